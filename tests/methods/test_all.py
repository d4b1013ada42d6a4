"""What every closed-form method promises; a method is tested by being registered."""

from __future__ import annotations

import importlib
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_merging.catalogue import all_methods, find_method
from expert_merging.errors import InputError
from expert_merging.method import AT_MOST_TWO, Method
from expert_merging.parts import Part
from expert_merging.processes import ALONE

METHODS = [method for method in all_methods().values() if method.is_closed_form]
# But router_mean, which changes nothing but routers (tests/mixtures/test_merged_routers.py).
MODIFIERS = [
    method
    for method in all_methods().values()
    if method.is_modifier and not method.reads_samples and method.name != "router_mean"
]
SHAPES = [(), (1,), (7,), (5, 3), (3, 5), (4, 4), (2, 3, 4), (1, 1), (0,), (0, 4), (4, 0)]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def those(trait: str) -> list[Method]:
    return [method for method in METHODS if trait in method.promises or trait == method.unit]


def each(methods: list[Method] = METHODS) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("method", methods, ids=lambda method: method.name)


def task_vectors(shape: tuple[int, ...], experts: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(experts, *shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def as_many_as(method: Method, shape: tuple[int, ...]) -> torch.Tensor:
    """Task vectors of three experts, or of as many as the method takes."""
    return task_vectors(shape, 2 if AT_MOST_TWO in method.promises else 3)


class OneTensor:
    """Passes over a model that is a single tensor, as `expert_merging.streaming.Passes` makes them over files."""

    def __init__(self, task_vectors: torch.Tensor, base: torch.Tensor | None = None) -> None:
        self.task_vectors = task_vectors
        self.base = base_weights(task_vectors) if base is None else base
        self.expert_names = tuple(f"expert {number}" for number in range(len(task_vectors)))
        self.sizes = {"weight": task_vectors[0].numel()}
        self.part = Part.whole("weight", tuple(task_vectors.shape[1:]))
        self.processes = ALONE

    def total(self, count, shape, title, only=None, sample=1, keep=lambda _: None):
        counts = torch.zeros(shape, dtype=torch.int64)
        stop = -(-self.part.elements // sample)
        if stop:
            entries = self.task_vectors.reshape(-1, self.part.elements)[:, :stop].clone()
            returned = count(entries, self.part.between(0, stop), counts)
            if returned is not None:
                keep(returned)
        return counts

    def sums(self, measure, shape, title):
        if not self.part.elements:
            return {"weight": torch.zeros(shape, dtype=torch.float64)}
        rows = self.task_vectors.reshape(-1, self.part.elements)
        found = measure(self.base.reshape(-1).clone(), rows.clone(), self.part).double().cpu()
        assert found.shape == shape
        return {"weight": found}

    def measure_wholes(self, measure, shape, title):
        return {"weight": measure(self.task_vectors.clone(), self.part).double().cpu()} if self.part.elements else {}


def base_weights(given: torch.Tensor) -> torch.Tensor:
    """Weights of the base, about ten times as large as the task vectors."""
    return torch.randn(given.shape[1:], generator=torch.Generator().manual_seed(7)).to(given.device)


def rule_for(method: Method, given: torch.Tensor, *, base: torch.Tensor | None = None, **options: object):
    """The method's rule for a model that is one tensor, and the part that is all of it."""
    base = base_weights(given) if base is None else base
    defaults = {name: option.default for name, option in method.options.items()}
    chosen = {**defaults, **{name: value for name, value in options.items() if name in defaults}}
    passes = OneTensor(given, base)
    context = SimpleNamespace(passes=passes, plan=SimpleNamespace(experts=dict.fromkeys(passes.expert_names)), seed=3)
    known = {"seed": 3, "experts": passes.expert_names, **method.prepared(context, chosen).run()}
    rule, flat = method.rule(known, chosen), base.reshape(-1)

    def apply_to(task_vectors: torch.Tensor, part: Part, *merged: torch.Tensor) -> torch.Tensor:
        return rule(task_vectors, part, flat[part.start : part.stop].view(task_vectors.shape[1:]), *merged)

    return apply_to, passes.part


def apply(method: Method, given: torch.Tensor, **options: object) -> torch.Tensor:
    rule, part = rule_for(method, given, **options)
    result = rule(given.clone(), part)
    assert isinstance(result, torch.Tensor)
    return result


@each()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("experts", [1, 2, 5])
def test_shape_and_type_are_kept(method, shape, experts):
    if experts > 2 and AT_MOST_TWO in method.promises:
        pytest.skip("it takes at most two")
    merged = apply(method, task_vectors(shape, experts))
    assert merged.shape == shape
    assert merged.dtype == torch.float32
    assert merged.isfinite().all()


@each()
@pytest.mark.parametrize("device", DEVICES)
def test_device_is_kept(method, device):
    assert apply(method, as_many_as(method, (4, 3)).to(device)).device.type == device


@each(those(AT_MOST_TWO))
def test_more_than_two_experts_are_refused_by_those_that_say_so(method):
    with pytest.raises(
        InputError, match=r"there are 3 \(expert 0, expert 1, expert 2\); choose with --expert NAME=PATH$"
    ):
        rule_for(method, task_vectors((4, 3)))


@each()
@pytest.mark.parametrize("shape", [(7,), (5, 3)], ids=str)
def test_the_result_has_memory_of_its_own(method, shape):
    given = as_many_as(method, shape)
    rule, part = rule_for(method, given)
    merged = rule(given, part)
    before = given.clone()
    merged.add_(1)
    assert given.equal(before), "the result shares memory with the task vectors"


@each()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zero_task_vectors_give_zero(method, shape):
    merged = apply(method, torch.zeros_like(as_many_as(method, shape)))
    assert merged.equal(torch.zeros(shape))


@each([method for method in METHODS if "scaling_coefficient" in method.options])
@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 3, 4)], ids=str)
def test_the_coefficient_zero_gives_the_base(method, shape):
    assert not apply(method, as_many_as(method, shape), scaling_coefficient=0.0).any()


@each([method for method in METHODS if "scaling_coefficient" in method.options])
@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("coefficient", [0.03, 0.4, 3.0])
def test_the_result_is_a_multiple_of_that_with_the_coefficient_one(method, shape, coefficient):
    """A search for the coefficient merges once."""
    given = as_many_as(method, shape)
    once = apply(method, given, scaling_coefficient=1.0)
    merged = apply(method, given, scaling_coefficient=coefficient)
    torch.testing.assert_close(merged, coefficient * once, rtol=1e-4, atol=1e-7)


@each()
def test_the_result_depends_on_every_expert(method):
    """Without this, a method that returns zeros would pass everything else."""
    given = as_many_as(method, (6, 5))
    merged = apply(method, given)
    for expert in range(len(given)):
        changed = given.clone()
        changed[expert] *= -3
        assert not apply(method, changed).allclose(merged)


@each(those("keeps_single"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_expert_with_coefficient_one_is_that_expert(method, shape):
    given = task_vectors(shape, experts=1)
    torch.testing.assert_close(apply(method, given, scaling_coefficient=1.0), given[0], rtol=1e-4, atol=1e-6)


@each(those("order_free"))
@pytest.mark.parametrize("order", [[1, 0, 2], [2, 0, 1], [2, 1, 0]], ids=str)
def test_the_order_of_experts_does_not_matter(method, order):
    given = task_vectors((6, 5))
    torch.testing.assert_close(apply(method, given[order]), apply(method, given), rtol=1e-4, atol=1e-6)


@each(those("entries"))
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 1000), max_size=4))
def test_blocks_give_the_bytes_of_the_whole(method, cuts):
    given = as_many_as(method, (1000,))
    bounds = sorted({0, *cuts, 1000})
    rule, part = rule_for(method, given)
    blocks = [rule(given[:, start:stop].clone(), part.between(start, stop)) for start, stop in pairwise(bounds)]
    assert torch.cat(blocks).equal(apply(method, given))


@each(those("rows"))
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=4))
def test_blocks_of_rows_give_the_bytes_of_the_whole(method, cuts):
    given = as_many_as(method, (40, 25))
    bounds = [25 * row for row in sorted({0, *cuts, 40})]
    rule, part = rule_for(method, given)
    blocks = [
        rule(given.flatten(1)[:, start:stop].clone(), part.between(start, stop)) for start, stop in pairwise(bounds)
    ]
    assert torch.cat(blocks).equal(apply(method, given).flatten())


@each(those("entries"))
def test_the_shape_does_not_matter_to_an_elementwise_method(method):
    given = as_many_as(method, (6, 5))
    assert apply(method, given).flatten().equal(apply(method, given.flatten(1)))


@each(those("matrix"))
@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5), (0, 4)], ids=str)
def test_a_method_for_matrices_gives_other_tensors_the_scaled_mean(method, shape):
    given = task_vectors(shape)
    torch.testing.assert_close(apply(method, given, scaling_coefficient=0.5), given.mean(0) * 0.5)


@each([method for method in all_methods().values() if method.parts is not None])
@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (3, 5), (4, 4), (2, 3, 4), (0, 4)], ids=str)
@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("coefficient", [1.0, 0.3])
def test_what_the_experts_add_sums_to_the_result(method, shape, experts, coefficient):
    given = task_vectors(shape, experts)
    if experts > 2:
        given[1] = 0
        given[-1] = given[0] * 2
    options = {name: option.default for name, option in method.options.items()} | {"scaling_coefficient": coefficient}
    parts = method.parts_rule({}, options)(given.clone(), Part.whole("weight", shape), torch.zeros(shape))
    assert parts.shape == given.shape
    assert parts.dtype == torch.float32
    merged = apply(method, given, scaling_coefficient=coefficient)
    torch.testing.assert_close(parts.sum(0), merged, rtol=1e-4, atol=1e-5)


@each([method for method in all_methods().values() if method.parts is not None])
def test_what_an_expert_adds_is_nothing_where_it_has_not_changed(method):
    given = task_vectors((5, 3))
    given[1] = 0
    options = {name: option.default for name, option in method.options.items()}
    assert method.parts_rule({}, options)(given, Part.whole("weight", (5, 3)), torch.zeros(5, 3))[1].abs().max() < 1e-6


@each()
@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 3, 4)], ids=str)
def test_the_same_inputs_give_the_same_bytes(method, shape):
    torch.manual_seed(1)
    first = apply(method, as_many_as(method, shape))
    torch.manual_seed(2)
    assert apply(method, as_many_as(method, shape)).equal(first)


@each()
def test_a_merge_leaves_the_global_random_state_alone(method):
    before = torch.get_rng_state()
    apply(method, as_many_as(method, (5, 3)))
    assert torch.get_rng_state().equal(before)


# What every modifier promises that needs no samples.


def improve(modifier: Method, given: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
    rule, part = rule_for(modifier, given)
    return rule(given.clone(), part, merged.clone())


@each(MODIFIERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("experts", [2, 5])
@pytest.mark.parametrize("device", DEVICES)
def test_a_modifier_keeps_shape_type_and_device(method, shape, experts, device):
    given = task_vectors(shape, experts).to(device)
    improved = improve(method, given, given.mean(0))
    assert improved.shape == shape
    assert improved.dtype == torch.float32
    assert improved.device.type == device
    assert improved.isfinite().all()


@each(MODIFIERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_modifier_makes_nothing_of_nothing(method, shape):
    zeros = torch.zeros(3, *shape)
    assert improve(method, zeros, zeros[0]).equal(zeros[0])


@each(MODIFIERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_experts_that_agree_in_all_leave_nothing_to_improve(method, shape):
    given = task_vectors(shape, 1).expand(3, *shape).contiguous()
    torch.testing.assert_close(improve(method, given, given[0]), given[0])


@each(MODIFIERS)
def test_a_modifier_changes_what_experts_do_not_agree_in(method):
    """Without this, one that does nothing would pass everything else."""
    given = task_vectors((6, 5))
    assert not improve(method, given, given.mean(0)).allclose(given.mean(0))


@each([method for method in MODIFIERS if method.unit == "entries"])
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 1000), max_size=4))
def test_a_modifier_s_blocks_give_the_bytes_of_the_whole(method, cuts):
    given, merged = task_vectors((1000,)), task_vectors((1000,)).mean(0)
    bounds = sorted({0, *cuts, 1000})
    rule, part = rule_for(method, given)
    blocks = [
        rule(given[:, start:stop].clone(), part.between(start, stop), merged[start:stop])
        for start, stop in pairwise(bounds)
    ]
    assert torch.cat(blocks).equal(improve(method, given, merged))


@pytest.mark.parametrize("method", all_methods().values(), ids=lambda method: method.name)
def test_summary_and_options_are_described(method):
    assert method.summary.endswith(".")
    assert len(method.summary) <= 120
    for option in method.options.values():
        assert option.help.endswith("."), option.name
        assert option.convert(option.default) == option.default, option.name


@pytest.mark.parametrize("method", all_methods().values(), ids=lambda method: method.name)
def test_options_left_to_the_family_exist(method):
    assert set(method.family_defaults) <= set(method.options)


@pytest.mark.parametrize("family", ["InternVL", "Mistral", "Qwen2VL"])
def test_defaults_of_families_belong_to_options(family):
    for name, value in importlib.import_module(f"{family}.backbone").BACKBONE.defaults.items():
        method, _, option = name.rpartition(".")
        users = (
            [find_method(method)] if method else [entry for entry in all_methods().values() if option in entry.options]
        )
        assert users
        for user in users:
            assert user.options[option].convert(value) == value, name
