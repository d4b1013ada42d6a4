"""From the points of questions to scores with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from expert_merging.comparing.intervals import interval
from expert_merging.comparing.scores_file import SetScore, TaskScore
from expert_merging.questions.labelled import Question, by_task, digest_of

if TYPE_CHECKING:
    from expert_merging.running.answers import Answered

# Percentage points by which two sums of the same numbers may differ.
_NEAR = 1e-6


def points_by_task(questions: Sequence[Question], answers: Iterable[Answered]) -> dict[str, list[float]]:
    """Points of the answers to each task's questions, in [0, 1], in the order of the questions."""
    found: dict[str, list[float]] = {}
    for question, answer in zip(questions, answers, strict=True):
        found.setdefault(question.task, []).append(answer.points)
    return found


def digests_of(questions: Sequence[Question]) -> dict[str, str]:
    """A digest of each task's questions, pictures and answers."""
    return {task: digest_of(own) for task, own in by_task(questions).items()}


def set_score(
    questions: Sequence[Question], points: Mapping[str, Sequence[float]], digests: Mapping[str, str]
) -> SetScore:
    """What a model reaches on a set of questions, in percent.

    Args:
        questions: all of them.
        points: as `points_by_task` gives them.
        digests: as `digests_of` gives them.
    """
    kinds = {question.kind for question in questions}
    tasks = {task: task_score(own, digests[task]) for task, own in points.items()}
    return SetScore(tasks, kinds.pop() if len(kinds) == 1 else "accuracy")


def task_score(points: Sequence[float], questions: str = "") -> TaskScore:
    """A task's score in percent with its interval.

    Args:
        points: of each question, in [0, 1].
        questions: digest of the questions.
    """
    low, high = interval(points)
    return TaskScore(100 * sum(points) / len(points), 100 * low, 100 * high, len(points), tuple(points), questions)


def mean_score(score: SetScore) -> TaskScore:
    """A set's mean, with its interval where it is the plain mean over tasks, and each task's that of its points."""
    points = [task.correct for task in score.tasks.values()]
    if not points or not all(points):
        return TaskScore(score.mean)
    means = [100 * sum(own) / len(own) for own in points]
    plain = all(abs(mean - task.mean) < _NEAR for mean, task in zip(means, score.tasks.values(), strict=True))
    if not plain or abs(sum(means) / len(means) - score.mean) > _NEAR:
        return TaskScore(score.mean)
    low, high = interval(*points)
    return TaskScore(score.mean, 100 * low, 100 * high)
