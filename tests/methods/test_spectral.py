"""TSV-M and the isotropic methods against plain twins, and where a singular value decomposition leaves a choice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_merging.catalogue import find_method
from expert_merging.errors import InputError
from expert_merging.methods import spectral
from expert_merging.methods.spectral import iso, iso_cts, newton_schulz, polar_factor, singular_triples, svd
from tests.methods.numbers import assert_near, draw, low_rank, orthogonal
from tests.methods.reference import iso_cts_reference, iso_reference, polar, svd_reference

TWINS = [(svd, svd_reference), (iso, iso_reference), (iso_cts, iso_cts_reference)]
SHAPES = [(40, 12), (12, 40), (20, 20), (150, 140), (1, 9), (9, 1), (2, 3), (1, 1)]
METHODS = [svd, iso, iso_cts]

methods = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
sides = st.integers(1, 12)
seeds = st.integers(0, 1000)


@pytest.mark.parametrize(("method", "twin"), TWINS, ids=["svd", "iso", "iso_cts"])
@shapes
@pytest.mark.parametrize("experts", [1, 2, 5])
def test_the_twin_agrees(method, twin, shape, experts):
    given = draw(experts, *shape) * 1e-3
    assert_near(method(given), twin(given.double()), 1e-5)


@pytest.mark.parametrize(("method", "twin"), TWINS[:2], ids=["svd", "iso"])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (30, 30)], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_twin_agrees_on_low_ranks(method, twin, shape, rank):
    given = low_rank(3, *shape, rank)
    assert_near(method(given), twin(given.double()), 1e-5)


@methods
@settings(max_examples=15)
@given(rows=sides, columns=sides, experts=st.integers(1, 4), exponent=st.integers(-12, 4), seed=seeds)
def test_scaled_task_vectors_give_the_scaled_result(method, rows, columns, experts, exponent, seed):
    given = draw(experts, rows, columns, seed=seed)
    assert_near(method(given * 10.0**exponent), method(given) * 10.0**exponent, 1e-3)


@methods
@settings(max_examples=15)
@given(rows=sides, columns=sides, experts=st.integers(1, 4), seed=seeds)
def test_turned_task_vectors_give_the_turned_result(method, rows, columns, experts, seed):
    given = draw(experts, rows, columns, seed=seed)
    left, right = orthogonal(rows, seed), orthogonal(columns, seed + 1)
    assert_near(method(left @ given @ right), left @ method(given) @ right, 2e-3)


@methods
@settings(max_examples=15)
@given(rank=st.integers(1, 3), more_rows=st.integers(0, 5), more_columns=st.integers(0, 5), seed=seeds)
def test_rows_and_columns_that_nobody_uses_change_nothing(method, rank, more_rows, more_columns, seed):
    """The null space has no say, however large it is; TSV-M shares the shorter side, which is kept."""
    if method is not iso:
        more_columns = 0
    given = low_rank(3, 14, 9, rank, seed)
    padded = torch.nn.functional.pad(given, (0, more_columns, 0, more_rows))
    expected = torch.nn.functional.pad(method(given), (0, more_columns, 0, more_rows))
    assert_near(method(padded), expected, 1e-3)


@methods
@pytest.mark.parametrize("magnitude", [1e-36, 1e-30, 1e-12, 1e4, 1e18, 1e37])
def test_extreme_magnitudes_are_no_matter(method, magnitude):
    given = draw(3, 10, 6)
    assert_near(method(given * magnitude) / magnitude, method(given), 1e-4)


@pytest.mark.parametrize("method", [svd, iso], ids=["svd", "iso"])
@pytest.mark.parametrize("shape", [(20, 20), (10, 40)], ids=str)
def test_a_norm_may_be_beyond_float32(method, shape):
    given = draw(1, *shape)
    assert (3e37 * given).norm().isinf()
    assert_near(method(3e37 * given).double() / 3e37, method(given), 1e-5)


@methods
def test_the_coefficient_scales_a_matrix(method):
    given = draw(3, 10, 6)
    torch.testing.assert_close(method(given, scaling_coefficient=0.3), 0.3 * method(given))


@methods
def test_a_zero_expert_and_experts_that_cancel_are_defined(method):
    given = draw(1, 10, 6)
    assert method(torch.cat([given, 0 * given])).isfinite().all()
    parts = torch.cat([0.1 * given, 0.2 * given, -(0.1 * given + 0.2 * given)])
    assert method(parts).isfinite().all()


def test_tsv_m_of_one_expert_is_the_expert():
    for rank in (1, 3, 8):
        given = low_rank(1, 12, 8, rank)
        assert_near(svd(given), given[0], 1e-5)


def test_tsv_m_adds_what_does_not_overlap():
    given = torch.zeros(3, 12, 9)
    blocks = draw(3, 4, 3)
    for expert in range(3):
        given[expert, 4 * expert : 4 * expert + 4, 3 * expert : 3 * expert + 3] = blocks[expert]
    assert_near(svd(given), given.sum(0), 1e-5)


@pytest.mark.parametrize("factor", [1.0, 2.0, 3.0])
def test_tsv_m_of_equal_directions_has_them_once(factor):
    expert = draw(12, 9)
    left, values, right = torch.linalg.svd(expert, full_matrices=False)
    expected = left[:, :4] * values[:4] @ right[:4] * (1 + factor) / 2
    assert_near(svd(torch.stack([expert, factor * expert])), expected, 1e-4)


def test_tsv_m_keeps_one_direction_where_experts_outnumber_the_sides():
    given = draw(5, 1, 30)
    merged = svd(given)
    assert merged.norm() > 0.5 * given.norm(dim=(1, 2)).mean()
    assert_near(merged, svd_reference(given.double()), 1e-5)


@pytest.mark.parametrize("shape", [(600, 600), (400, 1200), (1200, 400)], ids=str)
@pytest.mark.parametrize("span", [9, 11, 95])
def test_tsv_m_knows_shared_directions_from_noise(shape, span):
    """Also where rounding to float32, magnified by the span of the kept singular values, makes them differ a little."""
    side = min(shape)
    values = torch.cat([torch.ones(side // 4), torch.linspace(1.5, 1, side // 4) / span, torch.zeros(side // 2)])
    left, right = orthogonal(shape[0], 0)[:, :side], orthogonal(shape[1], 1)[:, :side]
    expert = (left * values) @ right.mT
    assert_near(svd(torch.stack([expert, 0.3 * expert])), 0.65 * expert, 1e-5)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (20, 20)], ids=str)
@pytest.mark.parametrize("method", [iso, iso_cts], ids=["iso", "iso_cts"])
def test_isotropic_results_have_equal_singular_values(method, shape):
    values = torch.linalg.svdvals(method(draw(3, *shape)).double())
    torch.testing.assert_close(values, values.mean().expand(min(shape)), rtol=1e-5, atol=0)


def test_iso_keeps_the_sum_of_singular_values_and_the_rank():
    given = low_rank(3, 20, 30, 2)
    before, after = torch.linalg.svdvals(given.sum(0)), torch.linalg.svdvals(iso(given))
    torch.testing.assert_close(after.sum(), before.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(after[:6], before[:6].mean().expand(6), rtol=1e-4, atol=0)
    assert after[6:].max() < 1e-5 * after[0]


def test_iso_of_one_direction_is_that_direction():
    given = low_rank(1, 20, 30, 1)
    assert_near(iso(given), given[0], 1e-5)


def test_iso_of_experts_that_cancel_is_zero():
    expert = draw(8, 6)
    first, second = 0.1 * expert, 0.2 * expert
    assert iso(torch.stack([first, second, -first, -second])).equal(torch.zeros(8, 6))


def test_iso_cts_with_everything_common_is_iso():
    given = draw(3, 20, 12)
    assert_near(iso_cts(given, common_space_fraction=1.0), iso(given), 1e-5)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.8])
def test_iso_cts_of_low_rank_experts_uses_their_directions_alone(fraction):
    given = low_rank(3, 20, 30, 2)
    merged = iso_cts(given, common_space_fraction=fraction)
    columns = torch.linalg.svd(torch.cat(list(given), 1).double())[0][:, :6]
    rows = torch.linalg.svd(torch.cat(list(given.mT), 1).double())[0][:, :6]
    assert_near(columns @ (columns.T @ merged.double() @ rows) @ rows.T, merged, 1e-4)


def test_iso_cts_of_equal_experts_is_iso():
    given = draw(1, 20, 12).expand(3, 20, 12) * 1.0
    assert iso_cts(given, common_space_fraction=0.5).isfinite().all()
    flat = low_rank(1, 20, 12, 2).expand(3, 20, 12) * 1.0
    assert_near(iso_cts(flat, common_space_fraction=0.5), iso(flat), 1e-4)


@pytest.mark.parametrize(("side", "experts"), [(5, 3), (1, 5), (12, 5), (896, 5), (7, 7)])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.8, 1.0])
def test_common_and_own_directions_fill_the_shorter_side(side, experts, fraction):
    common, own = spectral._shares(side, experts, fraction)
    assert common + experts * own == side
    assert common >= 0


@shapes
def test_singular_triples_put_the_matrix_together(shape):
    matrix = draw(*shape) * 1e-3
    left, values, right = singular_triples(matrix, 0.0)
    assert_near((left * values) @ right.mT, matrix, 1e-6)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix.double()), rtol=1e-9, atol=0)
    left, values, right = singular_triples(matrix, float(values.max()) / 2)
    assert (values > values.max() / 2).all()
    assert left.shape == (shape[0], len(values))
    assert right.shape == (shape[1], len(values))


@shapes
def test_newton_schulz_finds_the_polar_factor_of_a_matrix_of_full_rank(shape):
    matrix = draw(*sorted(shape))
    found = newton_schulz(matrix, 1e-7 * float(matrix.norm()))
    assert found is not None
    assert_near(found, polar(matrix.double(), 0.0), 1e-4)


@pytest.mark.parametrize("smallest", [0.0, 1e-9, 1e-7])
def test_newton_schulz_has_no_answer_where_directions_are_mere_rounding(smallest):
    values = torch.tensor([1.0, 0.5, 0.25, smallest])
    matrix = orthogonal(4, 0) * values @ orthogonal(8, 1)[:4]
    assert newton_schulz(matrix, spectral.ROUNDING * float(matrix.norm())) is None
    assert newton_schulz(matrix, float(matrix.norm())) is None


@pytest.mark.parametrize("span", [10, 1e3, 1e5])
def test_small_singular_values_keep_their_digits(span):
    values = torch.logspace(0, -1, 12, base=span, dtype=torch.float64).float()
    matrix = orthogonal(12, 0) * values @ orthogonal(30, 1)[:12]
    for shaped in (matrix, matrix.mT):
        assert_near(polar_factor(shaped, 0.0)[0], polar(shaped.double(), 0.0), 2e-6)


def test_what_experts_leave_after_cancelling_is_exact():
    given = torch.tensor([1.0, 2.0**-20, -1.0]).view(3, 1, 1) * draw(1, 300, 400)
    assert spectral.exact_sum(given).equal(given[1])


@pytest.mark.parametrize("converges", [True, False])
def test_the_way_to_the_polar_factor_does_not_matter(converges):
    matrix = draw(30, 20) if converges else low_rank(1, 30, 20, 4)[0]
    expected, expected_mean = polar_factor(matrix, 1e-4)
    assert_near(expected, polar(matrix, 1e-4), 1e-4)
    assert expected_mean == pytest.approx(float(torch.linalg.svdvals(matrix)[: 20 if converges else 4].mean()), 1e-5)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)], ids=str)
def test_a_gpu_gets_the_same_polar_factor(shape, monkeypatch):
    """Takes the way of a GPU, with its fall-back, on whatever there is."""
    monkeypatch.setattr(spectral, "_multiplies_fast", lambda matrix: True)
    for task_vectors in (draw(3, *shape), low_rank(3, *shape, 2)):
        assert_near(iso(task_vectors), iso_reference(task_vectors.double()), 1e-4)


def test_aliases_and_intervals():
    assert find_method("tsv_m").name == "svd"
    assert find_method("iso-c").name == "iso"
    option = find_method("iso_cts").options["common_space_fraction"]
    with pytest.raises(InputError, match=r"must be a number in \(0, 1\], got 80; for 80 % write 0.8"):
        option.convert("80")
