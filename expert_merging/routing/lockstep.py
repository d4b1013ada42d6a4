"""Several models that write one text together: at each token, a mixture of what they predict.

Each model is asked in its own words and writes with transformers' own loop, which keeps its cache, in a thread of its
own. Where it would choose a token, it waits for the others and chooses by the mixture, so all choose the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier, BrokenBarrierError
from typing import Any

import torch
from torch import Tensor

from expert_merging.running.generating import generate, stop_tokens
from expert_merging.running.prompts import tokenizer_of


@dataclass(frozen=True)
class Writer:
    """One of the models.

    Args:
        model: the model.
        processor: its tokenizer or processor.
        prompts: the questions in its own words, model inputs on its device, batch of one each.
        ends: tokens that may end an answer beside the model's own, as for `stop_tokens`.
    """

    model: Any
    processor: Any
    prompts: Sequence[Mapping[str, Tensor]]
    ends: Sequence[int] = ()

    @property
    def stops(self) -> set[int]:
        """All tokens that end an answer."""
        return stop_tokens(self.model, tokenizer_of(self.processor), self.ends)


def mixed(logarithms: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Logarithm of a mixture of probabilities, ``log sum_i alpha_i p_i``.

    Args:
        logarithms: those of each model, of like shape.
        weights: ``(models, ...)``, which spread over the last dimensions.
    """
    stacked = torch.stack([one.double().to(logarithms[0].device) for one in logarithms])
    shape = [*weights.shape, *[1] * (stacked.dim() - weights.dim())]
    return torch.logsumexp(stacked + weights.to(stacked.device).log().view(shape), dim=0)


class Mixture:
    """What models in threads of their own predict together.

    Args:
        weights: ``(models, prompts)``, which sum to 1 over models.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self._given: dict[int, Tensor] = {}
        self._mixed = torch.empty(0)
        self._barrier = Barrier(len(weights), self._mix)

    def of(self, number: int) -> Callable[[Tensor, Tensor], Tensor]:
        """What a model chooses tokens by in place of its own scores ``(prompts, vocabulary)``."""

        def change(_tokens: Tensor, scores: Tensor) -> Tensor:
            self._given[number] = scores
            self._barrier.wait()
            found = torch.full_like(scores, -torch.inf)  # rows that pad a vocabulary, where others have fewer
            found[:, : self._mixed.shape[1]] = self._mixed.to(scores)
            return found

        return change

    def abort(self) -> None:
        """Let no model wait for one that does not come."""
        self._barrier.abort()

    def _mix(self) -> None:
        given = [self._given[number] for number in range(len(self.weights))]
        known = min(scores.shape[1] for scores in given)
        self._mixed = mixed([scores[:, :known].double().log_softmax(-1) for scores in given], self.weights)


def write_together(writers: Sequence[Writer], weights: Tensor, max_new_tokens: int) -> list[str]:
    """Greedy answers to questions by the mixture of models of one vocabulary.

    Args:
        writers: the models, each with its prompts of all questions.
        weights: ``(models, questions)``, which sum to 1 over models.
        max_new_tokens: bound on the length.
    """
    mixture, stops = Mixture(weights), set[int]().union(*(writer.stops for writer in writers))

    def write(number: int) -> list[str]:
        own = writers[number]
        try:
            found = generate(
                own.model, own.processor, own.prompts, max_new_tokens, stops=stops, change=mixture.of(number)
            )
            return [text for text, _ in found]
        except BaseException:
            mixture.abort()
            raise

    with ThreadPoolExecutor(len(writers)) as pool:
        try:
            jobs = [pool.submit(write, number) for number in range(len(writers))]
            errors = [error for job in jobs if (error := job.exception())]
        except BaseException:  # such as an interrupt, for which the models would not stop
            mixture.abort()
            raise
    for error in sorted(errors, key=lambda one: isinstance(one, BrokenBarrierError)):
        raise error
    return jobs[0].result()
