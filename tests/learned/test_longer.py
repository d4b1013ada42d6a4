"""A finished run that learns longer: it becomes what it would have been with as many epochs from the start."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from rich.console import Console

from expert_merging import run as run_module
from expert_merging.comparing.scores_file import Scores, add_scores
from expert_merging.learned.state import StateFolder, TrainingState
from expert_merging.learned.trainer import Trainer
from expert_merging.run import Run
from expert_merging.verify import verify
from tests.checkpoints import EXPERTS, tensors_of, write_tasks
from tests.command import assert_same_bytes, merge, merged, refusal

# What tells of time and of the machine, or keeps on what there was before.
APART = (
    "merge.log",
    "config.json",
    "outcome.json",
    ".lock",
    "state/",
    "stage1/state/",
    "stage1/digests.json",
    "board/",
)
METHODS = {
    "expert_merging": [],
    "expert_merging held out": ["--held_out", 0.4, "--patience", 9],
    "expert_merging++": ["--sparsity_reg_weight", 0],
    "align_merge": ["--synthesize", 0, "--directions", "svd,weight_average"],
    "adamerging_task": [],
}


@pytest.fixture
def learn(answered_zoo, tmp_path):
    """Runs the command with a run of one name; the run."""

    given = ["--cache_dir", answered_zoo, "--data_dir", answered_zoo / "dataset", "--run_name", "r"]
    given += ["--samples_per_task", 3, "--log_with", "none"]

    def run(*arguments, output="out", method="expert_merging"):
        assert merge(*given, "--output_path", tmp_path / output, "--method", method, *arguments) == 0
        return Run(tmp_path / output / method / "r")

    run.command = [*given, "--output_path", tmp_path / "out"]
    return run


def results(run):
    """Everything that a run leaves but what tells of time and of the machine."""
    found = contents_of(run)
    digests = json.loads(found.pop("digests.json"))["files"]
    return found, {name: entry["sections"] for name, entry in digests.items()}


def contents_of(run):
    """Bytes of every file, by its path in the run's folder."""
    files = {path: run.folder / path for path in sorted(str(p.relative_to(run.folder)) for p in run.folder.rglob("*"))}
    return {name: file.read_bytes() for name, file in files.items() if file.is_file() and not name.startswith(APART)}


@pytest.mark.parametrize(
    "name", [name if name == "expert_merging" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_a_longer_run_is_one_that_was_as_long_from_the_start(name, learn):
    method, options = name.split()[0], METHODS[name]
    short = learn("--num_epochs", 2, *options, method=method)
    before = short.coefficients.read_bytes()
    add_scores(short.scores, Scores(divergence={"Math": 0.5}))
    longer = learn("--num_epochs", 4, *options, method=method)
    whole = learn("--num_epochs", 4, *options, method=method, output="whole")
    assert results(longer) == results(whole)
    assert longer.coefficients.read_bytes() != before
    assert longer.record["options"] == whole.record["options"]
    assert json.loads(longer.outcome.read_text())["continued"]
    log = longer.log.read_text()
    assert "goes on with the finished run after its epoch 2" in log
    assert "epoch 3 of 4" in log
    assert log.count("epoch 1 of 4") == (method == "expert_merging++"), "of the second stage alone"
    verify(longer.folder, Console(quiet=True))
    assert not longer.longer.work.exists()
    assert longer.state.is_dir(), "it can go on again"


def test_until_it_is_complete_the_finished_run_stays_what_it_was(learn, monkeypatch):
    """Killed while it learns or writes, it goes on where it was, and learns nothing twice."""
    short = learn("--num_epochs", 2)
    whole = results(learn("--num_epochs", 4, output="whole"))
    before = contents_of(short)
    updates, update = [], Trainer._update

    def interrupted(self, *arguments, **keywords):
        if len(updates) in (3, 8):
            updates.append(None)
            raise StoppedError
        updates.append(self.state.updates)
        update(self, *arguments, **keywords)

    monkeypatch.setattr(Trainer, "_update", interrupted)
    monkeypatch.setattr("expert_merging.job.check_unchanged", stopped)
    for _ in range(3):
        with pytest.raises(StoppedError):
            learn("--num_epochs", 4)
        assert Run(short.folder).is_complete
        kept = {name: content for name, content in contents_of(short).items() if not name.startswith("longer/")}
        assert kept == before
        verify(short.folder, Console(quiet=True))
    learned = [number for number in updates if number is not None]
    assert learned == sorted(set(learned)), learned
    assert learn("--num_epochs", 2).is_complete
    monkeypatch.undo()
    assert results(learn("--num_epochs", 4)) == whole


class StoppedError(Exception):
    pass


def stopped(*_arguments):
    raise StoppedError


class Moves:
    """`os`, with which a process is stopped after some moves of files and folders."""

    def __init__(self, left):
        self.left = left

    def __getattr__(self, name):
        return self.move if name in ("rename", "replace") else getattr(os, name)

    def move(self, source, target):
        if not self.left:
            raise StoppedError
        self.left -= 1
        os.replace(source, target)


@pytest.mark.slow
def test_stopped_while_it_takes_the_place_of_the_finished_run_it_is_completed(learn, monkeypatch, tmp_path, capsys):
    short, moves = learn("--num_epochs", 1), Moves(100)
    shutil.copytree(short.folder, tmp_path / "short")
    monkeypatch.setattr(run_module, "os", moves)
    learn("--num_epochs", 2)
    whole, count = results(short), 100 - moves.left
    # After the first move, between the two files of coefficients, between the two models, and before the record.
    for steps in (1, count - 5, count - 3, count - 1):
        shutil.rmtree(short.folder)
        shutil.copytree(tmp_path / "short", short.folder)
        monkeypatch.setattr(run_module, "os", Moves(steps))
        with pytest.raises(StoppedError):
            learn("--num_epochs", 2)
        monkeypatch.undo()
        assert short.longer.coefficients.exists() == (steps == 1)
        assert short.model.is_dir() == (steps != count - 3)
        if not short.model.is_dir():
            told = f"error: {short.folder} was stopped while a longer run took its place; start that again"
            assert f"error: {refusal(capsys, *learn.command, '--num_epochs', 1)}" == told
        assert results(learn("--num_epochs", 2)) == whole


def test_the_state_to_begin_from_is_taken_over_where_there_is_none(tmp_path):
    states = StateFolder(tmp_path / "longer" / "state", before=tmp_path / "state")
    states.begin()
    assert states.found == []
    for content in ("last", "later"):
        (tmp_path / "state").mkdir(exist_ok=True)
        (tmp_path / "state" / "file").write_text(content)
        states.begin()
        assert (states.folder / "file").read_text() == "last"


def test_what_would_be_another_run_is_refused(learn, capsys):
    run = learn("--num_epochs", 2, "--patience", 2)
    different = f"{run.folder} holds a different run ({{}}choose another --run_name, or move the folder away"
    longer = "; a run can learn longer once it is finished, and never shorter; "
    for arguments, told in {
        ("--num_epochs", 1, "--patience", 2): f"num_epochs: 2 there, 1 now){longer}",
        ("--num_epochs", 3, "--patience", 1): f"num_epochs: 2 there, 3 now; patience: 2 there, 1 now){longer}",
        ("--num_epochs", 3, "--patience", 2, "--sam", 0.5): "num_epochs: 2 there, 3 now; sam: 0.0 there, 0.5 now); ",
    }.items():
        assert refusal(capsys, *learn.command, *arguments) == different.format(told)


def test_other_samples_make_another_run(learn, tmp_path, capsys):
    write_tasks(tmp_path / "dataset", responses=dict.fromkeys(EXPERTS, "abc"))
    here = ["--data_dir", tmp_path / "dataset"]
    run = learn("--num_epochs", 1, *here)
    write_tasks(tmp_path / "dataset", responses=dict.fromkeys(EXPERTS, "abcd"))
    told = refusal(capsys, *learn.command, *here, "--num_epochs", 2)
    assert told.startswith(f"{run.folder} holds a different run (calibration: ")
    assert "num_epochs" not in told


def never_better(end):
    """As if no epoch had been better than the one before the first."""

    def end_epoch(self, loss=None):
        end(self, float("inf"))
        return False

    return end_epoch


def test_a_run_that_would_learn_nothing_more_is_refused(learn, capsys, monkeypatch):
    monkeypatch.setattr(TrainingState, "end_epoch", never_better(TrainingState.end_epoch))
    run = learn("--num_epochs", 5, "--patience", 2)
    assert refusal(capsys, *learn.command, "--num_epochs", 9, "--patience", 2) == (
        "the finished run would learn nothing more: it has ended after epoch 2, and the last 2 had no better loss; "
        "give --num_epochs above 2 and --patience above 2"
    )
    assert learn("--num_epochs", 5, "--patience", 3).coefficients.exists()
    training = json.loads((run.state / "training.json").read_text())
    assert (training["epochs"], training["epochs_without_better"]) == (3, 3)


def test_without_its_last_state_all_is_learned_again(learn):
    run = learn("--num_epochs", 1)
    shutil.rmtree(run.state)
    assert results(learn("--num_epochs", 2)) == results(learn("--num_epochs", 2, output="whole"))
    assert "the state in which the finished run has ended is not there, so all is learned again" in run.log.read_text()


def test_another_length_waits_for_the_first(learn, capsys, monkeypatch):
    run = learn("--num_epochs", 1)
    monkeypatch.setattr("expert_merging.job.check_unchanged", stopped)
    with pytest.raises(StoppedError):
        learn("--num_epochs", 2)
    assert refusal(capsys, *learn.command, "--num_epochs", 3) == (
        f"{run.longer.work} holds a different run (num_epochs: 2 there, 3 now); a run can learn longer once it is "
        "finished, and never shorter; choose another --run_name, or move the folder away"
    )


def test_the_plan_says_that_a_run_goes_on(learn, capsys):
    run = learn("--num_epochs", 1)
    learn("--num_epochs", 2, "--dry_run")
    assert "goes on with the finished run after its epoch 1\n" in capsys.readouterr().out
    assert not run.longer.work.exists()


OTHER_KINDS = {
    "columns": ["--method", "dam"],
    "singular directions": ["--parametrisation", "direction"],
    "a mask with noise": ["--method", "concrete_ta"],
    "steps of their own": ["--method", "fw_hard", "--gradient_accumulation_steps", 3],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_every_kind_of_coefficients_and_steps_learns_longer(kind, answered_zoo, tmp_path):
    given = ["--cache_dir", answered_zoo, "--data_dir", answered_zoo / "dataset", "--samples_per_task", 1]
    given += ["--run_name", "r", *OTHER_KINDS[kind]]
    merged(tmp_path / "first", *given, "--num_epochs", 1)
    longer = merged(tmp_path / "first", *given, "--num_epochs", 3)
    whole = merged(tmp_path / "whole", *given, "--num_epochs", 3)
    assert_same_bytes(tensors_of(longer.model), tensors_of(whole.model))
