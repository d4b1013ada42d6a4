"""A run's folder is taken only by the run that it belongs to."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest

from expert_merging.errors import InputError
from expert_merging.records import digest_of_run
from expert_merging.run import Run

DESCRIPTION = {
    "family": "Mistral",
    "method": "task_arithmetic",
    "options": {"scaling_coefficient": 0.3, "seed": 0, "expert": {"A": "/a"}},
    "checkpoints": {"base": "11", "A": "22"},
    "inputs": {},
    "seed": 0,
    "command": "model_merging.py",
    "started": "today",
}


def described(**changes):
    """The description with other options."""
    return {**DESCRIPTION, "options": {**DESCRIPTION["options"], **changes}}


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "task_arithmetic" / "name")


@pytest.fixture
def begun(run):
    run.begin(DESCRIPTION)
    run.release()
    return run


def problem(run, description=DESCRIPTION):
    with pytest.raises(InputError) as caught:
        run.check(description)
    return str(caught.value)


def test_a_folder_that_is_not_there_or_empty_is_free(run):
    assert run.check(DESCRIPTION) is None
    assert not run.folder.exists()
    run.folder.mkdir(parents=True)
    assert run.check(DESCRIPTION) is None


def test_the_same_run_is_continued_with_its_own_record(begun):
    later = {**DESCRIPTION, "seed": 99, "command": "another", "started": "tomorrow"}
    assert begun.check(later) == DESCRIPTION


def test_the_record_of_the_first_part_is_kept(begun):
    begun.begin({**DESCRIPTION, "started": "tomorrow"})
    begun.release()
    assert json.loads(begun.config.read_text()) == DESCRIPTION


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (described(scaling_coefficient=0.5), "scaling_coefficient: 0.3 there, 0.5 now"),
        (described(density=0.5), "density: null there, 0.5 now"),
        ({**DESCRIPTION, "family": "InternVL"}, 'family: "Mistral" there, "InternVL" now'),
        ({**DESCRIPTION, "method": "ties"}, 'method: "task_arithmetic" there, "ties" now'),
        ({**DESCRIPTION, "checkpoints": {"base": "11", "A": "33"}}, 'A: "22" there, "33" now'),
        ({**DESCRIPTION, "inputs": {"Chat.json": "44"}}, 'Chat.json: null there, "44" now'),
    ],
)
def test_a_different_run_is_refused_with_what_differs(begun, other, difference):
    assert problem(begun, other) == (
        f"{begun.folder} holds a different run ({difference}); choose another --run_name, or move the folder away"
    )


def test_everything_that_differs_is_named_and_long_values_are_cut(begun):
    found = problem(begun, described(seed=1, coefficients="/" + "a" * 100))
    assert "(seed: 0 there, 1 now; coefficients: " in found
    assert "aaa... now" in found
    assert len(found) < 300


@pytest.mark.parametrize(
    "text",
    [
        *(None, "{", "[]", "null", '"text"', '{"model_type": "mistral"}'),
        *('{"family": "", "method": "", "options": []}', '{"family": "", "method": ["ties"], "options": {}}'),
    ],
)
def test_a_folder_with_something_else_is_refused(run, text):
    run.folder.mkdir(parents=True)
    (run.folder / "holiday.jpg").write_text("sea")
    if text is not None:
        run.config.write_text(text)
    assert problem(run) == (
        f"{run.folder} is in use and has no readable config.json of a run; "
        "choose another --run_name, or move the folder away"
    )


def test_a_file_in_the_place_of_a_folder_is_refused(run):
    run.folder.parent.write_text("")
    assert problem(run) == f"{run.folder.parent} is a file where the run needs a folder; move it away"
    run.folder.parent.unlink()
    run.folder.parent.mkdir()
    run.folder.write_text("")
    assert problem(run) == f"{run.folder} is a file where the run needs a folder; move it away"


@pytest.mark.parametrize("place", ["folder", "parent"])
def test_a_link_that_leads_nowhere_in_the_place_of_a_folder_is_refused(place, run):
    link = run.folder if place == "folder" else run.folder.parent
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to("nowhere")
    assert problem(run) == f"{link} is a link that leads nowhere; remove it"


def test_a_run_that_was_stopped_while_it_wrote_its_record_begins_again(run):
    run.folder.mkdir(parents=True)
    (run.folder / "config.json.partial").write_text('{"fam')
    assert run.check(DESCRIPTION) is None
    run.begin(DESCRIPTION)
    run.release()
    assert [path.name for path in run.folder.iterdir()] != []
    assert run.config.read_text().startswith("{")


def test_a_folder_that_another_process_writes_to_is_refused(run):
    run.folder.mkdir(parents=True)
    other = os.open(run.lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(InputError) as caught:
        run.begin(DESCRIPTION)
    assert str(caught.value) == (
        f"another process is writing to {run.folder}; wait for it or choose another --run_name"
    )
    assert not run.config.exists()
    os.close(other)
    run.begin(DESCRIPTION)
    run.release()


def test_two_runs_cannot_hold_one_folder(run):
    run.begin(DESCRIPTION)
    with pytest.raises(InputError, match=r"^another process is writing to "):
        Run(run.folder).begin(DESCRIPTION)
    run.release()


def test_a_released_folder_can_be_taken_again(begun):
    begun.release()
    again = Run(begun.folder)
    again.begin(DESCRIPTION)
    again.release()


def test_a_model_has_its_name_only_when_it_is_complete(begun):
    begun.partial_model.mkdir()
    assert not begun.is_complete
    begun.finish()
    assert begun.is_complete
    assert not begun.partial_model.exists()


def test_a_complete_run_is_found_by_its_folder_and_by_its_model(begun, tmp_path, monkeypatch):
    assert Run.named(tmp_path, "task_arithmetic", "name").folder == begun.folder
    assert (begun.method, begun.name) == ("task_arithmetic", "name")
    for place in (begun.folder, begun.partial_model):
        assert Run.found_at(place) is None, "there is no model yet"
    begun.partial_model.mkdir()
    begun.finish()
    (begun.model / "inside").mkdir()
    (tmp_path / "link").symlink_to(begun.model)
    monkeypatch.chdir(begun.folder)
    for place in (begun.folder, begun.model, tmp_path / "link", Path("model"), Path()):
        assert Run.found_at(place).folder == begun.folder
    for place in (begun.folder.parent, begun.model / "inside", begun.folder / "state", tmp_path / "absent"):
        assert Run.found_at(place) is None


def test_the_order_of_an_option_s_entries_is_part_of_a_run(run):
    """Of patterns the last that matches counts."""
    there, now = described(coeffs_size_dict={"A": 1, "B": 2}), described(coeffs_size_dict={"B": 2, "A": 1})
    assert_different(run, there, now, "order of coeffs_size_dict: A, B there, B, A now")


def test_the_order_of_experts_is_part_of_a_run(run):
    """Interpolation goes from the first expert to the second."""
    there, now = ({**DESCRIPTION, "checkpoints": dict.fromkeys(order, "11")} for order in (("A", "B"), ("B", "A")))
    assert_different(run, there, now, "order of checkpoints: A, B there, B, A now")


def assert_different(run, there, now, difference):
    run.begin(there)
    run.release()
    assert run.check(there) == there
    assert problem(run, now) == (
        f"{run.folder} holds a different run ({difference}); choose another --run_name, or move the folder away"
    )
    assert digest_of_run(there) != digest_of_run(now)


def test_checkpoints_may_lie_elsewhere(begun):
    moved = described(expert={"A": "/elsewhere"}, base_model_path="/there")
    assert begun.check(moved) == DESCRIPTION
    assert digest_of_run(moved) == digest_of_run(DESCRIPTION)


def test_the_digest_follows_what_decides_the_result():
    name = digest_of_run(DESCRIPTION)
    assert name == "9e7f4d40"  # as earlier versions have made it, whose runs are found by it
    assert digest_of_run({**DESCRIPTION, "seed": 9, "started": "x", "inputs": {"a": "b"}}) == name
    assert digest_of_run(dict(reversed(DESCRIPTION.items()))) == name
    options = dict(reversed(DESCRIPTION["options"].items()))
    assert digest_of_run({**DESCRIPTION, "options": options}) == name
    others = [described(seed=1), {**DESCRIPTION, "method": "ties"}, {**DESCRIPTION, "checkpoints": {}}]
    assert len({name, *(digest_of_run(other) for other in others)}) == 4
