"""What experts have said, on disk, for all runs that ask the same experts about the same samples.

``targets/EXPERT-DIGEST/`` beside the runs is of one expert, asked in one way: ``responses.json`` has all that it has
answered, and for each set of samples there is a file of hidden states. The order of an expert's units
(`expert_merging.alignment.aligning`) is kept in the same way. Whatever is missing or damaged is made again, so nothing
but time is lost when the folder is deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from expert_merging.checkpoints.fingerprints import of_text
from expert_merging.documents import read_object
from expert_merging.errors import InputError
from expert_merging.kept import Kept
from expert_merging.questions.calibration import Sample
from expert_merging.questions.picture_sources import content_of
from expert_merging.running.tensor_files import write_tensors
from expert_merging.writing import take_hold

logger = logging.getLogger(__name__)

# Bytes that all experts' files take together, and the share of a disk's free room that one file may take.
MOST_BYTES = 50 * 10**9
_SHARE = 0.25
_ANSWERS, _DIGESTS = "responses.json", "digests.json"
_LOCK = ".lock"
# States of all experts, those that a killed process has left unfinished too, and nothing of the user's.
_HEX = "[0-9a-f]" * 16
_STATES = f"*-{_HEX}/{_HEX}.safetensors*"


class KeptTargets:
    """What one expert has said, asked in one way.

    Args:
        parent: folder of all experts, asked in all ways.
        expert: the expert's name, for people.
        way: all that decides answers and hidden states beside the samples.
    """

    def __init__(self, parent: Path, expert: str, way: Mapping[str, Any]) -> None:
        self.parent = parent
        self.folder = parent / f"{expert}-{of_text(json.dumps(way, sort_keys=True))}"
        self.kept = Kept(self.folder / _DIGESTS)

    def answers(self) -> dict[str, Any]:
        """All answers by `identity`; none where their file is damaged."""
        file = self.folder / _ANSWERS
        try:
            return read_object(file) if self.kept.has(file) else {}
        except (OSError, InputError):
            return {}

    def add_answers(self, answers: Mapping[str, Any]) -> None:
        """Keep more answers, by `identity`."""
        if not answers.items() <= self.answers().items():
            self._attempt(lambda: self._write_answers(answers))

    def states(self, name: str) -> list[Tensor] | None:
        """What `add_states` has kept under a name; None where there is nothing."""
        file = self.folder / f"{name}.safetensors"
        try:
            if not self.kept.has(file):
                return None
            os.utime(file)
            with safe_open(file, framework="pt") as opened:
                # Copies: sums over what is mapped from a file differ in the last digits, since it is aligned otherwise.
                return [opened.get_tensor(str(number)).clone() for number in range(len(opened.keys()))]
        except (OSError, SafetensorError):  # it went while it was read
            return None

    def add_states(self, name: str, states: Sequence[Tensor]) -> None:
        """Keep hidden states, unless they would take too much of the disk; the oldest files go for them.

        Args:
            name: says of which samples they are, and which.
            states: any shapes.
        """
        self._attempt(lambda: self._write_states(self.folder / f"{name}.safetensors", states))

    def _write_answers(self, answers: Mapping[str, Any]) -> None:
        text = json.dumps({**self.answers(), **answers}, indent=1, ensure_ascii=False) + "\n"
        self.kept.write(self.folder / _ANSWERS, text.encode())

    def _write_states(self, file: Path, states: Sequence[Tensor]) -> None:
        size, free = sum(state.nbytes for state in states), shutil.disk_usage(self.folder).free
        if size > min(MOST_BYTES, _SHARE * free):
            logger.info("hidden states of %s are not kept: they take %.1f GB", self.folder.name, size / 1e9)
            return
        _make_room(self.parent, size)
        write_tensors(file, {str(number): state for number, state in enumerate(states)}, self.kept)

    def _attempt(self, write: Callable[[], None]) -> None:
        """Write something; where that fails it is not kept, since the run needs none of it.

        Nor is it where another process is writing there now.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(InputError):
                lock = take_hold(self.folder / _LOCK, "--output_path")
                try:
                    write()
                finally:
                    os.close(lock)
        except (OSError, SafetensorError) as error:
            logger.warning("what experts say cannot be kept in %s: %s", self.parent, error)


def _make_room(parent: Path, size: int) -> None:
    """Remove the files that have not been used for the longest time, until all and ``size`` bytes are few enough."""
    files = sorted((file.stat().st_mtime, file.stat().st_size, file) for file in parent.glob(_STATES))
    total = sum(own for _, own, _ in files) + size
    for _, own, file in files:
        if total <= MOST_BYTES:
            return
        file.unlink(missing_ok=True)
        total -= own


def identity(sample: Sample) -> str:
    """A digest of all that decides what an expert says about a sample, and of what it has said, asked in one way."""
    pictures = [hashlib.sha256(content_of(picture)).hexdigest() for picture in sample.images]
    return of_text(json.dumps([sample.task, sample.question, sample.response, sample.tokens, pictures]))


def name_of(identities: Iterable[str], layers: Sequence[int], *, response_only: bool) -> str:
    """The name of hidden states of these samples."""
    return of_text(json.dumps([*identities, [*layers], response_only]))
