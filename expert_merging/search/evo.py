"""CMA-ES over merging coefficients: candidates are merged in memory and scored, the best one is kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
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
from expert_merging.running.accelerator import finish_trackers, make_accelerator, start_tracker
from expert_merging.running.sharding import load_on
from expert_merging.search.evolution import Candidate, Found, Generation, minimise
from expert_merging.search.options import SearchOptions
from expert_merging.search.record import Evaluation, Record
from expert_merging.search.score import Scorer
from expert_merging.search.settings import Settings, check, notes

logger = logging.getLogger(__name__)


def prepare(context: Context, options: SearchOptions) -> Preparation:
    """Check the options; the search is the work to be done.

    Raises:
        InputError: every problem found.
    """
    settings = check(context, options)

    def work() -> dict[str, Any]:
        coefficients = kept_or_made(context, lambda: Search(context, settings).run())
        return {"coefficients": coefficients, "directions": PLAIN.prepare()}

    return Preparation(work, settings.asked.inputs, notes(context, settings))


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
        self.record: Record = from_main_process(Record(context.run.evaluations, self.space.names))
        self.resumed = len(self.record.evaluations)
        self.done = 0
        self.best: Evaluation | None = None

    def run(self) -> Coefficients:
        """Search, save the best coefficients in the run folder and return them."""
        options = self.settings.options
        scorer = self._gather()
        start_tracker(self.accelerator, self.context, first=1)  # the points of an earlier part are written again
        if self.resumed:
            logger.info("continuing after %d evaluations", self.resumed)
        try:
            with self.context.progress("searching", options.evaluations, "evaluation") as advance:
                found = minimise(
                    lambda candidates: self._evaluate(scorer, candidates, advance),
                    self.settings.start,
                    spread=options.initial_spread,
                    evaluations=options.evaluations,
                    population=self.settings.population,
                    seed=self.context.seed,
                    tell=self._tell,
                )
        finally:
            scorer.close()
        return self._finish(found, scorer)

    def _gather(self) -> Scorer:
        """Ask the experts, load the base, and bring the task vectors to where there is room for them."""
        plan, backbone, asked = self.context.plan, self.context.backbone, self.settings.asked
        device = self.accelerator.device
        task_vectors = TaskVectors(plan, [1.0] * len(plan.experts), device)
        check_weights(self.context, task_vectors.magnitudes)
        # The others find the responses that the main process has written.
        with self.accelerator.main_process_first():
            targets = asked.target_maker(self.context, (), device).make(asked.samples)
        model = load_on(device, backbone, plan.base, asked.dtype, sharded=False)
        scorer = Scorer(model, task_vectors, targets, backbone.file_name, asked.batch_tokens)
        self._place(task_vectors)
        return scorer

    def _place(self, task_vectors: TaskVectors) -> None:
        """Keep task vectors as near as there is room; the model has run, so what that takes is taken."""
        free = measure(task_vectors, self.accelerator.wait_for_everyone)
        chosen = choose(task_vectors.sizes, 0, free.device, free.host, task_vectors="auto", weight_gradients="sample")
        task_vectors.place(chosen.places)

    def _evaluate(self, scorer: Scorer, candidates: Sequence[Candidate], advance: Advance) -> list[float]:
        """Scores of candidates; those that an earlier part of the run has evaluated are looked up."""
        left, scores = list(from_main_process(candidates)), []
        while left:
            known = self.record.known(self.done, left[0])
            found = [known] if known else self._score(scorer, left[: self.accelerator.num_processes])
            if not known:
                self.record.add(found, save=self.accelerator.is_main_process)
            for evaluation in found:
                self._note(evaluation, advance)
            scores += [evaluation.score for evaluation in found]
            left = left[len(found) :]
        return scores

    def _score(self, scorer: Scorer, candidates: Sequence[Candidate]) -> list[Evaluation]:
        """Evaluations of candidates, at most one a process, in all processes."""
        from accelerate.utils import gather_object

        own = candidates[self.accelerator.process_index :][:1]
        found = [Evaluation(candidate, scorer.score(self.space.coefficients(candidate))) for candidate in own]
        gathered: list[Evaluation] = gather_object(found)
        return gathered

    def _note(self, evaluation: Evaluation, advance: Advance) -> None:
        """Count an evaluation and show it."""
        self.done += 1
        score = evaluation.score
        if self.best is None or math.isnan(self.best.score) or score < self.best.score:
            self.best = evaluation
        advance(1, f"best {self.best.score:.4g}")
        report = {"score/candidate": score, "score/best": self.best.score}
        report |= {f"task_score/{task}": value for task, value in evaluation.tasks.items()}
        report |= {
            f"coefficient/{name}": value for name, value in zip(self.space.names, evaluation.candidate, strict=True)
        }
        self.accelerator.log(report, step=self.done)

    def _tell(self, generation: Generation) -> None:
        """One line for each generation that this part of the run has completed."""
        if self.done <= self.resumed or self.best is None:
            return
        logger.info(
            "generation %d: best score %.4g, best so far %.4g after %d of %d evaluations; spread %.3g",
            generation.number,
            min(generation.scores),
            self.best.score,
            self.done,
            self.settings.options.evaluations,
            generation.spread,
        )

    def _finish(self, found: Found, scorer: Scorer) -> Coefficients:
        """The coefficients found, saved by the main process."""
        finish_trackers(self.accelerator)
        if not math.isfinite(found.score):
            raise InputError(
                "no candidate's predictions are numbers; lower --scaling_coefficient and --initial_spread, or use "
                "--mixed_precision no"
            )
        start = self.record.evaluations[0].score
        logger.info(
            "best score %.4g after %d evaluations (the start has %.4g, the base 1, every task's own expert 0)%s",
            found.score,
            found.evaluations,
            start,
            f"; CMA-ES ended the search by its own criteria: {', '.join(found.reasons)}" if found.reasons else "",
        )
        coefficients = self._result(found, start, scorer)
        if self.accelerator.is_main_process:
            coefficients.save_published(self.context.run.weight_coeffs)
            coefficients.save(self.context.run.coefficients, self.context.run.kept)
        return coefficients

    def _result(self, found: Found, start: float, scorer: Scorer) -> Coefficients:
        plan = self.context.plan
        return Coefficients(
            experts=tuple(plan.experts),
            values=self.space.coefficients(found.candidate),
            task_vector_scale=(1.0,) * len(plan.experts),
            checkpoints=plan.contents,
            provenance={
                "base": str(plan.base.folder),
                "experts": {name: str(checkpoint.folder) for name, checkpoint in plan.experts.items()},
                "evaluations": found.evaluations,
                "score": found.score,
                "score_of_start": start,
                "divergence_of_base": {task: numbers["divergence"] for task, numbers in scorer.divergence.base.items()},
                "found": dict(zip(self.space.names, found.candidate, strict=True)),
            },
        )
