"""Coefficients that are made of masks: gates of singular directions, and one mask that all experts share."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from expert_merging.learned.parametrisations import CoefficientVector, Layout


class GatedVector(CoefficientVector):
    """For each singular direction whether it counts, and a coefficient per expert and tensor for those that do.

    AdaRank (arXiv 2503.22178): a direction counts where its logit is positive. Gradients pass through as if it counted
    by ``sigmoid(logit / 10)``. A tensor's numbers are ``(experts, directions + 1)``, its coefficient last. Tensors that
    are not along singular directions have coefficients alone.

    Args:
        layout: the coefficients.
        device: where they are.
        share: of each expert's strongest directions that count at first.
    """

    _TEMPERATURE, _START = 10.0, 0.1
    derived = True

    def __init__(self, layout: Layout, device: torch.device | str = "cpu", *, share: float = 1.0) -> None:
        gated = set(layout.axes)
        counts = {name: count + 1 if name in gated else count for name, count in layout.chunks.items()}
        super().__init__(replace(layout, chunks=counts), device)
        self.gated = gated
        self.is_gate: Tensor
        self.register_buffer("is_gate", torch.zeros_like(self.raw, dtype=torch.bool))
        with torch.no_grad():
            for name in gated:
                count = layout.chunks[name]
                self.view(self.is_gate, name)[:, :count] = True
                logits = self.view(self.raw, name)[:, :count]
                logits.fill_(-self._START)
                logits[:, : int(share * count)] = self._START
            self.anchor.copy_(self())

    def forward(self) -> Tensor:
        """Values of all trainable numbers, of which gates are 0 or 1."""
        soft = torch.sigmoid(self.raw / self._TEMPERATURE)
        hard = (self.raw > 0).float()
        return torch.where(self.is_gate, hard + soft - soft.detach(), self._value(self.raw))

    def coefficients(self, values: Tensor, name: str) -> Tensor:
        """The coefficient of each direction, 0 where it does not count; see `CoefficientVector.coefficients`."""
        return values[:, :-1] * values[:, -1:] if name in self.gated else values


class SharedMask(CoefficientVector):
    """A soft mask that all experts share, times each expert's first coefficient, which stays.

    Concrete subspace learning (arXiv 2312.06173): ``mask = sigmoid((raw + noise) / 0.5)``, where noise is the logit of
    a uniform number while gradients are taken, and 0 otherwise. A coefficient is ``first * mask / mean of the mask``.
    A tensor's numbers are ``(1, count)``.

    Args:
        layout: the coefficients.
        device: where they are.
    """

    _TEMPERATURE = 0.5
    derived = True

    def __init__(self, layout: Layout, device: torch.device | str = "cpu") -> None:
        # The mask has the places of a single expert, at 1/2, so that training begins at the first coefficients.
        first = torch.tensor(layout.initial, device=device)
        super().__init__(replace(layout, initial=[0.5], first=None, bounded=True, signed=False), device)
        self.first: Tensor
        self.register_buffer("first", first)
        self.constants = dict.fromkeys(self.constants, first[:, None])
        self.noise: Tensor
        self.register_buffer("noise", torch.zeros_like(self.raw), persistent=False)

    def forward(self) -> Tensor:
        """The mask, ``(numbers,)``."""
        return torch.sigmoid((self.raw + self.noise) / self._TEMPERATURE)

    def draw(self, seed: str | None) -> None:
        """See `CoefficientVector.draw`; every process draws the same, in whatever order tensors are stored."""
        self.noise.zero_()
        for name, place in self.places.items() if seed is not None else ():
            number = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
            uniform = torch.rand(place.stop - place.start, generator=torch.Generator().manual_seed(number))
            self.noise[place] = torch.logit(uniform, eps=1e-6).to(self.noise.device)

    def coefficients(self, values: Tensor, name: str) -> Tensor:
        """See `CoefficientVector.coefficients`."""
        if name in self.constants:  # whose values are the first coefficients
            return values
        return self.first[:, None] * values / values.mean()
