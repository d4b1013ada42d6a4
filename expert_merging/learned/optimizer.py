"""The optimizer, schedule and loss scaling that coefficients are published with, as accelerate runs them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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


@contextmanager
def uphill(parameters: Iterable[torch.nn.Parameter], distance: float) -> Iterator[None]:
    """Move parameters along their gradient, so that the gradient there is taken inside of the block, and back.

    A step against that gradient leads to where the loss is small also nearby (sharpness-aware minimization,
    arXiv 2010.01412, Eq. 3).

    Args:
        parameters: they have a gradient, and none inside of the block.
        distance: how far, as the Euclidean norm over all of them.
    """
    own = list(parameters)
    before = [parameter.detach().clone() for parameter in own]
    gradients = [parameter.grad for parameter in own]
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]))
    step = distance / norm if norm.isfinite() and norm > 0 else torch.zeros_like(norm)  # after an overflow of float16
    with torch.no_grad():
        for parameter, gradient in zip(own, gradients, strict=True):
            if gradient is not None and step > 0:
                parameter.add_(gradient * step)
            parameter.grad = None
    yield
    with torch.no_grad():
        for parameter, values in zip(own, before, strict=True):
            parameter.copy_(values)


def attempts() -> Iterator[None]:
    """Attempts at one update, each with a smaller loss scale than the last.

    Raises:
        InputError: none of them has succeeded.
    """
    yield from [None] * _OVERFLOWS
    raise InputError("float16 overflows at every loss scale; use --mixed_precision bf16 or no")
