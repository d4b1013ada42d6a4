"""Files of numbers for each entry, and what is read of them."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from expert_merging.kept import Kept
from expert_merging.parts import Part
from expert_merging.statistics.entrywise import Entries, EntrySums, bytes_of

PARTS = {"a.weight": Part.whole("a.weight", (3, 4)), "b": Part.whole("b", ()), "c": Part.whole("c", (0, 2))}


def write(folder, name: str, factor: float) -> tuple[EntrySums, torch.Tensor]:
    values = torch.arange(12.0) * factor
    sums = EntrySums(folder / f"{name}.safetensors", PARTS)
    for _ in range(2):
        sums.values["a.weight"].add_(values)
        sums.values["b"].add_(factor)
    return sums, values


@pytest.mark.parametrize("relative", [False, True])
def test_a_part_is_read_from_where_it_is(relative, tmp_path):
    expected, files = [], {}
    for name, factor in (("A", 1.0), ("B", -3.0)):
        sums, values = write(tmp_path, name, factor)
        files[name] = sums.target
        sums.finish(4, Kept(tmp_path / "digests.json"))
        all_values = torch.cat([values, torch.tensor([factor])]) / 2
        expected.append(values / 2 / (all_values.square().mean().sqrt() if relative else 1.0))
    found = Entries(files, relative=relative)
    for start, stop in ((0, 12), (5, 11), (3, 3)):
        part = PARTS["a.weight"].between(start, stop)
        torch.testing.assert_close(found.of(part), torch.stack(expected)[:, start:stop])
    assert found.of(PARTS["b"]).shape == (2, 1)
    assert found.of(PARTS["c"]).shape == (2, 0)


def test_tensors_in_their_shape_and_another_type_are_read_too(tmp_path):
    values = torch.arange(12.0).view(3, 4)
    save_file({"a.weight.end": values.bfloat16()}, tmp_path / "given.safetensors")
    found = Entries({"A": tmp_path / "given.safetensors"}, ending=".end").of(PARTS["a.weight"].between(5, 11))
    assert found.dtype == torch.float32
    assert found.tolist() == [values.flatten()[5:11].tolist()]


def test_all_numbers_that_are_0_stay_so(tmp_path):
    sums = EntrySums(tmp_path / "zeros.safetensors", PARTS)
    sums.finish(1, Kept(tmp_path / "digests.json"))
    found = Entries({"A": sums.target}, relative=True)
    assert not found.of(PARTS["a.weight"]).any()


def test_a_file_has_its_name_once_it_is_complete_and_noted(tmp_path):
    kept = Kept(tmp_path / "digests.json")
    sums, values = write(tmp_path, "A", 1.0)
    assert not sums.target.exists()
    sums.finish(2, kept)
    assert kept.has(sums.target)
    assert [*tmp_path.glob("*.partial")] == []
    found = load_file(sums.target)
    assert found["a.weight"].equal(values)
    assert float(found["sum of squares"]) == float(values.square().sum()) + 1
    assert bytes_of(PARTS.values()) == 4 * 13


def test_nothing_is_left_of_what_is_abandoned_or_has_no_place(tmp_path, monkeypatch):
    sums, _ = write(tmp_path, "A", 1.0)
    sums.abandon()
    assert [*tmp_path.iterdir()] == []

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, "B", 1.0)
    assert [*tmp_path.iterdir()] == []
