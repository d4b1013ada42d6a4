"""However many files models have, a bounded number is open at a time, and every read is of the right one."""

from __future__ import annotations

import gc
import os
import random
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from expert_merging.checkpoints import open_files
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.checkpoints.open_files import OpenFiles
from tests.checkpoints import tensors_of, write_checkpoint
from tests.command import COMMAND, assert_same_bytes, flags

SHARDS = 40


@pytest.fixture
def folder(tmp_path):
    shards = [{f"layers.{number}.weight": torch.full((4,), float(number))} for number in range(SHARDS)]
    return write_checkpoint(tmp_path / "model", *shards)


@pytest.fixture
def bound(monkeypatch):
    gc.collect()
    monkeypatch.setattr(open_files, "_MOST", 5)
    return 5


def open_now(folder: Path) -> int:
    """Files of a folder that this process has open."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{number}").startswith(str(folder))
        except FileNotFoundError:  # it was that of the list itself
            continue
    return found


def test_a_file_stays_open_while_there_is_room(folder):
    files, path = OpenFiles(), folder / "config.json"
    with files.reading(path) as first, files.reading(path) as second:
        assert first == second
    with files.reading(path) as third:
        assert third == first
    files.close()
    assert open_now(folder) == 0


def test_closed_files_are_opened_again_when_needed(folder):
    checkpoint = Checkpoint(folder)
    assert checkpoint.read("layers.3.weight").sum() == 12
    assert open_now(folder) == 1
    checkpoint.close()
    assert open_now(folder) == 0
    assert checkpoint.read("layers.3.weight").sum() == 12


def test_no_more_than_the_bound_are_open_for_all_checkpoints_together(folder, bound):
    checkpoints = [Checkpoint(folder) for _ in range(3)]
    for number in range(SHARDS):
        for checkpoint in checkpoints:
            assert checkpoint.read(f"layers.{number}.weight").tolist() == [number] * 4
            assert open_now(folder) <= bound


def test_files_that_are_read_from_are_not_closed(folder, bound):
    files = OpenFiles()
    with files.reading(folder / "config.json") as descriptor:
        for file in sorted(folder.iterdir()):
            with files.reading(file):
                pass
        assert os.pread(descriptor, 100, 0) == (folder / "config.json").read_bytes()
    files.close()


def test_files_of_a_checkpoint_that_is_gone_are_closed(folder):
    checkpoint = Checkpoint(folder)
    checkpoint.read("layers.3.weight")
    del checkpoint
    gc.collect()
    assert Checkpoint(folder).read("layers.4.weight").sum() == 16
    assert open_now(folder) == 1


@pytest.mark.parametrize("threads", [8])
def test_threads_read_the_right_files(threads, folder, bound):
    checkpoint = Checkpoint(folder)

    def read(seed: int) -> bool:
        numbers = random.Random(seed).choices(range(SHARDS), k=200)
        return all(checkpoint.read(f"layers.{number}.weight").tolist() == [number] * 4 for number in numbers)

    with ThreadPoolExecutor(threads) as pool:
        assert all(pool.map(read, range(threads)))
    with open_files.OpenFiles().reading(folder / "config.json"):
        assert open_now(folder) <= bound + 1


@pytest.mark.parametrize(("allowed", "expected"), [(64, 16), (1024, 256), (1 << 20, 256), (3, 1)])
def test_the_bound_follows_what_the_process_may_open(allowed, expected, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (allowed, allowed))
    assert open_files._bound() == expected
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert open_files._bound() == 256


@pytest.mark.slow
def test_a_merge_of_more_files_than_a_process_may_open(folder, tmp_path):
    """Six models of 40 files where 100 may be open."""
    experts = {}
    for number in range(5):
        shards = [{name: tensor + number} for name, tensor in tensors_of(folder).items()]
        experts[f"E{number}"] = write_checkpoint(tmp_path / f"expert{number}", *shards)
    arguments = [*COMMAND, *flags(folder, **experts), "--scaling_coefficient", 0.5, "--device", "cpu"]
    arguments += ["--output_path", tmp_path / "out", "--run_name", "run"]
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100)); "
    code += "from expert_merging.cli import main; from Mistral.backbone import BACKBONE; sys.exit(main(BACKBONE))"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    expected = {name: tensor + 0.5 * (0 + 1 + 2 + 3 + 4) for name, tensor in tensors_of(folder).items()}
    assert_same_bytes(tensors_of(tmp_path / "out" / "task_arithmetic" / "run" / "model"), expected)
