"""Compare runs with the base and the experts of a zoo, as a table or as numbers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_merging.documents import resolved
from expert_merging.errors import InputError
from expert_merging.run import Run
from zoo.belonging import refuse_others
from zoo.build import DESCRIPTION, MIXTURE
from zoo.evaluate import Scores, cached_exact_match, exact_match, require_model
from zoo.family import load_family

if TYPE_CHECKING:
    from rich.table import Table


def read_description(zoo: Path, family_name: str = "mistral", seed: int = 0) -> dict[str, Any]:
    """What ``zoo`` holds, which should be of a family and a seed.

    Raises:
        InputError: There is no zoo, or it is not complete; the message says which command builds it.
    """
    path = zoo / DESCRIPTION
    if not path.is_file():
        command = f"python -m zoo build {family_name} --seed {seed} --output {zoo}"
        raise InputError(f"there is no zoo in {zoo}; build it with: {command}")
    description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    missing = [name for name in _model_names(description).values() if not (zoo / name).is_dir()]
    if missing:
        command = f"python -m zoo build {description['family']} --seed {description['seed']} --output {zoo}"
        raise InputError(f"the zoo in {zoo} is not complete ({', '.join(missing)} missing); go on with: {command}")
    return description


def _model_names(description: Mapping[str, Any]) -> dict[str, str]:
    experts = {f"{task} expert": name for task, name in description["experts"].items()}
    return {"base": description["base"], **experts}


def model_folder(place: Path) -> Path:
    """The folder of the model of a run, or ``place`` itself when it is one.

    Raises:
        InputError: There is no model.
    """
    run = Run(place)
    folder = run.model if run.is_complete else place
    require_model(folder)
    return folder


def run_labels(places: Sequence[Path]) -> list[str]:
    """A short label for each run: its method, with the run's name where several runs share the method.

    A run is known by its model, which may be what is given; anything else is labelled with its own name.
    """
    runs = [Run.found_at(place) for place in places]
    names = [
        (run.method, run.name) if run else (resolved(place).name, "") for run, place in zip(runs, places, strict=True)
    ]
    shared = Counter(method for method, _ in names)
    labels = [f"{method} ({name})" if shared[method] > 1 and name else method for method, name in names]
    repeated = Counter(labels)
    return [str(place) if repeated[label] > 1 else label for label, place in zip(labels, places, strict=True)]


def evaluate(zoo: Path, runs: Sequence[Path], *, questions: int | None = None) -> dict[str, Scores]:
    """Exact match in percent for the base, the experts and ``runs``: ``{label: {task: percentage, "mean": ...}}``.

    Args:
        zoo: folder of the zoo.
        runs: folders of runs or models.
        questions: how many are asked of each task, all by default.

    Raises:
        InputError: The zoo or the model of a run is missing, or they are of different families.
    """
    description = read_description(zoo)
    backbone = load_family(description["family"]).backbone
    refuse_others(runs, zoo, backbone.name)
    folders = [model_folder(run) for run in runs]
    built = _model_names(description) | ({"mixture training": MIXTURE} if (zoo / MIXTURE).is_dir() else {})
    scores = {
        label: cached_exact_match(backbone, zoo / name, zoo, questions=questions) for label, name in built.items()
    }
    for label, folder in zip(run_labels(runs), folders, strict=True):
        scores[label] = exact_match(backbone, folder, zoo / "test", questions=questions)
    tasks = list(description["experts"])
    return {label: with_mean({task: found[task] for task in tasks}) for label, found in scores.items()}


def with_mean(scores: Scores) -> Scores:
    """The scores with their mean over tasks."""
    return {**scores, "mean": sum(scores.values()) / len(scores)}


def table(scores: Mapping[str, Scores]) -> Table:
    """The numbers of ``evaluate`` with one decimal, a row for each model."""
    from rich.table import Table

    columns = list(next(iter(scores.values())))
    result = Table("", title="Exact match on held-out questions (%)")
    for column in columns:
        result.add_column(column, justify="right")
    for label, found in scores.items():
        result.add_row(label, *(f"{found[column]:.1f}" for column in columns))
    return result
