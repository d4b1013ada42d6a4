"""The preparation of methods that read Gram matrices: each expert's, gathered once, an expert at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from expert_merging.context import Context
from expert_merging.errors import InputError, first_of
from expert_merging.machine import gib, show_size
from expert_merging.method import Preparation
from expert_merging.processes import while_others_wait
from expert_merging.running.options import SampleOptions

if TYPE_CHECKING:
    from expert_merging.statistics.gram import Grams

logger = logging.getLogger(__name__)


def gathering(method: str, options: type[SampleOptions]) -> Callable[..., Preparation]:
    """What prepares a method whose ``grams`` are each expert's Gram matrices.

    Args:
        method: its name.
        options: class of its options.
    """

    def prepare(context: Context, **given: Any) -> Preparation:
        return _prepare(context, method, options(**given))

    return prepare


def _prepare(context: Context, method: str, options: SampleOptions) -> Preparation:
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
        while_others_wait(lambda: found.append(gather_grams(context, samples, folder)))
        for grams in found:
            _tell_of_others(wanted, grams)
        return {"grams": found[0] if found else Grams({})}

    notes = (
        f"inputs of {len(wanted)} matrices are gathered from {len(samples.samples)} samples, an expert at a time: at "
        f"most {gib(max(most.values()))} of memory beside the expert",
        f"they are kept in {folder}, at most {show_size(sum(most.values()))} in all, which can be removed once the "
        "merged model is there",
    )
    return Preparation(gather, samples.inputs, notes)


def _tell_of_others(wanted: Sequence[str], grams: Grams) -> None:
    """Say which matrices are merged otherwise."""
    others = [name for name in wanted if name not in grams.names]
    if others:
        logger.info("no linear layer with %s ran on any sample: merged by the mean", first_of(others, 1))
