"""Answers that models write, greedily and together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from expert_merging.running.batches import together
from expert_merging.running.prompts import tokenizer_of


def stop_tokens(model: Any, tokenizer: Any, ends: Sequence[int] = ()) -> set[int]:
    """Tokens that end an answer: those that the model's own generation settings name, and special ones among others.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        ends: tokens that end a turn; a fine-tune's settings are often those of its base, which has no turns.
    """
    own = model.generation_config.eos_token_id
    return {*(own if isinstance(own, list) else [own]), *(set(ends) & set(tokenizer.all_special_ids))} - {None}


@torch.no_grad()
def generate(
    model: Any,
    processor: Any,
    prompts: Sequence[Mapping[str, Tensor]],
    max_new_tokens: int,
    ends: Sequence[int] = (),
    *,
    stops: Set[int] | None = None,
    change: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> list[tuple[str, list[int]]]:
    """Greedy continuations of prompts, each as text and as tokens up to the end token.

    Args:
        model: the model.
        processor: its tokenizer, or what has one.
        prompts: model inputs, batch of one each, that are continued together.
        max_new_tokens: bound on the length.
        ends: tokens that may end an answer beside the model's own, as for `stop_tokens`.
        stops: tokens that end an answer, in place of those.
        change: makes others of the scores of the next token, ``(prompts, vocabulary)``, given all tokens so far.
    """
    tokenizer = tokenizer_of(processor)
    stops = stop_tokens(model, tokenizer, ends) if stops is None else stops
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    inputs = together(prompts, padding or 0, side="left")
    tokens = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=sorted(stops) or None,
        pad_token_id=padding,
        logits_processor=[] if change is None else [change],
    )
    written = [_up_to(row, stops) for row in tokens[:, inputs["input_ids"].shape[1] :].tolist()]
    return [(str(tokenizer.decode(row, skip_special_tokens=True)), row) for row in written]


def _up_to(tokens: list[int], stops: Set[int]) -> list[int]:
    """Tokens up to the first that ends an answer; where others of a batch went on, padding follows it."""
    end = next((place for place, token in enumerate(tokens, 1) if token in stops), len(tokens))
    return tokens[:end]
