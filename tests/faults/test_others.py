"""What a disk, a reader, a second run or a signal can do at any moment of a run, and that the same command finishes."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from expert_merging.signals import CONTINUES
from tests.checkpoints import EXPERTS
from tests.command import contents
from tests.faults import acts
from tests.faults.conftest import COUNT
from tests.faults.moments import Moment
from tests.faults.runs import KINDS, Place, Runs, drawing
from tests.launching import Ended
from tests.test_signals import SIGNALS

pytestmark = pytest.mark.slow
# Each kind of fault happens to all kinds of runs in turn.
NUMBERS = range(max(1, COUNT // 5))


def nth(number: int, names: list[str]) -> str:
    return next(itertools.islice(itertools.cycle(names), number, None))


def names() -> list[str]:
    return [name for name in KINDS if KINDS[name].processes == 1] or pytest.skip("moments are those of Linux")


@contextmanager
def faulty(fault: str, number: int, place: Place, runs: Runs, name: str, act: Callable[[], object]) -> Iterator[Ended]:
    """A run in which something has gone wrong; at the end, when that is put right, the same command finishes."""
    expected, counts = runs.whole(name)
    moment = Moment.drawn(drawing(fault, number), counts)
    done, recorded = place.start(moment, act)
    try:
        assert recorded, "it was not reached"
        assert "Traceback" not in done.stderr
        if any(done.codes):
            place.check_ended(recorded)
        yield done
        place.check_whole_or_absent(expected)
        place.finish(expected)
    except AssertionError as error:
        raise AssertionError(f"{fault}, {name}, seed {number}: {moment}, {recorded}, {done}") from error
    shutil.rmtree(place.folder)


def check_told(done: Ended, *texts: str) -> None:
    """A run that could not go on says why, in lines of its own."""
    if done.codes == (0,):
        return
    assert done.codes == (1,)
    lines = done.stderr.splitlines()
    assert lines
    assert all(line.startswith("error: ") for line in lines)
    assert not texts or any(text in line for line in lines for text in texts)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_disk_that_is_full(number, runs: Runs, tmp_path, record_property):
    name = nth(number, names())
    with acts.small_disk(tmp_path / "disk") as disk:
        place = replace(runs.place(name), output=disk / "runs")
        with faulty("ENOSPC", number, place, runs, name, partial(acts.fill, disk)) as done:
            check_told(done, "the disk is full; make room, then the same command", " GB free; make room or")
            acts.make_room(disk)
    record_property("fault: the disk is full (ENOSPC)", 1)


@pytest.mark.parametrize("number", NUMBERS)
def test_files_that_may_not_grow(number, runs: Runs, record_property):
    name = nth(number, names())
    with faulty("EFBIG", number, runs.place(name), runs, name, acts.limit_files) as done:
        check_told(done)
    record_property("fault: files may not grow (EFBIG)", 1)


@pytest.mark.parametrize("number", NUMBERS)
def test_weights_that_cannot_be_read(number, runs: Runs, record_property):
    name = nth(number, names())
    with faulty("EIO", number, runs.place(name), runs, name, acts.fail_to_read) as done:
        check_told(done, os.strerror(5))
    record_property("fault: weights cannot be read (EIO)", 1)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_folder_that_may_not_be_written_to(number, runs: Runs, record_property):
    name = nth(number, names())
    place = runs.place(name)
    with faulty("EACCES", number, place, runs, name, partial(acts.take_permission, place.folder)) as done:
        acts.give_permission(place.folder)
        check_told(done, os.strerror(13), "cannot be written")
    record_property("fault: the output is read-only (EACCES)", 1)


def with_own_experts(place: Place, draw: random.Random) -> tuple[Place, Path]:
    """The place with a copy of the checkpoints, and a file of weights of an expert there."""
    zoo = Path(shutil.copytree(place.zoo, place.folder / "zoo"))
    file = draw.choice(sorted((zoo / draw.choice([*EXPERTS.values()])).glob("*.safetensors")))
    return replace(place, zoo=zoo), file


@pytest.mark.parametrize("number", NUMBERS)
def test_an_expert_that_is_cut_off(number, runs: Runs, record_property):
    name = nth(number, names())
    place, file = with_own_experts(runs.place(name), drawing("file", number))
    kept = shutil.copy2(file, file.with_suffix(".kept"))
    with faulty("truncation", number, place, runs, name, partial(acts.cut, file)) as done:
        os.replace(kept, file)
        check_told(
            done, file.name, "a file of weights was cut off while it was read", "were written while this run read them"
        )
    record_property("fault: an expert is cut off", 1)


@pytest.mark.parametrize("number", NUMBERS)
def test_an_expert_that_is_rewritten(number, runs: Runs, record_property):
    """The result is that of the content before or of the content after, or there is none."""
    name = nth(number, names())
    draw = drawing("rewritten", number)
    place, file = with_own_experts(runs.place(name), draw)
    before = file.read_bytes()
    after = before[:-2] + bytes(value ^ 1 for value in before[-2:])
    act, moment = partial(acts.rewrite, file, after), Moment.drawn(draw, runs.whole(name)[1])
    done, recorded = place.start(moment, act)
    story = f"{name}, seed {number}: {moment}, {recorded}, {done}"
    assert recorded, story
    if done.codes == (0,):
        found = contents(place.run.model)
        if found != runs.whole(name)[0]:
            replace(place, output=place.folder / "after").finish(found)
    else:
        check_told(done, "were written while this run read them", "has changed")
        assert not place.run.model.exists(), story
        acts.rewrite(file, before)
        replace(place, output=place.folder / "again").finish(runs.whole(name)[0])
    shutil.rmtree(place.folder)
    record_property("fault: an expert is rewritten", 1)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_second_run_of_the_same_command(number, runs: Runs, record_property):
    """One of them merges; the other one is refused, or finds the result."""
    name = nth(number, names())
    place = runs.place(name)
    told = place.folder / "second"
    act = partial(acts.run_beside, place.arguments, told)
    with faulty("second", number, place, runs, name, act) as done:
        codes = {done.codes[0], int(told.read_text())}
        assert codes in ({0}, {0, 1})
        assert 1 not in codes or f"another process is writing to {place.run.folder}; wait for it" in done.stderr
    record_property("fault: the same command is run beside it", 1)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal(number, runs: Runs, record_property):
    name = nth(number, names())
    sent = drawing("signal", number).choice([*SIGNALS])
    place = replace(runs.place(name), is_program=True)
    with faulty("signal", number, place, runs, name, partial(acts.send, sent)) as done:
        assert done.codes == (128 + sent,)
        assert done.stderr == f"\n{SIGNALS[signal.Signals(sent)]}; {CONTINUES}\n"
    record_property("fault: Ctrl-C, SIGTERM or SIGHUP", 1)
