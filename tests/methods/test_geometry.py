"""Methods that follow angles, against mergekit and plain formulas on the weights themselves."""

from __future__ import annotations

import math

import pytest
import torch

from expert_merging.catalogue import find_method
from tests.checkpoints import BASE, EXPERTS, tensors_of
from tests.command import merged
from tests.methods.elsewhere import assert_agrees, inputs, numbers
from tests.methods.test_all import apply, base_weights, task_vectors

KARCHER, MODEL_STOCK, NUSLERP = (find_method(name) for name in ("karcher", "model_stock", "nuslerp"))
EXACT = {"karcher_iterations": 100, "karcher_tolerance": 1e-12}


@pytest.mark.parametrize(("name", "options"), [("karcher", {}), ("karcher 100", EXACT)])
def test_mergekit_s_karcher_agrees(name, options):
    base, given = inputs()
    assert_agrees(apply(KARCHER, given, base=base, **options), "mergekit", name)


def test_mergekit_s_model_stock_agrees():
    base, given = inputs()
    given = given + numbers(tuple(base.shape), 50, 1.0).float()  # so that angles are acute
    assert_agrees(apply(MODEL_STOCK, given, base=base), "mergekit", "model_stock")


@pytest.mark.parametrize("t", [0.3, 0.5])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("task_vectors", {}),
        ("weights", {"nuslerp_space": "weights"}),
        ("rows", {"nuslerp_along": "rows"}),
        ("columns", {"nuslerp_along": "columns"}),
    ],
)
def test_mergekit_s_nuslerp_agrees(name, options, t):
    base, given = inputs()
    assert_agrees(apply(NUSLERP, given[:2], base=base, t=t, **options), "mergekit", f"nuslerp {name} {t}")


def plain_karcher(weights: list[torch.Tensor]) -> torch.Tensor:
    """Gradient descent on the sum of squared angles, on the vectors themselves, in float64."""
    lengths = [float(own.double().norm()) for own in weights]
    units = [own.double().flatten() / length for own, length in zip(weights, lengths, strict=True)]
    mean = units[0]
    for _ in range(200):
        pull = torch.zeros_like(mean)
        for unit in units:
            across = unit - (unit @ mean) * mean
            angle = math.atan2(float(across.norm()), float(unit @ mean))
            pull += angle / len(units) * across / across.norm().clamp(min=1e-300)
        length = float(pull.norm())
        if length < 1e-14:
            break
        mean = math.cos(length) * mean + math.sin(length) * pull / length
    return (sum(lengths) / len(lengths) * mean / mean.norm()).view(weights[0].shape).float()


@pytest.mark.parametrize("scale", [10.0, 1.0, 0.01])
@pytest.mark.parametrize("experts", [2, 3, 5])
def test_karcher_is_the_plain_mean_on_the_sphere(scale, experts):
    """Far apart, and as near as fine-tunes of one base are."""
    given = task_vectors((6, 5), experts) * scale
    base = base_weights(given)
    found = base + apply(KARCHER, given, base=base, **EXACT)
    torch.testing.assert_close(found, plain_karcher([base + own for own in given]), rtol=1e-5, atol=1e-6)


def test_karcher_of_two_is_in_the_middle_of_the_arc():
    base, x, y = torch.tensor([3.0, -4.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    found = base + apply(KARCHER, torch.stack([x - base, y - base]), base=base)
    torch.testing.assert_close(found, torch.tensor([math.sqrt(2), math.sqrt(2)]))


def test_karcher_keeps_the_length_and_experts_without_direction_shorten_it():
    given = task_vectors((50,), 4)
    base = base_weights(given)
    given[3] = -base
    found = base + apply(KARCHER, given, base=base)
    lengths = [(base + own).norm() for own in given]
    assert float(found.norm()) == pytest.approx(float(sum(lengths)) / 4, rel=1e-5)
    alone = base + apply(KARCHER, given[:3], base=base)
    torch.testing.assert_close(found, alone * 0.75)


def test_karcher_of_opposite_weights_begins_at_the_first():
    base = torch.tensor([1.0, 2.0])
    first = torch.tensor([2.0, 0.0])
    found = base + apply(KARCHER, torch.stack([first - base, -first - base]), base=base)
    assert float(found.norm()) == pytest.approx(2.0)


def test_karcher_of_weights_that_are_all_zero_is_zero():
    assert not apply(KARCHER, torch.zeros(3, 4), base=torch.zeros(4)).any()


@pytest.mark.parametrize("experts", [2, 3, 5])
def test_model_stock_is_its_formula(experts):
    given = task_vectors((6, 5), experts) + task_vectors((6, 5), 1, seed=9)
    cosines = [
        float(torch.cosine_similarity(given[one].flatten(), given[other].flatten(), dim=0))
        for one in range(experts)
        for other in range(one)
    ]
    cosine = sum(cosines) / len(cosines)
    assert cosine > 0.1
    expected = given.mean(0) * experts * cosine / (1 + (experts - 1) * cosine)
    torch.testing.assert_close(apply(MODEL_STOCK, given), expected)


def test_model_stock_of_equal_experts_is_one_and_of_perpendicular_or_opposite_ones_the_base():
    given = task_vectors((6, 5), 1).expand(3, 6, 5).clone()
    torch.testing.assert_close(apply(MODEL_STOCK, given), given[0])
    assert not apply(MODEL_STOCK, torch.tensor([[1.0, 0.0], [0.0, 2.0]])).any()
    assert not apply(MODEL_STOCK, torch.tensor([[1.0, 1.0], [-0.5, -0.3]])).any()
    assert not apply(MODEL_STOCK, torch.tensor([[1.0, 1.0], [0.0, 0.0]])).any()


@pytest.mark.parametrize("space", ["task_vectors", "weights"])
@pytest.mark.parametrize("along", ["tensor", "rows", "columns"])
@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 3, 4)], ids=str)
def test_nuslerp_begins_and_ends_at_the_experts(space, along, shape):
    given = task_vectors(shape, 2)
    for t, end in ((0.0, 0), (1.0, 1)):
        found = apply(NUSLERP, given, t=t, nuslerp_space=space, nuslerp_along=along)
        torch.testing.assert_close(found, given[end], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("along", ["tensor", "rows", "columns"])
def test_nuslerp_is_straight_between_vectors_of_one_line(along):
    given = task_vectors((5, 3), 1)
    for factor in (3.0, -0.5, 1.0):
        found = apply(NUSLERP, torch.cat([given, factor * given]), t=0.25, nuslerp_along=along)
        torch.testing.assert_close(found, (0.75 + 0.25 * factor) * given[0])


def test_nuslerp_of_one_expert_starts_at_the_base():
    given = task_vectors((5, 3), 1)
    torch.testing.assert_close(apply(NUSLERP, given, t=1.0), given[0])
    assert not apply(NUSLERP, given, t=0.0).any()
    torch.testing.assert_close(apply(NUSLERP, given, t=0.5), given[0] * math.sqrt(0.5))


def test_the_command_finds_the_angles_of_each_tensor(tiny_zoo, tmp_path):
    """With every tensor merged, tables of words and norms included."""
    run = merged(tmp_path, "--method", "karcher", "--exclude_params", "none", "--cache_dir", tiny_zoo)
    experts = [tensors_of(tiny_zoo / folder) for folder in EXPERTS.values()]
    base, found = tensors_of(tiny_zoo / BASE), tensors_of(run.model)
    for name, tensor in found.items():
        given = [expert[name] for expert in experts]
        if any(not own.equal(base[name]) for own in given):
            torch.testing.assert_close(tensor, plain_karcher(given), rtol=1e-4, atol=1e-5)
