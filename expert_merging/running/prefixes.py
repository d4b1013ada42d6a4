"""Hidden states of several texts that begin alike: what all begin with goes through the model once.

A chat template's system prompt, an instruction, or solved examples are often most of a question's tokens.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

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
        cache = _empty_cache(model)
        first = {name: value[:1, :shared] for name, value in inputs.items()}
        model.base_model(**first, **{_cache_name(model): cache}, use_cache=True)
        cache.batch_repeat_interleave(len(samples))
        rest = inputs["input_ids"][:, shared:]
        # Qwen2-VL would count on from where the pictures of an earlier text have left it.
        places = torch.arange(shared, shared + rest.shape[1], device=rest.device).expand_as(rest)
        inputs = {**inputs, "input_ids": rest, "position_ids": places, _cache_name(model): cache}
    states = model.base_model(**inputs, use_cache=bool(shared)).last_hidden_state
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    return [own[start - shared : length - shared] for own, start, length in zip(states, starts, lengths, strict=True)]


def _empty_cache(model: Any) -> Any:
    return import_transformers().DynamicCache(config=model.config.get_text_config())


def _cache_name(model: Any) -> str:
    """What a model calls its cache: transformers has changed the name."""
    return "cache" if "cache" in inspect.signature(model.base_model.forward).parameters else "past_key_values"


def _reach(model: Any) -> float:
    """Tokens from which a model's cache forgets the first ones; 0 where it keeps other things than keys and values.

    What it keeps of convolutions and of linear attention cannot be given to several texts.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if model._is_stateful:
        return 0
    layers = _empty_cache(model).layers
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return 0
    return min((layer.sliding_window for layer in layers if layer.is_sliding), default=math.inf)


def _shared(model: Any, samples: Sequence[Mapping[str, Tensor]], starts: Sequence[int]) -> int:
    """How many tokens, all before the starts, the samples have in common; 0 if a pass of their own is not worth it."""
    if len(samples) == 1 or any(set(sample) - _TEXT for sample in samples):
        return 0
    rows = [sample["input_ids"][0, :start].tolist() for sample, start in zip(samples, starts, strict=True)]
    alike = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))
    found = sum(1 for _ in alike)
    return found if found >= _WORTH and found < _reach(model) else 0
