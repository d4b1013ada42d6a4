"""TIES and DARE against peft, plain references and their definitions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.merge_utils import dare_linear
from peft.utils.merge_utils import ties as peft_ties

from expert_merging.catalogue import find_method
from expert_merging.methods.drawing import drop
from expert_merging.parts import Part
from tests.checkpoints import tensors_of, write_checkpoint
from tests.command import flags, merged, refusal
from tests.methods.elsewhere import assert_agrees, inputs
from tests.methods.test_all import apply, task_vectors

NAMES = ("a", "b", "c")


def plain_ties(given: torch.Tensor, density: float, counted: torch.Tensor | None = None) -> torch.Tensor:
    """TIES of task vectors ``(experts, entries)`` by sorting; entries are ranked among ``counted``, or themselves."""
    everything = given if counted is None else counted
    rank = int(round((1 - density) * everything.shape[1], 6))
    ordered = everything.abs().sort(dim=1).values
    thresholds = ordered[:, rank - 1] if rank else torch.zeros(len(given))
    kept = torch.where(given.abs() >= thresholds[:, None], given, 0.0)
    all_kept = torch.where(everything.abs() >= thresholds[:, None], everything, 0.0)
    majority = all_kept.sum(0).sign().sum().sign()
    signs = kept.sum(0).sign()
    signs = torch.where(signs == 0, majority, signs)
    agreeing = torch.where(kept.sign() == signs, kept, 0.0)
    return agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)


@pytest.mark.slow
@given(
    experts=st.integers(1, 5),
    entries=st.integers(1, 300),
    density=st.sampled_from([0.1, 0.2, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 999),
    rounded=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_ties_is_what_sorting_gives(experts, entries, density, seed, rounded):
    """Rounded task vectors, as bfloat16 checkpoints have, bring ties in rank and sums that cancel."""
    given_vectors = task_vectors((entries,), experts, seed)
    if rounded:
        given_vectors = (given_vectors * 16).round() / 16
    torch.testing.assert_close(
        apply(find_method("ties"), given_vectors, density=density), plain_ties(given_vectors, density)
    )


def test_ties_agrees_with_peft():
    given_vectors = task_vectors((40, 25), experts=4)
    # peft keeps exactly the given share; the published rule keeps the entry of rank k itself, which is one more.
    theirs = peft_ties(list(given_vectors), torch.ones(4), density=0.3011)
    torch.testing.assert_close(apply(find_method("ties"), given_vectors, density=0.3), theirs)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "ties 0.4 1,1,1"),
        ({"ties_weights": [1.0, 0.5, 2.0]}, "ties 0.4 1,0.5,2"),
        ({"ties_weights": [1.0, 0.5, 2.0], "ties_normalize": False}, "ties 0.4 1,0.5,2 sum"),
    ],
)
def test_ties_with_weights_is_mergekit_s(options, name):
    """Which keeps 21 of 54 entries where the published rule keeps one more."""
    base, given_vectors = inputs()
    assert_agrees(apply(find_method("ties"), given_vectors, base=base, density=19.5 / 54, **options), "mergekit", name)


def test_weights_count_in_the_election_and_in_the_majority():
    given_vectors = torch.tensor([[1.0, -2.0, 3.0, 1.0], [3.0, 1.0, -3.0, -1.0]])
    # Weighted sums are 3.5, 0, -1.5 and -0.5: more are negative.
    weights = {"ties_weights": [0.5, 1.0], "density": 1.0}
    assert apply(find_method("ties"), given_vectors, **weights).tolist() == pytest.approx([3.5 / 1.5, -2.0, -3.0, -1.0])
    assert apply(find_method("ties"), given_vectors, **weights, ties_normalize=False).tolist() == [
        3.5,
        -1.0,
        -3.0,
        -1.0,
    ]


def test_equal_weights_are_none_and_a_weight_of_zero_leaves_an_expert_out():
    given_vectors = task_vectors((6, 5))
    plain = apply(find_method("ties"), given_vectors)
    torch.testing.assert_close(apply(find_method("ties"), given_vectors, ties_weights=0.25), plain)
    alone = apply(find_method("ties"), given_vectors, ties_weights=[0.0, 1.0, 0.0])
    torch.testing.assert_close(alone, apply(find_method("ties"), given_vectors[1:2]))


def test_each_tensor_has_a_majority_of_its_own(tmp_path):
    """Where experts cancel each other, the sign is that of the tensor's majority or of the model's, by scope."""
    signs = {"a.weight": 1.0, "b.weight": -1.0}
    rows = {
        name: sign * torch.stack([torch.full((size,), 2.0), torch.cat([torch.tensor([-2.0]), torch.ones(size - 1)])])
        for (name, sign), size in zip(signs.items(), (30, 20), strict=True)
    }
    base = write_checkpoint(tmp_path / "base", {name: torch.zeros_like(both[0]) for name, both in rows.items()})
    experts = {
        name: write_checkpoint(tmp_path / name, {key: both[number] for key, both in rows.items()})
        for number, name in enumerate("AB")
    }
    for scope, expected in (("tensor", (2.0, -2.0)), ("global", (2.0, 2.0))):
        options = ("--method", "ties", "--density", 1.0, "--ties_scope", scope)
        result = tensors_of(merged(tmp_path / scope, *options, *flags(base, **experts)).model)
        assert (float(result["a.weight"][0]), float(result["b.weight"][0])) == expected


def test_density_one_averages_what_agrees():
    given_vectors = torch.tensor([[1.0, -2.0, 3.0], [3.0, 1.0, -3.0]])
    # Sums 4, -1, 0: the signs +, - and, for the zero, the majority's, which is 0 here, so nothing agrees.
    assert apply(find_method("ties"), given_vectors, density=1.0).tolist() == [2.0, -2.0, 0.0]
    more = torch.cat([given_vectors, torch.ones(2, 1)], dim=1)
    assert apply(find_method("ties"), more, density=1.0).tolist() == [2.0, -2.0, 3.0, 1.0]


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_entries_are_ranked_over_the_model_or_in_each_tensor(scope, tmp_path):
    shapes = {"a.weight": (30, 20), "b.weight": (500,), "c.norm.weight": (9,)}
    generator = torch.Generator().manual_seed(0)
    base_tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    base = write_checkpoint(tmp_path / "base", base_tensors)
    experts = {}
    for number, name in enumerate(NAMES):
        # The second tensor changes much more than the first, so that global ranks differ from ranks in each tensor.
        tensors = {
            key: value + 10.0**position * 0.01 * torch.randn(value.shape, generator=generator)
            for position, (key, value) in enumerate(base_tensors.items())
        }
        experts[name] = write_checkpoint(tmp_path / f"expert{number}", tensors)
    run = merged(tmp_path / "out", "--method", "ties", "--ties_scope", scope, *flags(base, **experts))
    vectors = {
        key: torch.stack([(tensors_of(folder)[key] - value).flatten() for folder in experts.values()])
        for key, value in base_tensors.items()
        if "norm" not in key
    }
    result = tensors_of(run.model)
    for key, rows in vectors.items():
        counted = torch.cat(list(vectors.values()), dim=1) if scope == "global" else None
        expected = base_tensors[key] + plain_ties(rows, 0.2, counted).view(shapes[key])
        torch.testing.assert_close(result[key], expected, rtol=1e-5, atol=1e-6)
    assert result["c.norm.weight"].equal(base_tensors["c.norm.weight"])


def part_of(entries: int, name: str = "w") -> Part:
    return Part(name, (entries,), 0, entries)


def mask(entries: int, rate: float, seed: int = 0, name: str = "w", experts=("a",)) -> torch.Tensor:
    return drop(torch.ones(len(experts), entries), part_of(entries, name), seed, experts, rate)


@pytest.mark.parametrize("rate", [1e-5, 0.001, 0.2, 0.25, 0.5, 0.9, 0.999])
def test_the_share_that_is_dropped_and_the_mean_that_is_kept(rate):
    """Rates that one byte can tell apart, and others."""
    entries = 4_000_000
    drawn = mask(entries, rate)
    assert drawn.unique().tolist() == [0.0, 1.0]
    deviation = math.sqrt(rate * (1 - rate) / entries)
    assert (drawn == 0).double().mean().item() == pytest.approx(rate, abs=4 * deviation)


def test_a_higher_rate_drops_the_same_entries_and_more():
    """There is one random number an entry, whatever the rate that it is compared with."""
    kept = [mask(300_000, rate)[0] > 0 for rate in (0.1, 0.2, 0.2001, 0.203, 0.204, 0.7)]
    for more, less in pairwise(kept):
        assert (more | ~less).all()
        assert not more.equal(less)


def test_neighbours_and_segments_are_dropped_independently():
    dropped = (mask(1 << 20, 0.2)[0] == 0).double() - 0.2
    for distance in (1, 2, 8, 1 << 16):
        both = dropped[:-distance] * dropped[distance:]
        assert abs(both.mean().item()) < 4 * 0.16 / math.sqrt(len(both))


def plain_kept(key: str, entries: int, rate: float) -> list[bool]:
    """The mask of one segment from its definition: SFC64's numbers, byte by byte, and one more where a byte ties."""
    words = iter_sfc64(hashlib.sha256(key.encode()).digest())
    digits = [digit for _ in range(-(-entries // 8)) for digit in next(words).to_bytes(8, "little")][:entries]
    boundary, rest = divmod(Fraction(rate) * 256, 1)
    return [digit > boundary or (digit == boundary and Fraction(next(words), 1 << 64) >= rest) for digit in digits]


def iter_sfc64(state: bytes) -> Iterator[int]:
    """Chris Doty-Humphrey's generator, which numpy and PractRand call SFC64."""
    mask_64 = (1 << 64) - 1
    a, b, c, counter = (int.from_bytes(state[start : start + 8], "little") for start in range(0, 32, 8))
    while True:
        number = (a + b + counter) & mask_64
        a, b, counter = b ^ (b >> 11), (c + (c << 3)) & mask_64, (counter + 1) & mask_64
        c = (((c << 24) | (c >> 40)) + number) & mask_64
        yield number


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
def test_masks_are_the_plain_ones(rate):
    """Also a promise: a merge can be repeated with later versions of numpy and of this program."""
    entries = 65_536 + 3_001
    kept = (mask(entries, rate, seed=7, name="v")[0] > 0).tolist()
    assert kept == plain_kept("7/a/v/0", 65_536, rate) + plain_kept("7/a/v/1", 3_001, rate)


def test_masks_depend_on_seed_expert_and_name_alone():
    drawn = mask(1000, 0.5)
    assert drawn.equal(mask(1000, 0.5))
    assert not drawn.equal(mask(1000, 0.5, seed=1))
    assert not drawn.equal(mask(1000, 0.5, name="v"))
    assert not drawn.equal(mask(1000, 0.5, experts=("b",)))
    both, swapped = mask(1000, 0.5, experts=("a", "b")), mask(1000, 0.5, experts=("b", "a"))
    assert both[0].equal(drawn[0])
    assert both.equal(swapped.flip(0))


def test_any_block_of_a_large_tensor_is_drawn_alone():
    """Blocks that begin, end and pass over the segments that random numbers are drawn in."""
    whole, part = mask(200_000, 0.5), part_of(200_000)
    for start, stop in [(0, 10), (65_530, 65_540), (65_536, 131_072), (100_000, 199_999), (131_072, 200_000)]:
        (block,) = drop(torch.ones(1, stop - start), part.between(start, stop), 0, ("a",), 0.5)
        assert block.equal(whole[0, start:stop])


def test_nothing_dropped_is_the_plain_method():
    given_vectors = task_vectors((6, 5))
    for name, plain in {"dare_ta": "task_arithmetic", "dare_ties": "ties"}.items():
        dropped = apply(find_method(name), given_vectors, drop_rate=0.0, scaling_coefficient=0.7)
        assert dropped.equal(apply(find_method(plain), given_vectors, scaling_coefficient=0.7))


def test_dare_with_its_own_masks_agrees_with_peft(monkeypatch):
    """peft draws its masks itself; given ours, it computes the same."""
    given_vectors = task_vectors((30, 20))
    part = Part("weight", (30, 20), 0, 600)
    names = ("expert 0", "expert 1", "expert 2")
    drawn = iter([(row > 0).float() for row in drop(torch.ones_like(given_vectors), part, 3, names, 0.25)])
    monkeypatch.setattr(torch, "bernoulli", lambda *_args, **_keywords: next(drawn))
    theirs = dare_linear(list(given_vectors), torch.full((3,), 0.4), density=0.75)
    ours = apply(find_method("dare_ta"), given_vectors, drop_rate=0.25, scaling_coefficient=0.4)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(400,), (30, 20)], ids=str)
def test_dare_can_keep_the_norm_of_each_expert_s_tensor(shape):
    """As mergekit does: times the L1 norm before, by that after."""
    given_vectors = task_vectors(shape) * torch.tensor([1.0, 2.0, 0.1]).view(-1, *[1] * len(shape))
    part, names = Part.whole("weight", shape), tuple(f"expert {k}" for k in range(3))
    dropped = drop(given_vectors.clone(), part, 3, names, 0.6)
    rescaled = torch.stack(
        [row * (was.abs().sum() / row.abs().sum()) for row, was in zip(dropped, given_vectors, strict=True)]
    )
    options = {"drop_rate": 0.6, "dare_rescale": "l1"}
    ours = apply(find_method("dare_ta"), given_vectors, **options, scaling_coefficient=0.4)
    torch.testing.assert_close(ours, 0.4 * rescaled.sum(0))
    ours = apply(find_method("dare_ties"), given_vectors, **options, density=0.3)
    torch.testing.assert_close(ours.flatten(), plain_ties(rescaled.flatten(1), 0.3))


def test_nothing_kept_of_a_tensor_has_no_norm_to_restore():
    ours = apply(find_method("dare_ta"), torch.full((3, 1), 0.5), drop_rate=0.999, dare_rescale="l1")
    assert ours.isfinite().all()


def test_dare_ties_trims_what_was_not_dropped():
    given_vectors = task_vectors((400,))
    dropped = drop(
        given_vectors.clone(), Part("weight", (400,), 0, 400), 3, tuple(f"expert {k}" for k in range(3)), 0.3
    )
    ours = apply(find_method("dare_ties"), given_vectors, drop_rate=0.3, density=0.4)
    torch.testing.assert_close(ours, plain_ties(dropped / 0.7, 0.4))


@pytest.mark.parametrize("method", ["dare_ta", "dare_ties", "ties"])
def test_shards_do_not_change_the_result(method, tiny_zoo, tmp_path):
    """The same tensors in one file or in many give the same bytes."""
    folders = {}
    for name, source in {"base": "Mistral-7B-v0.1", "a": "MAmmoTH2-7B", "b": "Mistral-7B-codealpaca-lora"}.items():
        tensors = tensors_of(tiny_zoo / source)
        folders[name] = write_checkpoint(tmp_path / name, *({key: value} for key, value in sorted(tensors.items())))
    arguments = ["--method", method, "--seed", "5"]
    sharded = merged(tmp_path / "sharded", *arguments, *flags(folders["base"], a=folders["a"], b=folders["b"]))
    single = merged(
        tmp_path / "single",
        *arguments,
        *flags(tiny_zoo / "Mistral-7B-v0.1", a=tiny_zoo / "MAmmoTH2-7B", b=tiny_zoo / "Mistral-7B-codealpaca-lora"),
    )
    expected = tensors_of(single.model)
    assert all(tensor.equal(expected[name]) for name, tensor in tensors_of(sharded.model).items())


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--density", "80", "--density must be a number in (0, 1], got 80; for 80 % write 0.8"),
        ("--density", "0", "--density must be a number in (0, 1], got 0"),
        ("--drop_rate", "1", "--drop_rate must be a number in [0, 1), got 1"),
        ("--ties_scope", "layer", "--ties_scope must be 'global' or 'tensor', got layer"),
    ],
)
def test_options_out_of_range_are_refused(flag, value, message, tiny_zoo, capsys):
    assert refusal(capsys, "--method", "dare_ties", "--cache_dir", tiny_zoo, flag, value) == message
