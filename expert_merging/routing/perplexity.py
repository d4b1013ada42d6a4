"""The perplexity of a question under an expert, and what it makes of the experts' weights (arXiv 2502.00997).

Experts are asked in their own words, which differ in length and are known to one expert alone. So only the tokens of
the question itself count, in the place that they have in the expert's prompt. Special tokens, pictures among them, do
not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from expert_merging.errors import InputError
from expert_merging.questions.calibration import Sample
from expert_merging.running.answers import BATCH_TOKENS, final_logits
from expert_merging.running.batches import pack, together
from expert_merging.running.prompts import place, tokenizer_of

# Texts of which no question shares both the first and the last token.
_PROBES = ("0", "Z")
# Tokens whose logits are made together.
_SLICE = 64
# A loss of which the exponential is still a number.
_LARGEST = 700.0

Encode: TypeAlias = Callable[[Sample], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Scored:
    """A question as an expert is asked, and what of it counts.

    Args:
        inputs: model inputs of the prompt, batch of one.
        positions: ``(counted,)`` places of the tokens that count.
        size: what their loss is divided by.
    """

    inputs: Mapping[str, Tensor]
    positions: Tensor
    size: int

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return int(self.inputs["input_ids"].shape[1])


@dataclass(frozen=True)
class Frame:
    """The words around every question of an expert.

    Args:
        encode: makes model inputs of a question, batch of one.
        special: tokens that do not count.
        by_bytes: losses are divided by the question's bytes, which tokenizers agree on, instead of its tokens.
    """

    encode: Encode
    special: frozenset[int]
    by_bytes: bool = False

    def asked(self, samples: Sequence[Sample]) -> list[Scored]:
        """Questions as the expert is asked.

        Raises:
            InputError: no token of a question can be predicted.
        """
        probes = [_tokens(self.encode(Sample.test(probe))) for probe in _PROBES]
        return [self._one(sample, probes) for sample in samples]

    def _one(self, sample: Sample, probes: Sequence[Sequence[int]]) -> Scored:
        inputs = self.encode(sample)
        tokens = _tokens(inputs)
        first = min(_shared(tokens, probe) for probe in probes)
        last = len(tokens) - min(_shared(tokens[::-1], probe[::-1]) for probe in probes)
        # Nothing comes before the first token that could predict it.
        counted = [number for number in range(max(1, first), last) if tokens[number] not in self.special]
        if not counted:
            raise InputError(
                f"{sample.place}: no token of the question comes after another, so that it has no perplexity; give a "
                "longer one, or --prompt_template with a word before {question}"
            )
        size = len(sample.question.encode()) if self.by_bytes else len(counted)
        return Scored(inputs, torch.tensor(counted), size)


def uncounted(processor: Any) -> frozenset[int]:
    """Tokens that are no part of a question's text: special ones, and those that stand for pictures."""
    tokenizer = tokenizer_of(processor)
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({*tokenizer.all_special_ids, *added, getattr(processor, "image_token_id", None)} - {None})


def _tokens(inputs: Mapping[str, Tensor]) -> list[int]:
    found: list[int] = inputs["input_ids"][0].tolist()
    return found


def _shared(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((number for number, (one, other) in pairs if one != other), min(len(tokens), len(others)))


@torch.no_grad()
def perplexities(model: Any, asked: Sequence[Scored], batch_tokens: int = BATCH_TOKENS) -> Iterator[dict[int, float]]:
    """``exp(-1/t sum log p(x_j | x_<j))`` of each question by its number, those that go through the model together.

    A question's last digits depend on its neighbours. Whoever leaves out questions has those of whole batches left out,
    as the first ones, to get the same of the others.

    Args:
        model: the expert.
        asked: the questions.
        batch_tokens: tokens that go through the model together.

    Raises:
        InputError: the model computes NaN.
    """
    head = model.get_output_embeddings()
    for batch in pack(range(len(asked)), lambda number: asked[number].length, batch_tokens):
        inputs = place(together([asked[number].inputs for number in batch]), model.device, model.dtype)
        states = model.base_model(**inputs, use_cache=False).last_hidden_state
        found = {}
        for row, number in enumerate(batch):
            own = asked[number]
            loss = 0.0
            for positions in torch.split(own.positions.to(states.device), _SLICE):
                logits = final_logits(model, head(states[row, positions - 1]).float())
                targets = inputs["input_ids"][row, positions]
                loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            if math.isnan(loss):
                raise InputError("the expert computes NaN; its weights are damaged, or not those of config.json")
            found[number] = math.exp(min(loss / own.size, _LARGEST))
        yield found


def mixing_weights(perplexity: Tensor, count: int, temperature: float) -> Tensor:
    """Weights of the experts, ``softmax(top_k(1 / perplexity) / temperature)`` over experts.

    ``1 / perplexity`` is at most 1, so that MergeME's weights (temperature 1) are never far from each other:
    perplexities of 2 and 10 give 0.60 and 0.40.

    Args:
        perplexity: ``(experts, questions)``.
        count: experts of a question, the first ones where perplexities are the same.
        temperature: above 0; the lower, the more the best expert counts.

    Returns:
        ``(experts, questions)`` float64, 0 for experts that do not take part.
    """
    fitness = 1 / perplexity.double()
    best = fitness.argsort(dim=0, descending=True, stable=True)[:count]
    weights = torch.zeros_like(fitness)
    return weights.scatter_(0, best, (fitness.gather(0, best) / temperature).softmax(0))
