"""What a sweep is of: points, samples and questions, and the record of its scores.

Each point is checked as a run of its own, so its model is the one that the same flags of the ordinary command write.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from expert_merging.asking import Formats
from expert_merging.backbone import Backbone
from expert_merging.checks import Job, check
from expert_merging.comparing.grid import Point, label_of
from expert_merging.comparing.sweep_record import Record, Select
from expert_merging.console import Terminal
from expert_merging.context import Context
from expert_merging.errors import InputError, Problems
from expert_merging.options import Resolved, resolve
from expert_merging.progress import Progress
from expert_merging.questions.labelled import Question, digest_of
from expert_merging.run import Run
from expert_merging.running.options import SampleOptions
from expert_merging.running.prompts import Prompts
from expert_merging.running.samples import Samples, check_samples

RECORD = "sweep.json"


@dataclass(frozen=True)
class Planned:
    """A point whose checks have passed.

    Args:
        point: the values of the swept options.
        key: digest of all its settings.
        job: a run with these settings.
    """

    point: Point
    key: str
    job: Job


@dataclass(frozen=True)
class Scoring:
    """How points are scored.

    Args:
        select: what decides which is best.
        questions: labelled questions; none where divergence alone counts.
        halving: points that are left are the best of so many, by scores on so few of the samples; None to score all
            points on all samples.
    """

    select: Select = "divergence"
    questions: Sequence[Question] = ()
    halving: int | None = None

    def shares(self, points: int, samples: int) -> list[float]:
        """Shares of the samples by which points are scored, one round after the other (Jamieson and Talwalkar, 2016).

        Args:
            points: number of points.
            samples: samples of the task that has the fewest.
        """
        if self.halving is None:
            return [1.0]
        rounds = int(min(math.log(max(points, 1)), math.log(max(samples, 1))) / math.log(self.halving) + 1e-9)
        return [self.halving**-number for number in range(rounds, -1, -1)]


class Sweep:
    """One sweep: its points, its record, and the live model.

    Args:
        given: flags and options of a file that all points share, by name.
        points: the values of the swept options.
        backbone: the model family.
        scoring: how points are scored.
        parent: folder that the sweep's own is made in.
        name: the sweep's name; by default the same for all that can be compared.
        work: folder for what preparations write, which is removed; by default this process's own.

    Attributes:
        planned: the points to be scored.
        same: points whose settings are those of another one, with that.

    Raises:
        InputError: every problem of every point.
    """

    def __init__(
        self,
        given: Mapping[str, Any],
        points: Sequence[Point],
        backbone: Backbone,
        scoring: Scoring,
        parent: Path,
        name: str | None,
        work: Path | None = None,
    ) -> None:
        self.given, self.backbone, self.scoring = given, backbone, scoring
        # The folder's name depends on what is checked, so what checks write goes beside it.
        self.work = work or parent / f"work-{os.getpid()}"
        self.same: list[tuple[Point, Point]] = []
        self.planned = self._plan(points)
        self.first = self.planned[0].job
        self.asked = self._samples()
        self.formats = self._formats()
        description = self._description()
        own = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:8]
        self.folder = parent / (name or f"{backbone.name}-{own}")
        self.record = Record(self.folder / RECORD, description)

    def _plan(self, points: Sequence[Point]) -> list[Planned]:
        """Points with different settings, checked."""
        problems, planned = Problems(), dict[str, Planned]()
        faulty: dict[str, list[Point]] = {}
        terminal = Terminal(quiet=True)  # whose bars would stand inside the sweep's own
        try:
            for point in points:
                try:
                    # One job keeps the prompts of its samples, which may have pictures.
                    changes = {"output_path": str(self.work), "log_with": "none", "dry_run": bool(planned)}
                    resolved = self.resolved(point, **changes)
                    _check_kind(resolved)
                    own = {name: value for name, value in point.items() if name not in resolved.ignored}
                    key = _key_of(resolved)
                    if key in planned:
                        self.same.append((point, planned[key].point))
                    else:
                        planned[key] = Planned(own, key, check(resolved, self.backbone, terminal))
                except InputError as error:
                    for problem in error.problems:
                        faulty.setdefault(problem, []).append(point)
        finally:
            terminal.close()
        for problem, own_points in faulty.items():
            more = f" and {len(own_points) - 1} more" if len(own_points) > 1 else ""
            problems.add(f"point {label_of(own_points[0])}{more}: {problem}")
        problems.check()
        return list(planned.values())

    def resolved(self, point: Point, **changes: Any) -> Resolved:
        """The options of a point's run; what the sweep itself asks with is not given in vain."""
        found = resolve({**self.given, **point, **changes}, os.environ, self.backbone)
        asked_with = {*SampleOptions.__dataclass_fields__, *self.backbone.options}
        return replace(found, ignored=tuple(name for name in found.ignored if name not in asked_with))

    def _samples(self) -> Samples:
        """The samples that every point is scored by."""
        values = {name: self.given[name] for name in SampleOptions.__dataclass_fields__ if name in self.given}
        return check_samples(self.first.context, sample_options(values, self.backbone), batch_tokens=None)

    def _formats(self) -> Formats:
        """In whose words labelled questions are asked, after a check of the questions.

        Raises:
            InputError: one cannot be asked.
        """
        assert self.asked.prompts is not None  # noqa: S101  (checked samples have them)
        formats = replace(self.first.wording, asked=self.asked.prompts.formats).of_merged
        samples = [question.sample for question in self.scoring.questions]
        pictured = next((sample for sample in samples if sample.images), None)
        if pictured is not None and not self.backbone.takes_images:
            raise InputError(f"{pictured.place} has a picture, and {self.backbone.name} is a language model")
        context = self.first.context
        Prompts(context.backbone, context.plan.base, formats, keeps=False).check(samples)
        return formats

    def _description(self) -> dict[str, Any]:
        """What must be the same for scores to be compared."""
        return {
            "family": self.backbone.name,
            "checkpoints": self.first.description["checkpoints"],
            "loss_tokens": self.asked.options.loss_tokens,
            **self.asked.inputs,
            "questions": digest_of(self.scoring.questions) if self.scoring.questions else None,
        }

    def context(self, progress: Progress) -> Context:
        """What asks the experts."""
        self.share_files(self.first.context.run)
        return replace(self.first.context, progress=progress)

    def share_files(self, run: Run) -> None:
        """Let a point's run have the files that all of them share."""
        run.responses = self.folder / run.responses.name
        if run.targets is not None:
            run.targets = self.folder.parent.parent / run.targets.name


def _check_kind(resolved: Resolved) -> None:
    """Check that a point makes one model that the base's own can become.

    Raises:
        InputError: it does not.
    """
    if not resolved.method.writes_mirror_with(resolved.options):
        raise InputError(f"{resolved.method.name} writes something else than one model, so it cannot be swept")
    changed = [name for name in ("tokenizer", "embeddings") if resolved.general[name] is not None]
    if changed:
        raise InputError(f"--{changed[0]} makes a model with other words than the base's, so it cannot be swept")


def _key_of(resolved: Resolved) -> str:
    """A digest of all that decides a point's model beside checkpoints and samples."""
    general = {name: resolved.general[name] for name in ("method", "post", "align_experts", "seed", "exclude_params")}
    content = json.dumps([general, resolved.options, resolved.family], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def sample_options(values: Mapping[str, Any], backbone: Backbone) -> SampleOptions:
    """The options of the samples, from flags; the family's number of samples where none is given.

    Raises:
        InputError: a value does not fit.
    """
    from expert_merging.flags import read_options
    from expert_merging.options import ROOT

    options, problems = read_options(SampleOptions), Problems()
    found: dict[str, Any] = {"data_dir": str(ROOT / "dataset")}
    if "samples_per_task" in backbone.defaults:
        found["samples_per_task"] = backbone.defaults["samples_per_task"]
    for name, value in values.items():
        with problems.collecting():
            found[name] = options[name].convert(value)
    problems.check()
    return SampleOptions(**found)
