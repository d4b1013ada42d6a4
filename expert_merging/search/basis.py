"""What candidates are scored by: the experts' predictions on calibration samples, or labelled questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from expert_merging.asking import check_given, choose_formats
from expert_merging.context import Context
from expert_merging.errors import InputError, Problems
from expert_merging.questions.labelled import Question, digest_of, load_questions
from expert_merging.running.answers import Asker
from expert_merging.running.prompts import Prompts
from expert_merging.running.samples import Samples, check_models, check_samples
from expert_merging.running.scores import ExpertDivergence
from expert_merging.running.targets import Target
from expert_merging.search.options import ScoringOptions
from expert_merging.search.score import Judge, WrongAnswers


@dataclass(frozen=True)
class Basis:
    """What candidates are scored by.

    Args:
        asked: how models are run, and the samples; none where there are questions.
        questions: labelled questions.
        prompts: how they are asked.
    """

    asked: Samples
    questions: tuple[Question, ...] = ()
    prompts: Prompts | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the scores."""
        items = self.questions or self.asked.samples
        return tuple(dict.fromkeys(item.task for item in items))

    @property
    def told(self) -> str:
        """What it is, in words."""
        return f"{len(self.questions)} labelled questions" if self.questions else f"{len(self.asked.samples)} samples"

    @property
    def scale(self) -> str:
        """What scores mean, in words."""
        return "the share of wrong answers" if self.questions else "the base has 1, every task's own expert 0"

    @property
    def tokens_together(self) -> int:
        """Tokens that go through a model in a pass, at most."""
        return self.asked.tokens_together(len(self.questions))

    @property
    def inputs(self) -> Mapping[str, str]:
        """What decides a result beside the options."""
        if self.prompts is None:
            return self.asked.inputs
        formats = self.prompts.formats.digest
        return {"questions": digest_of(self.questions), "precision": self.asked.precision, "formats": formats}

    def judge(self, context: Context, model: Any, targets: Sequence[Target] | None) -> Judge:
        """What scores models.

        Args:
            context: the run.
            model: the base's.
            targets: what experts say about the samples; None where there are questions.

        Raises:
            InputError: the base predicts what an expert does.
        """
        if targets is not None:
            return ExpertDivergence.beside(model, targets, self.asked.batch_tokens)
        assert self.prompts is not None  # noqa: S101  (questions have them)
        options = self.asked.options
        asker = Asker(
            context.backbone,
            self.prompts.processor,
            self.prompts.formats,
            max_new_tokens=options.max_new_tokens,
            batch_tokens=self.asked.batch_tokens,
        )
        return WrongAnswers(asker, self.questions)


def check_basis(context: Context, options: ScoringOptions) -> Basis:
    """Read samples or questions, and check that the models can be asked them.

    Raises:
        InputError: every problem found.
    """
    if options.questions is None:
        return Basis(check_samples(context, options, batch_tokens=options.batch_tokens, synthesize=options.synthesize))
    problems, questions = Problems(), tuple[Question, ...]()
    with problems.collecting():
        asked = check_models(context, options, batch_tokens=options.batch_tokens)
    with problems.collecting():
        questions = _load(context, options, options.questions)
    tasks = {question.task for question in questions}
    problems.found += check_given(options.prompt_template, context.plan.experts, tasks)
    problems.check()
    formats = choose_formats(context.backbone, context.plan, options.prompt_template)
    prompts = Prompts(context.backbone, context.plan.base, formats, keeps=False)
    lengths = prompts.check([question.sample for question in questions])
    return Basis(replace(asked, longest=max(lengths) + options.max_new_tokens), questions, prompts)


def _load(context: Context, options: ScoringOptions, folder: str) -> tuple[Question, ...]:
    questions = load_questions(Path(folder), experts=options.task_expert, count=options.question_samples)
    with_picture = next((question.sample for question in questions if question.sample.images), None)
    if with_picture is not None and not context.backbone.takes_images:
        raise InputError(f"{with_picture.place} has a picture, and {context.backbone.name} is a language model")
    return tuple(questions)
