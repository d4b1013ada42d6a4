"""How many labelled questions a model answers rightly.

A short right answer is found by one pass over question and answer, without writing anything: the model writes it if
and only if each of its tokens is the likeliest after those before, and one that ends an answer after the last.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from expert_merging.asking import Formats
from expert_merging.backbone import Backbone
from expert_merging.questions.calibration import Sample
from expert_merging.questions.labelled import Question
from expert_merging.running.batches import pack
from expert_merging.running.generating import generate, stop_tokens
from expert_merging.running.prefixes import hidden_states
from expert_merging.running.prompts import end_tokens, place, tokenizer_of, with_response

# Questions whose prompts, which may have pictures, are in memory at a time.
_GROUP = 64
# Tokens that an answer may have more than the right one: white space, before it cannot be right any more.
_SLACK = 8
BATCH_TOKENS = 2048
# Questions whose answers are written up to the bound on their length.
_WRITTEN = ("numbers", "open")

Key = TypeVar("Key", bound=Hashable)
# A question, and its prompt as model inputs.
_Asked: TypeAlias = tuple[Question, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Row:
    """A prompt and an answer that a model is given.

    Args:
        prompt: model inputs of the prompt, batch of one.
        answer: the answer's tokens.
        ends: tokens that may end it beside the model's own, as for `expert_merging.running.targets.stop_tokens`.
    """

    prompt: Mapping[str, Tensor]
    answer: Sequence[int]
    ends: Sequence[int] = ()

    @property
    def start(self) -> int:
        """The position that predicts the answer's first token."""
        return int(self.prompt["input_ids"].shape[1]) - 1

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return self.start + 1 + len(self.answer)


@dataclass(frozen=True)
class Answered:
    """What a model answers to a question.

    Args:
        text: the answer: what the model writes, or the likeliest choice.
        points: 1 where it is right, else 0.
    """

    text: str
    points: float


@dataclass(frozen=True)
class Asker:
    """Asks models labelled questions; a `expert_merging.running.scores.Score` of questions.

    Args:
        backbone: the model family.
        processor: the models' tokenizer or processor.
        formats: in whose words they are asked; None for what the processor's own chat template says.
        max_new_tokens: bound on the length of an answer in which a number is looked for.
        batch_tokens: tokens that go through a model together.
        by_length: the log-likelihood of a choice counts per byte.
        only_points: short answers that have begun wrongly are not written to their end.
        names: what the number is called.
    """

    backbone: Backbone
    processor: Any
    formats: Formats | None
    max_new_tokens: int = 256
    batch_tokens: int = BATCH_TOKENS
    by_length: bool = False
    only_points: bool = False
    names: tuple[str, ...] = ("accuracy",)

    def measure(self, model: Any, questions: Sequence[Question]) -> Iterator[tuple[float]]:
        """100 for each question that is answered rightly, else 0."""
        return ((100.0 * found.points,) for found in replace(self, only_points=True).answer(model, questions))

    @torch.no_grad()
    def answer(self, model: Any, questions: Sequence[Question]) -> Iterator[Answered]:
        """What a model answers to each question, in their order."""
        for start in range(0, len(questions), _GROUP):
            group = questions[start : start + _GROUP]
            prompts = [self.prompt(question.sample) for question in group]
            found: dict[int, Answered] = {}
            for kinds, judge in ((["choice"], self._choose), (["exact_match"], self._match), (_WRITTEN, self._write)):
                numbers = [number for number, question in enumerate(group) if question.kind in kinds]
                found.update(judge(model, {number: (group[number], prompts[number]) for number in numbers}))
            yield from (found[number] for number in range(len(group)))

    def prompt(self, sample: Sample) -> dict[str, Tensor]:
        """Model inputs of a question, batch of one."""
        asked = None if self.formats is None else self.formats.of(sample)
        return self.backbone.encode_prompt(self.processor, sample, asked)

    def ends(self, sample: Sample) -> list[int]:
        """The first token of what ends a turn."""
        return [] if self.formats is None else end_tokens(self.processor, self.formats.of(sample).end)[:1]

    def tokens(self, text: str) -> list[int]:
        """The tokens of an answer."""
        return list(tokenizer_of(self.processor)(text, add_special_tokens=False)["input_ids"])

    def _choose(self, model: Any, asked: Mapping[int, _Asked]) -> Iterable[tuple[int, Answered]]:
        """The likeliest choices."""
        rows = {
            (number, choice): Row(prompt, self.tokens(choice))
            for number, (question, prompt) in asked.items()
            for choice in question.choices
        }
        scores = dict(likelihoods(model, rows, self.batch_tokens))
        for number, (question, _) in asked.items():
            yield number, self.likeliest(question, [scores[number, choice] for choice in question.choices])

    def likeliest(self, question: Question, scores: Sequence[float]) -> Answered:
        """The choice of the largest log-likelihood, given one for each."""
        lengths = [len(choice.encode()) if self.by_length else 1 for choice in question.choices]
        own = [score / length for score, length in zip(scores, lengths, strict=True)]
        best = question.choices[own.index(max(own))]
        return Answered(best, float(best in question.answers))

    def _match(self, model: Any, asked: Mapping[int, _Asked]) -> Iterable[tuple[int, Answered]]:
        """Answers that are compared as texts: what is exactly right is seen at once, the rest written.

        Where only points count, so is what is wrong: one token that no right answer has there.
        """
        rows = {
            (number, answer): Row(prompt, self.tokens(answer), self.ends(question.sample))
            for number, (question, prompt) in asked.items()
            for answer in question.answers
        }
        found: dict[int, Answered] = {}
        for (number, answer), beginning in beginnings(model, self.processor, rows, self.batch_tokens):
            if beginning.is_all(rows[number, answer].answer):
                found[number] = Answered(answer, 1.0)
            elif self.only_points and number not in found:
                text = str(tokenizer_of(self.processor).decode(beginning.tokens, skip_special_tokens=True))
                if beginning.ends or not asked[number][0].can_begin_with(text):
                    found[number] = Answered(text, float(asked[number][0].is_right(text)))
        yield from found.items()
        yield from self._write(model, {number: one for number, one in asked.items() if number not in found})

    def _write(self, model: Any, asked: Mapping[int, _Asked]) -> Iterable[tuple[int, Answered]]:
        """Answers that are written."""
        by_end: dict[tuple[int, ...], list[int]] = {}
        for number, (question, _) in asked.items():
            by_end.setdefault(tuple(self.ends(question.sample)), []).append(number)
        bounds = {number: self.bound(question) for number, (question, _) in asked.items()}
        for ends, numbers in by_end.items():
            lengths = {number: asked[number][1]["input_ids"].shape[1] + bounds[number] for number in numbers}
            for batch in pack(numbers, lengths.__getitem__, self.batch_tokens):
                prompts = [place(asked[number][1], model.device, model.dtype) for number in batch]
                bound = max(bounds[number] for number in batch)
                texts = generate(model, self.processor, prompts, bound, ends)
                for number, (text, _) in zip(batch, texts, strict=True):
                    yield number, Answered(text, float(asked[number][0].is_right(text)))

    def bound(self, question: Question) -> int:
        """Tokens after which an answer is right or wrong for certain."""
        if question.kind in _WRITTEN:
            return self.max_new_tokens
        return _SLACK + max(len(self.tokens(answer)) for answer in question.answers)


@dataclass(frozen=True)
class Beginning:
    """The first tokens that a model writes greedily.

    Args:
        tokens: the tokens.
        ends: whether the last of them ends what it writes.
    """

    tokens: Sequence[int]
    ends: bool

    def is_all(self, answer: Sequence[int]) -> bool:
        """Whether the model writes exactly an answer, and ends."""
        return self.ends and list(self.tokens[:-1]) == list(answer)


@torch.no_grad()
def beginnings(
    model: Any, processor: Any, rows: Mapping[Key, Row], batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[Key, Beginning]]:
    """What a model writes for each row: the answer as far as it agrees, and the first token that ends it or is another.

    Args:
        model: the model.
        processor: its tokenizer or processor.
        rows: prompts with answers.
        batch_tokens: tokens that go through the model together.
    """
    for key, logits in _logits(model, rows, batch_tokens, after_last=True):
        stops = stop_tokens(model, tokenizer_of(processor), rows[key].ends)
        answer, written = list(rows[key].answer), logits.argmax(-1).tolist()
        differs = (token in stops or token != answer[place] for place, token in enumerate(written[:-1]))
        last = next((place for place, found in enumerate(differs) if found), len(answer))
        yield key, Beginning(written[: last + 1], written[last] in stops)


@torch.no_grad()
def likelihoods(model: Any, rows: Mapping[Key, Row], batch_tokens: int = BATCH_TOKENS) -> Iterator[tuple[Key, float]]:
    """Log-likelihood of each row's answer after its prompt, in nats, summed over its tokens.

    Args:
        model: the model.
        rows: prompts with answers.
        batch_tokens: tokens that go through the model together.
    """
    yield from ((key, float(found.sum())) for key, found in token_likelihoods(model, rows, batch_tokens))


@torch.no_grad()
def token_likelihoods(
    model: Any, rows: Mapping[Key, Row], batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[Key, Tensor]]:
    """The same of each token of an answer, ``(tokens,)`` float32."""
    for key, logits in _logits(model, rows, batch_tokens, after_last=False):
        answer = torch.tensor(list(rows[key].answer), device=logits.device)
        scores = final_logits(model, logits.float()).log_softmax(-1)
        yield key, scores.gather(1, answer[:, None])[:, 0]


def _logits(
    model: Any, rows: Mapping[Key, Row], batch_tokens: int, *, after_last: bool
) -> Iterator[tuple[Key, Tensor]]:
    """What the head makes of the states before an answer's tokens, ``(tokens, vocabulary)``, and after the last, if so.

    If not, the last does not go through the model, which may take no more tokens than there are before it.
    """
    head = model.get_output_embeddings()
    answers = {key: [*row.answer] if after_last else [*row.answer][:-1] for key, row in rows.items()}
    for batch in pack(rows, lambda key: rows[key].length, batch_tokens):
        samples = [with_response(rows[key].prompt, answers[key]) for key in batch]
        states = hidden_states(model, samples, [rows[key].start for key in batch])
        yield from ((key, head(own)) for key, own in zip(batch, states, strict=True))


def final_logits(model: Any, logits: Tensor) -> Tensor:
    """Logits as the model's own forward pass gives them: Gemma, Cohere and Granite change what their heads make."""
    config = model.config.get_text_config()
    bound = getattr(config, "final_logit_softcapping", None)
    logits = logits * (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
    return logits if not bound else bound * torch.tanh(logits / bound)
