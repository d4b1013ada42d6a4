"""Signals while learning, alone and below launchers."""

from __future__ import annotations

import os
import signal

import pytest

from expert_merging.signals import CONTINUES
from tests.learned.test_parallel import ACCELERATE, CONFIGS
from tests.test_signals import descendants, started, told
from tests.test_workers import FORKS, ended

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)


@FORKS
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "launcher"),
    [
        *((number, ()) for number in (signal.SIGINT, signal.SIGKILL)),
        *((number, TORCHRUN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)),
        (signal.SIGTERM, ("-m", *ACCELERATE, CONFIGS / "cpu_two_processes.yaml")),
    ],
)
def test_the_command_says_how_to_continue_once(number, launcher, answered_zoo, tmp_path):
    """Also below launchers, which add tracebacks of their own; a terminal sends to all."""
    given = ["--cache_dir", answered_zoo, "--data_dir", answered_zoo / "dataset", "--output_path", tmp_path]
    command = ("Mistral/model_merging.py", *given, "--device", "cpu", "--num_epochs", 1000, "--log_with", "none")
    with started(*launcher, *command) as process:
        while not (line := process.stdout.readline()).startswith("learning "):
            assert line, process.stderr.read()
        children = descendants(process.pid)
        assert len(children) >= (2 if launcher else 0)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        code, _, errors = told(process, 20)
        assert errors.count(CONTINUES) == (number != signal.SIGKILL)
        if not launcher:
            assert code == (-number if number == signal.SIGKILL else 128 + number)
            assert errors.count("\n") == 2 * (number != signal.SIGKILL)
        for child in children:
            assert ended(child)
