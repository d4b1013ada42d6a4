"""Several processes write what one writes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.command import contents, merge
from tests.launching import run_together
from tests.low_rank.adapters import pairs_of, write_zoo


def merge_both(arguments: Sequence[object]) -> int:
    """Write a dense model and an adapter, in each of several processes."""
    return sum(merge(*arguments, "--run_name", output, "--output", output) for output in ("dense", "adapter"))


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(tmp_path):
    """Which share the passes over coordinates."""
    zoo = write_zoo(tmp_path, pairs_of())
    given = ["--method", "knots", *zoo.flags, "--output_path"]
    assert merge_both([*given, tmp_path / "alone"]) == 0
    done = run_together(2, merge_both, [*given, tmp_path / "together"], folder=tmp_path)
    assert done.codes == (0, 0), done.stderr
    for output in ("dense", "adapter"):
        alone, together = (contents(tmp_path / place / "knots" / output / "model") for place in ("alone", "together"))
        assert alone == together
