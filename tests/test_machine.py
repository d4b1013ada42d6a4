"""Free memory as the kernel tells it."""

from __future__ import annotations

from expert_merging.machine import free_host_memory


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
