"""Sweeps: many settings are merged in one live model and scored, and nothing of them is written but scores.

What a method's preparation writes goes into a folder that is removed.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch

from expert_merging.comparing.grid import label_of
from expert_merging.comparing.scoring import points_by_task
from expert_merging.comparing.sweep import Planned, Sweep
from expert_merging.comparing.sweep_record import Scored
from expert_merging.console import Terminal, say
from expert_merging.errors import InputError
from expert_merging.families import load_family
from expert_merging.forks import crew
from expert_merging.machine import cores
from expert_merging.preparing import prepare
from expert_merging.progress import Progress, no_progress
from expert_merging.running.answers import Asker
from expert_merging.running.candidates import Candidates, experts_targets, first_of_tasks
from expert_merging.writing import take_hold

LOCK = ".lock"

# Scores points in the round of a number, and tells of each.
Score: TypeAlias = Callable[[Sequence[Planned], int, Callable[[Scored], None]], None]


def run(sweep: Sweep, terminal: Terminal, jobs: int = 1) -> list[Scored]:
    """Score all points, best first; those that an earlier part of the sweep has scored are looked up.

    Args:
        sweep: the sweep.
        terminal: shows how far it is.
        jobs: points that are scored at a time, in processes of their own.

    Raises:
        InputError: another process is at the same sweep.
    """
    sweep.folder.mkdir(parents=True, exist_ok=True)
    held = take_hold(sweep.folder / LOCK, "--sweep_name")
    try:
        sweep.record.read()  # another process may have added to it since the checks
        return _run(sweep, terminal, jobs)
    finally:
        os.close(held)
        shutil.rmtree(sweep.work, ignore_errors=True)


def _run(sweep: Sweep, terminal: Terminal, jobs: int) -> list[Scored]:
    fewest = min(sum(sample.task == task for sample in sweep.asked.samples) for task in sweep.asked.tasks)
    shares = sweep.scoring.shares(len(sweep.planned), fewest)
    left, done = sweep.planned, list[Scored]()
    known = len(left) - len(_missing(sweep, left, shares[0]))
    if known:
        say(terminal.console, f"{known} of {len(left)} points are known already")
    counts = [max(1, len(left) // (sweep.scoring.halving or 1) ** number) for number in range(len(shares))]
    with (
        _scorers(sweep, shares, min(jobs, _most_at_a_time(sweep, shares, counts)), terminal.progress) as score,
        terminal.progress("sweeping", sum(counts), "point") as advance,
        _silence(),
    ):

        def note(found: Scored) -> None:
            sweep.record.add(found)
            advance(1, label_of(found.point))
            if not terminal.console.is_terminal:
                say(terminal.console, f"scored {label_of(found.point)}")

        for number, following in enumerate([*counts[1:], 0]):
            missing = _missing(sweep, left, shares[number])
            advance(len(left) - len(missing))
            score(missing, number, note)
            scored = _ranked(sweep, left, shares[number])
            done = [*scored, *(one for one in done if one.key not in {other.key for other in scored})]
            left = _kept(left, scored[:following])
    return done


def _ranked(sweep: Sweep, points: Sequence[Planned], share: float) -> list[Scored]:
    """The scores of points in a round that is over, best first."""
    scored = [sweep.record.scored[planned.key, share] for planned in points]
    return sorted(scored, key=lambda one: one.rank(sweep.scoring.select))


def _kept(points: Sequence[Planned], best: Sequence[Scored]) -> list[Planned]:
    """The points that are the best ones."""
    keys = {one.key for one in best}
    return [planned for planned in points if planned.key in keys]


def _most_at_a_time(sweep: Sweep, shares: Sequence[float], counts: Sequence[int]) -> int:
    """How many points the largest of the rounds has that have no score yet, at most."""
    left = sweep.planned
    for number, share in enumerate(shares):
        missing, following = _missing(sweep, left, share), counts[number + 1 :]
        if missing:
            return max([len(missing), *following])
        left = _kept(left, _ranked(sweep, left, share)[: max(following, default=0)])
    return 0


def _missing(sweep: Sweep, points: Sequence[Planned], share: float) -> list[Planned]:
    """The points that have no score yet."""
    return [planned for planned in points if sweep.record.known(planned.key, share) is None]


@contextmanager
def _scorers(sweep: Sweep, shares: Sequence[float], size: int, progress: Progress) -> Iterator[Score]:
    """What scores points, after the experts were asked.

    Args:
        sweep: the sweep.
        shares: shares of the samples by which points are scored.
        size: points at a time: this process, or several others; 0 where none is left.
        progress: shows how far the experts are.
    """
    if size > 1:
        with _shared(sweep, shares, size, progress) as score:
            yield score
        return
    bench = Bench(sweep, shares)
    if size:
        bench.open(progress)

    def score_here(points: Sequence[Planned], number: int, note: Callable[[Scored], None]) -> None:
        for planned in points:
            note(bench.score(planned, shares[number]))

    yield score_here


@contextmanager
def _shared(sweep: Sweep, shares: Sequence[float], size: int, progress: Progress) -> Iterator[Score]:
    """What hands points out to processes, which read what the experts have said."""
    context = sweep.context(progress)
    experts_targets(context, sweep.asked, torch.device(context.device))
    job, places = _Job(sweep, shares, size), {planned.key: place for place, planned in enumerate(sweep.planned)}
    with crew(job, size, job.start, "spawn") as hand_out:

        def score(points: Sequence[Planned], number: int, note: Callable[[Scored], None]) -> None:
            numbers = [number * len(places) + places[planned.key] for planned in points]
            hand_out(numbers, lambda _, found: note(found))

        yield score


class Bench:
    """What points are scored with, made when the first is: experts' answers, the base's model."""

    def __init__(self, sweep: Sweep, shares: Sequence[float]) -> None:
        self.sweep, self.shares = sweep, shares
        self.opened: tuple[Candidates, Asker] | None = None

    def open(self, progress: Progress = no_progress) -> tuple[Candidates, Asker]:
        """Ask the experts and load the base's model, unless that is done.

        Args:
            progress: shows how far the experts are.
        """
        if self.opened is None:
            context = self.sweep.context(progress)
            candidates = Candidates(context, self.sweep.asked, self.shares)
            processor = context.backbone.load_processor(context.plan.base.folder)
            self.opened = candidates, Asker(context.backbone, processor, self.sweep.formats, only_points=True)
        return self.opened

    def score(self, planned: Planned, share: float) -> Scored:
        """Merge a point in memory and score it."""
        candidates, asker = self.open()
        start, job = time.monotonic(), planned.job
        run = job.context.run
        self.sweep.share_files(run)
        run.folder.mkdir(parents=True, exist_ok=True)
        try:
            rule, _ = prepare(job)
            model = candidates.merge(rule, job.unit, job.context.plan)
        except InputError as error:
            return Scored(planned.point, planned.key, share, problem=error.problems[0])
        finally:
            shutil.rmtree(run.folder, ignore_errors=True)
        divergence = candidates.divergence(share)
        questions = first_of_tasks(self.sweep.scoring.questions, share)
        correct = points_by_task(questions, asker.answer(model, questions))
        seconds = round(time.monotonic() - start, 2)
        return Scored(planned.point, planned.key, share, divergence, correct, seconds)


class _Job:
    """One of several processes that score points. It begins anew, as a GPU needs it, so it plans the sweep by itself.

    Args:
        sweep: the sweep.
        shares: shares of the samples by which points are scored.
        count: number of the processes.
    """

    def __init__(self, sweep: Sweep, shares: Sequence[float], count: int) -> None:
        self.given, self.family, self.scoring = dict(sweep.given), sweep.backbone.name, sweep.scoring
        self.points = [planned.point for planned in sweep.planned]
        self.folder, self.work = sweep.folder, sweep.work
        self.shares, self.count, self.number = shares, count, 0
        self.on_gpus = sweep.first.context.device.startswith("cuda")
        self.bench: Bench | None = None

    def start(self, number: int) -> None:
        """Begin; only the process that waits for the scores tells the user anything."""
        logging.disable(logging.CRITICAL)
        self.number = number

    def __call__(self, number: int) -> Scored:
        """Score the point of a number, in the round of the number: points are counted through, round after round."""
        if self.bench is None:
            self.bench = Bench(self._plan(), self.shares)
        round_, place = divmod(number, len(self.points))
        return self.bench.score(self.bench.sweep.planned[place], self.shares[round_])

    def _plan(self) -> Sweep:
        torch.set_num_threads(max(1, cores() // self.count))
        device = f"cuda:{self.number % torch.cuda.device_count()}" if self.on_gpus else "cpu"
        given, work = {**self.given, "device": device}, self.work / str(self.number)
        backbone, place = load_family(self.family), self.folder.parent
        return Sweep(given, self.points, backbone, self.scoring, place, self.folder.name, work=work)


@contextmanager
def _silence() -> Iterator[None]:
    """Leave out what preparations and readers tell of each point."""
    package = logging.getLogger("expert_merging")
    level = package.level
    package.setLevel(logging.WARNING)
    try:
        yield
    finally:
        package.setLevel(level)
