"""A process of a parallel run that is watched, and may die or overlook what the others see."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence

import torch

from expert_merging import job
from expert_merging.cli import main
from expert_merging.learned import directions
from expert_merging.learned.state import StateFolder
from expert_merging.learned.trainer import Trainer
from expert_merging.running.sharding import own_part
from Mistral.backbone import BACKBONE


def learn(arguments: Sequence[str], *, output: str, dying: str = "", blind: str = "") -> int:
    """The command, in a process that tells what it holds.

    All processes but the first are refused to open anything in the run's folder for writing, and none may see a GPU:
    they run on the CPU, and where there are fewer GPUs than processes, those without one would end.

    Args:
        arguments: the command's.
        output: folder for all runs.
        dying: number of the process that dies after one update.
        blind: number of the process that finds no state to continue from.
    """
    rank = os.environ["RANK"]
    if rank != "0":
        sys.addaudithook(lambda event, given: _refuse_changes(event, given, output))
    collect, learn = Trainer._collect, Trainer._learn

    def tell_and_learn(self, targets):
        held = sum(own_part(parameter).numel() for parameter in self.live.parts)
        kept = sum(tensor.numel() for tensors in self.gather().task_vectors._kept.values() for tensor in tensors)
        # In one piece: all processes write to the same place at the same time.
        os.write(1, f"process {rank} has {held} and {kept}\n".encode())
        if torch.cuda.is_available() or os.environ["CUDA_VISIBLE_DEVICES"]:
            os._exit(78)
        return learn(self, targets)

    def collect_or_die(self, *arguments):
        if rank == dying and self.state.updates == 1:
            os.write(1, f"dies at {time.time()}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        return collect(self, *arguments)

    Trainer._collect, Trainer._learn = collect_or_die, tell_and_learn
    if rank == blind:
        StateFolder.found = ()
    return main(BACKBONE, arguments)


def _refuse_changes(event, given, output):
    changes = event in ("os.mkdir", "os.rename", "os.remove") or (
        event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )
    if changes and output in str(given[0]):
        os.write(1, f"a second process writes {given[0]}\n".encode())
        os._exit(77)


def learn_elsewhere(arguments: Sequence[str]) -> int:
    """The command, in processes whose machines do not share the output folder."""
    job._SHARING = 1
    given = list(arguments)
    given[given.index("--output_path") + 1] += os.environ["RANK"]
    return main(BACKBONE, given)


def learn_and_be_killed(arguments: Sequence[str], when: str, *, updates: int = 1) -> int:
    """The command, in a process that is killed.

    Args:
        arguments: the command's.
        when: ``making`` directions, ``saving`` the state, or once it is ``saved``.
        updates: number of updates after which that is; directions are made before.
    """
    save = Trainer._save_state

    def die(*_given, **_named):
        os.kill(os.getpid(), signal.SIGKILL)

    def save_and_die(self):
        if self.state.updates == updates and when == "saving":
            self.accelerator.save_state = lambda folder: (os.mkdir(folder), die())
        save(self)
        if self.state.updates == updates:
            die()

    if when == "making":
        directions.write_atomically = die
    Trainer._save_state = save_and_die
    return main(BACKBONE, arguments)


if __name__ == "__main__":
    OUTPUT, DYING, *ARGUMENTS = sys.argv[1:]
    sys.exit(learn(ARGUMENTS, output=OUTPUT, dying=DYING))
