"""Workers that share blocks: threads and forked processes do what one thread does."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from expert_merging.errors import InputError
from expert_merging.parts import Part
from expert_merging.workers import Workers, shared_zeros

PARTS = list(Part.whole("a", (100,)).cut(5))
FORKS = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux alone")
WORKERS = [
    pytest.param(Workers(1), id="alone"),
    pytest.param(Workers(3), id="threads"),
    pytest.param(Workers(3, forked=True), id="processes", marks=FORKS),
]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr("expert_merging.workers._BATCH", 10)


@pytest.mark.parametrize("workers", WORKERS)
def test_every_block_is_worked_on_once_and_reported(workers):
    reported = []
    workers.work_through(PARTS, lambda part: part.entries + part.start**2, lambda *done: reported.append(done))
    assert sorted(reported, key=lambda done: done[0].start) == [(part, 5 + part.start**2) for part in PARTS]
    workers.work_through([], lambda part: 0, lambda *done: reported.append(done))
    assert len(reported) == len(PARTS)


@pytest.mark.parametrize("workers", WORKERS)
def test_workers_have_numbers_and_share_memory(workers):
    counts = shared_zeros((workers.size, 100), torch.int64)

    def work(part):
        assert torch.get_num_threads() == 1
        counts[Workers.number(), part.start : part.stop] += 1
        time.sleep(0.01)

    before = torch.get_num_threads()
    workers.work_through(PARTS, work)
    assert torch.get_num_threads() == before
    assert counts.sum(0).tolist() == [1] * 100
    assert workers.size == 1 or (counts.sum(1) > 0).sum() > 1, "the work is shared"


@pytest.mark.parametrize("workers", WORKERS)
def test_the_first_error_stops_the_work_and_tells_all_its_problems(workers):
    begun = shared_zeros((100,), torch.int64)

    def work(part):
        begun[part.start] = 1
        if part.start == 10:
            raise InputError("one", "two")
        time.sleep(0.01)

    many = [Part("a", (110,), start, start + 10) for start in range(100)]
    with pytest.raises(InputError) as caught:
        workers.work_through(many, work)
    assert caught.value.problems == ("one", "two")
    assert begun.sum() < 60


class OddError(Exception):
    """Cannot be sent from one process to another."""

    def __init__(self, one, two):
        super().__init__(one)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("error", [OSError(28, "no space"), MemoryError(), OddError("strange", 2)], ids=repr)
def test_every_error_is_told_as_what_it_is(workers, error):
    def work(part):
        raise error

    with pytest.raises((type(error), RuntimeError)) as caught:
        workers.work_through(PARTS, work)
    assert type(error).__name__ in repr(caught.value)


@FORKS
def test_a_process_that_is_ended_from_outside_ends_the_run():
    def work(part):
        if part.start == 50:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(InputError) as caught:
        Workers(2, forked=True).work_through(PARTS, work)
    assert str(caught.value) == (
        "a process of this run was ended from outside, perhaps because memory ran out; "
        "the same command continues the run"
    )


def work_for_long(told):
    """In a process of its own, the leader of a group as a command in a terminal is: two more that work for a minute."""
    os.setsid()

    def work(part):
        told.put(os.getpid())
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            told.put("interrupted")

    Workers(2, forked=True).work_through(PARTS, work)


@contextmanager
def working_for_long():
    """A process, the two that it has forked, and what they tell; all are gone afterwards."""
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    parent = context.Process(target=work_for_long, args=(told,))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
        parent.start()
    try:
        children = {told.get(), told.get()}
        assert len(children) == 2, "each process is handed a batch"
        yield parent, children, told
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.join()


@FORKS
def test_processes_end_with_the_one_that_they_were_forked_from():
    """Otherwise they would write into files that the next run is writing."""
    with working_for_long() as (parent, children, _):
        os.kill(parent.pid, signal.SIGKILL)
        parent.join(30)
        for child in children:
            assert ended(child), "a process outlived its parent"


@FORKS
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_only_the_parent_hears_a_signal(number):
    """A terminal sends it to all; the parent alone decides, and ends the others."""
    with working_for_long() as (parent, children, told):
        for child in children:
            os.kill(child, number)
        time.sleep(0.1)
        assert told.empty()
        assert not any(ended(child, patience=1) for child in children)
        os.killpg(parent.pid, number)
        for child in children:
            assert ended(child), "a process outlived its parent"
        assert told.empty()


@FORKS
@pytest.mark.parametrize("seed", range(20))
def test_a_process_that_is_ended_at_any_moment_ends_the_run(seed):
    """Also where it has nothing to do, and where all is done and the others are about to end."""
    moments = random.Random(seed)
    victim, moment = moments.randrange(3), moments.randrange(len(PARTS) + 1)
    processes = shared_zeros((3,), torch.int64)
    told = []

    def work(part):
        processes[Workers.number()] = os.getpid()
        time.sleep(0.002)
        return part

    def done(part, _result):
        told.append(part)
        if len(told) >= moment and processes[victim]:
            with suppress(ProcessLookupError):
                os.kill(int(processes[victim]), signal.SIGKILL)

    begun = time.monotonic()
    with pytest.raises(InputError, match="a process of this run was ended from outside"):
        Workers(3, forked=True).work_through(PARTS, work, done)
    assert time.monotonic() - begun < 5, f"seed {seed}: worker {victim} after {moment} parts"


def ended(process: int, patience: int = 100) -> bool:
    for _ in range(patience):
        state = Path(f"/proc/{process}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_the_cores_share_much_work_and_one_worker_does_little(monkeypatch):
    monkeypatch.setattr("expert_merging.workers.cores", lambda: 6)
    monkeypatch.setattr(sys, "platform", "linux")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert Workers.for_entries(10**9, cpu) == Workers(6, forked=True)
    assert Workers.for_entries(10**6, cpu) == Workers(1)
    assert Workers.for_entries(10**9, gpu) == Workers(4)
    for processes, share in ((2, 3), (8, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert Workers.for_entries(10**9, cpu) == Workers(share, forked=True)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert Workers.for_entries(10**9, cpu) == Workers(6)
