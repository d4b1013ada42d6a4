"""Results of lm-evaluation-harness and of lmms-eval, which have one form, as scores.

A task has a number for each metric and each filter of its answers, such as ``exact_match,flexible-extract``. The score
is the first that is a share of right answers, unless another is asked for or usual. Points of questions are kept where
their mean is the score, as it is for accuracies and not for measures of a whole corpus.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from expert_merging.checkpoints.fingerprints import of_text
from expert_merging.comparing.columns import HARNESS, USUAL, Measured
from expert_merging.comparing.grounding import overlap
from expert_merging.comparing.intervals import interval
from expert_merging.comparing.scores_file import TaskScore, finite
from expert_merging.comparing.scoring import task_score
from expert_merging.documents import parse_json, read_json, read_text
from expert_merging.errors import InputError, excerpt, first_of

# What was asked in a task, one entry for each question and filter.
Samples = Sequence[Mapping[str, Any]]
_ADVICE = "let the harness write it again"
_RESULTS = re.compile(r"(?:results(?:_(.+))?|(.+)_results)\.json")
_SHARE = re.compile(r"ACC@(\d\.\d+)")
_NEAR = 1e-6


def scores_of(results: Mapping[str, Any], samples: Callable[[str], Samples], metric: str | None = None) -> Measured:
    """Scores by task or group; tasks of a group that has a score of its own are not told apart.

    Args:
        results: what the harness returns, or has written.
        samples: what was asked in a task.
        metric: name of the metric or filter that is taken where a task has it.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the results have another form.
    """
    numbers, inside = results["results"], results.get("group_subtasks", {})
    chosen = {
        name: _metric(own, results.get("higher_is_better", {}).get(name) or {}, (metric, USUAL.get(name)))
        for name, own in numbers.items()
    }
    hidden = {task for group, tasks in inside.items() if chosen.get(group) for task in tasks}
    found = Measured()
    for name, key in chosen.items():
        if key is not None and name not in hidden:
            parts = [_points(samples(task), key) for task in sorted(_leaves(name, inside))]
            found.tasks[_column(name)] = _score(finite(numbers[name][key]), key, parts)
        elif key is None and any("," in metric for metric in numbers[name]) and name not in hidden:
            found.left_out.append(name)
    return found


def _column(task: str) -> str:
    return HARNESS[task].name if task in HARNESS else task


def _metric(numbers: Mapping[str, Any], better: Mapping[str, Any], wanted: Sequence[str | None]) -> str | None:
    """The key of the number that is a task's score; None where none is a share of right answers."""
    usable = [
        key
        for key, value in numbers.items()
        if "," in key and "_stderr" not in key and better.get(key.partition(",")[0]) is not False and _is_share(value)
    ]
    preferred = (key for name in wanted if name for key in usable if name in (key, *key.split(",", 1)))
    return next(preferred, next(iter(usable), None))


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def _leaves(name: str, inside: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks that a group is made of, the name of a task itself."""
    return [leaf for task in inside.get(name) or () for leaf in _leaves(task, inside)] or [name]


def _points(samples: Samples, key: str) -> tuple[list[float], list[Any]]:
    """Points of each question in the order of the questions, and what tells the questions apart; nothing if unknown."""
    metric, _, kept = key.partition(",")
    own = {sample["doc_id"]: sample for sample in samples if sample.get("filter", kept) == kept and metric in sample}
    ordered = [own[number] for number in sorted(own)]
    points = [_point(metric, sample[metric]) for sample in ordered]
    known = [point for point in points if point is not None]
    return (known, [_question(sample) for sample in ordered]) if len(known) == len(points) else ([], [])


def _point(metric: str, value: Any) -> float | None:
    """Points of a question in [0, 1]; None where the metric is not of single questions."""
    if isinstance(value, int | float):
        return float(value) if 0 <= value <= 1 else None
    wanted = _SHARE.search(metric)
    if wanted and isinstance(value, Mapping):
        return float(overlap(value["bbox"], value["pred"]) >= float(wanted[1]))
    return None


def _question(sample: Mapping[str, Any]) -> Any:
    """What tells a question from others. lmms-eval's own digest is that of a picture's place in memory, too."""
    return sample["doc_hash"] if "target_hash" in sample else [sample["doc_id"], sample["target"], sample.get("input")]


def _score(share: float, key: str, parts: Sequence[tuple[list[float], list[Any]]]) -> TaskScore:
    """The score of a task or group in percent, with points and interval where its parts' points lead to it."""
    points = [own for own, _ in parts]
    whole = [point for own in points for point in own]
    if not all(points):
        return TaskScore(100 * share)
    digest = of_text(json.dumps([key, [questions for _, questions in parts]], default=str))
    if math.isclose(_mean(whole), share, abs_tol=_NEAR):
        return task_score(whole, digest)
    if math.isclose(_mean(map(_mean, points)), share, abs_tol=_NEAR):
        low, high = interval(*points)
        return TaskScore(100 * share, 100 * low, 100 * high, len(whole), tuple(whole), digest)
    return TaskScore(100 * share)


def _mean(numbers: Iterable[float]) -> float:
    values = list(numbers)
    return sum(values) / len(values)


def result_files(folder: Path) -> list[Path]:
    """Files of results in a folder and those inside it, the oldest first."""
    found = [file for file in folder.rglob("*results*.json") if _RESULTS.fullmatch(file.name)]
    return sorted((file for file in found if _is_result(file)), key=lambda file: _date(file) or "")


def _is_result(file: Path) -> bool:
    content = read_json(file, advice=_ADVICE)
    return isinstance(content, dict) and isinstance(content.get("results"), dict)


def _date(file: Path) -> str | None:
    """The part of a file's name that says when the results were written."""
    found = _RESULTS.fullmatch(file.name)
    return None if found is None else found[1] or found[2]


def read_results(files: Sequence[Path], metric: str | None = None) -> Measured:
    """Scores of files, of which a later one counts before earlier ones.

    Args:
        files: as `result_files` gives them.
        metric: as for `scores_of`.

    Raises:
        InputError: they are of several models, or a file cannot be read or has another form.
    """
    folders = sorted({file.parent for file in files})
    if len(folders) > 1:
        raise InputError(f"results of several models: {first_of(folders, 5)}; give the folder of one")
    found, known = Measured(), set[str]()
    for file in files:
        try:
            content = read_json(file, advice=_ADVICE)
            known.update(part for own in content["results"].values() for key in own for part in (key, *key.split(",")))
            found.add(scores_of(content, partial(_samples, file), metric))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError):
            raise InputError(f"{file} does not hold results as lm_eval and lmms-eval write them; {_ADVICE}") from None
    if metric is not None and metric not in known:
        raise InputError(f"no task has the metric {metric}; they have {', '.join(sorted(_metrics(known)))}")
    return found


def _metrics(keys: Iterable[str]) -> list[str]:
    return [key for key in keys if "," in key and "_stderr" not in key]


def _samples(results: Path, task: str) -> Samples:
    """What was asked in a task, from the file beside the results; nothing where it was not kept."""
    date = _date(results)
    names = [f"samples_{task}_{date}.jsonl", f"{date}_samples_{task}.jsonl"] if date else [f"samples_{task}.jsonl"]
    file = next((results.with_name(name) for name in names if results.with_name(name).is_file()), None)
    if file is None:
        return []
    found = []
    for number, line in enumerate(read_text(file, advice=_ADVICE).split("\n"), 1):
        if line.strip():
            found.append(_sample(file, number, line))
    return found


def _sample(file: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        content = parse_json(line)
    except ValueError as error:
        raise InputError(f"{file}, line {number} is not valid JSON ({error}); {_ADVICE}") from None
    if not isinstance(content, dict) or "doc_id" not in content:
        raise InputError(f"{file}, line {number} is no sample of a harness ({excerpt(content)}); {_ADVICE}")
    return content
