"""What a candidate's numbers are coefficients of."""

from __future__ import annotations

import torch

from expert_merging.plan import make_plan
from expert_merging.search.space import make_space
from tests.checkpoints import write_checkpoint

# Four layers, of which the first two are in different thirds; a projector, and a vision tower with layers of its own.
NAMES = [
    *(f"language_model.model.layers.{depth}.self_attn.q_proj.weight" for depth in range(4)),
    "mlp1.1.weight",
    "vision_model.encoder.layers.3.mlp.fc1.weight",
]


def space_of(folder, kind, *, excluded=()):
    tensors = {name: torch.ones(2) for name in NAMES}
    base = write_checkpoint(folder / "base", tensors)
    experts = {name: write_checkpoint(folder / name, tensors) for name in ("A", "B")}
    return make_space(make_plan(base, experts, list(excluded)), kind)


def test_one_coefficient_for_each_expert(tmp_path):
    space = space_of(tmp_path, "experts")
    assert space.names == ["A", "B"]
    assert space.size == 2
    assert space.start(0.3) == (0.3, 0.3)
    assert space.start([0.2, 0.5]) == (0.2, 0.5)
    values = space.coefficients((0.25, -1.5))
    assert set(values) == set(NAMES)
    assert all(value.equal(torch.tensor([[0.25], [-1.5]])) for value in values.values())


def test_one_coefficient_for_each_expert_and_third_of_the_depth(tmp_path):
    space = space_of(tmp_path, "depth")
    assert space.order == ("early", "middle", "late", "outside")
    assert space.names[:4] == ["A/early", "B/early", "A/middle", "B/middle"]
    assert space.start([0.2, 0.5]) == (0.2, 0.5) * 4
    values = space.coefficients(tuple(map(float, range(8))))
    first = {name: value[0].item() for name, value in values.items()}
    assert [first[name] for name in NAMES] == [0, 0, 2, 4, 6, 6]
    assert all(value.equal(value[0] + torch.tensor([[0.0], [1.0]])) for value in values.values())


def test_thirds_are_of_the_whole_model_and_only_those_that_are_merged_count(tmp_path):
    space = space_of(tmp_path, "depth", excluded=[".*layers.[01]..*", "vision.*", "mlp1.*"])
    assert space.order == ("middle", "late")
