"""One search: candidates are merged in memory and scored, and the best one becomes the run's coefficients."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from expert_merging.context import Context
from expert_merging.errors import InputError
from expert_merging.learned.coefficients import Coefficients, kept_or_made
from expert_merging.learned.directions import PLAIN
from expert_merging.learned.memory import choose, measure
from expert_merging.learned.same_weights import check_weights
from expert_merging.learned.task_vectors import TaskVectors
from expert_merging.method import Preparation
from expert_merging.processes import from_main_process
from expert_merging.progress import Advance
from expert_merging.running.accelerator import board_of, finish_trackers, make_accelerator, start_tracker
from expert_merging.running.sharding import load_on
from expert_merging.search.evolution import Candidate
from expert_merging.search.front import leave_front, ranked_front
from expert_merging.search.record import Evaluation, Record
from expert_merging.search.score import Scorer
from expert_merging.search.settings import Settings, memory_notes

logger = logging.getLogger(__name__)

# Of coefficients; where there are more of them, nobody looks at each.
_MOST_CURVES = 64
# Options that may put candidates too far from the base.
_FAR = ("scaling_coefficient", "initial_spread")


def prepare_search(context: Context, settings: Settings, about: str) -> Preparation:
    """A search as the work to be done.

    Args:
        context: the run.
        settings: checked options.
        about: a line for the plan.
    """

    def work() -> dict[str, Any]:
        coefficients = kept_or_made(context, lambda: Search(context, settings).run())
        return {"coefficients": coefficients, "directions": PLAIN.prepare()}

    return Preparation(work, settings.basis.inputs, (about, *memory_notes(context, settings.basis)))


class Search:
    """One search, with its record, its progress and its curves.

    With several processes, each scores its share of a generation, so the coefficients are those of one process.

    Args:
        context: the run.
        settings: checked options.

    Raises:
        InputError: the record of an earlier part cannot be read.
    """

    def __init__(self, context: Context, settings: Settings) -> None:
        self.context, self.settings, self.space = context, settings, settings.space
        self.accelerator = make_accelerator(context)
        # All processes go by what the main one has read.
        record = Record(context.run.evaluations, self.space.names, settings.options.over_tasks)
        self.record: Record = from_main_process(record)
        self.resumed = len(self.record.evaluations)
        self.evaluated: list[Evaluation] = []
        self.best: Evaluation | None = None

    def run(self) -> Coefficients:
        """Search, save the best coefficients in the run folder and return them."""
        options = self.settings.options
        self.settings.measure()
        scorer = self._gather()
        start_tracker(self.accelerator, self.context, first=1)  # the points of an earlier part are written again
        if self.resumed:
            logger.info("continuing after %d evaluations", self.resumed)
        try:
            with self.context.progress("searching", options.evaluations, "evaluation") as advance:
                reasons = self.settings.search(
                    lambda candidates: self._evaluate(scorer, candidates, advance), self.context.seed, self._tell
                )
        finally:
            scorer.close()
        return self._finish(reasons, scorer)

    def _gather(self) -> Scorer:
        """Ask the experts, load the base, and bring the task vectors to where there is room for them."""
        plan, backbone, basis = self.context.plan, self.context.backbone, self.settings.basis
        device, targets = self.accelerator.device, None
        task_vectors = TaskVectors(plan, [1.0] * len(plan.experts), device)
        check_weights(self.context, task_vectors.magnitudes)
        if not basis.questions:
            # The others find the responses that the main process has written.
            with self.accelerator.main_process_first():
                targets = basis.asked.target_maker(self.context, (), device).make(basis.asked.samples)
        model = load_on(device, backbone, plan.base, basis.asked.dtype, sharded=False)
        judge = basis.judge(self.context, model, targets)
        scorer = Scorer(model, task_vectors, judge, backbone.file_name)
        self._place(task_vectors)
        return scorer

    def _place(self, task_vectors: TaskVectors) -> None:
        """Keep task vectors as near as there is room; the model has run, so what that takes is taken."""
        free = measure(task_vectors, self.accelerator.wait_for_everyone)
        chosen = choose(task_vectors.sizes, 0, free.device, free.host, task_vectors="auto", weight_gradients="sample")
        task_vectors.place(chosen.places)

    def _evaluate(self, scorer: Scorer, candidates: Sequence[Candidate], advance: Advance) -> list[Evaluation]:
        """Evaluations of candidates, until the time is over; those of an earlier part of the run are looked up."""
        left, done = list(from_main_process(candidates)), len(self.evaluated)
        while left and not self._is_over:
            known = self.record.known(len(self.evaluated), left[0])
            found = [known] if known else self._score(scorer, left[: self.accelerator.num_processes])
            if not known:
                self.record.add(found, save=self.accelerator.is_main_process)
            for evaluation in found:
                self._note(evaluation, advance)
            left = left[len(found) :]
        return self.evaluated[done:]

    @property
    def _is_over(self) -> bool:
        """Whether evaluations, those of earlier parts of the run among them, have taken the time that there is."""
        minutes = self.settings.options.minutes
        return minutes is not None and sum(one.seconds for one in self.evaluated) >= 60 * minutes

    def _score(self, scorer: Scorer, candidates: Sequence[Candidate]) -> list[Evaluation]:
        """Evaluations of candidates, at most one a process, in all processes."""
        from accelerate.utils import gather_object

        own = candidates[self.accelerator.process_index :][:1]
        gathered: list[Evaluation] = gather_object([self._judge(scorer, candidate) for candidate in own])
        # What they take together is shared among them, and noted where it matters: results are else the same anywhere.
        together = 0.0 if self.settings.options.minutes is None else max(one.seconds for one in gathered)
        return [replace(one, seconds=together / len(gathered)) for one in gathered]

    def _judge(self, scorer: Scorer, candidate: Candidate) -> Evaluation:
        """The evaluation of a candidate."""
        begun = time.monotonic()
        found = scorer.score(self.space.coefficients(candidate))
        items = tuple(found.items) if self.settings.by_item else ()
        over = self.settings.options.over_tasks
        return Evaluation(candidate, found.tasks, over, time.monotonic() - begun, items)

    def _note(self, evaluation: Evaluation, advance: Advance) -> None:
        """Count an evaluation and show it."""
        self.evaluated.append(evaluation)
        if self.best is None or evaluation.rank < self.best.rank:
            self.best = evaluation
        advance(1, f"best {self.best.score:.4g}")
        report = {"score/candidate": evaluation.score, "score/best": self.best.score}
        report |= {f"task_score/{task}": value for task, value in evaluation.tasks.items()}
        if self.space.size <= _MOST_CURVES:
            named = zip(self.space.names, evaluation.candidate, strict=True)
            report |= {f"coefficient/{name}": value for name, value in named}
        self.accelerator.log(report, step=len(self.evaluated))

    def _tell(self, before: str, after: str) -> None:
        """One line for each generation that this part of the run has completed."""
        done = len(self.evaluated)
        if done > self.resumed and self.best is not None:
            most, best = self.settings.options.evaluations, self.best.score
            logger.info("%s, best so far %.4g after %d of %d evaluations%s", before, best, done, most, after)

    def _finish(self, reasons: Sequence[str], scorer: Scorer) -> Coefficients:
        """The coefficients found, saved by the main process."""
        best = self.best
        if best is None or not math.isfinite(best.score):
            finish_trackers(self.accelerator)
            found = [f"--{name}" for name in _FAR if hasattr(self.settings.options, name)]
            lower = f"lower {' and '.join(found)}, or " if found else ""
            raise InputError(f"no candidate's predictions are numbers; {lower}use --mixed_precision no")
        if self._is_over:
            reasons = [*reasons, f"{self.settings.options.minutes:g} minutes are over"]
        logger.info(
            "best score %.4g after %d evaluations (the first has %.4g; %s)%s",
            best.score,
            len(self.evaluated),
            self.evaluated[0].score,
            self.settings.basis.scale,
            "".join(f"; {reason}" for reason in reasons),
        )
        coefficients = self._result(best, scorer)
        if self.accelerator.is_main_process:
            self._leave_front(scorer)
            coefficients.save_published(self.context.run.weight_coeffs)
            coefficients.save(self.context.run.coefficients, self.context.run.kept)
        finish_trackers(self.accelerator)
        return coefficients

    def _leave_front(self, scorer: Scorer) -> None:
        """The trade-offs between tasks, as a table, a picture and coefficients."""
        run, front = self.context.run, ranked_front(self.evaluated)
        if len(self.evaluated[0].tasks) == 1:
            return
        picture = leave_front(self.evaluated, front, self.space.names, run)
        for number, place in enumerate(front, start=1):
            run.trade_off(number).parent.mkdir(parents=True, exist_ok=True)
            self._result(self.evaluated[place], scorer).save(run.trade_off(number))
        board = board_of(self.accelerator)
        if board is not None:
            board.add_image("front", picture, len(self.evaluated), dataformats="HWC")
        logger.info("%d trade-offs between tasks: %s", len(front), run.front)

    def _result(self, found: Evaluation, scorer: Scorer) -> Coefficients:
        plan, names = self.context.plan, self.space.names
        return Coefficients(
            experts=tuple(plan.experts),
            values=self.space.coefficients(found.candidate),
            task_vector_scale=(1.0,) * len(plan.experts),
            checkpoints=plan.contents,
            provenance={
                "base": str(plan.base.folder),
                "experts": {name: str(checkpoint.folder) for name, checkpoint in plan.experts.items()},
                "evaluations": len(self.evaluated),
                "score": found.score,
                "score_of_start": self.evaluated[0].score,
                **scorer.judge.record,
                "found": dict(zip(names, found.candidate, strict=True)),
            },
        )
