"""What routers are made of: the inputs of every router while each expert does all the work on its own samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from expert_merging.context import Context
from expert_merging.errors import Problems
from expert_merging.learned.epochs import hold_out
from expert_merging.questions.calibration import Sample
from expert_merging.running.options import SampleOptions
from expert_merging.running.samples import Samples, check_samples
from expert_merging.running.targets import Asked
from expert_merging.statistics.gram import Gram, Grams, GramSum
from expert_merging.statistics.inputs import gather, grams_of

# Samples that routers are made of, those that an expert is not for, and those that routers are tried on.
OWN, NEGATIVE, HELD_OUT = "", "negative ", "held out "
# Samples that are for an expert, whosever they are.
FOR = "for {} "
# Vectors that are kept of what routers are tried on, of each expert and router.
_MOST_KEPT = 1024


class SumWithMean(GramSum):
    """A Gram matrix of vectors that have a one at their end, so that its last row is their mean."""

    def add(self, vectors: Tensor) -> None:
        """Add vectors ``(vectors, inputs)``."""
        super().add(torch.cat([vectors, vectors.new_ones(len(vectors), 1)], dim=1))


class FirstVectors(GramSum):
    """The first vectors, as they are; always fewer than inputs, so that none are added up."""

    def add(self, vectors: Tensor) -> None:
        """Keep some of the vectors ``(vectors, inputs)``, as long as there is room."""
        room = min(_MOST_KEPT, vectors.shape[1] - 1) - self.vectors
        if room > 0:
            super().add(vectors[:room])


_SUMS: Mapping[str, Callable[[], GramSum]] = {OWN: SumWithMean, NEGATIVE: SumWithMean, HELD_OUT: FirstVectors}


@dataclass(frozen=True)
class RouterSamples:
    """The samples of a run by what they are for.

    Args:
        samples: all of them.
        kinds: what each of them is for.
    """

    samples: Samples
    kinds: tuple[str, ...]

    @classmethod
    def check(
        cls, context: Context, options: SampleOptions, *, held_out: float, negatives: str | None
    ) -> RouterSamples:
        """Read the calibration files and check that every expert can be asked.

        Args:
            context: the run.
            options: how they are asked, and which.
            held_out: share of each task's samples that no router is made of.
            negatives: folder of the samples that experts are not for; None if there are none.

        Raises:
            InputError: every problem found.
        """
        problems, other = Problems(), None
        with problems.collecting():
            found = check_samples(context, options, compares_logits=False)
        if negatives is not None:
            with problems.collecting():
                own = replace(options, data_dir=negatives, task_expert=None, samples_per_task_dict=None)
                other = check_samples(context, own, compares_logits=False, flag="negative_prompts")
        problems.check()
        own_samples, tried = hold_out(found.samples, held_out)
        by_kind = {OWN: own_samples, NEGATIVE: [*(other.samples if other else ())], HELD_OUT: tried}
        longest = max(found.longest, other.longest if other else 0)
        together = tuple(sample for samples in by_kind.values() for sample in samples)
        kinds = tuple(kind for kind, samples in by_kind.items() for _ in samples)
        return cls(replace(found, samples=together, longest=longest), kinds)

    def assigned(self, chosen: Sequence[str]) -> RouterSamples:
        """The same, in which samples that routers are made of are for other experts than those that are asked.

        Args:
            chosen: the expert that each of them is for.
        """
        names = iter(chosen)
        kinds = [FOR.format(next(names)) if kind == OWN else kind for kind in self.kinds]
        order = sorted(range(len(kinds)), key=kinds.__getitem__)  # those of a kind go through an expert in one go
        samples = tuple(self.samples.samples[number] for number in order)
        return RouterSamples(replace(self.samples, samples=samples), tuple(kinds[number] for number in order))

    def kinds_of(self, expert: str) -> list[str]:
        """What each of an expert's samples is for."""
        pairs = zip(self.samples.samples, self.kinds, strict=True)
        return [kind for sample, kind in pairs if sample.expert == expert]

    def of(self, kind: str) -> list[Sample]:
        """The samples for something."""
        return [sample for sample, own in zip(self.samples.samples, self.kinds, strict=True) if own == kind]


def most_bytes(routers: int, columns: int, sums: int) -> int:
    """The most bytes that are kept of an expert, in memory and on the disk.

    Args:
        routers: number of routers.
        columns: columns of a router.
        sums: kinds of samples whose inputs are added up.
    """
    return 4 * routers * (sums * (columns + 1) ** 2 + min(_MOST_KEPT, columns) * columns)


def gather_inputs(context: Context, found: RouterSamples, names: Sequence[str], change: Callable[[Any], None]) -> Grams:
    """Statistics of the inputs of some tensors by expert; those of an earlier part of the run are taken.

    Those of samples for something else than making routers have that before the tensor's name.

    Args:
        context: the run.
        found: what experts are asked.
        names: the tensors.
        change: makes an expert's model what runs, of all checkpoints.

    Raises:
        InputError: an expert answers with nothing or computes NaN.
    """
    file_name, opened = context.backbone.file_name, context.plan.opened

    def find(expert: str, model: Any, own: Iterator[Asked]) -> dict[tuple[str, ...], Gram]:
        change(model)
        grams = dict[tuple[str, ...], Gram]()
        for kind, pairs in groupby(zip(found.kinds_of(expert), own, strict=True), itemgetter(0)):
            asked = (one for _, one in pairs)
            of_kind = grams_of(model, names, file_name, asked, _SUMS.get(kind, SumWithMean))
            grams |= {tuple(kind + name for name in shared): gram for shared, gram in of_kind.items()}
        return grams

    return gather(context, found.samples, lambda _: opened, find, who="the mixture with expert {} alone")
