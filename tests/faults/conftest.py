"""How many faults there are, and how often each kind of them was survived."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.runs import Runs

# Faults of each kind, over all kinds of runs: `make faults` has 200.
COUNT = int(os.environ.get("FAULTS", "30"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the number of faults by kind, where there was more than the usual number."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for name, number in report.user_properties:
            if name.startswith("fault: "):
                counts[name.removeprefix("fault: ")] += number
    if "FAULTS" in os.environ:
        for name, number in sorted(counts.items()):
            terminalreporter.write_line(f"{number:5} {name}")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("faults")
    if not os.access("/dev/shm", os.W_OK):
        yield Runs(folder)
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:  # a disk would be what is waited for
        yield Runs(Path(memory))
