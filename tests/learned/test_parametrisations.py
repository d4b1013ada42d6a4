"""Parametrisations: fast pairs equal what autograd gives, and any differentiable merge can be trained."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_merging.learned.axes import COLUMNS
from expert_merging.learned.chunks import chunk_count
from expert_merging.learned.live import LiveModel
from expert_merging.learned.parametrisations import CoefficientVector, Layout, Parametrisation
from expert_merging.parts import Part
from tests.learned.training import make_trainer, read_task_vectors


@pytest.mark.slow
@pytest.mark.parametrize("many", [1, 3, 10**6])
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 7),
    wanted=st.integers(1, 70),
    start=st.integers(0, 60),
    entries=st.integers(1, 60),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_fast_pairs_are_those_of_autograd(many, rows, columns, wanted, start, entries, seed):
    """Of layers, chunks, rows and columns, in blocks that begin and end anywhere."""
    torch.manual_seed(seed)
    whole = Part.whole("w", (rows, columns))
    start = min(start, whole.elements - 1)
    part = whole.between(start, min(start + entries, whole.elements))
    directions, gradient = torch.randn(3, part.entries), torch.randn(part.entries)
    counts = [(1, {}), (rows, {}), (chunk_count(whole.elements, wanted), {}), (columns, {"w": "columns"})]
    for chunks, axes in counts:
        vector = CoefficientVector(Layout({"v": 1, "w": chunks}, [0.2, 0.7, 0.4], axes=axes))
        values = torch.rand(3, chunks)
        found = {}
        for kind in (Parametrisation, CoefficientVector):
            merged, total = torch.ones(part.entries), torch.ones(3, chunks)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("expert_merging.learned.chunks._MANY", many)
                kind.add_merged(vector, merged, values, directions, part)
                kind.add_gradient(vector, total, values, directions, part, gradient)
            found[kind] = merged, total
        for slow, fast in zip(*found.values(), strict=True):
            torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


def test_merging_says_which_coefficient_an_entry_has():
    """The plain way of rows: each row of the matrices times the row's coefficients."""
    directions, values = torch.randn(2, 4, 3), torch.rand(2, 4)
    vector = CoefficientVector(Layout({"w": 4}, [0.3, 0.3]))
    merged = vector.merge(values, directions.view(2, -1), Part.whole("w", (4, 3)))
    torch.testing.assert_close(merged.view(4, 3), (values[:, :, None] * directions).sum(0))


def test_a_column_is_an_input_of_a_matrix():
    directions, values, part = torch.randn(2, 4, 3), torch.rand(2, 3), Part.whole("w", (4, 3))
    vector = CoefficientVector(Layout({"w": 3}, [0.3, 0.3], axes={"w": "columns"}))
    merged = vector.merge(values, directions.view(2, -1), part)
    expected = sum(direction @ torch.diag(own) for direction, own in zip(directions, values, strict=True))
    torch.testing.assert_close(merged.view(4, 3), expected)
    torch.testing.assert_close(COLUMNS.apply(values, directions.view(2, -1), part).view(4, 3), expected)


class Weights(Parametrisation):
    """The merged task vector's entries themselves, squashed: everything but the merge is the default."""

    def __init__(self, sizes):
        super().__init__()
        stops = list(accumulate(sizes.values()))
        self.places = {name: slice(stop - sizes[name], stop) for name, stop in zip(sizes, stops, strict=True)}
        self.constants = {}
        self.raw = torch.nn.Parameter(0.01 * torch.randn(stops[-1]))

    def forward(self):
        return self.raw * 2

    def merge(self, values, directions, part):
        return values[part.start : part.stop].tanh() * directions.mean(0)


@pytest.mark.parametrize("accumulates", [False, True])
def test_a_parametrisation_that_only_merges_has_the_gradient_of_merging_in_every_pass(
    accumulates, answered_zoo, tmp_path
):
    torch.manual_seed(0)
    trainer = make_trainer(answered_zoo, tmp_path)
    material = trainer.gather()
    material.task_vectors._block, material.task_vectors._step = 300, 100
    parts = {name: trainer.plan.part(name) for name in trainer.plan.merged}
    own = Weights({name: part.elements for name, part in parts.items()})
    base = {name: value.detach().clone() for name, value in material.model.named_parameters()}
    live = LiveModel(material.model, material.task_vectors, own, lambda name: name)
    live.accumulates = accumulates
    target, losses = material.targets[0], trainer.settings.objective.losses
    for _ in range(2):  # of which the second knows what is fetched next
        live.rebuild()
        losses(live.model, [target]).sum().backward()
        live.finish()
    values = own().detach().requires_grad_(True)
    weights = dict(base)
    for name, part in parts.items():
        directions = read_task_vectors(trainer.plan, part)[1]
        weights[name] = base[name] + own.merge(own.view(values, name), directions, part).view(part.shape)
    assert all(torch.allclose(live.model.get_parameter(name), weights[name], atol=1e-6) for name in parts)
    with torch.nn.utils.stateless._reparametrize_module(live.model, weights):
        (expected,) = torch.autograd.grad(losses(live.model, [target]).sum(), values)
    torch.testing.assert_close(live.gradient, expected, rtol=1e-4, atol=1e-9)


def test_free_coefficients_may_pass_one():
    vector = CoefficientVector(Layout({"a": 2}, [1.0, 1.5], bounded=False))
    assert vector().tolist() == vector.anchor.tolist() == [1.0, 1.0, 1.5, 1.5]
    vector.raw.data.add_(3)
    assert vector.by_name()["a"].tolist() == [[4.0, 4.0], [4.5, 4.5]]
    assert vector.anchor.tolist() == [1.0, 1.0, 1.5, 1.5]


def test_the_vector_starts_at_the_initial_values_and_keeps_fixed_ones():
    vector = CoefficientVector(Layout({"a": 2, "b": 0, "c": 1}, [0.2, 0.7]))
    values = vector.by_name()
    torch.testing.assert_close(values["a"], torch.tensor([[0.2, 0.2], [0.7, 0.7]]))
    torch.testing.assert_close(values["b"], torch.tensor([[0.2], [0.7]]))
    assert vector.raw.numel() == 6
    assert vector.fixed == ("b",)
    assert torch.equal(vector(), vector.anchor)


def test_the_vector_starts_where_it_is_told_and_is_anchored_at_the_initial_values():
    start = {"a": torch.tensor([0.1, 0.9]), "b": torch.tensor([0.4, 0.6])}
    vector = CoefficientVector(Layout({"a": 2, "b": 0}, [0.2, 0.7], first=start))
    values = vector.by_name()
    torch.testing.assert_close(values["a"], torch.tensor([[0.1, 0.1], [0.9, 0.9]]))
    assert torch.equal(values["b"], torch.tensor([[0.4], [0.6]]))
    torch.testing.assert_close(vector.anchor, torch.tensor([0.2, 0.2, 0.7, 0.7]))


def test_a_shared_vector_has_one_coefficient_per_expert():
    vector = CoefficientVector(Layout({"a": 1, "b": 1}, [0.2, 0.7], shared=True))
    assert vector.raw.numel() == 2
    vector.raw.data += 1
    values = vector.by_name()
    assert torch.equal(values["a"], values["b"])
    assert torch.equal(values["a"].flatten(), vector())
