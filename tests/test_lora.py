"""Tensors that an adapter changes are computed in tiles, whatever they are asked for in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expert_merging.checkpoints import lora
from expert_merging.checkpoints.checkpoint import Entry
from expert_merging.checkpoints.lora import Adapted, Change, Matrix

ROWS, COLUMNS, RANK = 13, 7, 3


class Files:
    """Tensors in memory that are read like those in files, and what was read."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = {
            "start": (ROWS, COLUMNS),
            "B": (ROWS, RANK),
            "A": (RANK, COLUMNS),
            "turned B": (RANK, ROWS),
            "turned A": (COLUMNS, RANK),
            "rows": (ROWS,),
            "columns": (COLUMNS,),
            "tokens": (2, COLUMNS),
        }
        self.tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        self.tensors |= {f"turned {name}": self.tensors[name].T.contiguous() for name in ("A", "B")}
        self.largest: dict[str, int] = {}

    def entry(self, name: str) -> Entry:
        tensor = self.tensors[name]
        return Entry(name, "F32", tuple(tensor.shape), None, 0, tensor.nbytes)

    def read(self, entry: Entry, start: int, stop: int) -> torch.Tensor:
        self.largest[entry.name] = max(self.largest.get(entry.name, 0), stop - start)
        return self.tensors[entry.name].flatten()[start:stop].clone()

    def adapted(self, kind: str) -> Adapted:
        straight = Matrix(self.entry("B")), Matrix(self.entry("A"))
        turned = Matrix(self.entry("turned B"), True), Matrix(self.entry("turned A"), True)
        changes = {
            "plain": Change(*straight, 0.5),
            "turned": Change(*turned, 0.5),
            "rows": Change(*straight, 0.5, self.entry("rows")),
            "columns": Change(*turned, 0.5, self.entry("columns"), by_columns=True),
        }
        if kind == "tokens":
            return Adapted(self.entry("start"), self.read, None, (11, 2), self.entry("tokens"))
        return Adapted(self.entry("start"), self.read, changes[kind])

    def expected(self, kind: str) -> torch.Tensor:
        start, tensors = self.tensors["start"].double(), self.tensors
        changed = start + 0.5 * tensors["B"].double() @ tensors["A"].double()
        if kind == "rows":
            changed = changed * (tensors["rows"] / changed.norm(dim=1))[:, None]
        if kind == "columns":
            changed = changed * (tensors["columns"] / changed.norm(dim=0))[None]
        if kind == "tokens":
            changed = start.clone()
            changed[[11, 2]] = tensors["tokens"].double()
        return changed


def filled(adapted: Adapted, start: int, stop: int) -> torch.Tensor:
    block = torch.full((stop - start,), float("nan"))
    adapted.fill(block, start)
    return block


KINDS = ("plain", "turned", "rows", "columns", "tokens")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [1, 3 * COLUMNS, 1 << 16])
def test_all_kinds_of_change(kind, tile, monkeypatch):
    monkeypatch.setattr(lora, "TILE", tile)
    files = Files()
    found = filled(files.adapted(kind), 0, ROWS * COLUMNS).view(ROWS, COLUMNS)
    torch.testing.assert_close(found, files.expected(kind).float(), rtol=1e-5, atol=1e-6)


@given(kind=st.sampled_from(KINDS), bounds=st.tuples(*[st.integers(0, ROWS * COLUMNS)] * 2).map(sorted))
def test_entries_have_the_same_bits_in_every_block(kind, bounds):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "TILE", 3 * COLUMNS)
        files = Files()
        whole = filled(files.adapted(kind), 0, ROWS * COLUMNS)
        assert filled(files.adapted(kind), *bounds).equal(whole[slice(*bounds)])


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_than_a_tile_is_made_at_a_time(kind, monkeypatch):
    monkeypatch.setattr(lora, "TILE", 2 * COLUMNS)
    files = Files()
    filled(files.adapted(kind), 0, ROWS * COLUMNS)
    assert files.largest["start"] == 2 * COLUMNS
    assert files.largest.get("B", 0) <= 2 * RANK
    assert files.largest.get("turned B", 0) <= 2


def test_a_block_inside_a_row_takes_that_row_s_tile_alone(monkeypatch):
    monkeypatch.setattr(lora, "TILE", 1)  # rows are longer
    files, seen = Files(), []
    adapted = files.adapted("plain")
    adapted.read = lambda entry, start, stop: seen.append((entry.name, start, stop)) or files.read(entry, start, stop)
    filled(adapted, 4 * COLUMNS + 2, 4 * COLUMNS + 5)
    assert seen == [("A", 0, RANK * COLUMNS), ("start", 4 * COLUMNS, 5 * COLUMNS), ("B", 4 * RANK, 5 * RANK)]


def test_norms_of_columns_are_measured_once():
    files = Files()
    adapted = files.adapted("columns")
    filled(adapted, 0, ROWS * COLUMNS)
    count = 0

    def read(entry: Entry, start: int, stop: int) -> torch.Tensor:
        nonlocal count
        count += entry.name == "start"
        return files.read(entry, start, stop)

    adapted.read = read
    filled(adapted, 0, 5)
    assert count == 1


def test_an_empty_tensor_stays_empty():
    files = Files()
    files.tensors |= {"start": torch.ones(0, COLUMNS), "B": torch.ones(0, RANK)}
    assert filled(files.adapted("plain"), 0, 0).numel() == 0
