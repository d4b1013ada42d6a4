"""``python -m tests.fuzz``: damage files of every kind, read them, and count what comes of it.

What is neither a result nor a refusal is shown with its smallest input, which is kept in ``--keep``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tests.fuzz.readers import READERS
from tests.fuzz.running import run


def main() -> int:
    """Exit code: 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=50_000, help="damaged files, over all readers")
    parser.add_argument("--seconds", type=float, default=1200, help="end then, however many cases there were")
    parser.add_argument("--seed", type=int, default=0, help="decides every case")
    parser.add_argument("--reader", action="append", help="only this one; may be repeated")
    parser.add_argument("--jobs", type=int, default=2, help="processes that share the readers")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-found"), help="where found inputs are kept")
    given = parser.parse_args()
    chosen = [reader for reader in READERS if given.reader is None or reader.name in given.reader]
    shares, start = sum(reader.share for reader in chosen), time.time()
    counts = {reader.name: -(-given.cases * reader.share // shares) for reader in chosen}
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
        runs = [
            pool.submit(run, name, count, start + given.seconds, given.seed, given.keep)
            for name, count in sorted(counts.items(), key=lambda pair: pair[1])  # those that take longest first
        ]
        results = []
        for done in as_completed(runs):
            results.append(done.result())
            print(results[-1], flush=True)
    total, wrong = (sum(numbers) for numbers in zip(*((r.counts.total(), len(r.wrong)) for r in results), strict=True))
    print(f"{total} cases in {time.time() - start:.0f} s, {wrong} kinds of wrong outcomes")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
