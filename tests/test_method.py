"""What a method is, how it is entered into the table, and how it is found."""

from __future__ import annotations

import pytest
import torch

from expert_merging.catalogue import all_methods, find_method
from expert_merging.errors import InputError
from expert_merging.method import (
    KEEPS_SINGLE,
    Method,
    Preparation,
    Prepare,
    accepted,
    coarsest,
    enter_method,
    modified,
    register,
)
from expert_merging.parts import Part

PART = Part.whole("a.weight", (2, 3))
BASE = torch.zeros(2, 3)
GIVEN = torch.arange(12.0).view(2, 2, 3)


@pytest.fixture
def table(monkeypatch):
    """A table whose entries are forgotten after the test."""
    table = dict(all_methods())
    for name in ("method", "catalogue"):
        monkeypatch.setattr(f"expert_merging.{name}.TABLE", table)


@pytest.mark.usefixtures("table")
def test_a_registered_method_is_found_by_name_and_alias():
    @register(name="nothing", aliases=("nil",), unit="entries")
    def give_nothing(task_vectors, *, factor: float = 0.0):
        """Merge to nothing.

        Args:
            task_vectors: task vectors.
            factor: what it is multiplied by.
        """
        return task_vectors[0] * factor

    assert find_method("nothing") is find_method("nil")
    method = find_method("nil")
    assert (method.name, method.summary, method.unit, method.needs) == ("nothing", "Merge to nothing.", "entries", ())
    assert method.merge is give_nothing
    reading = [method.reads_samples for method in all_methods().values()]
    assert reading == sorted(reading), "those that read samples come last"
    with pytest.raises(InputError, match=r"^no method named 'nill'. Did you mean 'nil'\?$"):
        find_method("nill")


def test_dashes_count_as_underscores():
    assert find_method("task-arithmetic") is all_methods()["task_arithmetic"]


def test_an_unknown_method_is_answered_with_the_near_name():
    with pytest.raises(InputError, match=r"^no method named 'task-arithmetik'. Did you mean 'task_arithmetic'\?$"):
        find_method("task-arithmetik")
    with pytest.raises(InputError, match=r"^no method named 'x'. Known: .*task_arithmetic, .*weight_average.*$"):
        find_method("x")


def test_the_family_sets_only_the_defaults_left_to_it():
    family = {"scaling_coefficient": 0.1, "samples_per_task": 9}
    assert find_method("task_arithmetic").defaults(family) == {"scaling_coefficient": 0.1}
    assert find_method("weight_average").defaults(family) == {"scaling_coefficient": 1.0}
    assert find_method("task_arithmetic").defaults({}) == {"scaling_coefficient": 0.3}


def test_the_family_sets_defaults_of_single_methods():
    family = {"scaling_coefficient": 0.1, "weight_average.scaling_coefficient": 0.5}
    assert find_method("weight_average").defaults(family) == {"scaling_coefficient": 0.5}
    assert find_method("task_arithmetic").defaults(family) == {"scaling_coefficient": 0.1}
    assert find_method("iso").defaults(family) == {"scaling_coefficient": 1.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "needs cannot be 'thresholds'; known are base, experts, merged, part, seed"),
        ({"prepare": Prepare(lambda context: Preparation(), ("threshold",))}, "needs cannot be 'thresholds'"),
        ({"unit": "columns"}, "unit cannot be 'columns'; known are entries, matrix, rows, tensor"),
        ({"reads": frozenset({"labels"})}, "reads cannot be 'labels'; known are samples"),
        (
            {"promises": frozenset({"fast"})},
            "promises cannot be 'fast'; known are at_most_two, keeps_single, order_free",
        ),
        ({"family_defaults": ("density",)}, "family_defaults cannot be 'density'"),
    ],
)
def test_a_record_that_no_run_could_use_fails_at_registration(fields, message):
    def merge_(task_vectors, *, factor=1.0):
        return task_vectors[0]

    def merge_with_thresholds(task_vectors, thresholds):
        return task_vectors[0]

    plain = "thresholds" not in message
    with pytest.raises(TypeError, match=message):
        Method(
            "x", merge_ if plain else merge_with_thresholds, {}, "X.", needs=() if plain else ("thresholds",), **fields
        )


def test_parts_need_what_the_merge_needs():
    def merge_(task_vectors, seed):
        return task_vectors[0]

    with pytest.raises(TypeError, match="merge and parts must need the same, seed"):
        Method("x", merge_, {}, merge_, needs=("seed",), parts=lambda task_vectors: task_vectors)


def test_merge_and_preparation_are_given_the_options_that_they_name_or_all():
    options = {"density": 0.2, "scope": "global"}
    assert accepted(lambda given, *, density: 0, options) == {"density": 0.2}
    assert accepted(lambda given, **others: 0, options) == options
    assert accepted(lambda given: 0, options) == {}


def test_needs_are_given_by_name_in_any_order():
    seen = []

    def merge_(task_vectors, seed, base, found, part, experts):
        seen.extend([seed, base, found, part, experts])
        return task_vectors[0]

    prepare = Prepare(lambda context: Preparation(lambda: {"found": 7}), ("found",))
    method = Method("x", merge_, {}, merge_, needs=("seed", "base", "found", "part", "experts"), prepare=prepare)
    known = {"seed": 3, "experts": ("A", "B"), **method.prepared(None, {}).run()}
    method.rule(known, {})(GIVEN, PART, BASE)
    assert seen == [3, BASE, 7, PART, ("A", "B")]


@pytest.mark.parametrize(
    ("returned", "gives", "told"),
    [
        ({}, ("found",), "returns nothing, and was registered to give found"),
        ({"fond": 7}, ("found",), "returns fond, and was registered to give found"),
        ({"found": 7, "more": 1}, ("found",), "returns found, more, and was registered to give found"),
        ({"more": 1}, (), "returns more, and was registered to give nothing"),
        ({"found": 7, "made": {}}, ("found",), None),
    ],
)
def test_a_preparation_returns_what_it_was_registered_to_give(returned, gives, told):
    def merge_(task_vectors):
        """Merge."""

    prepare = Prepare(lambda context: Preparation(lambda: returned), gives)
    prepared = Method("x", merge_, {}, merge_, prepare=prepare).prepared(None, {})
    if told is None:
        assert prepared.run() == returned
        return
    with pytest.raises(TypeError, match=f"^method x: its preparation {told}$"):
        prepared.run()


@pytest.mark.parametrize(
    "part", [Part.whole("embed_tokens.weight", (2, 3)), Part.whole("a.bias", (6,)), Part.whole("a", (1, 2, 3))], ids=str
)
def test_what_is_no_matrix_gets_the_scaled_mean(part):
    def never(task_vectors, *, scaling_coefficient):
        raise AssertionError("matrices alone")

    method = Method("x", never, {}, never, unit="matrix", parts=never)
    options = {"scaling_coefficient": 3.0}
    assert method.rule({}, options)(GIVEN, part, BASE).equal(GIVEN.mean(0) * 3)
    assert method.parts_rule({}, options)(GIVEN, part, BASE).equal(GIVEN * 1.5)
    with pytest.raises(AssertionError, match="matrices alone"):
        method.rule({}, options)(GIVEN, PART, BASE)


def test_a_method_that_is_no_sum_has_no_parts():
    with pytest.raises(TypeError, match="method ties is no sum over the experts"):
        find_method("ties").parts_rule({}, {})


def test_the_coarsest_unit_contains_the_others():
    assert coarsest(["entries"]) == "entries"
    assert coarsest(["entries", "tensor", "matrix"]) == "tensor"
    assert coarsest(["matrix", "entries"]) == "matrix"


def test_modifiers_see_the_task_vectors_as_they_were_and_what_was_merged_so_far():
    def spoil(task_vectors):
        return task_vectors.mul_(0).sum(0) + 1

    def add_first(task_vectors, merged):
        first = task_vectors[0].clone()
        task_vectors.zero_()
        return merged + first

    method = Method("spoil", spoil, {}, spoil)
    modifier = Method("add", add_first, {}, add_first, needs=("merged",))
    assert modifier.is_modifier
    assert not method.is_modifier
    rules = [method.rule({}, {}), *[modifier.rule({}, {})] * 2]
    assert modified(rules, [(), (), ()])(GIVEN.clone(), PART, BASE).equal(1 + 2 * GIVEN[0])


def test_what_a_modifier_makes_anew_is_not_merged_before():
    done = []

    def step(name):
        return lambda _given, part, _base, merged=None: done.append(name) or (merged or ()) + (name,)

    rule = modified([step("a"), step("b"), step("c"), step("d")], [(), {PART.name}, {PART.name, "other"}, ()])
    assert rule(GIVEN, PART, BASE) == ("c", "d")
    assert rule(GIVEN, PART._replace(name="more"), BASE) == ("a", "b", "c", "d")
    assert done == ["c", "d", "a", "b", "c", "d"]


def test_a_modifier_of_matrices_leaves_what_is_none_as_it_is():
    modifier = Method("m", lambda given, merged: merged * 2, {}, find_method, needs=("merged",), unit="matrix").rule(
        {}, {}
    )
    assert modifier(GIVEN, Part.whole("a", (6,)), BASE, BASE + 1).equal(BASE + 1)
    assert modifier(GIVEN, PART, BASE, BASE + 1).equal(BASE + 2)


def test_a_method_of_rows_is_given_rows():
    """Of blocks, of whole tensors, and of tables of words, which are fed as vectors."""

    def longest(task_vectors, base, merged):
        assert task_vectors.shape == (2, 2, 3)
        assert base.shape == merged.shape == (2, 3)
        return task_vectors.amax(2, keepdim=True).expand(2, 2, 3).sum(0) + base + merged

    method = Method("longest", longest, {}, longest, needs=("base", "merged"), unit="rows")
    given = torch.tensor([[[1.0, 2.0, 3.0], [6.0, 5.0, 4.0]]] * 2)
    base = torch.ones(2, 3)
    expected = torch.tensor([[6.0] * 3, [12.0] * 3]) + 2
    for shape, part in [((2, 3), Part.whole("a", (2, 3))), ((6,), Part("a", (4, 3), 3, 9))]:
        made = method.rule({}, {})(given.view(2, *shape), part, base.view(shape), base.view(shape))
        assert made.equal(expected.view(shape))


@pytest.mark.parametrize(
    ("units", "unit"),
    [
        (("entries", "rows"), "rows"),
        (("entries", "matrix"), "matrix"),
        (("rows", "tensor"), "tensor"),
        (("rows", "matrix"), "tensor"),
    ],
)
def test_steps_are_fed_what_all_of_them_can_use(units, unit):
    assert coarsest(units) == coarsest(reversed(units)) == unit


@pytest.mark.usefixtures("table")
def test_a_method_may_be_described_by_another_function():
    def learns(context, *, rate: float = 0.5):
        """Learn.

        Args:
            context: the run.
            rate: how fast.
        """
        return Preparation(lambda: {"found": 1}, notes=("note",))

    enter_method(lambda task_vectors, found: task_vectors[0], described=learns, prepare=Prepare(learns, ("found",)))
    method = find_method("learns")
    assert (method.summary, method.needs, list(method.options)) == ("Learn.", ("found",), ["rate"])
    assert method.prepared(None, {"rate": 0.1}).unit == "tensor"


def test_comparable_methods_make_one_model_of_experts_and_samples():
    names = [name for name, method in all_methods().items() if method.merges_any_experts]
    assert {"ties", "expert_merging"} <= set(names)
    assert not {"svd_intermediate", "coefficients"} & set(names)
    assert find_method("ties").is_closed_form
    assert not find_method("expert_merging").is_closed_form
    assert KEEPS_SINGLE in find_method("svd").promises
