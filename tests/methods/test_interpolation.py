"""Interpolation against plain formulas on the weights themselves."""

from __future__ import annotations

import math

import pytest
import torch

from expert_merging.methods import interpolation
from expert_merging.methods.interpolation import interpolate, slerp
from tests.checkpoints import BASE, EXPERTS, tensors_of, write_checkpoint
from tests.command import flags, merge, merged, refusal

SHAPES = [(), (7,), (5, 3), (2, 3, 4), (0,), (0, 4)]
SHARES = [0.0, 0.25, 0.5, 0.9, 1.0]


def random(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on_the_arc(first: torch.Tensor, last: torch.Tensor, t: float) -> torch.Tensor:
    """What mergekit's rule says of two weights, in float64 and with vectors at right angles instead of sines."""
    first, last = first.double(), last.double()
    lengths = [float(end.norm()) if end.norm() > 1e-8 else 1.0 for end in (first, last)]
    cosine = float((first * last).sum()) / math.prod(lengths)
    if abs(cosine) > 0.9995:
        return first + t * (last - first)
    angle = math.acos(cosine)
    # The point at t of the way on the unit circle, in coordinates along the first end and across it.
    along, across = math.cos(t * angle), math.sin(t * angle)
    share_of_last = across / math.sin(angle)
    return first * (along - share_of_last * cosine) + last * share_of_last


def of_weights(first: torch.Tensor, last: torch.Tensor, base: torch.Tensor, t: float) -> torch.Tensor:
    return base + slerp(torch.stack([first - base, last - base]), base, t=t)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("t", SHARES)
def test_slerp_of_two_experts_is_the_plain_formula_s(shape, t):
    base, first, last = (random(shape, seed) for seed in range(3))
    torch.testing.assert_close(of_weights(first, last, base, t), on_the_arc(first, last, t).float())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("t", SHARES)
def test_slerp_of_one_expert_starts_at_the_base(shape, t):
    base, expert = random(shape, 0), random(shape, 1)
    merged = base + slerp((expert - base)[None], base, t=t)
    torch.testing.assert_close(merged, on_the_arc(base, expert, t).float())


def test_numbers_known_by_hand():
    """Half of a right angle, between weights of lengths 1 and 2; and a third of the way from the x to the y axis."""
    base, x, y = torch.tensor([3.0, -4.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    root = math.sqrt(0.5)
    torch.testing.assert_close(of_weights(x, 2 * y, base, 0.5), torch.tensor([root, 2 * root]))
    torch.testing.assert_close(of_weights(x, y, base, 1 / 3), torch.tensor([math.sqrt(0.75), 0.5]))


@pytest.mark.parametrize("degrees", [1.7, 1.9, 178.1, 178.3])
def test_the_way_is_straight_between_weights_that_are_nearly_colinear(degrees):
    """The cosine of 1.812 degrees is 0.9995."""
    angle = math.radians(degrees)
    first, last = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(angle), math.sin(angle)])
    straight = (first + last) / 2
    found = of_weights(first, last, torch.zeros(2), 0.5)
    is_straight = degrees < 1.812 or degrees > 180 - 1.812
    assert torch.allclose(found, straight, rtol=0, atol=1e-6) == is_straight
    torch.testing.assert_close(found, on_the_arc(first, last, 0.5).float(), rtol=1e-4, atol=1e-6)


def test_a_tensor_of_zeros_counts_as_perpendicular():
    expert, zeros = random((4,), 0), torch.zeros(4)
    torch.testing.assert_close(slerp(expert[None], zeros, t=0.5), expert * math.sqrt(0.5))
    assert slerp(torch.zeros(2, 4), zeros, t=0.5).equal(zeros)


def test_a_tensor_next_to_zero_counts_as_perpendicular_to_its_own_multiples():
    base = torch.tensor([3e-9, 4e-9])
    expert = base * 1e9
    torch.testing.assert_close(slerp((expert - base)[None], base, t=0.5), expert * math.sqrt(0.5))


def test_products_are_summed_block_by_block(monkeypatch):
    base, given = random((50,), 0), random((2, 50), 1)
    whole = slerp(given, base, t=0.3)
    monkeypatch.setattr(interpolation, "_CACHED", 7)
    torch.testing.assert_close(slerp(given, base, t=0.3), whole)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("t", SHARES)
def test_interpolate_is_the_plain_formula(shape, t):
    base, first, last = (random(shape, seed) for seed in range(3))
    between = base + interpolate(torch.stack([first - base, last - base]), t=t)
    torch.testing.assert_close(between, (1 - t) * first + t * last)
    torch.testing.assert_close(interpolate((last - base)[None], t=t), t * (last - base))


@pytest.mark.parametrize(("method", "plain"), [("interpolate", torch.lerp), ("slerp", on_the_arc)])
@pytest.mark.parametrize("names", [("Chat", "Code"), ("Math",)], ids=str)
def test_the_command_goes_between_real_models(method, plain, names, tiny_zoo, tmp_path):
    """With every tensor merged, tables of words and norms included, as the papers do."""
    experts = {name: tiny_zoo / EXPERTS[name] for name in names}
    given = flags(tiny_zoo / BASE, **experts)
    run = merged(tmp_path, "--method", method, "--t", "0.3", "--exclude_params", "none", *given)
    base = tensors_of(tiny_zoo / BASE)
    ends = [tensors_of(folder) for folder in experts.values()]
    first, last = ends if len(ends) == 2 else (base, *ends)
    for name, tensor in tensors_of(run.model).items():
        expected = plain(first[name], last[name], 0.3).float()
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["interpolate", "slerp"])
def test_three_experts_are_refused_before_anything_is_read(method, tiny_zoo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("expert_merging.checkpoints.checkpoint.Checkpoint.read_into", None)
    message = refusal(capsys, "--method", method, "--cache_dir", tiny_zoo, "--output_path", tmp_path / "out")
    assert message == (
        "interpolation is between two experts, or between the base and one, and there are 3 (Chat, Math, Code); "
        "choose with --expert NAME=PATH"
    )
    assert not (tmp_path / "out").exists()


def test_the_way_back_is_another_run(tmp_path):
    """Without a name of its own, a run is not taken for the one from the second model to the first."""
    base, a, b = (write_checkpoint(tmp_path / name, {"a": random((4, 3), seed)}) for seed, name in enumerate("xab"))
    for given in (flags(base, A=a, B=b), flags(base, B=b, A=a)):
        assert merge("--method", "interpolate", "--t", 0, *given, "--output_path", tmp_path / "out") == 0
    found = [tensors_of(folder)["a"] for folder in tmp_path.glob("out/*/*/model")]
    expected = [tensors_of(folder)["a"] for folder in (a, b)]
    assert len(found) == 2
    assert all(any(tensor.allclose(end, atol=1e-6) for tensor in found) for end in expected)


def test_a_share_beyond_the_ends_is_refused(tiny_zoo, capsys):
    message = refusal(capsys, "--method", "slerp", "--cache_dir", tiny_zoo, "--t", "1.5")
    assert message == "--t must be a number in [0, 1], got 1.5"


def test_the_ends_of_half_precision_are_the_experts_to_the_bit(tmp_path):
    folders = [write_checkpoint(tmp_path / str(seed), {"a": random((500,), seed).bfloat16()}) for seed in range(3)]
    for t, end in ((0, 1), (1, 2)):
        for method in ("interpolate", "slerp"):
            given = flags(folders[0], A=folders[1], B=folders[2])
            output = tmp_path / f"{method} {t}"
            assert merge("--method", method, "--t", t, "--run_name", "r", "--output_path", output, *given) == 0
            model = output / method / "r" / "model"
            assert tensors_of(model)["a"].equal(tensors_of(folders[end])["a"]), (method, t)
