"""Results of VLMEvalKit: a folder of a model, and in it a table of scores for each data set.

Files are called ``MODEL_DATASET...``. Newer versions put them into a folder for each evaluation (``T20260818_G...``),
with links to the newest beside them. ``_acc`` has the mean over all questions, ``_JUDGE_score`` numbers by skill or
subject, and ``_results``, which newer versions write for questions without a judge, the points of each question.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from expert_merging.checkpoints.fingerprints import of_text
from expert_merging.comparing.columns import VLMEVALKIT, Column, Measured
from expert_merging.comparing.intervals import interval
from expert_merging.comparing.scores_file import TaskScore
from expert_merging.comparing.scoring import task_score
from expert_merging.documents import read_json, read_text, resolved
from expert_merging.errors import InputError, first_of

Rows: TypeAlias = Sequence[Mapping[str, Any]]

_ADVICE = "let VLMEvalKit write it again"
_EVALUATION = re.compile(r"T\d{8}_.*")
_SCORES = re.compile(r"(.+)_(acc|score)\.(?:csv|json)")
_FORMS = ("xlsx", "tsv", "json")
# What a table may have unpacked, far above those of 20,000 questions with their answers.
_LARGEST = 1 << 30
_NEAR = 1e-6


def read_vlmevalkit(folder: Path) -> Measured:
    """Scores by column; nothing where the folder holds none of VLMEvalKit's.

    Args:
        folder: of a model, or of one of its evaluations.

    Raises:
        InputError: a file cannot be read or has another form, or there are scores by several judges.
    """
    found, named = Measured(), _name_of(folder)
    if named is None:
        return found
    for place in (folder, *sorted((one for one in folder.iterdir() if _EVALUATION.fullmatch(one.name)), reverse=True)):
        own, others = _score_files(place, named)
        for dataset, files in own.items():
            column = VLMEVALKIT[dataset]
            if column.name in found.tasks:
                continue  # measured again later
            if len(files) > 1:
                raise InputError(
                    f"{place} has scores on {dataset} by several judges: {first_of([file.name for file in files], 5)}; "
                    "move all but one away"
                )
            found.tasks[column.name] = _score(column, files[0], place / f"{named}_{dataset}_results")
        found.add(Measured(left_out=others))
    return found


def _name_of(folder: Path) -> str | None:
    """The model's name, with which its files begin; None where they do not begin with a folder's name."""
    whole = resolved(folder)
    names = [path.name for path in folder.rglob("*") if _SCORES.fullmatch(path.name)]
    return next(
        (one for one in (whole.name, whole.parent.name) if any(name.startswith(f"{one}_") for name in names)), None
    )


def _score_files(folder: Path, model: str) -> tuple[dict[str, list[Path]], list[str]]:
    """The files of scores by data set, and names of those that no column is made of."""
    known, others = defaultdict[str, list[Path]](list), []
    for file in sorted(folder.glob("*_*")):
        found = _SCORES.fullmatch(file.name.removeprefix(f"{model}_"))
        if found is None or not file.name.startswith(f"{model}_") or not file.is_file():
            continue
        dataset = _dataset(found[1], found[2])
        if dataset is None:
            others.append(found[1])
        else:
            known[dataset].append(file)
    return known, others


def _dataset(name: str, kind: str) -> str | None:
    """The known data set of a file of scores, whose name a judge's may follow."""
    for dataset, column in VLMEVALKIT.items():
        if (kind == "score") == bool(column.parts) and (
            name == dataset or (column.parts and name.startswith(f"{dataset}_"))
        ):
            return dataset
    return None


def _score(column: Column, file: Path, questions: Path) -> TaskScore:
    """A column's score.

    Args:
        column: the column.
        file: the table of scores.
        questions: the table with points of each question, without its ending.
    """
    rows = _table(file)
    try:
        if column.parts:
            return _mean_of_parts(column, file, rows)
        mean = _percent(rows[0]["Overall"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise InputError(f"{file} does not hold scores as VLMEvalKit writes them; {_ADVICE}") from None
    points = next((file for form in _FORMS if (file := questions.with_name(f"{questions.name}.{form}")).exists()), None)
    return TaskScore(mean) if points is None else _with_points(mean, points)


def _mean_of_parts(column: Column, file: Path, rows: Rows) -> TaskScore:
    """The mean of a column's parts, each counted once, with its interval where no question is in two of them."""
    own = {str(row.get("Task&Skill", row.get("Subject"))).strip().lower(): row for row in rows}
    missing = [part for part in column.parts if part not in own]
    if missing:
        raise InputError(f"{file} lacks {', '.join(missing)}; {column.name} is the mean of {', '.join(column.parts)}")
    mean = sum(_percent(own[part]["acc"]) for part in column.parts) / len(column.parts)
    if "Subject" not in rows[0]:
        return TaskScore(mean)
    counts = [(int(own[part]["hit"]), int(own[part]["tot"])) for part in column.parts]
    low, high = interval(*([1.0] * hits + [0.0] * (count - hits) for hits, count in counts))
    return TaskScore(mean, 100 * low, 100 * high, sum(count for _, count in counts))


def _with_points(mean: float, file: Path) -> TaskScore:
    """A score with its questions' points, where their mean is the score."""
    rows = _table(file)
    try:
        points = [float(row["eval_score"]) for row in rows]
        digest = of_text(json.dumps([[str(row[name]) for name in ("index", "question", "answer")] for row in rows]))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{file} does not hold points of questions as VLMEvalKit writes them; {_ADVICE}") from None
    plain = bool(points) and all(0 <= point <= 1 for point in points)
    same = plain and math.isclose(100 * sum(points) / len(points), mean, abs_tol=_NEAR)
    return task_score(points, digest) if same else TaskScore(mean)


def _percent(value: Any) -> float:
    """A number from 0 to 100.

    Raises:
        ValueError, TypeError: it is something else.
    """
    found = float(value)
    if not 0 <= found <= 100:
        raise ValueError(value)
    return found


def _table(file: Path) -> Rows:
    """The rows of a table, each by the names of the columns.

    Raises:
        InputError: the file cannot be read, or is no table.
    """
    if file.suffix == ".xlsx":
        return _workbook(file)
    if file.suffix == ".json":
        content = read_json(file, advice=_ADVICE)
        if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
            raise InputError(f"{file} is no list of rows; {_ADVICE}")
        return content
    try:
        text = io.StringIO(read_text(file, advice=_ADVICE), newline="")
        return list(csv.DictReader(text, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True))
    except csv.Error as error:
        raise InputError(f"{file} is no table ({error}); {_ADVICE}") from None


def _workbook(file: Path) -> Rows:
    """The rows of a workbook's first sheet."""
    try:
        import openpyxl
        from openpyxl.utils.exceptions import InvalidFileException
    except ImportError:
        raise InputError(
            f"{file} is read with openpyxl; pip install openpyxl, or run VLMEvalKit with PRED_FORMAT=tsv"
        ) from None
    try:
        with zipfile.ZipFile(file) as packed:
            if sum(member.file_size for member in packed.infolist()) > _LARGEST:
                raise InputError(f"{file} unpacks to more than {_LARGEST >> 20} MiB, too many for a table")
        sheet = openpyxl.load_workbook(file, read_only=True, data_only=True).worksheets[0]
        head, *rows = sheet.iter_rows(values_only=True)
    except (
        *(zipfile.BadZipFile, zlib.error, InvalidFileException, SyntaxError),
        *(OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError),
    ):
        raise InputError(f"{file} is no workbook; {_ADVICE}") from None
    names = [str(name) for name in head]
    return [dict(zip(names, row, strict=False)) for row in rows]
