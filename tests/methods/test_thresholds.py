"""Thresholds and the majority of TIES against sorting, whatever samples suggest and whoever counts."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_merging import streaming
from expert_merging.errors import InputError
from expert_merging.methods import thresholds
from expert_merging.methods.thresholds import find_thresholds, trim
from expert_merging.plan import make_plan
from expert_merging.progress import no_progress
from expert_merging.streaming import Passes
from expert_merging.workers import Workers
from tests.checkpoints import write_checkpoint
from tests.methods.test_all import OneTensor, task_vectors
from tests.test_workers import WORKERS

NAMES = ("a", "b", "c")


@given(
    exponent=st.integers(-30, 30),
    entries=st.integers(1, 400),
    density=st.floats(0.01, 1.0),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_thresholds_are_exact_at_any_magnitude(exponent, entries, density, seed):
    given_vectors = task_vectors((entries,), 2, seed) * 10.0**exponent
    found, _ = find_thresholds(OneTensor(given_vectors), lambda rows, part: rows, density)
    rank = int((1 - Decimal(str(density))) * entries)
    expected = given_vectors.abs().kthvalue(rank, dim=1).values if rank else torch.zeros(2)
    assert found.equal(expected)


@pytest.mark.parametrize("order", ["drawn", "nearly all zero", "ascending", "descending", "zeros first"])
def test_thresholds_are_exact_whatever_the_first_entries_look_like(order, monkeypatch):
    """Samples are the first entries of a block, so that sorted ones mislead; then all entries are counted."""
    (row,) = task_vectors((50_000,), 1)
    rows = {
        "drawn": row,
        "ascending": row.abs().sort().values,
        "descending": row.abs().sort(descending=True).values,
        "zeros first": torch.cat([torch.zeros(10_000), row[10_000:]]),
        "nearly all zero": torch.cat([row[:5], torch.zeros(49_995)]),
    }
    given_vectors = torch.stack([rows[order], row])
    monkeypatch.setattr(thresholds, "_SAMPLED", 50_000)
    passes = CountingPasses(given_vectors)
    found, _ = find_thresholds(passes, lambda rows, part: rows, 0.2)
    assert found.equal(given_vectors.abs().kthvalue(40_000, dim=1).values)
    assert passes.passes == (3 if order in ("drawn", "nearly all zero") else 6)


def test_checkpoints_that_change_while_they_are_read_are_refused():
    class Changing(CountingPasses):
        def total(self, *arguments, **keywords):
            self.task_vectors = self.task_vectors * 2
            return super().total(*arguments, **keywords)

    with pytest.raises(InputError, match="the checkpoints have changed while they were read"):
        find_thresholds(Changing(task_vectors((5000,), 2)), lambda rows, part: rows, 0.2)


def test_few_entries_are_not_sampled():
    given_vectors = task_vectors((5000,), 2)
    passes = CountingPasses(given_vectors)
    found, _ = find_thresholds(passes, lambda rows, part: rows, 0.2)
    assert found.equal(given_vectors.abs().kthvalue(4000, dim=1).values)
    assert passes.passes == 3


@given(
    experts=st.integers(1, 5),
    levels=st.sampled_from([2, 5, 40, 2**20]),
    density=st.sampled_from([0.02, 0.2, 0.5, 0.9, 1.0]),
    slack=st.sampled_from([0, 1, 10]),
    room=st.sampled_from([0, 1 << 20]),
    seed=st.integers(0, 999),
)
@settings(max_examples=150, deadline=None)
def test_thresholds_and_the_majority_are_exact_whatever_a_sample_leaves_undecided(
    experts, levels, density, slack, room, seed
):
    """From none to nearly all entries undecided, alone in their column or not, with room for these columns or not."""
    given_vectors = balanced((task_vectors((2000,), experts, seed) * 3 * levels).round() / levels, density)
    with pytest.MonkeyPatch.context() as patch:
        sample_much(patch, slack, room)
        found = find_thresholds(OneTensor(given_vectors), lambda rows, part: rows, density)
    assert_found(found, given_vectors, density)


def sample_much(patch: pytest.MonkeyPatch, slack: int, room: int = 1 << 20) -> None:
    for name, value in (("_SAMPLED", 1000), ("_SLACK", slack), ("_KEPT_BYTES", room), ("_SAMPLE", 4)):
        patch.setattr(thresholds, name, value)


def plain_thresholds(rows: torch.Tensor, density: float) -> torch.Tensor:
    rank = rows.shape[1] - round(rows.shape[1] * density)
    return rows.abs().kthvalue(rank, dim=1).values if rank else torch.zeros(len(rows))


def plain_votes(rows: torch.Tensor, density: float) -> torch.Tensor:
    return sum(torch.where(rows.abs() >= plain_thresholds(rows, density)[:, None], rows, 0.0)).sign()


def balanced(rows: torch.Tensor, density: float) -> torch.Tensor:
    """The same with some columns negated, so that a vote or two decide the majority."""
    votes = plain_votes(rows, density)
    surplus = int(votes.sum())
    turned = (votes == (surplus > 0) - (surplus < 0)).nonzero().flatten()[: abs(surplus) // 2]
    return rows.index_copy(1, turned, -rows[:, turned])


def assert_found(found: tuple[torch.Tensor, float], rows: torch.Tensor, density: float) -> None:
    assert found[0].equal(plain_thresholds(rows, density))
    assert found[1] == plain_votes(rows, density).sum().sign()


def test_as_many_entries_below_the_bounds_as_the_rank_make_the_sample_wrong():
    """One more, and the entry of that rank would be between the bounds."""
    wrong = 0
    for seed in range(100):
        rows = balanced(task_vectors((64,), 1, seed), 0.5)
        passes = CountingPasses(rows)
        with pytest.MonkeyPatch.context() as patch:
            sample_much(patch, slack=0)
            patch.setattr(thresholds, "_SAMPLED", 64)
            found = find_thresholds(passes, lambda rows, part: rows, 0.5)
        assert_found(found, rows, 0.5)
        wrong += passes.passes == 6
    assert 50 < wrong < 100


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 1 << 20])
@pytest.mark.parametrize("workers", WORKERS)
def test_what_workers_could_not_decide_reaches_the_process_that_decides(workers, room, tmp_path, monkeypatch):
    monkeypatch.setattr(Workers, "for_entries", lambda *_: workers)
    monkeypatch.setattr("expert_merging.workers._BATCH", 1000)
    monkeypatch.setattr(streaming, "BLOCK", 500)
    sample_much(monkeypatch, slack=10, room=room)
    for seed in range(3):
        rows = balanced((task_vectors((6000,), 3, seed) * 30).round() / 8, 0.3)
        base = write_checkpoint(tmp_path / f"{seed} base", {"weight": torch.zeros(6000)})
        experts = {
            name: write_checkpoint(tmp_path / f"{seed} {name}", {"weight": row})
            for name, row in zip(NAMES, rows, strict=True)
        }
        plan = make_plan(base, experts, [])
        found = find_thresholds(Passes(plan, torch.device("cpu"), no_progress), lambda rows, part: rows, 0.3)
        assert_found(found, rows, 0.3)


def test_votes_of_other_processes_count():
    class Others:
        def add(self, votes):
            return votes + 3

    passes = OneTensor(torch.zeros(1, 1))
    none = torch.zeros(1, dtype=torch.int64)
    counted = thresholds._Counted(none, none, none, none, -2, none[:, None], none[:, None], [])
    assert counted.majority(passes, none) == -1
    passes.processes = Others()
    assert counted.majority(passes, none) == 1


@pytest.mark.slow
def test_more_experts_than_a_byte_can_count():
    """All alike, so that whole columns are undecided; only those near the threshold are negative."""
    row = 1 + torch.rand(4000, generator=torch.Generator().manual_seed(0))
    near = row.argsort()[1951:2060]
    row[near] *= -1
    rows = balanced(row.repeat(257, 1), 0.5)
    with pytest.MonkeyPatch.context() as patch:
        sample_much(patch, slack=1, room=1 << 30)
        found = find_thresholds(OneTensor(rows), lambda rows, part: rows, 0.5)
    assert_found(found, rows, 0.5)


class CountingPasses(OneTensor):
    """Passes over one tensor that are counted."""

    passes = 0

    def total(self, *arguments, **keywords):
        self.passes += 1
        return super().total(*arguments, **keywords)


@given(
    levels=st.sampled_from([2, 5, 40, 2**20]),
    exponent=st.integers(-44, 38),
    bounds=st.tuples(st.floats(0, 3), st.floats(0, 3)).map(sorted),
    seed=st.integers(0, 99),
)
def test_processors_and_gpus_find_the_same_entries_between_bounds(levels, exponent, bounds, seed):
    """Down to the smallest numbers that float32 has; on a GPU the work is torch's, on a processor numpy's."""
    row = (task_vectors((500,), 1, seed)[0] * 10 * levels).round() / levels * 10.0**exponent
    low, high = (torch.tensor(bounds) * 10.0**exponent).view(torch.int32).tolist()
    found = [way(row, low, high) for way in (thresholds._between_by_numpy, thresholds._between_by_torch)]
    assert found[0][:2] == found[1][:2]
    assert found[0][2].equal(found[1][2])


def test_what_equals_the_threshold_is_kept():
    row = torch.tensor([[-0.5, 0.25, 0.5, 0.0, -0.25]])
    assert trim(row.clone(), torch.tensor([0.5]))[0].tolist() == [-0.5, 0.0, 0.5, 0.0, 0.0]
    assert trim(row.clone(), torch.tensor([0.0]))[0].equal(row[0])
