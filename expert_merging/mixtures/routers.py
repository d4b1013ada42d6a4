"""Routers: the matrix ``(experts, hidden size)`` of each layer that rates the experts for a token."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.errors import InputError
from expert_merging.mixtures.tensors import Mixture

if TYPE_CHECKING:
    from torch import Tensor

# What transformers draws new weights with where config.json does not say it.
_USUAL_DEVIATION = 0.02


def zero_routers(mixture: Mixture) -> dict[str, Tensor]:
    """Routers that rate all experts alike, by name."""
    import torch

    return {router: torch.zeros(len(mixture.members), mixture.columns) for router in mixture.inputs.values()}


def random_routers(mixture: Mixture, seed: int, deviation: float) -> dict[str, Tensor]:
    """Routers of random numbers, by name.

    A row depends on the seed and the names of expert and router alone: a restart does not change it, and experts in
    another order make the same model.

    Args:
        mixture: the mixture.
        seed: seed of the run.
        deviation: standard deviation.
    """
    import torch

    def row(router: str, member: str) -> Tensor:
        key = f"{seed}/{member}/{router}".encode()
        drawn = int.from_bytes(hashlib.sha256(key).digest()[:8], "little")
        return torch.randn(mixture.columns, generator=torch.Generator().manual_seed(drawn)) * deviation

    return {
        router: torch.stack([row(router, member) for member in mixture.members]) for router in mixture.inputs.values()
    }


def deviation_of(base: Checkpoint) -> float:
    """Standard deviation of the numbers in random routers: that of the base's own weights before it was trained.

    Raises:
        InputError: ``config.json`` has another thing in its place.
    """
    given = base.config.get("initializer_range")
    if given is None:
        return _USUAL_DEVIATION
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < math.inf:
        raise InputError(
            f"{base.folder}/config.json has the initializer_range {given!r}, and routers are drawn with it as their "
            "standard deviation; give it a number that is not negative, or choose --router zeros"
        )
    return float(given)
