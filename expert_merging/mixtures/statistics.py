"""What routers are made of: the inputs of every router while each expert does all the work on its own samples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from expert_merging.context import Context
from expert_merging.errors import InputError, Problems, about
from expert_merging.learned.epochs import hold_out
from expert_merging.questions.calibration import Sample
from expert_merging.running.options import SampleOptions
from expert_merging.running.samples import Samples, check_samples
from expert_merging.running.targets import Asked
from expert_merging.statistics.gram import Gram, Grams, GramSum, write_grams
from expert_merging.statistics.inputs import InputWatch, file_of

# Samples that routers are made of, those that an expert is not for, and those that routers are tried on.
OWN, NEGATIVE, HELD_OUT = "", "negative ", "held out "
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
            with problems.collecting(), about("--negative_prompts"):
                own = replace(options, data_dir=negatives, task_expert=None, samples_per_task_dict=None)
                other = check_samples(context, own, compares_logits=False)
        problems.check()
        own_samples, tried = hold_out(found.samples, held_out)
        by_kind = {OWN: own_samples, NEGATIVE: [*(other.samples if other else ())], HELD_OUT: tried}
        longest = max(found.longest, other.longest if other else 0)
        together = tuple(sample for samples in by_kind.values() for sample in samples)
        kinds = tuple(kind for kind, samples in by_kind.items() for _ in samples)
        return cls(replace(found, samples=together, longest=longest), kinds)

    def of(self, kind: str) -> list[Sample]:
        """The samples for something."""
        return [sample for sample, own in zip(self.samples.samples, self.kinds, strict=True) if own == kind]

    def only(self, experts: Collection[str]) -> RouterSamples:
        """The samples of some experts."""
        pairs = zip(self.samples.samples, self.kinds, strict=True)
        left = [(sample, kind) for sample, kind in pairs if sample.expert in experts]
        samples = replace(self.samples, samples=tuple(sample for sample, _ in left))
        return RouterSamples(samples, tuple(kind for _, kind in left))


def most_bytes(routers: int, columns: int, *, negatives: bool) -> int:
    """The most bytes that are kept of an expert, in memory and on the disk.

    Args:
        routers: number of routers.
        columns: columns of a router.
        negatives: there are samples that experts are not for.
    """
    return 4 * routers * ((1 + negatives) * (columns + 1) ** 2 + min(_MOST_KEPT, columns) * columns)


def gather(context: Context, found: RouterSamples, names: Sequence[str], change: Callable[[Any], None]) -> Grams:
    """Statistics of the inputs of some tensors by expert; those of an earlier part of the run are taken.

    They have to be as they were written, and no checkpoint may have been written since.

    Args:
        context: the run.
        found: what experts are asked.
        names: the tensors. Those of samples for something else than making routers have that before their name.
        change: makes an expert's model what runs.

    Raises:
        InputError: an expert answers with nothing or computes NaN.
    """
    folder = context.run.statistics
    kept = context.run.kept.within(folder.name, context.plan.opened)
    files = {expert: file_of(folder, expert) for expert in context.plan.experts}
    left = [expert for expert, file in files.items() if not (file.exists() and kept.has(file))]
    if left:
        folder.mkdir(exist_ok=True)
        asked = found.only(left)

        def look(expert: str, model: Any, own: Iterator[Asked]) -> None:
            change(model)
            write_grams(files[expert], _watch(context, expert, model, own, asked, names), kept)

        missing = replace(context, plan=context.plan.only(left))
        asked.samples.target_maker(missing, (), torch.device(context.device)).ask(asked.samples.samples, look)
    return Grams(files)


@torch.no_grad()
def _watch(
    context: Context, expert: str, model: Any, own: Iterator[Asked], found: RouterSamples, names: Sequence[str]
) -> dict[tuple[str, ...], Gram]:
    """Statistics of one expert, by the names of the tensors with what they are for before them."""
    file_name, grams = context.backbone.file_name, dict[tuple[str, ...], Gram]()
    for kind, samples in groupby(own, lambda asked: found.kinds[asked.number]):
        watch = InputWatch(model, {file_name(name): name for name in names}, file_name, _SUMS[kind])
        try:
            for asked in samples:
                watch.run(asked)
            grams |= {tuple(kind + name for name in shared): gram for shared, gram in watch.finish().items()}
        finally:
            watch.close()
    faulty = [shared[0] for shared, gram in grams.items() if not bool(torch.isfinite(gram.values).all())]
    if faulty:
        hint = "; in bf16 there is room for larger numbers (--mixed_precision)"
        raise InputError(
            f"the mixture with expert {expert} alone computes NaN or infinite inputs of {faulty[0]}"
            + (hint if found.samples.precision == "fp16" else "")
        )
    return grams
