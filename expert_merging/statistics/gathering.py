"""What methods that read Gram matrices or gradients have in common: each expert's are gathered once, one at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from expert_merging.arithmetic import scaled_mean
from expert_merging.context import Context
from expert_merging.errors import InputError, first_of
from expert_merging.machine import gib, show_size
from expert_merging.method import KEEPS_SINGLE, ORDER_FREE, SAMPLES, Preparation, Prepare, register
from expert_merging.parts import Part
from expert_merging.processes import while_others_wait
from expert_merging.running.options import SampleOptions

if TYPE_CHECKING:
    from torch import Tensor

    from expert_merging.running.samples import Samples
    from expert_merging.statistics.gram import Gram, Grams

logger = logging.getLogger(__name__)


def register_on_grams(
    method: str,
    options: type[SampleOptions],
    *,
    with_norms: bool = False,
    promises: frozenset[str] = frozenset({ORDER_FREE, KEEPS_SINGLE}),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`register` for a function of ``task_vectors, part, grams`` and options.

    Args:
        method: its name.
        options: class of its options.
        with_norms: it is given tensors of all kinds, and has the mean squares of what norms scale too.
        promises: what it keeps, of the promises that `Method` knows.
    """

    def prepare(context: Context, **given: Any) -> Preparation:
        return _prepare(context, method, options(**given), with_norms=with_norms)

    return register(
        options=options,
        unit="tensor" if with_norms else "matrix",
        promises=promises,
        reads=frozenset({SAMPLES}),
        prepare=Prepare(prepare, ("grams",)),
        family_defaults=("samples_per_task",),
    )


class HasGrams(Protocol):
    """Gram matrices by tensor."""

    def of(self, name: str) -> tuple[Gram | None, ...]:
        """Each expert's of a tensor's inputs, None where there is none."""
        ...


def merge_around_mean(
    task_vectors: Tensor, part: Part, grams: HasGrams, solve: Callable[[Iterable[tuple[Tensor, Gram]]], Tensor]
) -> Tensor:
    """The experts' mean, and what a method adds to it where inputs are known.

    Args:
        task_vectors: ``(experts, outputs, inputs)``.
        part: the tensor.
        grams: each expert's Gram matrices.
        solve: what is added, ``(outputs, inputs)``, given deviation from the mean, float64, and Gram matrix of each
            expert with samples that come by.
    """
    mean = scaled_mean(task_vectors, 1.0)
    own = {number: gram for number, gram in enumerate(grams.of(part.name)) if gram is not None}
    if len(task_vectors) == 1 or not own:
        return mean
    deviations = ((task_vectors[number].double().sub_(mean), gram) for number, gram in own.items())
    return mean + solve(deviations).to(mean.dtype)


def _prepare(context: Context, method: str, options: SampleOptions, *, with_norms: bool) -> Preparation:
    """Check the samples; the work is to gather Gram matrices, an expert at a time.

    Raises:
        InputError: options or calibration files cannot be used, or the disk has no room.
    """
    from expert_merging.outputs import mirror_of
    from expert_merging.running.samples import check_samples
    from expert_merging.statistics.inputs import file_of, gather_grams, matrices, most_bytes
    from expert_merging.writing import check_free_disk

    samples = check_samples(context, options, compares_logits=False)
    wanted = matrices(context)
    if not wanted:
        raise InputError(f"{method} merges matrices, and --exclude_params leaves none; use another method")
    folder = context.run.statistics
    most = most_bytes(context, samples)
    missing = sum(size for expert, size in most.items() if not file_of(folder, expert).exists())
    if missing and not context.run.is_complete:
        check_free_disk(context.run.folder, missing + mirror_of(context.plan).size)

    def gather() -> dict[str, Grams]:
        from expert_merging.statistics.gram import Grams

        found: list[Grams] = []
        while_others_wait(lambda: found.append(gather_grams(context, samples, with_norms=with_norms)))
        for grams in found:
            _tell_of_others(wanted, grams)
        return {"grams": found[0] if found else Grams({})}

    notes = (
        f"inputs of {len(wanted)} matrices are gathered from {len(samples.samples)} samples, an expert at a time: at "
        f"most {gib(max(most.values()))} of memory beside the expert",
        kept_note("they", folder, sum(most.values())),
    )
    return Preparation(gather, samples.inputs, notes)


def check_entries(context: Context, samples: Samples, base: Path | None = None) -> tuple[str, ...]:
    """Check that the disk has room for a number for each merged entry of each expert; notes for the plan.

    Args:
        context: the run.
        samples: what the experts are asked.
        base: where the same of the base's gradients is kept, if they are taken too.

    Raises:
        InputError: the disk has no room.
    """
    from expert_merging.outputs import mirror_of
    from expert_merging.statistics.entrywise import bytes_of
    from expert_merging.statistics.inputs import file_of
    from expert_merging.writing import check_free_disk

    plan, folder = context.plan, context.run.statistics
    size = bytes_of(plan.part(name) for name in plan.merged)
    files = [file_of(place, expert) for place in (folder, base) if place for expert in plan.experts]
    missing = size * sum(not file.exists() for file in files)
    if missing and not context.run.is_complete:
        check_free_disk(context.run.folder, missing + mirror_of(plan).size)
    asked = f"{len(samples.samples)} samples" + (", and the base's from all of them again" if base else "")
    return (
        f"gradients of {len(plan.merged)} tensors are taken from {asked}, a model at a time: {gib(size)} beside the "
        "model, in a file that the system keeps in memory as far as there is room",
        kept_note("they", folder, size * len(files)),
    )


def kept_note(what: str, folder: Path, size: int) -> str:
    """A line for the plan on what is kept in the run's folder, and takes so many bytes at most."""
    return (
        f"{what} are kept in {folder}, at most {show_size(size)} in all, which can be removed once the merged model is "
        "there"
    )


def _tell_of_others(wanted: Sequence[str], grams: Grams) -> None:
    """Say which matrices are merged otherwise."""
    others = [name for name in wanted if name not in grams.names]
    if others:
        logger.info("no linear layer with %s ran on any sample: merged by the mean", first_of(others, 1))
