"""Adapters that peft has made, and what peft makes of them, for the tests."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

Load = Callable[[], Any]
PROJECTIONS = ("q_proj", "v_proj", "down_proj")


def save_adapter(
    load: Load,
    folder: Path,
    *,
    seed: int = 1,
    change: float = 0.1,
    resized: int | None = None,
    dtype: torch.dtype | None = None,
    **settings: Any,
) -> Path:
    """An adapter with random numbers in all that it trains, saved by peft.

    Args:
        load: the base's model, a new one each time.
        folder: where it is saved.
        seed: of its numbers.
        change: how large they are.
        resized: rows of the embeddings after resizing, which are then saved whole.
        dtype: type of its numbers; the base's by default.
        settings: of ``LoraConfig``.
    """
    torch.manual_seed(seed)
    model = load()
    if resized is not None:
        model.resize_token_embeddings(resized)
    settings = {"target_modules": list(PROJECTIONS), "r": 4, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(**settings))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(change * torch.randn_like(parameter))
                    parameter.data = parameter.to(dtype or parameter.dtype)
        adapted.save_pretrained(folder, save_embedding_layers=True if resized else "auto")
    return folder


def merged_by_peft(load: Load, folder: Path, *, resized: int | None = None) -> Any:
    """The base's model with the adapter merged into it."""
    model = load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if resized is not None:
            model.resize_token_embeddings(resized)
        return PeftModel.from_pretrained(model, folder).merge_and_unload(safe_merge=True)
