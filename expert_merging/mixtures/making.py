"""Makes the routers of a mixture: what is checked before, and the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from expert_merging.context import Context
from expert_merging.machine import gib, show_size
from expert_merging.mixtures import fitting
from expert_merging.mixtures.body import share
from expert_merging.mixtures.options import FITTED, OF_STATES, MixtureOptions
from expert_merging.mixtures.report import report
from expert_merging.mixtures.similarity import chosen_experts, told
from expert_merging.mixtures.statistics import NEGATIVE, OWN, RouterSamples, gather_inputs, most_bytes
from expert_merging.mixtures.tensors import Mixture
from expert_merging.plan import Rule
from expert_merging.statistics.gram import Gram, Grams
from expert_merging.statistics.inputs import file_of
from expert_merging.writing import check_free_disk

# By name.
Routers: TypeAlias = "dict[str, Tensor]"
_GRADIENTS = (
    "which expert a sample is for is found before: a backward pass of the base for each, with the gradient of one of "
    "its feed-forward tensors in memory at a time, and task vectors in memory where half of it has room for them"
)


@dataclass(frozen=True)
class RouterMaker:
    """Makes routers of samples.

    Args:
        context: the run.
        mixture: the mixture.
        options: its options.
        samples: what the routers are made of, checked.
    """

    context: Context
    mixture: Mixture
    options: MixtureOptions
    samples: RouterSamples

    @classmethod
    def check(cls, context: Context, mixture: Mixture, options: MixtureOptions, size: int) -> RouterMaker:
        """Check samples, and that the disk has room.

        Args:
            context: the run.
            mixture: the mixture.
            options: its options.
            size: bytes of the result.

        Raises:
            InputError: calibration files cannot be used, or the disk has no room.
        """
        held_out = options.held_out if options.kind in OF_STATES else 0.0  # else no model runs to see what they do
        samples = RouterSamples.check(context, options, held_out=held_out, negatives=options.negatives)
        maker = cls(context, mixture, options, samples)
        missing = sum(not file_of(context.run.statistics, expert).exists() for expert in context.plan.experts)
        if missing and maker.bytes_each and not context.run.is_complete:
            check_free_disk(context.run.folder, missing * maker.bytes_each + size)
        return maker

    @property
    def bytes_each(self) -> int:
        """The most bytes that are kept of an expert."""
        if self.options.kind not in OF_STATES:
            return 0
        sums = len(self.context.plan.experts) if self.by_gradient else 1 + (self.options.negatives is not None)
        return most_bytes(len(self.mixture.inputs), self.mixture.columns, sums)

    @property
    def by_gradient(self) -> bool:
        """Whether samples are for the experts whose task vectors their gradients ask for."""
        return self.options.kind == "task_vectors"

    @property
    def notes(self) -> tuple[str, ...]:
        """What the plan says of the work."""
        count = len(self.samples.samples.samples)
        if not self.bytes_each:
            return (f"routers are made of the base's embeddings of {count} samples",)
        experts, size = len(self.context.plan.experts), self.bytes_each
        return (
            f"routers are made of {count} samples, held-out ones included: an expert at a time runs alone, with all "
            f"that is shared put into it; at most {gib(size)} of memory beside the expert",
            f"what routers are made of is kept in {self.context.run.statistics}, at most {show_size(experts * size)}, "
            "which can be removed once the mixture is there",
            *([_GRADIENTS] if self.by_gradient else []),
        )

    def make(self, rule: Rule, unit: str, trained: Callable[[Routers], Routers] = dict) -> Routers:
        """Routers by name; what they do is written to the run's folder and told.

        Args:
            rule: what merges the shared tensors.
            unit: what it is fed.
            trained: what training makes of them.
        """
        if not self.bytes_each:
            routers = trained(self._of_embeddings())
            report(self.context, self.mixture, routers, None)
            return routers
        samples, assigned = self.samples, None
        if self.by_gradient:
            own = samples.of(OWN)
            chosen = chosen_experts(self.context, replace(samples.samples, samples=tuple(own)))
            samples, assigned = samples.assigned(chosen), told(own, chosen)
        names, shared = [*self.mixture.inputs], (self.context, self.mixture, rule, unit)
        grams = gather_inputs(self.context, samples, names, lambda model: share(model, *shared))
        routers = trained(self._of_states(grams))
        report(self.context, self.mixture, routers, grams, assigned)
        return routers

    def _of_states(self, grams: Grams) -> Routers:
        device = torch.device(self.context.device)

        def ridge(own: Sequence[Gram], _negative: Sequence[Gram]) -> Tensor:
            return fitting.ridge_rows(own, self.options.ridge, device)

        def prompts(own: Sequence[Gram], negative: Sequence[Gram]) -> Tensor:
            means = torch.stack([fitting.mean_of(gram, device) for gram in own])
            given = torch.stack([fitting.mean_of(gram, device) for gram in negative]) if negative else None
            return fitting.directions(means, self._negatives(means, given))

        rows = ridge if self.options.kind in FITTED else prompts
        temperature = self.options.temperature
        return fitting.from_states(self.mixture, grams, rows, temperature, assigned=self.by_gradient)

    def _of_embeddings(self) -> Routers:
        """The same rows for every layer."""
        base, experts = self.context.plan.base, [*self.context.plan.experts]
        means = fitting.means_of_embeddings(base, self.samples, experts, OWN)
        given = None
        if self.options.negatives is not None:
            given = fitting.means_of_embeddings(base, self.samples, experts, NEGATIVE)
        rows = fitting.directions(means, self._negatives(means, given))
        router = fitting.for_members(self.mixture, rows, self.options.temperature)
        return {name: router.clone() for name in self.mixture.inputs.values()}

    def _negatives(self, means: Tensor, given: Tensor | None) -> Tensor | None:
        """What is subtracted from the experts' means."""
        return fitting.others(means) if self.options.negative_prompts == "others" else given
