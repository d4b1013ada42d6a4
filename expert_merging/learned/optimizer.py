"""The optimizer, schedule and loss scaling that coefficients are published with, as accelerate runs them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from expert_merging.context import Context
from expert_merging.errors import InputError
from expert_merging.learned.settings import Settings
from expert_merging.running.accelerator import make_accelerator

# Attempts at an update in float16; each overflow halves the loss scale, which starts at 2 ** 16.
_OVERFLOWS = 24
_PUBLISHED_ADAMW = {"weight_decay": 1e-5, "betas": (0.9, 0.999)}
_PUBLISHED_CYCLE = {"T_0": 50, "T_mult": 2}
# Largest norm of the gradient.
PUBLISHED_CLIPPING = 1.0


def training_accelerator(context: Context, settings: Settings) -> Any:
    """What runs training, in the wanted precision."""
    from accelerate.utils import GradientAccumulationPlugin

    return make_accelerator(
        context,
        mixed_precision=settings.asked.precision,
        # As a plugin, since a launcher's environment variable would win over the plain argument.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.options.gradient_accumulation_steps),
        step_scheduler_with_optimizer=False,
    )


def make_optimizer(accelerator: Any, parameters: Iterable[torch.nn.Parameter], rate: float) -> tuple[Any, Any]:
    """AdamW and its cosine schedule with warm restarts."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, **_PUBLISHED_ADAMW)  # type: ignore[arg-type]
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, eta_min=0.1 * rate, **_PUBLISHED_CYCLE)
    optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
    return optimizer, scheduler


def attempts() -> Iterator[None]:
    """Attempts at one update, each with a smaller loss scale than the last.

    Raises:
        InputError: none of them has succeeded.
    """
    yield from [None] * _OVERFLOWS
    raise InputError("float16 overflows at every loss scale; use --mixed_precision bf16 or no")
