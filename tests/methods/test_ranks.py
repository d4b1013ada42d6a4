"""Values by rank against sorting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_merging import streaming
from expert_merging.methods.ranks import count_of, find_values_at, values_at
from expert_merging.plan import make_plan
from expert_merging.progress import no_progress
from expert_merging.streaming import Passes
from expert_merging.workers import Workers
from tests.checkpoints import tensors_of, write_checkpoint
from tests.methods.test_all import OneTensor, task_vectors
from tests.test_workers import WORKERS

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(
    st.lists(st.lists(floats, min_size=7, max_size=7), min_size=1, max_size=3), st.lists(st.integers(0, 6), min_size=1)
)
@settings(deadline=None, max_examples=30)
def test_values_are_those_of_a_sort_at_any_magnitude(rows, places):
    values = torch.tensor(rows)
    expected = values.sort(dim=1).values[:, places]
    found = find_values_at(OneTensor(values), lambda rows, _part: rows, places, len(rows), "ranking")
    assert (found + 0.0).equal(expected + 0.0)  # either zero
    assert [values_at(row, places) for row in values] == expected.tolist()


@pytest.mark.parametrize("workers", WORKERS)
def test_a_model_s_values_are_those_of_all_its_tensors(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 64)
    monkeypatch.setattr(streaming, "STEP", 24)
    monkeypatch.setattr(Workers, "for_entries", lambda *_: workers)
    shapes = {"a": (20, 30), "b": (7,), "c": ()}
    rows = {name: task_vectors(shape, 2, seed) for seed, (name, shape) in enumerate(shapes.items())}
    base = write_checkpoint(tmp_path / "base", {name: torch.zeros(shape) for name, shape in shapes.items()})
    experts = {
        name: write_checkpoint(tmp_path / name, {key: row[number] for key, row in rows.items()})
        for number, name in enumerate("AB")
    }
    plan = make_plan(base, experts, [])
    everything = torch.cat([row.reshape(2, -1) for row in rows.values()], 1)
    made = torch.stack([everything.prod(0), everything.sum(0), everything[0].abs()])

    def make(task_vectors, _part):
        return torch.stack([task_vectors.prod(0), task_vectors.sum(0), task_vectors[0].abs()])

    found = find_values_at(Passes(plan, torch.device("cpu"), no_progress), make, [0, 300, 607], 3, "ranking")
    torch.testing.assert_close(found, made.sort(dim=1).values[:, [0, 300, 607]], rtol=1e-6, atol=0)
    assert tensors_of(base).keys() == shapes.keys()


def test_shares_are_counted_in_decimals():
    assert [count_of(share, 10) for share in (0.1, 0.3, 0.7, 0.29, 1.0, 0.0)] == [1, 3, 7, 2, 10, 0]
