"""One loop makes means by task of every score; distances are shares of the base's."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from expert_merging.errors import InputError
from expert_merging.questions.calibration import Sample
from expert_merging.running.objectives import alignment, distance, prediction_entropy
from expert_merging.running.scores import (
    ExpertDivergence,
    Score,
    mean_over_tasks,
    relative_to_base,
    require_distance,
    score_by_task,
)
from expert_merging.running.targets import Target
from Mistral.backbone import BACKBONE
from tests.checkpoints import BASE, EXPERTS
from tests.learned.training import make_trainer
from zoo.evaluate import ExactMatch


@dataclass(frozen=True)
class Length:
    """Letters of the question, and their square."""

    names: tuple[str, ...] = ("letters", "square")

    def measure(self, model, items):
        assert not torch.is_grad_enabled()
        return ((len(item.question), len(item.question) ** 2) for item in items)


def sample(task: str, question: str) -> Sample:
    return Sample(task, task, question, None, "0")


def test_samples_are_averaged_by_task_and_tasks_count_once():
    found = score_by_task(Length(), None, [sample("b", "xx"), sample("a", "xxx"), sample("b", "xxxx")])
    assert found == {"b": {"letters": 3, "square": 10}, "a": {"letters": 3, "square": 9}}
    assert list(found) == ["b", "a"]
    assert mean_over_tasks(found) == {"letters": 3, "square": 9.5}


def test_everything_that_is_measured_keeps_the_contract():
    scores: list[Score] = [
        alignment((1,), temperature=1.0, logits_weight=1.0, hidden_states_weight=1.0),
        prediction_entropy(),
        distance((1,)),
        ExactMatch(BACKBONE, None),
    ]
    assert all(score.names for score in scores)


@pytest.fixture(scope="module")
def targets(answered_zoo, tmp_path_factory) -> list[Target]:
    trainer = make_trainer(answered_zoo, tmp_path_factory.mktemp("run"), samples_per_task=2)
    return trainer._make_targets(torch.device("cpu"))


def load(folder):
    return BACKBONE.load_model(folder, torch.float32)


def test_an_objective_is_scored_as_it_is_trained(targets, answered_zoo):
    base = load(answered_zoo / BASE)
    objective = alignment((1,), temperature=2.0, logits_weight=3.0, hidden_states_weight=0.5)
    found = score_by_task(objective, base, targets)
    assert set(found) == set(EXPERTS)
    for task, numbers in found.items():
        own = [objective.losses(base, [target])[0] for target in targets if target.task == task]
        assert list(numbers.values()) == pytest.approx(torch.stack(own).mean(0).tolist())
        assert list(numbers) == ["logits", "hidden_states"]


def test_the_base_has_divergence_1_and_an_expert_0_on_its_task(targets, answered_zoo):
    base = load(answered_zoo / BASE)
    divergence = ExpertDivergence.beside(base, targets)
    assert divergence(base) == 1
    shares = divergence.by_task(load(answered_zoo / EXPERTS["Math"]))
    assert shares["Math"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for parameter in base.parameters():  # the live model's weights change in place
            parameter.mul_(1.1)
        expected = [
            sum(float(distance(()).losses(base, [target])[0, 0]) for target in targets if target.task == task) / 2
            for task in shares
        ]
    by_task, items = divergence.by_task_and_item(base)
    with torch.no_grad():
        moved = [float(distance(()).losses(base, [target])[0, 0]) for target in targets]
    before = load(answered_zoo / BASE)
    with torch.no_grad():
        at_first = [float(distance(()).losses(before, [target])[0, 0]) for target in targets]
    assert items == pytest.approx([now / then for now, then in zip(moved, at_first, strict=True)], rel=1e-4)
    wanted = [value / divergence.base[task]["divergence"] for task, value in zip(shares, expected, strict=True)]
    assert list(by_task.values()) == pytest.approx(wanted, rel=1e-5)
    assert divergence(base) == pytest.approx(sum(wanted) / 3, rel=1e-5)


def test_a_base_like_its_expert_is_no_measure():
    numbers = {"t": {"divergence": 0.5, "hidden": 0.0}}
    require_distance(numbers)
    assert relative_to_base(numbers, {"t": {"divergence": 2.0, "hidden": 0.0}}) == {
        "t": {"divergence": 0.25, "hidden": 0.0}
    }
    for nothing in (0.0, float("nan")):
        with pytest.raises(InputError, match="the base and the expert of t predict the same; there is nothing to meas"):
            require_distance({"t": {"divergence": nothing, "hidden": 1.0}})
