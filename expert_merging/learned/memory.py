"""Which task vectors are kept where, and when weight gradients are pulled back to coefficients, by the memory there is.

Going through the task vectors is what training costs beyond running the model. They are gone through once per update
to rebuild the weights, and again for the gradient: once per update too where the weight gradients of all its samples
can be added up in memory, else once per sample. On the device that is cheap; from elsewhere it is not, so where they do
not all fit there, weight gradients have precedence.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from expert_merging.errors import InputError
from expert_merging.learned.live import LiveModel
from expert_merging.learned.options import TrainingOptions
from expert_merging.learned.task_vectors import DEVICE, DISK, HOST, TaskVectors
from expert_merging.machine import free_host_memory, gib
from expert_merging.running.sharding import own_part

logger = logging.getLogger(__name__)

# Share of a GPU's memory that is left for what its allocator cannot use.
_MARGIN = 0.05


@dataclass(frozen=True)
class Arrangement:
    """What is kept where.

    Args:
        places: ``device``, ``host`` or ``disk`` by tensor name.
        accumulates: weight gradients are added up and used once per update.
    """

    places: Mapping[str, str]
    accumulates: bool


def choose(
    sizes: Mapping[str, int],
    gradients: int,
    device_budget: float,
    host_budget: float,
    *,
    task_vectors: str,
    weight_gradients: str,
) -> Arrangement:
    """Make the best of the memory.

    Args:
        sizes: bytes of base and experts by tensor name.
        gradients: bytes of all weight gradients in float32.
        device_budget: bytes to give away on the training device.
        host_budget: bytes to give away in host memory where it is not the device's.
        task_vectors: where task vectors are wanted, or ``auto``.
        weight_gradients: ``sample``, ``update`` or ``auto``.
    """
    total = sum(sizes.values())
    kept = total if task_vectors == DEVICE or (task_vectors == "auto" and total <= device_budget) else 0
    fits = kept + gradients <= device_budget
    accumulates = weight_gradients == "update" or (weight_gradients == "auto" and fits)
    if task_vectors != "auto":
        return Arrangement(dict.fromkeys(sizes, task_vectors), accumulates)
    left = {DEVICE: device_budget - (gradients if accumulates else 0), HOST: host_budget}
    places = {}
    for name, size in sizes.items():
        places[name] = next((place for place in (DEVICE, HOST) if size <= left[place]), DISK)
        if places[name] != DISK:
            left[places[name]] -= size
    return Arrangement(places, accumulates)


def arrange(
    live: LiveModel, options: TrainingOptions, warm_up: Callable[[], None], barrier: Callable[[], None]
) -> None:
    """Choose, bring the task vectors to their places, and say what was chosen.

    Args:
        live: the model, on its device.
        options: what the user wants.
        warm_up: a forward and backward pass over the sample that takes most memory.
        barrier: waits for the other processes of the run, so that all measure before one takes anything.

    Raises:
        InputError: what was asked for does not fit.
    """
    vectors = live.task_vectors
    budgets = measure(vectors, barrier, partial(_activations, live, warm_up))
    _refuse_too_much(vectors, options.task_vectors, budgets)
    chosen = choose(
        vectors.sizes,
        4 * sum(own_part(parameter).numel() for parameter in live.parts),
        budgets.device,
        budgets.host,
        task_vectors=options.task_vectors,
        weight_gradients=options.weight_gradients,
    )
    vectors.place(chosen.places)
    live.accumulates = chosen.accumulates
    _tell(vectors, chosen)


@dataclass(frozen=True)
class Budgets:
    """Bytes of memory to give away.

    Args:
        device: on the training device.
        host: in host memory where it is not the device's.
        most: in host memory, if the user wants all task vectors there.
    """

    device: float
    host: float
    most: float


def measure(vectors: TaskVectors, barrier: Callable[[], None], activations: Callable[[], int] = lambda: 0) -> Budgets:
    """What is free, and what task vectors of an earlier stage would leave.

    Args:
        vectors: base and experts.
        barrier: waits for the other processes of the run, so that all measure before one takes anything.
        activations: bytes of a GPU that a model will take and has not taken yet.
    """
    sizes = vectors.sizes
    kept = {place: sum(sizes[name] for name in sizes if vectors.places[name] == place) for place in (DEVICE, HOST)}
    barrier()
    if vectors.device.type == "cuda":
        needed = activations() + vectors.working_bytes
        free, total = torch.cuda.mem_get_info(vectors.device)
        on_host = free_host_memory() + kept[HOST]
        budgets = Budgets(free - needed - _MARGIN * total + kept[DEVICE], on_host / 2, on_host)
    else:
        on_host = free_host_memory() + kept[DEVICE] + kept[HOST]
        budgets = Budgets(on_host / 2, 0, on_host)
    barrier()
    return budgets


def _refuse_too_much(vectors: TaskVectors, wanted: str, budgets: Budgets) -> None:
    """Check that task vectors fit where the user wants them."""
    size = sum(vectors.sizes.values())
    if wanted == DEVICE and size > budgets.device:
        raise InputError(
            f"--task_vectors device needs {gib(size)}, and {vectors.device} has {gib(max(0, budgets.device))} to "
            "spare; use auto, host or disk"
        )
    if wanted == HOST and size > budgets.most:
        raise InputError(
            f"--task_vectors host needs {gib(size)} for each process, and host memory has "
            f"{gib(max(0, budgets.most))} for each of those on this machine; use auto or disk"
        )


def _tell(vectors: TaskVectors, chosen: Arrangement) -> None:
    """Say in the log what is where."""
    sizes = vectors.sizes
    where = {
        DEVICE: f"on {vectors.device}" if vectors.device.type == "cuda" else "in memory",
        HOST: "in host memory",
        DISK: "read from the files when needed",
    }
    amounts = {place: sum(size for name, size in sizes.items() if chosen.places[name] == place) for place in where}
    parts = [f"{gib(amount)} {where[place]}" for place, amount in amounts.items() if amount]
    logger.info("base and experts: %s", ", ".join(parts))
    logger.info("weight gradients are used once per %s", "update" if chosen.accumulates else "sample")


def _activations(live: LiveModel, warm_up: Callable[[], None]) -> int:
    """Bytes that a sample's activations take on the model's GPU."""
    device = live.task_vectors.device
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with live.ignoring_gradients():
        warm_up()
    needed = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return needed
