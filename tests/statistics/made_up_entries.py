"""Numbers for each entry that are made up, as methods on gradients ask for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from expert_merging.parts import Part

SHAPE = (5, 8)
WHOLE = Part.whole("layers.0.weight", SHAPE)


@dataclass(frozen=True)
class GivenEntries:
    """Numbers ``(experts, *shape)`` of one tensor, which is all that is merged."""

    values: torch.Tensor

    @property
    def files(self) -> dict[str, Path]:
        """Names for messages."""
        return {str(number): Path(str(number)) for number in range(len(self.values))}

    @property
    def relative(self) -> GivenEntries:
        """Each expert's of the root of their mean square."""
        scales = self.values.double().flatten(1).square().mean(1).sqrt().float()
        return GivenEntries(self.values / torch.where(scales > 0, scales, 1.0).view(-1, 1, 1))

    def of(self, part: Part) -> torch.Tensor:
        return self.values.flatten(1)[:, part.start : part.stop].clone()


def entries(experts: int = 3, seed: int = 2) -> torch.Tensor:
    """Numbers whose sizes differ as much as those of gradients do."""
    return torch.randn(experts, *SHAPE, generator=torch.Generator().manual_seed(seed)).mul(3).exp()
