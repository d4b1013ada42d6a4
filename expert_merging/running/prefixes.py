"""Hidden states of several texts that begin alike: what all begin with goes through the model once.

A chat template's system prompt, an instruction, or solved examples are often most of a question's tokens.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from expert_merging.checkpoints.configurations import size_setting
from expert_merging.libraries import import_transformers
from expert_merging.running.batches import together
from expert_merging.running.prompts import place

# Model inputs of which a text has no others.
_TEXT = {"input_ids", "attention_mask"}
# Tokens from which a pass of their own is worth it.
_WORTH = 8


@torch.no_grad()
def hidden_states(model: Any, samples: Sequence[Mapping[str, Tensor]], starts: Sequence[int]) -> list[Tensor]:
    """The last hidden states of each sample from a token on, ``(tokens, hidden)``, as one pass over all gives them.

    Args:
        model: a causal language model.
        samples: model inputs, batch of one each.
        starts: the first token of each whose state is asked for.
    """
    shared = _shared(model, samples, starts)
    inputs = place(together(samples), model.device, model.dtype)
    if shared:
        cache = import_transformers().DynamicCache(config=model.config.get_text_config())
        first = {name: value[:1, :shared] for name, value in inputs.items()}
        model.base_model(**first, **{_cache_name(model): cache}, use_cache=True)
        cache.batch_repeat_interleave(len(samples))
        inputs = {**inputs, "input_ids": inputs["input_ids"][:, shared:], _cache_name(model): cache}
    states = model.base_model(**inputs, use_cache=bool(shared)).last_hidden_state
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    return [own[start - shared : length - shared] for own, start, length in zip(states, starts, lengths, strict=True)]


def _cache_name(model: Any) -> str:
    """What a model calls its cache: transformers has changed the name."""
    return "cache" if "cache" in inspect.signature(model.base_model.forward).parameters else "past_key_values"


def _shared(model: Any, samples: Sequence[Mapping[str, Tensor]], starts: Sequence[int]) -> int:
    """How many of the first tokens, all before the starts, go through the model once for all; 0 if none is worth it."""
    if len(samples) == 1 or any(set(sample) - _TEXT for sample in samples):
        return 0
    rows = [sample["input_ids"][0, :start].tolist() for sample, start in zip(samples, starts, strict=True)]
    window = size_setting(model.config.to_dict(), "sliding_window")  # a cache forgets what is before it
    alike = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))
    found = sum(1 for _ in alike)
    return found if found >= _WORTH and (window is None or found < window) else 0
