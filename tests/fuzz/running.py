"""Many damaged files for one reader, and what came of them."""

from __future__ import annotations

import collections
import faulthandler
import logging
import resource
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from expert_merging.libraries import import_transformers
from tests.fuzz.readers import READERS, SECONDS, cases, exchanged, outcome


@dataclass
class Found:
    """What came of a reader's cases.

    Args:
        name: the reader.
        counts: cases by outcome.
        slowest: processor seconds of the slowest.
        peak: MiB of memory of the process at most.
        wrong: by what was raised, the smallest file with its content.
    """

    name: str
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    slowest: float = 0.0
    peak: int = 0
    wrong: dict[str, tuple[str, bytes]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{self.name:22} {self.counts.total():6} cases: {self.counts['read']:6} read, "
            f"{self.counts['refused']:6} refused, {self.counts['wrong']:3} others; slowest {self.slowest:.1f} s, "
            f"peak {self.peak} MiB"
        ]
        lines += [f"  {text}\n    {file}: {content[:200]!r}" for text, (file, content) in self.wrong.items()]
        return "\n".join(lines)


def run(name: str, count: int, until: float, number: int, keep: Path) -> Found:
    """Read so many damaged files with the reader of that name, until a time of the clock at most."""
    import_transformers()
    logging.disable()
    (reader,) = [reader for reader in READERS if reader.name == name]
    found = Found(name)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "files"
        reader.make(folder)

        @seed(number)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases(reader, folder))
        def one(case: tuple[str, bytes]) -> None:
            if time.time() > until:
                return
            begun = time.process_time()
            with exchanged(folder / case[0], case[1]):
                # What nothing in Python can end ends the process.
                faulthandler.dump_traceback_later(120 * SECONDS, exit=True)
                try:
                    found.counts[outcome(reader, folder)] += 1
                except KeyboardInterrupt:
                    raise
                except BaseException as error:  # noqa: BLE001  (is counted and shown)
                    _note(found, case, error, keep)
                faulthandler.cancel_dump_traceback_later()
            found.slowest = max(found.slowest, time.process_time() - begun)

        one()
    found.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return found


def _note(found: Found, case: tuple[str, bytes], error: BaseException, keep: Path) -> None:
    """Count a wrong outcome and keep its input, the smallest of its kind."""
    found.counts["wrong"] += 1
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:50]}"
    if text in found.wrong and len(case[1]) >= len(found.wrong[text][1]):
        return
    found.wrong[text] = case
    kind = "".join(letter if letter.isalnum() else "_" for letter in f"{found.name} {text}")[:80]
    keep.mkdir(exist_ok=True)
    (keep / kind).write_bytes(case[1])
    (keep / f"{kind}.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="replace")
