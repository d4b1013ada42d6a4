"""Perplexity routing (MergeME, arXiv 2502.00997): experts stay apart, attention too, and no router is trained.

Of a question, the perplexity under each expert is found. The experts of the smallest perplexities answer it, alone or
together, with a cache each. Only those experts are in memory that work at that time.
"""

from __future__ import annotations

import itertools
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expert_merging.checkpoints.sources import locate
from expert_merging.comparing.asked import Asked, family_of, load, loaded, ready
from expert_merging.comparing.compare import Compared
from expert_merging.errors import InputError, Problems, about
from expert_merging.questions.calibration import Sample
from expert_merging.questions.labelled import Question
from expert_merging.routing.lockstep import Writer, mixed, write_together
from expert_merging.routing.perplexity import Frame, mixing_weights, perplexities, uncounted
from expert_merging.running.answers import Answered, Asker, Row, token_likelihoods
from expert_merging.running.batches import pack
from expert_merging.running.prompts import place, tokenizer_of
from expert_merging.workers import fitting_threads

# Questions between which answers can be kept.
_GROUP = 64


@dataclass(frozen=True)
class Routed:
    """A question that experts have answered.

    Args:
        perplexities: of the question, by expert.
        weights: of the experts that have answered it, which sum to 1.
        text: the answer.
        points: 1 where it is known to be right, else 0.
    """

    perplexities: Mapping[str, float]
    weights: Mapping[str, float]
    text: str
    points: float


@dataclass(frozen=True)
class PerplexityRouter:
    """Experts that answer questions whose perplexity speaks for them.

    Args:
        experts: the experts by name, ready to be asked; `of` makes them from folders.
        per_question: how many of them answer a question.
        temperature: what ``1 / perplexity`` is divided by before the softmax that makes weights.
        device: where they run; auto takes the first GPU if there is one.
        max_new_tokens: bound on the length of an answer.
        by_length: the log-likelihood of a choice counts per byte.
        by_bytes: perplexity is that of a byte instead of a token; so it is where vocabularies differ.
    """

    experts: Mapping[str, Asked]
    per_question: int = 1
    temperature: float = 1.0
    device: str = "auto"
    max_new_tokens: int = 256
    by_length: bool = False
    by_bytes: bool = False

    @classmethod
    def of(
        cls,
        experts: Mapping[str, Path],
        questions: Sequence[Question] = (),
        *,
        words: str | Mapping[str, str] | None = None,
        family: str | None = None,
        per_question: int = 1,
        **settings: Any,
    ) -> PerplexityRouter:
        """A router of the experts in these folders; all that can be wrong is told before one is loaded.

        Args:
            experts: folders by name, or repositories on the Hub.
            questions: what they will be asked, to be checked.
            words: text with ``{question}`` in it, for all or by expert; by default each expert's own words.
            family: model family; by default that of each expert's ``config.json``.
            per_question: how many experts answer a question.
            settings: the other arguments of the class.

        Raises:
            InputError: every problem found.
        """
        problems, found = Problems(), dict[str, Asked]()
        if not 1 <= per_question <= len(experts):
            problems.add(
                f"--experts_per_question must be from 1 to the number of experts, {len(experts)}, got {per_question}"
            )
        for name, place_of in experts.items():
            with problems.collecting():
                with about(name):
                    folder = locate(place_of)
                    if not any(folder.glob("*.safetensors")):
                        raise InputError(f"{folder} holds no model: no .safetensors file is there")
                    model = Compared(name, folder, None)
                    backbone = family_of(model, family)
                own = words if isinstance(words, str) else (words or {}).get(name)
                (found[name],) = ready([model], [backbone], own, questions)
        problems.check()
        differing = _differing_vocabulary(found)
        if differing and per_question > 1:
            raise InputError(
                f"{differing}, and what several experts predict can be mixed only of one vocabulary; give "
                "--experts_per_question 1, or experts of one tokenizer"
            )
        router = cls(found, per_question, by_bytes=bool(differing), **settings)
        for name in found:
            with problems.collecting(), about(name):
                router._frame(name).asked([question.sample for question in questions])
        problems.check()
        return router

    def perplexities(self, expert: str, questions: Sequence[Question]) -> Iterator[dict[int, float]]:
        """Perplexities under an expert by number of the question, as `perplexity.perplexities` gives them.

        The expert is loaded and released.

        Raises:
            InputError: the expert computes NaN.
        """
        asked = self._frame(expert).asked([question.sample for question in questions])
        with about(expert), loaded(self.experts[expert], self.device) as model:
            yield from perplexities(model, asked)

    def weights(self, found: Mapping[str, Sequence[float]]) -> Tensor:
        """Weights of the experts ``(experts, questions)``, in their order, from perplexities by expert."""
        rows = torch.tensor([found[name] for name in self.experts], dtype=torch.float64)
        return mixing_weights(rows, self.per_question, self.temperature)

    def answer(self, questions: Sequence[Question], weights: Tensor) -> Iterator[tuple[list[int], list[Answered]]]:
        """Answers, some questions at a time, with their numbers; no more experts are in memory than answer a question.

        Args:
            questions: the questions.
            weights: ``(experts, questions)``, 0 for experts that do not take part.
        """
        names, models = [*self.experts], dict[str, Any]()
        chosen = [tuple(torch.nonzero(column)[:, 0].tolist()) for column in weights.T]
        for experts, numbers in itertools.groupby(
            sorted(range(len(chosen)), key=chosen.__getitem__), chosen.__getitem__
        ):
            working = [names[expert] for expert in experts]
            models = {name: model for name, model in models.items() if name in working}
            for name in working:
                models[name] = models[name] if name in models else load(self.experts[name], self.device)
            listed = list(numbers)
            for start in range(0, len(listed), _GROUP):
                group = listed[start : start + _GROUP]
                own = weights[list(experts)][:, group]
                yield group, self._answer(models, working, [questions[number] for number in group], own)

    def ask(self, questions: Sequence[str]) -> list[Routed]:
        """Answers to questions in text."""
        asked = [Question(Sample.test(text), (), "open") for text in questions]
        found = {}
        for name in self.experts:
            own = ChainMap(*self.perplexities(name, asked))
            found[name] = [own[number] for number in range(len(asked))]
        weights = self.weights(found)
        answers = {
            number: one
            for numbers, made in self.answer(asked, weights)
            for number, one in zip(numbers, made, strict=True)
        }
        return [
            Routed(
                {name: row[number] for name, row in found.items()},
                self.shares(weights[:, number]),
                answers[number].text,
                answers[number].points,
            )
            for number in range(len(asked))
        ]

    def shares(self, weights: Tensor) -> dict[str, float]:
        """Weights ``(experts,)`` by name, those of experts that take part."""
        return {name: share for name, share in zip(self.experts, weights.tolist(), strict=True) if share}

    def _frame(self, expert: str) -> Frame:
        return Frame(self._asker(expert).prompt, uncounted(self.experts[expert].processor), self.by_bytes)

    def _asker(self, expert: str) -> Asker:
        own = self.experts[expert]
        return Asker(
            own.backbone,
            own.processor,
            own.formats,
            max_new_tokens=self.max_new_tokens,
            by_length=self.by_length,
        )

    def _answer(
        self, models: Mapping[str, Any], working: Sequence[str], questions: Sequence[Question], weights: Tensor
    ) -> list[Answered]:
        """Answers of one expert, or of several together."""
        askers = {name: self._asker(name) for name in working}
        with fitting_threads(sum(models[name].num_parameters() for name in working)):
            if len(working) == 1:
                return list(askers[working[0]].answer(models[working[0]], questions))
            found = _choose(models, askers, questions, weights) | _write(models, askers, questions, weights)
        return [found[number] for number in range(len(questions))]


def _choose(
    models: Mapping[str, Any], askers: Mapping[str, Asker], questions: Sequence[Question], weights: Tensor
) -> dict[int, Answered]:
    """The likeliest choices by the mixture of what experts predict, by number of the question."""
    asked = {number: question for number, question in enumerate(questions) if question.kind == "choice"}
    scores = []
    for name, asker in askers.items():
        prompts = {number: asker.prompt(question.sample) for number, question in asked.items()}
        rows = {
            (number, choice): Row(prompts[number], asker.tokens(choice))
            for number, question in asked.items()
            for choice in question.choices
        }
        scores.append(dict(token_likelihoods(models[name], rows)))
    found = {}
    for number, question in asked.items():
        of_choices = [[own[number, choice] for own in scores] for choice in question.choices]
        sums = [float(mixed(own, weights[:, number]).sum()) for own in of_choices]
        found[number] = next(iter(askers.values())).likeliest(question, sums)
    return found


def _write(
    models: Mapping[str, Any], askers: Mapping[str, Asker], questions: Sequence[Question], weights: Tensor
) -> dict[int, Answered]:
    """Answers that experts write together, by number of the question."""
    asked = {number: question for number, question in enumerate(questions) if question.kind != "choice"}
    prompts = {
        name: {number: asker.prompt(question.sample) for number, question in asked.items()}
        for name, asker in askers.items()
    }
    first = next(iter(askers.values()))
    bounds = {number: first.bound(question) for number, question in asked.items()}

    def length(number: int) -> int:
        longest = max(int(own[number]["input_ids"].shape[1]) for own in prompts.values())
        return longest + bounds[number]

    found = {}
    for batch in pack(asked, length, first.batch_tokens):
        writers = [
            Writer(
                models[name],
                asker.processor,
                [place(prompts[name][number], models[name].device, models[name].dtype) for number in batch],
                asker.ends(asked[batch[0]].sample),
            )
            for name, asker in askers.items()
        ]
        texts = write_together(writers, weights[:, batch], max(bounds[number] for number in batch))
        for number, text in zip(batch, texts, strict=True):
            found[number] = Answered(text, float(asked[number].is_right(text)))
    return found


def _differing_vocabulary(experts: Mapping[str, Asked]) -> str | None:
    """Where the vocabularies of experts differ, in words; None where they are the same."""
    tables = {name: tokenizer_of(asked.processor).get_vocab() for name, asked in experts.items()}
    (first, known), *rest = tables.items()
    for name, own in rest:
        differing = min((token for token, number in known.items() ^ own.items()), default=None)
        if differing is not None:
            places = [f"number {table[differing]}" if differing in table else "unknown" for table in (known, own)]
            return f"{first} and {name} have different vocabularies ({differing!r} is {places[0]} and {places[1]})"
    return None
