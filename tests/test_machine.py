"""Memory and processors as the kernel tells of them."""

from __future__ import annotations

import os

import pytest
import torch

from expert_merging import machine
from expert_merging.machine import cores, free_host_memory, gib, half_of_memory, host_memory, limit_threads
from tests.command import merge


def test_a_containers_limit_counts_as_the_end_of_memory(tmp_path, monkeypatch):
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 4000 kB\n")
    assert free_host_memory(tmp_path, tmp_path) == 4_096_000
    (tmp_path / "self" / "cgroup").write_text("0::/job/3\n")
    group = tmp_path / "job" / "3"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("900000\n")
    (group / "memory.stat").write_text("anon 600000\ninactive_file 200000\n")
    (group / "memory.max").write_text("max\n")
    assert free_host_memory(tmp_path, tmp_path) == 4_096_000
    (group / "memory.max").write_text("1000000\n")
    assert free_host_memory(tmp_path, tmp_path) == 300_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert free_host_memory(tmp_path, tmp_path) == 100_000


def own_group(folder):
    """The folder of this process's group, told by a file as the kernel has it."""
    (folder / "self").mkdir()
    (folder / "self" / "cgroup").write_text("0::/\n")
    return folder


def test_memory_is_a_machines_or_a_containers(tmp_path):
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert host_memory(tmp_path, tmp_path) == whole
    group = own_group(tmp_path)
    for limit, memory in {"max": whole, str(2 * whole): whole, "1000000": 1_000_000}.items():
        (group / "memory.max").write_text(f"{limit}\n")
        assert host_memory(tmp_path, tmp_path) == memory
        assert free_host_memory(tmp_path, tmp_path) == memory // 2  # where the kernel does not tell what is free


def test_whole_tensors_share_half_of_what_a_container_has(monkeypatch):
    monkeypatch.setattr(machine, "host_memory", lambda: 1_000_000)
    assert half_of_memory(torch.device("cpu")) == 500_000


@pytest.mark.parametrize(("quota", "count"), [("max", 6), ("900000", 6), ("200000", 2), ("150000", 2), ("1000", 1)])
def test_a_containers_share_of_the_processors_counts(quota, count, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert cores(tmp_path, tmp_path) == 6
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert cores(tmp_path, tmp_path) == 4
    monkeypatch.setattr("sys.platform", "linux")
    (own_group(tmp_path) / "cpu.max").write_text(f"{quota} 100000\n")
    assert cores(tmp_path, tmp_path) == count


def test_torch_computes_with_no_more_threads_than_there_are_processors(command, monkeypatch):
    before = torch.get_num_threads()
    try:
        for there, threads in ((2, 2), (8, 3)):
            monkeypatch.setattr(machine, "cores", lambda there=there: there)
            torch.set_num_threads(3)
            limit_threads()
            assert torch.get_num_threads() == threads
            torch.set_num_threads(3)
            assert merge(*command, "--dry_run") == 0
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_memory_in_words():
    assert gib(1.5 * 2**30) == "1.5 GiB"
    assert gib(2**20) == "1.0 MiB"
