"""Runs of every kind, small enough to be started some hundred times, and what must be left of them after a fault."""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from expert_merging import provenance as record_of_runs
from expert_merging import streaming, workers
from expert_merging.cli import main
from expert_merging.run import Run
from expert_merging.signals import CONTINUES, run_program
from Mistral.backbone import BACKBONE
from tests import launching
from tests.checkpoints import make_zoo, write_tasks
from tests.command import contents
from tests.faults.moments import Moment, Watch, kill
from tests.launching import Ended
from tests.test_workers import ended

# Seconds in which a run ends after a fault, on a machine that has a core for every process that wants one.
PATIENCE = 5.0
# Seconds until a launcher ends the processes beside one that has failed.
_LAUNCHER = 2.0
_SHORT = ("--log_with", "none", "--samples_per_task", "2")


@dataclass(frozen=True)
class Kind:
    """One kind of run.

    Args:
        method: what is run.
        more: further flags.
        processes: their number.
        workers: they are forked.
    """

    method: str
    more: tuple[str, ...] = ()
    processes: int = 1
    workers: bool = True


KINDS = {
    "element-wise": Kind("ties"),
    "matrix": Kind("svd", ("--post", "consensus"), workers=False),
    "mixture": Kind("moe"),
    "masks": Kind("tall"),
    "learned": Kind("expert_merging", _SHORT),
    "search": Kind("evo", ("--evaluations", "4", "--population", "2", *_SHORT)),
    "two processes": Kind("ties", processes=2),
    "two processes, learned": Kind("expert_merging", _SHORT, processes=2),
}


def command(
    arguments: list[str],
    watched: int,
    moment: Moment | None,
    act: Callable[[], object],
    record: Path,
    clock: float,
    is_program: bool,
) -> int:
    """The command in a process of its own, with blocks so small that a tiny model has many.

    Args:
        arguments: of the command.
        watched: number of the process that the moment is in.
        moment: when something goes wrong; None counts.
        act: what goes wrong.
        record: as for `Watch`.
        clock: seconds by which the machine's clock is wrong.
        is_program: signals are heard as in the commands of the families.
    """
    from expert_merging.processes import rank

    torch.set_num_threads(1)
    record_of_runs._git_revision = lambda: None
    streaming.BLOCK, streaming.STEP, workers._BATCH = 128, 64, 400
    workers.Workers.for_entries = classmethod(lambda cls, *_: cls(2, forked=True))  # type: ignore[method-assign]
    right = time.time
    time.time = lambda: right() + clock
    if rank() != watched:
        return main(BACKBONE, arguments)
    watch = Watch(moment, act, record)
    watch.start()
    if is_program:
        run_program(lambda: main(BACKBONE, arguments), CONTINUES)
    code = main(BACKBONE, arguments)
    if moment is None:
        watch.stop()
    return code


@dataclass(frozen=True)
class Place:
    """Runs of one kind in a folder of their own.

    Args:
        kind: the kind.
        zoo: the checkpoints, with their questions.
        folder: for what processes say and record.
        output: for results; in ``folder`` by default.
        is_program: as for `command`.
    """

    kind: Kind
    zoo: Path
    folder: Path
    output: Path | None = None
    is_program: bool = False
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def run(self) -> Run:
        """The run."""
        return Run.named(self._output, self.kind.method, "r")

    @property
    def _output(self) -> Path:
        return self.output or self.folder / "out"

    @property
    def arguments(self) -> list[str]:
        """The command's."""
        places = {"cache_dir": self.zoo, "data_dir": self.zoo / "dataset", "output_path": self._output}
        given = [word for name, place in places.items() for word in (f"--{name}", str(place))]
        return ["--method", self.kind.method, *given, *self.kind.more, "--device", "cpu", "--run_name", "r"]

    def start(
        self, moment: Moment | None = None, act: Callable[[], object] = kill, *, watched: int = 0, clock: float = 0
    ) -> tuple[Ended, dict[str, Any]]:
        """Run the command until it ends, which must be soon after the moment; and what was recorded."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = self.folder / f"record{next(self.numbers)}"
        arguments = (self.arguments, watched, moment, act, record, clock, self.is_program)
        with patch.object(launching, "_PATIENCE", _LAUNCHER):
            done = launching.run_together(self.kind.processes, command, *arguments, folder=self.folder)
        found = [json.loads(file.read_text()) for file in sorted(self.folder.glob(f"{record.name}.*")) if file.exists()]
        own = json.loads(record.read_text()) if record.exists() else {}
        if moment is None:
            return done, {**own, "workers": found}
        return done, own or next(iter(found), {})

    def check_ended(self, recorded: Mapping[str, Any]) -> None:
        """Check that what had been started has ended, and soon."""
        taken = time.monotonic() - recorded["at"]
        busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        assert taken < PATIENCE * busy, f"it took {taken:.1f} s to end, on a machine {busy:.1f} times too busy"
        for child in recorded["children"]:
            assert ended(child), f"process {child} was left"

    def check_whole_or_absent(self, expected: Mapping[str, bytes]) -> None:
        """Check that there is the right result or none."""
        if self.run.model.exists():
            assert contents(self.run.model) == expected

    def finish(self, expected: Mapping[str, bytes]) -> None:
        """The same command finishes, with the right bytes."""
        done, _ = self.start()
        assert set(done.codes) == {0}, done.stderr
        assert contents(self.run.model) == expected
        assert not self.run.partial_model.exists()


class Runs:
    """What the runs of a session share.

    Args:
        folder: for all of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.numbers = itertools.count()
        self.whole = cache(self._whole)

    @cached_property
    def zoo(self) -> Path:
        """Checkpoints of some kilobytes, in several files each."""
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        zoo = make_zoo(self.folder / "zoo", max_shard_size="8KB", **sizes)
        write_tasks(zoo / "dataset", count=2, responses={"Chat": "Ok", "Math": "4", "Code": "f"})
        return zoo

    def place(self, name: str) -> Place:
        """A new folder for runs of a kind."""
        return Place(KINDS[name], self.zoo, self.folder / f"{next(self.numbers)}")

    def _whole(self, name: str) -> tuple[dict[str, bytes], dict[str, Any]]:
        place = self.place(name)
        done, counts = place.start()
        assert set(done.codes) == {0}, done.stderr
        return contents(place.run.model), counts


def drawing(*of: object) -> random.Random:
    """What draws moments, the same for the same words."""
    return random.Random(" ".join(map(str, of)))


if sys.platform != "linux":
    KINDS.clear()
