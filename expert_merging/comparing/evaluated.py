"""What is told of models that were measured: tables, whose lead is more than chance, and files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from expert_merging.comparing.intervals import Paired, compare_paired
from expert_merging.comparing.scores_file import Scores, SetScore, TaskScore, as_json
from expert_merging.comparing.scoring import mean_score
from expert_merging.console import say, table_of_numbers
from expert_merging.errors import one_line
from expert_merging.writing import write_atomically

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from expert_merging.questions.labelled import Question
    from expert_merging.running.answers import Answered

# A model's scores by set, for each model by its label.
Found = dict[str, dict[str, SetScore]]


def paired(found: Found, name: str) -> dict[tuple[str, str], Paired]:
    """Every two models on the tasks of a set in which both have answered the same questions."""
    having = {label: sets[name] for label, sets in found.items() if name in sets}
    result = {}
    for (first, one), (second, other) in itertools.combinations(having.items(), 2):
        shared = [
            task for task in sorted(one.tasks) if _questions_of(one, task) == _questions_of(other, task) is not None
        ]
        if shared:
            result[first, second] = compare_paired(_points_of(one, shared), _points_of(other, shared))
    return result


def _points_of(score: SetScore, tasks: Sequence[str]) -> list[float]:
    return [point for task in tasks for point in score.tasks[task].correct]


def _questions_of(score: SetScore, task: str) -> tuple[str, int] | None:
    """What tells the questions of a task from others; None where single ones are not known."""
    own = score.tasks.get(task)
    return (own.questions, len(own.correct)) if own and own.correct else None


def show(found: Found, console: Console) -> None:
    """Print a table for each set, and which differences are more than chance."""
    for name in dict.fromkeys(name for sets in found.values() for name in sets):
        having = {label: sets[name] for label, sets in found.items() if name in sets}
        console.print(_table(name, having), soft_wrap=False)  # which would cut names instead of folding them
        best = max(having, key=lambda label: having[label].mean)  # shares, where single questions are known
        for other in having:
            pair = paired({label: found[label] for label in (best, other)}, name).get((best, other))
            if pair is not None:
                say(console, _in_words(best, other, pair))


def _in_words(best: str, other: str, pair: Paired) -> str:
    """What the test says of the best model and another one."""
    p = "p < 0.001" if pair.p < 0.001 else f"p = {pair.p:.3f}"
    return (
        f"{best} is right where {other} is wrong on {pair.first_only} of {pair.count} questions, and wrong where it is "
        f"right on {pair.second_only}: {p} (McNemar's exact test)"
    )


def _table(name: str, scores: Mapping[str, SetScore]) -> Table:
    """Means and intervals, a row for each model."""
    first = next(iter(scores.values()))
    metric = first.metric.replace("_", " ")
    tasks = list(dict.fromkeys(task for score in scores.values() for task in score.tasks))
    rows = [
        [label, *(_cell(score, score.tasks.get(task)) for task in tasks), _cell(score, mean_score(score))]
        for label, score in scores.items()
    ]
    told = f"{metric} in %, with 95 % intervals" if first.higher_is_better else f"{metric}, lower is better"
    return table_of_numbers(f"{one_line(name)}: {told}", [*tasks, "mean"], rows)


def _cell(own: SetScore, score: TaskScore | None) -> str:
    if score is None:
        return ""
    bounds = "" if score.low is None or score.high is None else f"\n{own.show(score.low)} to {own.show(score.high)}"
    return f"{own.show(score.mean)}{bounds}"


def write_scores(file: Path, folders: Mapping[str, Path], found: Found) -> None:
    """Write scores of all models, and the tests between every two, as JSON.

    Args:
        file: where to.
        folders: of the models.
        found: their scores.
    """
    names = dict.fromkeys(name for sets in found.values() for name in sets)
    content = {
        "models": {
            label: {"folder": str(folder), **as_json(Scores(found[label]))} for label, folder in folders.items()
        },
        "paired": {
            name: [
                {"first": first, "second": second, **vars(pair)}
                for (first, second), pair in paired(found, name).items()
            ]
            for name in names
        },
    }
    write_atomically(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_answers(file: Path, questions: Sequence[Question], answers: Mapping[str, Sequence[Answered]]) -> None:
    """Write every question with what is right and what each model has answered, as JSON."""
    content = [
        {
            "task": question.task,
            "question": question.sample.question,
            **({"pictures": list(map(str, question.sample.images))} if question.sample.images else {}),
            "right": list(question.answers),
            "answers": {
                label: {"text": own[number].text, "points": own[number].points} for label, own in answers.items()
            },
        }
        for number, question in enumerate(questions)
    ]
    write_atomically(file, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
