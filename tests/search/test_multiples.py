"""Merges with many coefficients: each equals the plain one, and whole tensors are merged once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from expert_merging.parts import Part
from expert_merging.search.multiples import kept_bytes, multiples

SHAPES = {"model.layers.0.mlp.up_proj.weight": (3, 4), "model/../norm.weight": (5,)}
PLAN = SimpleNamespace(merged=tuple(SHAPES), part=lambda name: Part.whole(name, SHAPES[name]))
# Which tensors are worked on as a whole, and the bytes of their float32.
WHOLES = {"entries": (set(), 0), "matrix": ({"model.layers.0.mlp.up_proj.weight"}, 48), "tensor": (set(SHAPES), 68)}


def task_vectors(name):
    return torch.randn(2, *SHAPES[name], generator=torch.Generator().manual_seed(len(name)))


@pytest.mark.parametrize("unit", WHOLES)
@pytest.mark.parametrize("several", [False, True])
def test_a_whole_tensor_is_merged_once_and_its_multiples_are_the_plain_merges(unit, several, tmp_path):
    wholes, size = WHOLES[unit]
    merged, folder = [], tmp_path / "run" / "multiples"

    def rule(given, part, base):
        merged.append(part.name)
        assert base.equal(torch.ones(part.shape))
        found = given[0] - 2 * given[1]
        return {"merged": found, "mask": found > 0} if several else found

    with multiples(rule, unit, PLAN, folder) as times:
        for coefficient in (0.5, 1.0, 0.0, 3.0):
            for name, shape in SHAPES.items():
                found = times(coefficient)(task_vectors(name), PLAN.part(name), torch.ones(shape))
                torch.testing.assert_close(found, coefficient * (task_vectors(name)[0] - 2 * task_vectors(name)[1]))
        assert sum(4 * value.numel() for value in map(task_vectors, wholes)) == 2 * size == 2 * kept_bytes(PLAN, unit)
        assert len(list(folder.iterdir())) == len(wholes)
    assert not folder.exists()
    assert {name: merged.count(name) for name in SHAPES} == {name: 1 if name in wholes else 4 for name in SHAPES}


def test_what_another_process_has_left_is_not_used(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    given = task_vectors(name), PLAN.part(name), torch.ones(SHAPES[name])
    folder = tmp_path / "multiples"
    kept = tmp_path / "0.safetensors"
    with multiples(lambda own, *_: own[0].clone(), "matrix", PLAN, folder) as times:
        times(1.0)(*given)
        kept.write_bytes((folder / kept.name).read_bytes())
    folder.mkdir()
    kept.rename(folder / kept.name)
    with multiples(lambda own, *_: own[1].clone(), "matrix", PLAN, folder) as times:
        assert times(1.0)(*given).equal(task_vectors(name)[1])


def test_nothing_is_left_of_an_error(tmp_path):
    with pytest.raises(KeyError), multiples(lambda *_: None, "matrix", PLAN, tmp_path / "multiples"):
        raise KeyError
    assert not list(tmp_path.iterdir())
