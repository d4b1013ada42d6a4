"""SIGKILL at any moment: the right result or none, nobody left behind, and the same command finishes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.faults.conftest import COUNT
from tests.faults.moments import Moment
from tests.faults.runs import KINDS, Runs, drawing

pytestmark = pytest.mark.slow
# Kills one after another until a run is left to finish, and so many of a test.
_IN_A_ROW, _TOGETHER = 5, 10
WITH_WORKERS = [name for name, kind in KINDS.items() if kind.workers]
_YEARS = 10 * 365 * 86400.0
ENDED = (
    "error: a process of this run was ended from outside, perhaps because memory ran out; "
    "the same command continues the run\n"
)


def portions(victim: str, names: list[str]) -> Iterator[tuple[str, str, int, int]]:
    """The kills of a victim, shared out to kinds of runs and tests: number of the test, and of its kills."""
    each = -(-COUNT // len(names)) if names else 0
    for name in names:
        for part, start in enumerate(range(0, each, _TOGETHER)):
            yield victim, name, part, min(_TOGETHER, each - start)


@pytest.mark.parametrize(
    ("victim", "name", "part", "count"), [*portions("run", list(KINDS)), *portions("worker", WITH_WORKERS)]
)
def test_what_is_killed_again_and_again_finishes(victim, name, part, count, runs: Runs, record_property):
    """The clock is wrong by years, now and then."""
    kills = seed = 0
    while kills < count:
        kills += kill_in_a_row(name, victim, f"{part}.{seed}", runs, min(_IN_A_ROW, count - kills))
        seed += 1
    record_property(f"fault: SIGKILL of a {victim}, {name}", kills)


def kill_in_a_row(name: str, victim: str, seed: str, runs: Runs, most: int) -> int:
    """Kill a run, and the same command again, at moments drawn from the seed; number of kills."""
    expected, counts = runs.whole(name)
    place, draw, story, kills = runs.place(name), drawing(name, victim, seed), [f"seed {name} {victim} {seed}"], 0
    try:
        for _ in range(most):
            moment = Moment.drawn(draw, counts, of_worker=victim == "worker")
            # What workers do, those of the other process do as well.
            number = draw.randrange(KINDS[name].processes) if moment.worker is None else 0
            clock = draw.choice([0.0, -_YEARS, _YEARS])
            done, recorded = place.start(moment, watched=number, clock=clock)
            story.append(f"{moment} of process {number}, clock {clock:+.0f} s: {recorded}, {done}")
            assert "Traceback" not in done.stderr
            if not recorded:  # what was continued has fewer moments
                assert set(done.codes) == {0}
                break
            kills += 1
            assert done.codes[number] == (-9 if moment.worker is None else 1)
            assert moment.worker is None or ENDED in done.stderr
            place.check_ended(recorded)
            place.check_whole_or_absent(expected)
        place.finish(expected)
    except AssertionError as error:
        raise AssertionError("\n".join(story)) from error
    shutil.rmtree(place.folder)
    return kills
