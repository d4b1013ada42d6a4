"""The processes of a parallel run, and each one's device.

The only module that reads what a launcher (torchrun, ``accelerate launch``) says in the environment.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from expert_merging.errors import InputError
from expert_merging.parts import Part

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# Seconds in which a launcher ends the processes beside one that has failed.
PATIENCE = 10.0


def rank() -> int:
    """Number of this process among those of the run."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """Number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_count() -> int:
    """Number of processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process reports and writes what is written once."""
    return rank() == 0


def await_end() -> None:
    """Wait for the launcher to end this process, as it does where another one has failed; return if it does not."""
    if count() > 1:
        time.sleep(PATIENCE)


def tell_launcher(message: str) -> bool:
    """Give torchrun, which also runs below ``accelerate launch``, the words that its report on a failure ends with.

    That report is the last thing on the terminal, whatever this process prints.

    Returns:
        Whether there is a launcher that takes them.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return False
    # The launcher takes what was noted first for the cause.
    content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
    try:
        Path(file).write_text(json.dumps(content), encoding="utf-8")
    except OSError:  # its folder of logs is gone
        return False
    return True


def launched_precision() -> str | None:
    """The half precision that ``accelerate launch`` was told to use, ``fp16`` or ``bf16``, if it was."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION")  # "no" unless the user has chosen
    return asked if asked in ("fp16", "bf16") else None


def launched_with(plugin: str, environment: Mapping[str, str]) -> bool:
    """Whether ``accelerate launch`` was told to use ``FSDP`` or ``DEEPSPEED``."""
    return environment.get(f"ACCELERATE_USE_{plugin}", "").lower() == "true"


def forget_fsdp() -> None:
    """Keep accelerate from splitting models in its own way, which is for those whose weights are optimised."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)


@dataclass(frozen=True)
class Processes:
    """The processes that share a merge; a single one by default.

    Args:
        rank: number of this process.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def share(self, parts: Iterable[Part]) -> list[Part]:
        """The parts of this process: the largest first, each goes to the process with the fewest entries so far."""
        loads = [0] * self.size
        own = []
        for part in sorted(parts, key=lambda part: -part.entries):
            lightest = loads.index(min(loads))
            loads[lightest] += part.entries
            if lightest == self.rank:
                own.append(part)
        return own

    def barrier(self) -> None:
        """Go on when all processes are here."""
        if self.size > 1:
            import torch

            torch.distributed.barrier()

    def leave(self) -> None:
        """Close the connections; without this, a process that ends early can break one that does not."""
        self.barrier()
        if count() > 1:  # also those that have only run models together
            import torch

            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

    def gather(self, value: T) -> list[T]:
        """Every process's value, in every process."""
        gathered = [value] * self.size
        if self.size > 1:
            import torch

            torch.distributed.all_gather_object(gathered, value)
        return gathered

    def agree(self, value: T) -> T:
        """The first process's value, in every process."""
        return self.gather(value)[0]

    def add(self, value: Tensor) -> Tensor:
        """Sum of the processes' tensors, in every process."""
        if self.size == 1:
            return value
        import torch

        return torch.stack(self.gather(value)).sum(0)


ALONE = Processes()


def join(device: str, *, runs_models: bool) -> Processes:
    """Meet the other processes of a parallel run.

    Running models uses what accelerate sets up for the device. Merging exchanges little, and always between CPUs.

    Args:
        device: this process's device.
        runs_models: the run asks or trains models, in all processes; then the main one merges alone.

    Returns:
        The processes that share the merge.
    """
    size = count()
    if size == 1:
        return ALONE
    if runs_models:
        if device == "cpu":
            # Where torch sees a GPU, accelerate's barriers between CPUs use the GPU of each process's number, and there
            # may be none of that number. This must come before anything has asked CUDA for its devices.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        from accelerate import PartialState

        # The others wait while the main process asks the experts, which may take longer than the usual ten minutes.
        PartialState(cpu=device == "cpu", timeout=timedelta(hours=12))
        return ALONE
    import torch

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return Processes(rank(), size)


def while_others_wait(work: Callable[[], Any]) -> None:
    """Let the main process work; the others go on when it is done."""
    if is_main_process():
        work()
    if count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def from_main_process(value: Any) -> Any:
    """The main process's value, in every process of a parallel run."""
    if count() == 1:
        return value
    import torch

    shared = [value]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(shared)
    return shared[0]


def is_lost_process(error: RuntimeError) -> bool:
    """Whether the error means that another process of a parallel run is gone."""
    if count() == 1:
        return False
    import torch

    # gloo raises a plain RuntimeError.
    signs = ("Connection closed by peer", "Connection reset by peer")
    return isinstance(error, torch.distributed.DistError) or any(sign in str(error) for sign in signs)


def choose_device(asked: str, *, one_each: bool = False) -> str:
    """The device to compute on.

    Args:
        asked: ``cuda`` is the first GPU, or with a launcher of several processes this one's own; ``auto`` is the same
            where there is a GPU, and the CPU elsewhere.
        one_each: no two processes may have the same GPU.

    Raises:
        InputError: there is no such device, or only one where each process needs its own.
    """
    import torch

    if asked == "auto":
        return _own_gpu() if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise InputError(f"--device must be auto, cpu, cuda or cuda:NUMBER, got {asked!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device must be auto, cpu, cuda or cuda:NUMBER, got {asked!r}")
    if one_each and local_count() > 1 and device.type == "cuda" and device.index is not None:
        raise InputError(
            f"--device {asked} is one GPU, and each of the {local_count()} processes on this machine needs one of its "
            "own; give --device cuda, or start one process"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {asked}: this machine has {torch.cuda.device_count()} GPUs that torch can use")
    return _own_gpu() if asked == "cuda" else asked


def _own_gpu() -> str:
    """The GPU of this process, by its number among those that a launcher has started on this machine.

    Raises:
        InputError: some process has none; all of them find that, since only the main process tells it.
    """
    import torch

    if "LOCAL_RANK" not in os.environ:
        return "cuda"
    number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", number + 1))
    if processes > gpus:
        raise InputError(
            f"{processes} processes run on this machine, and torch can use {gpus} of its GPUs; start one process for "
            "each GPU, or give --device cpu"
        )
    return f"cuda:{number}"
