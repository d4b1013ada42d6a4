"""``python -m tests.fuzz``: damage files of every kind, read them, and count what comes of it.

What is neither a result nor a refusal is shown with its smallest input, which is kept in ``--keep``.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import logging
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from expert_merging.libraries import import_transformers
from tests.fuzz.readers import READERS, SECONDS, Reader, cases, exchanged, outcome


def main() -> int:
    """Exit code: 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=50_000, help="damaged files, over all readers")
    parser.add_argument("--seconds", type=float, default=1200, help="end then, however many cases there were")
    parser.add_argument("--seed", type=int, default=0, help="decides every case")
    parser.add_argument("--reader", action="append", help="only this one; may be repeated")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-found"), help="where found inputs are kept")
    given = parser.parse_args()
    chosen = [reader for reader in READERS if given.reader is None or reader.name in given.reader]
    shares = sum(reader.share for reader in chosen)
    import_transformers()
    logging.disable()
    total, found, start = 0, 0, time.monotonic()
    for reader in chosen:
        left = given.seconds - (time.monotonic() - start)
        count = -(-given.cases * reader.share // shares)
        counts, slowest, wrong = run(reader, count, left, given.seed, given.keep)
        total, found = total + counts.total(), found + len(wrong)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(
            f"{reader.name:22} {counts.total():6} cases: {counts['read']:6} read, {counts['refused']:6} refused, "
            f"{len(wrong)} kinds of others; slowest {slowest:.1f} s, peak {memory} MiB, "
            f"{time.monotonic() - start:.0f} s so far",
            flush=True,
        )
        for text, (file, content) in wrong.items():
            print(f"  {text}\n    {file}: {content[:200]!r}", flush=True)
    print(f"{total} cases in {time.monotonic() - start:.0f} s, {found} kinds of wrong outcomes")
    return int(found > 0)


def run(
    reader: Reader, count: int, seconds: float, number: int, keep: Path
) -> tuple[collections.Counter[str], float, dict[str, tuple[str, bytes]]]:
    """Outcomes of cases, the processor seconds of the slowest, and what else happened with its smallest input."""
    counts: collections.Counter[str] = collections.Counter()
    wrong: dict[str, tuple[str, bytes]] = {}
    slowest = 0.0
    last = time.monotonic() + seconds
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
            nonlocal slowest
            if time.monotonic() > last:
                return
            begun = time.process_time()
            with exchanged(folder / case[0], case[1]):
                faulthandler.dump_traceback_later(10 * SECONDS, exit=True)
                try:
                    counts[outcome(reader, folder)] += 1
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    counts["wrong"] += 1
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    text = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:200]}"
                    name = text[:90]
                    if name not in wrong or len(case[1]) < len(wrong[name][1]):
                        wrong[name] = case
                        keep.mkdir(exist_ok=True)
                        kind = "".join(letter if letter.isalnum() else "_" for letter in f"{reader.name} {name}")[:80]
                        (keep / kind).write_bytes(case[1])
                        (keep / f"{kind}.txt").write_text("".join(traceback.format_exception(error)), errors="replace")
                faulthandler.cancel_dump_traceback_later()
            slowest = max(slowest, time.process_time() - begun)

        one()
    return counts, slowest, wrong


if __name__ == "__main__":
    sys.exit(main())
