"""Experts that would merge to nothing are found before the work begins, and honest ones are not."""

from __future__ import annotations

import shutil

import pytest
import torch

from expert_merging.likeness import changes_line, find_likeness, likeness_warnings
from expert_merging.plan import make_plan
from tests.checkpoints import write_checkpoint
from tests.command import flags, merge

SHAPES = {"layers.0.weight": (100, 80), "layers.1.weight": (60, 40), "layers.1.bias": (30,), "norm.weight": (9,)}


def weights(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def tuned(tensors, change, seed=1):
    """Weights that are changed by so much, relative to their size."""
    return {name: tensor + change * weights(seed)[name] for name, tensor in tensors.items()}


@pytest.fixture
def base(tmp_path):
    return write_checkpoint(tmp_path / "base", weights(0))


def told(base, **experts):
    plan = make_plan(base, experts, [".*norm.*"])
    found = find_likeness(plan)
    return changes_line(found), likeness_warnings(plan, found)


@pytest.mark.parametrize(("change", "shown"), [(0.001, "0.1 %"), (0.013, "1.3 %"), (0.4, "40 %"), (1.2, "120 %")])
def test_a_fine_tune_is_told_by_its_relative_change(base, tmp_path, change, shown):
    expert = write_checkpoint(tmp_path / "a", tuned(weights(0), change))
    lines, warnings = told(base, A=expert)
    estimate = float(lines[0].removeprefix("relative change by experts, from samples: A ").removesuffix(" %")) / 100
    assert estimate == pytest.approx(change, rel=0.05)
    assert lines[0].endswith(shown) or change > 0.1
    assert warnings == []


def test_an_estimate_is_near_the_truth_where_tensors_change_differently(tmp_path):
    tensors = {"w": torch.randn(300, 300), "v": 0.1 * torch.randn(50, 50)}
    changed = {"w": tensors["w"] * 1.02, "v": tensors["v"] * 1.5}
    plan = make_plan(write_checkpoint(tmp_path / "base", tensors), {"A": write_checkpoint(tmp_path / "a", changed)}, [])
    squares = [sum(float(part.square().sum()) for part in parts.values()) for parts in (tensors,)]
    difference = sum(float((changed[name] - tensors[name]).square().sum()) for name in tensors)
    assert find_likeness(plan)["A"].change == pytest.approx((difference / squares[0]) ** 0.5, rel=0.05)


def test_little_is_read_of_large_tensors(tmp_path, monkeypatch):
    folders = [
        write_checkpoint(tmp_path / name, {"w": torch.full((2000, 1000), shift)})
        for shift, name in ((1.0, "b"), (1.5, "a"))
    ]
    plan = make_plan(folders[0], {"A": folders[1]}, [])
    read = []
    whole = type(plan.base).read
    monkeypatch.setattr(
        type(plan.base),
        "read",
        lambda self, name, start=0, stop=None: read.append(stop - start) or whole(self, name, start, stop),
    )
    assert find_likeness(plan)["A"].change == pytest.approx(0.5)
    assert sum(read) <= 2 * 2048


def test_an_expert_that_is_the_base_is_told(base, tmp_path):
    expert = shutil.copytree(base, tmp_path / "copy")
    lines, (warning,) = told(base, A=expert, B=write_checkpoint(tmp_path / "b", tuned(weights(0), 0.1)))
    assert lines[0].startswith("relative change by experts, from samples: A 0 %, B 1")
    assert warning == (
        "expert A has the base's values in all 4126 sampled entries of the merged tensors: it adds nothing; is "
        f"{expert} the right folder?"
    )


def test_what_is_excluded_makes_no_expert(tmp_path):
    base = {"w": torch.ones(4, 4), "norm.weight": torch.ones(4)}
    folders = [
        write_checkpoint(tmp_path / "base", base),
        write_checkpoint(tmp_path / "a", {**base, "norm.weight": torch.zeros(4)}),
    ]
    _, (warning,) = told(folders[0], A=folders[1])
    assert warning.startswith("expert A has the base's values in every merged tensor: it adds nothing;")


def test_an_expert_that_is_given_twice_is_told(base, tmp_path):
    expert = write_checkpoint(tmp_path / "a", tuned(weights(0), 0.1))
    copy = shutil.copytree(expert, tmp_path / "copy")
    expected = (
        "experts {} and {} have the same values in all 4126 sampled entries of the merged tensors: what they have "
        "learned counts twice; give each expert once"
    )
    other = write_checkpoint(tmp_path / "b", tuned(weights(0), 0.1, seed=2))
    assert told(base, A=expert, B=expert, C=other)[1] == [expected.format("A", "B")]
    assert told(base, A=expert, C=other, B=copy)[1] == [expected.format("A", "B")]


def test_an_expert_that_is_the_base_twice_is_told_as_the_base_alone(base):
    _, warnings = told(base, A=base, B=base)
    assert [warning.split(" has")[0] for warning in warnings] == ["expert A", "expert B"]


@pytest.mark.parametrize("factor", [1.0, 0.1, 5.0])
def test_a_model_of_another_base_is_told(base, tmp_path, factor):
    other = {name: factor * tensor for name, tensor in weights(5).items()}
    expert = write_checkpoint(tmp_path / "a", other)
    _, (warning,) = told(base, A=expert)
    assert warning.startswith("expert A is hardly related to the base (the cosine of their weights is ")
    assert ", and near 1 for a fine-tune): is it an expert of this base?" in warning
    assert warning.endswith("For models of different origin, there is --align_experts")
    plan = make_plan(base, {"A": expert}, [".*norm.*"])
    assert likeness_warnings(plan, find_likeness(plan), aligned=True) == []


def test_few_numbers_tell_no_relation(tmp_path):
    base = write_checkpoint(tmp_path / "base", {"w": torch.ones(4, 4)})
    assert told(base, A=write_checkpoint(tmp_path / "a", {"w": -torch.ones(4, 4)})) == (
        ["relative change by experts, from samples: A 200 %"],
        [],
    )


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_left_to_the_merge(base, tmp_path, number):
    expert = weights(3)
    expert["layers.1.bias"][0] = number
    assert told(base, A=write_checkpoint(tmp_path / "a", expert))[0] == []


def test_a_base_of_zeros_has_no_relative_change(tmp_path):
    base = write_checkpoint(tmp_path / "base", {"w": torch.zeros(4, 4), "v": torch.zeros(0, 4)})
    expert = write_checkpoint(tmp_path / "a", {"w": torch.ones(4, 4), "v": torch.zeros(0, 4)})
    assert told(base, A=expert) == ([], [])


def test_types_may_differ(tmp_path):
    base = write_checkpoint(tmp_path / "base", weights(0, torch.bfloat16))
    lines, warnings = told(
        base, A=write_checkpoint(tmp_path / "a", weights(0, torch.bfloat16) | {"norm.weight": torch.ones(9)})
    )
    assert lines == ["relative change by experts, from samples: A 0 %"]
    assert len(warnings) == 1


def test_plan_and_log_say_it(base, tmp_path, capsys):
    expert = write_checkpoint(tmp_path / "a", tuned(weights(0), 0.1))
    command = ("--method", "weight_average", *flags(base, A=expert, B=expert), "--output_path", tmp_path / "out")
    assert merge(*command, "--dry_run") == 0
    dry = capsys.readouterr().out
    assert "\nrelative change by experts, from samples: A " in dry
    assert "\nwarning: experts A and B have the same values in all 4096 sampled entries" in dry
    assert merge(*command) == 0
    (log,) = (tmp_path / "out").glob("*/*/merge.log")
    assert " INFO relative change by experts, from samples: A " in log.read_text()
    assert " warning: experts A and B have the same values" in log.read_text()
