"""The WUDI family against plain twins: autograd, torch's optimizers, gradient flow in small steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_merging.catalogue import find_method
from expert_merging.errors import InputError
from expert_merging.methods import wudi as module
from expert_merging.methods.wudi import aswudi, effective_rank, iwudi, swudi, wudi, wudi2
from expert_merging.parts import Part
from tests.methods.numbers import assert_near, draw, low_rank, orthogonal
from tests.methods.reference import flow_reference, interference, wudi2_reference, wudi_reference

SHAPES = [(40, 12), (12, 40), (20, 20), (1, 9), (9, 1), (2, 3), (1, 1)]
CLOSED = {
    "wudi exact": lambda given: wudi(given, solver="exact"),
    "wudi2 exact": lambda given: wudi2(given, solver="exact"),
    "wudi2 lora exact": lambda given: wudi2(given, wudi2_variant="lora", solver="exact"),
    "wudi2 lora": lambda given: wudi2(given, wudi2_variant="lora"),
    "iwudi": iwudi,
    "swudi": swudi,
    "aswudi": aswudi,
}

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
closed = pytest.mark.parametrize("method", CLOSED.values(), ids=CLOSED.keys())
every = pytest.mark.parametrize("method", [*CLOSED.values(), wudi, wudi2], ids=[*CLOSED.keys(), "wudi", "wudi2"])
sides = st.integers(2, 10)
seeds = st.integers(0, 1000)


def loss(merged: torch.Tensor, given: torch.Tensor) -> float:
    given = given.double()
    return float(interference(merged.double(), given, given, given))


@shapes
@pytest.mark.parametrize("experts", [1, 2, 5])
def test_wudi_takes_the_steps_of_its_twin(shape, experts):
    given = draw(experts, *shape) * 1e-2
    change, expected = wudi(given, steps=40) - given.sum(0), wudi_reference(given, 40) - given.sum(0)
    torch.testing.assert_close(change, expected, rtol=1e-2, atol=1e-6)  # a step is 1e-5, and 40 of them were taken
    precise, given = wudi(given.double(), steps=40), given.double()
    torch.testing.assert_close(precise, wudi_reference(given, 40), rtol=0, atol=1e-8 if experts > 1 else 0)


def test_wudi_takes_300_steps():
    given = draw(3, 8, 6) * 1e-2
    torch.testing.assert_close(wudi(given), wudi_reference(given), rtol=0, atol=2e-6)
    furthest = float((wudi(given) - given.sum(0)).abs().max())
    assert 1e-3 < furthest < 3.1e-3


def test_wudi_takes_the_learning_rate():
    given = draw(3, 8, 6) * 1e-2
    expected = wudi_reference(given, 20, 2e-5)
    torch.testing.assert_close(wudi(given, steps=20, step_size=2e-5), expected, rtol=0, atol=1e-6)


def test_blocks_of_rows_do_not_matter(monkeypatch):
    given = draw(3, 11, 6) * 1e-2
    whole = wudi(given, steps=30)
    monkeypatch.setattr(module, "_BLOCK_ROWS", 2)
    monkeypatch.setattr(module, "_BLOCK_ENTRIES", 1)
    torch.testing.assert_close(wudi(given, steps=30), whole, rtol=0, atol=1e-8)


@pytest.mark.parametrize("for_steps", [True, False])
@pytest.mark.parametrize("shape", [(2, 40), (6, 40), (15, 40), (40, 6)], ids=str)
def test_both_forms_of_the_function_have_its_gradient(shape, for_steps):
    given = draw(3, *shape).double()
    start, change = draw(*shape, seed=1).double(), draw(*shape, seed=2).double()
    merged = (start + change).requires_grad_()
    (expected,) = torch.autograd.grad(interference(merged, given, given, given) / 2, merged)
    problem = module._whole_rows(given, start, for_steps=for_steps)
    assert problem is not None
    assert (problem.projections is not None) == (3 * shape[0] * (2 if for_steps else 1) < 40 and shape[1] == 40)
    if problem.projections is None:
        found = change @ problem.curvature + problem.slope
    else:
        torch.testing.assert_close(problem.projections @ problem.projections.mT, problem.curvature)
        found = (change @ problem.projections.mT + problem.slope) @ problem.projections
    torch.testing.assert_close(found, expected)


def test_the_function_does_not_grow_with_the_number_of_experts():
    for experts in (5, 50):
        given = draw(experts, 20, 10)
        problem = module._whole_rows(given, given.sum(0), for_steps=True)
        assert problem is not None
        assert (problem.curvature.shape, problem.slope.shape, problem.projections) == ((10, 10), (20, 10), None)


@shapes
@pytest.mark.parametrize("experts", [1, 2, 4])
@pytest.mark.parametrize("variant", ["centered", "lora"])
def test_wudi2_takes_the_steps_of_its_twin(shape, experts, variant):
    given = (draw(experts, *shape) * 1e-2).double()
    expected = wudi2_reference(given, variant, 40)
    merged = wudi2(given, wudi2_variant=variant, steps=40)
    torch.testing.assert_close(merged, expected.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("variant", ["centered", "lora"])
def test_wudi2_takes_300_steps(variant):
    given = draw(3, 8, 6) * 1e-2
    expected = wudi2_reference(given.double(), variant)
    torch.testing.assert_close(wudi2(given, wudi2_variant=variant).double(), expected, rtol=1e-4, atol=2e-6)


def test_wudi2_s_solver_and_learning_rate_can_be_chosen():
    given = draw(3, 8, 6) * 1e-2
    for variant, default, size in (("centered", "adam", 1e-5), ("lora", "sgd", 1e-4)):
        chosen = wudi2(given, wudi2_variant=variant, solver=default, step_size=size)
        assert chosen.equal(wudi2(given, wudi2_variant=variant))
        assert not wudi2(given, wudi2_variant=variant, step_size=10 * size).allclose(chosen)
    near, far = wudi2(given, step_size=1e-6) - given.sum(0), wudi2(given) - given.sum(0)
    assert 5 < far.abs().max() / near.abs().max() < 20
    assert not wudi2(given, solver="sgd", step_size=10.0).allclose(wudi2(given))


def test_sgd_of_many_steps_finds_the_optimum():
    given = low_rank(3, 9, 8, 1)
    stepped = wudi2(given, wudi2_variant="lora", steps=3000, step_size=0.02)
    assert_near(stepped, wudi2(given, wudi2_variant="lora", solver="exact"), 1e-3)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (20, 20), (1, 9)], ids=str)
def test_the_exact_solver_finds_the_optimum_nearest_to_the_sum(shape):
    given = draw(3, *shape)
    merged = wudi(given, solver="exact").double().requires_grad_()
    twice = given.double()
    (gradient,) = torch.autograd.grad(interference(merged, twice, twice, twice), merged)
    assert float(gradient.norm()) < 1e-4 * float(given.norm())
    # What it adds to the sum lies in the directions that some expert reads.
    rows = torch.linalg.svd(given.double().flatten(0, 1))[2][3 * shape[0] :]
    assert float(((merged.detach() - twice.sum(0)) @ rows.T).norm()) < 1e-4


def test_adam_gets_nearer_to_the_optimum():
    given = draw(3, 12, 8) * 1e-2
    assert loss(wudi(given, solver="exact"), given) < loss(wudi(given), given) < loss(given.sum(0), given)


@pytest.mark.parametrize("start", ["sum", "mean", "zero"])
@pytest.mark.parametrize("shape", [(10, 5), (2, 9), (6, 6)], ids=str)
def test_iwudi_is_gradient_flow(shape, start):
    given = draw(3, *shape)
    beginning = {"sum": given.sum(0), "mean": given.mean(0), "zero": 0 * given[0]}[start].double()
    expected = flow_reference(beginning, given.double(), duration=3.0, step=0.05)
    assert_near(iwudi(given, flow_time=3, start=start), expected, 1e-5)


@pytest.mark.parametrize("method", [iwudi, swudi], ids=["iwudi", "swudi"])
def test_a_moment_of_flow_stays_at_the_start(method):
    given = draw(3, 10, 6)
    assert_near(method(given, flow_time=1e-9), given.sum(0), 1e-6)


def test_iwudi_ends_at_the_optimum_wherever_it_starts():
    given = draw(3, 20, 8)
    for start in ("sum", "mean", "zero"):
        assert_near(iwudi(given, flow_time=1e6, start=start), wudi(given, solver="exact"), 1e-5)


def test_swudi_follows_the_leading_directions_and_keeps_the_start_along_the_others():
    given = draw(3, 20, 10)
    assert_near(swudi(given, curvature_ratio=1.0), iwudi(given), 1e-6)
    curvature = sum(entry.mT @ entry / entry.norm() ** 2 for entry in given.double())
    directions = torch.linalg.eigh(curvature)[1].flip(1).float()
    merged, followed = swudi(given, curvature_ratio=0.35), iwudi(given)  # 3.5 of 10, rounded up
    torch.testing.assert_close(merged @ directions[:, :4], followed @ directions[:, :4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged @ directions[:, 4:], given.sum(0) @ directions[:, 4:], rtol=1e-4, atol=1e-5)


def test_swudi_s_default_is_two_thirds_of_the_columns_even_where_few_are_read():
    given = low_rank(3, 20, 10, 1)
    assert_near(swudi(given), iwudi(given), 1e-5)


def test_aswudi_is_the_optimum_along_the_directions_that_count():
    given = low_rank(3, 20, 10, 1)
    assert_near(aswudi(given), wudi(given, solver="exact"), 1e-5)
    given = draw(3, 20, 10)
    curvature = sum(entry.mT @ entry / entry.norm() ** 2 for entry in given.double())
    eigenvalues, directions = torch.linalg.eigh(curvature)
    rank = effective_rank(eigenvalues.flip(0), (20, 10), "participation", 0.95)
    directions, best = directions.flip(1).float(), wudi(given, solver="exact")
    assert 1 < rank < 10
    merged = aswudi(given, rank_rule="participation")
    torch.testing.assert_close(merged @ directions[:, :rank], best @ directions[:, :rank], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged @ directions[:, rank:], given.sum(0) @ directions[:, rank:], rtol=1e-4, atol=1e-5)
    few = aswudi(given, max_curvature_ratio=0.2)
    torch.testing.assert_close(few @ directions[:, :2], best @ directions[:, :2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(few @ directions[:, 2:], given.sum(0) @ directions[:, 2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["participation_sqrt", "participation", "stable_rank", "entropy", "cumulative"])
@pytest.mark.parametrize("scale", [1.0, 1e-9, 0.3])
def test_equal_eigenvalues_all_count(rule, scale):
    eigenvalues = torch.tensor([scale] * 7 + [0.0] * 5, dtype=torch.float64)
    assert effective_rank(eigenvalues, (12, 12), rule, 1.0) == 7


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("participation_sqrt", 3),  # (4 + 2 + 1)**2 / 21 = 2.33
        ("participation", 2),  # 21**2 / 273 = 1.62
        ("stable_rank", 2),  # 273 / 256 = 1.07
        ("entropy", 2),  # exp(0.668) = 1.95
        ("cumulative", 2),  # 16 / 21 = 0.76, 20 / 21 = 0.952
        ("gavish_donoho", 1),  # 4 / sqrt(3) / 1.932 times the median 2 is 2.39, for a square matrix
    ],
)
def test_ranks_of_known_eigenvalues(rule, expected):
    eigenvalues = torch.tensor([16.0, 4.0, 1.0], dtype=torch.float64)
    assert effective_rank(eigenvalues, (3, 3), rule, 0.95) == expected


def test_the_gavish_donoho_threshold_sees_the_zeros_and_the_shape():
    eigenvalues = torch.tensor([16.0, 4.0], dtype=torch.float64)
    assert effective_rank(eigenvalues, (2, 5), "gavish_donoho", 0.95) == 2  # the median of five is zero
    # For a ratio of 0.5, 1.979 / 0.866 times the median 1 is 2.285, and its square 5.22.
    for second, expected in ((5.2, 1), (5.3, 2)):
        eigenvalues = torch.tensor([9.0, second, 1.0, 1.0, 0.1], dtype=torch.float64)
        assert effective_rank(eigenvalues, (10, 5), "gavish_donoho", 0.95) == expected


@closed
@settings(max_examples=10)
@given(rows=sides, columns=sides, experts=st.integers(1, 4), exponent=st.integers(-12, 4), seed=seeds)
def test_scaled_task_vectors_give_the_scaled_result(method, rows, columns, experts, exponent, seed):
    given = draw(experts, rows, columns, seed=seed)
    assert_near(method(given * 10.0**exponent), method(given) * 10.0**exponent, 1e-3)


@closed
@settings(max_examples=10)
@given(rows=sides, columns=sides, experts=st.integers(1, 4), seed=seeds)
def test_turned_task_vectors_give_the_turned_result(method, rows, columns, experts, seed):
    given = draw(experts, rows, columns, seed=seed)
    left, right = orthogonal(rows, seed), orthogonal(columns, seed + 1)
    assert_near(method(left @ given @ right), left @ method(given) @ right, 2e-3)


@closed
@pytest.mark.parametrize("rank", [1, 3])
def test_columns_that_nobody_uses_stay_untouched(method, rank):
    given = low_rank(3, 9, 14, rank)  # the shorter side stays
    merged = method(torch.cat([given, torch.zeros(3, 9, 4)], 2))
    assert float(merged[:, 14:].norm()) < 1e-5
    if method not in (swudi, aswudi):  # these count the columns
        assert_near(merged[:, :14], method(given))


@every
@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e4, 1e15])
def test_extreme_magnitudes_stay_finite(method, magnitude):
    assert method(draw(3, 10, 6) * magnitude).isfinite().all()


@every
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (2, 12)], ids=str)
@pytest.mark.parametrize("rank", [1, 2])
def test_one_expert_is_itself_and_zeros_are_skipped(method, shape, rank):
    given = low_rank(1, *shape, rank)
    assert_near(method(given), given[0], 1e-5)
    assert method(torch.cat([given, 0 * given])).isfinite().all()


@pytest.mark.parametrize("method", [iwudi, swudi, wudi, CLOSED["wudi exact"]], ids=["iwudi", "swudi", "wudi", "exact"])
def test_a_zero_expert_changes_nothing(method):
    given = draw(2, 10, 6)
    assert_near(method(torch.cat([given, torch.zeros(1, 10, 6)])), method(given), 1e-6)


@pytest.mark.parametrize("method", ["wudi exact", "wudi2 exact", "wudi2 lora exact", "aswudi"])
def test_equal_experts_give_the_expert_and_not_their_sum(method):
    expert = low_rank(1, 12, 8, 2)
    assert_near(CLOSED[method](expert.expand(3, 12, 8) * 1.0), expert[0])


@pytest.mark.parametrize("method", ["wudi exact", "iwudi", "swudi", "aswudi"])
def test_experts_that_read_other_columns_are_added(method):
    given = torch.zeros(3, 10, 9)
    for expert in range(3):
        given[expert, :, 3 * expert : 3 * expert + 3] = draw(10, 3, seed=expert)
    assert_near(CLOSED[method](given), given.sum(0), 1e-5)


@pytest.mark.parametrize("method", [wudi, wudi2, iwudi, swudi, aswudi], ids=lambda method: method.__name__)
def test_the_coefficient_scales(method):
    given = draw(3, 10, 6)
    torch.testing.assert_close(method(given, scaling_coefficient=0.3), 0.3 * method(given))


def test_aliases_and_choices():
    assert find_method("wudi_v2").name == "wudi2"
    options = find_method("wudi2").options
    assert options["step_size"].convert("1e-6") == 1e-6
    assert options["solver"].convert(None) is None
    with pytest.raises(InputError, match="--solver must be 'adam' or 'sgd' or 'exact', got newton"):
        options["solver"].convert("newton")
    with pytest.raises(InputError, match="--solver must be 'adam' or 'exact', got sgd"):
        find_method("wudi").options["solver"].convert("sgd")
    with pytest.raises(InputError, match=r"--flow_time must be a number in \(0, inf\), got 0"):
        find_method("iwudi").options["flow_time"].convert("0")
    with pytest.raises(InputError, match=r"--steps must be a whole number in \[1, inf\), got 0"):
        find_method("wudi").options["steps"].convert("0")


@pytest.mark.parametrize("start", ["sum", "mean", "zero"])
@pytest.mark.parametrize("shape", [(10, 6), (3, 40)], ids=str)  # held as curvature, and as projections
@pytest.mark.parametrize("name", ["iwudi", "swudi", "aswudi"])
def test_what_the_experts_add_sums_to_the_result_from_every_start(name, shape, start):
    given, method = draw(3, *shape), find_method(name)
    given[1] = 0
    options = {option.name: option.default for option in method.options.values()} | {"start": start}
    part, base = Part.whole("weight", shape), torch.zeros(shape)
    parts = method.parts_rule({}, options)(given.clone(), part, base)
    torch.testing.assert_close(parts.sum(0), method.rule({}, options)(given, part, base), rtol=1e-5, atol=1e-6)
    assert parts[1].abs().max() < 1e-7
