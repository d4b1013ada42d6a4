"""What was learned, or made for it, belongs to the weights that a run began with, and is what it was."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.learned import stages
from expert_merging.learned.directions import find_directions, make_directions
from expert_merging.learned.trainer import Trainer
from expert_merging.run import Run
from tests.checkpoints import BASE, EXPERTS
from tests.command import contents, forget_accelerate, merge, refusal
from tests.learned.test_directions import context as a_context

SAME = (
    "weights of {}, or of the base, have changed since this run began, though samples of them are as they were; put "
    "the old ones back, or move the run's folder away to begin again"
)
context = a_context


@pytest.fixture
def answered_zoo(answered_zoo, tmp_path) -> Path:
    """One that may be written to."""
    return Path(shutil.copytree(answered_zoo, tmp_path / "zoo"))


@pytest.fixture
def command(answered_zoo, tmp_path):
    given = ["--cache_dir", answered_zoo, "--data_dir", answered_zoo / "dataset", "--output_path", tmp_path / "out"]
    return [*given, "--run_name", "r", "--samples_per_task", 1, "--log_with", "none"]


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "out" / "expert_merging" / "r")


def change(folder: Path) -> None:
    """Another entry between the samples of a fingerprint, and the old time."""
    checkpoint = Checkpoint(folder)
    entry = checkpoint.entries["model.layers.1.mlp.up_proj.weight"]
    before, times = checkpoint.fingerprint(whole=True), entry.file.stat()
    with entry.file.open("r+b") as stream:
        stream.seek(entry.offset)
        stream.write(b"\0\0\x80\x3f")
    os.utime(entry.file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert Checkpoint(folder).fingerprint(whole=True) == before


def stop_learning(patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when learning is done, and before its result is written."""

    def stop(*_arguments):
        raise KeyboardInterrupt

    patch.setattr(Trainer, "_save", stop)


def stop_merging(patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when the result of learning is written."""

    def stop(*_arguments, **_keywords):
        raise KeyboardInterrupt

    patch.setattr("expert_merging.job.write_output", stop)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [stop_learning, stop_merging], ids=["learning", "merging"])
@pytest.mark.parametrize(("who", "told"), [("Math", "Math"), (None, "Chat, Math, Code")], ids=["expert", "base"])
def test_a_run_does_not_go_on_with_other_weights(who, told, stop, command, answered_zoo, run, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop(patch)
        assert merge(*command) == 130
    change(answered_zoo / (EXPERTS[who] if who else BASE))
    forget_accelerate()
    assert refusal(capsys, *command) == SAME.format(told)
    assert not run.model.exists()


@pytest.mark.slow
def test_a_run_goes_on_with_copies_without_learning_again(command, answered_zoo, run, monkeypatch):
    with monkeypatch.context() as patch:
        stop_merging(patch)
        assert merge(*command) == 130
    answered_zoo.rename(answered_zoo.with_name("old"))
    shutil.copytree(answered_zoo.with_name("old"), answered_zoo)
    monkeypatch.setattr(stages.Trainer, "train", None)
    forget_accelerate()
    assert merge(*command) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coefficients.safetensors", "coefficients.json"])
def test_coefficients_that_were_damaged_or_edited_are_not_merged_with(name, command, run, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_merging(patch)
        assert merge(*command) == 130
    file = run.folder / name
    before = file.read_bytes()
    if file.suffix == ".json":
        described = json.loads(before)
        file.write_text(json.dumps({**described, "task_vector_scale": [2.0, 1.0, 1.0]}))
    else:
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    forget_accelerate()
    assert refusal(capsys, *command) == (
        f"{file} is not what this run has learned; put that back, or remove coefficients.* to learn again (--method "
        "coefficients merges with edited ones)"
    )
    file.write_bytes(before)
    forget_accelerate()
    assert merge(*command) == 0


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["cut", "changed", "other weights"])
def test_directions_that_are_not_what_was_made_are_made_again(fault, context, answered_zoo, tmp_path):
    directions = find_directions(context, "svd")
    file = make_directions(directions, context, tmp_path / "kept").files[0]
    before, times = file.read_bytes(), file.stat()
    if fault == "cut":
        os.truncate(file, len(before) - 4)
    elif fault == "changed":
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    else:
        change(answered_zoo / EXPERTS["Math"])
        for checkpoint in context.plan.checkpoints.values():
            checkpoint.close()
        context.plan.experts["Math"].opened = Checkpoint(answered_zoo / EXPERTS["Math"]).opened
    make_directions(directions, context, tmp_path / "kept")
    assert (file.read_bytes() == before) == (fault != "other weights")
    assert file.stat().st_mtime_ns > times.st_mtime_ns
    again = contents(tmp_path / "kept")
    make_directions(directions, context, tmp_path / "kept")
    assert contents(tmp_path / "kept") == again
