"""The shell completes commands, methods, their flags and values."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = "import sys; sys.argv = ['expert-merging']; from expert_merging.commands.main import main; main()"


def completions(tmp_path, line):
    """What may come at the end of a command line."""
    answer = tmp_path / "answer"
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    subprocess.run([sys.executable, "-c", PROGRAM], env={**os.environ, **asked}, cwd=ROOT, check=True, timeout=60)
    return [word.strip() for word in answer.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("expert-merging ver", ["verify"]),
        ("expert-merging runs --s", ["--sort"]),
        ("expert-merging merge breadc", ["breadcrumbs"]),
        ("expert-merging merge ties --dens", ["--density"]),
        ("expert-merging merge ties --num_ep", []),
        ("expert-merging merge expert_merging --num_ep", ["--num_epochs"]),
        ("expert-merging merge --method ti", ["ties"]),
        ("expert-merging merge ties --ties_scope ", ["global", "tensor"]),
        ("expert-merging merge ties --post ", ["consensus", "svc", "router_mean", "aim", "featcal", "distil", "harc"]),
        ("expert-merging merge ties --family Q", ["Qwen2VL"]),
    ],
)
def test_what_may_come_next(tmp_path, line, expected):
    assert completions(tmp_path, line) == expected
