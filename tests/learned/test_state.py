"""What is kept while learning: killed or interrupted, a run goes on to the same result."""

from __future__ import annotations

import json
import pickle
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from expert_merging.cli import main
from expert_merging.kept import digest_files
from expert_merging.learned import stages
from expert_merging.learned.state import full_disk_as_os_error
from expert_merging.learned.trainer import Trainer
from Mistral.backbone import BACKBONE
from tests.launching import run_together
from tests.learned.training import make_trainer
from tests.learned.watched import learn_and_be_killed


@pytest.fixture(scope="module")
def whole(answered_zoo, tmp_path_factory):
    """Coefficients of training that nothing disturbs."""
    return make_trainer(answered_zoo, tmp_path_factory.mktemp("whole"), num_epochs=2).train()


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        "optimizer.bin",
        "coefficients.safetensors",
        "training.json",
        "version",
        "custom",
        "bit",
        "no digests",
        "other digests",
    ],
)
def test_a_damaged_state_is_passed_over(damage, whole, answered_zoo, tmp_path):
    """Training starts again; and what a state's files hold is never executed."""
    trainer = make_trainer(answered_zoo, tmp_path / "run", num_epochs=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_save", _interrupted)
        with pytest.raises(RuntimeError, match="interrupted"):
            trainer.train()
    state = tmp_path / "run" / "state"
    if damage == "custom":
        executed = tmp_path / "executed"
        (state / "custom_checkpoint_0.pkl").write_bytes(pickle.dumps(Payload(executed), protocol=2))
        (state / "optimizer.bin").write_bytes(pickle.dumps(Payload(executed), protocol=2))
    elif damage == "version":
        training = json.loads((state / "training.json").read_text())
        del training["epoch_losses"]
        (state / "training.json").write_text(json.dumps({**training, "updates": 1}))
    elif damage == "bit":
        content = (state / "coefficients.safetensors").read_bytes()
        (state / "coefficients.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif "digests" not in damage:
        (state / damage).write_bytes(b"")
    digests = state / "digests.json"
    if damage == "no digests":
        digests.unlink()
    elif damage == "other digests":
        digests.write_text("[]")
    elif damage != "bit":  # what reads the files has to cope with them itself
        digests.write_text(
            json.dumps({name: digest for name, digest in digest_files(state).items() if name != digests.name})
        )
    again = make_trainer(answered_zoo, tmp_path / "run", num_epochs=2).train()
    assert all(torch.equal(again.values[name], whole.values[name]) for name in whole.values)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("text", ["[enforce fail at inline_container.cc:672]", "PytorchStreamWriter failed writing"])
def test_a_full_disk_is_told_as_one(text):
    """torch does not say what the system has said."""
    with pytest.raises(OSError, match="No space left on device"), full_disk_as_os_error():
        raise RuntimeError(text)
    with pytest.raises(OSError, match="No space left on device"), full_disk_as_os_error():
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="another"), full_disk_as_os_error():
        raise RuntimeError("another")


def test_a_run_that_begins_again_is_one_run_on_the_board(answered_zoo, tmp_path):
    """Also where no state was saved the first time."""
    for _ in range(2):
        make_trainer(answered_zoo, tmp_path, samples_per_task=1, log_with="tensorboard").train()
    assert [entry for entry in (tmp_path / "board").iterdir() if entry.is_dir()] == []
    board = EventAccumulator(str(tmp_path / "board"), {"histograms": 0}).Reload()
    assert [point.step for point in board.Scalars("loss/total")] == [1]
    assert [point.step for point in board.Histograms("coefficients/Math")] == [0, 1]


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["saving", "saved"])
def test_killed_training_continues_to_the_same_coefficients(when, tiny_zoo, tmp_path):
    given = ["--cache_dir", tiny_zoo, "--data_dir", tiny_zoo / "dataset", "--num_epochs", 3, "--max_new_tokens", 6]
    given = [*map(str, given), "--run_name", "r", "--device", "cpu", "--output_path"]
    assert main(BACKBONE, [*given, str(tmp_path / "whole")]) == 0
    begun = partial(learn_and_be_killed, [*given, str(tmp_path / "killed")], when, updates=3)
    assert run_together(1, begun, folder=tmp_path).codes == (-signal.SIGKILL,)
    killed = tmp_path / "killed" / "expert_merging" / "r"
    assert not (killed / "model").exists()
    assert (killed / "state").is_dir()
    assert main(BACKBONE, [*given, str(tmp_path / "killed")]) == 0
    whole = tmp_path / "whole" / "expert_merging" / "r"
    assert "continuing after update" in (killed / "merge.log").read_text()
    curves = ("analysis/learning.csv", "analysis/over_time.csv")
    for name in ("coefficients.safetensors", "weight_coeffs.json", "model/model.safetensors", *curves):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_learning_is_not_repeated_when_only_merging_was_killed(answered_zoo, tmp_path, monkeypatch):
    arguments = [
        "--cache_dir",
        str(answered_zoo),
        "--data_dir",
        str(answered_zoo / "dataset"),
        "--output_path",
        str(tmp_path),
        "--run_name",
        "r",
        "--log_with",
        "none",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr("expert_merging.job.write_output", _interrupted)
    with pytest.raises(RuntimeError, match="interrupted"):
        main(BACKBONE, arguments)
    monkeypatch.undo()
    monkeypatch.setattr(stages.Trainer, "train", None)
    assert main(BACKBONE, arguments) == 0


def _interrupted(*_args, **_keywords):
    raise RuntimeError("interrupted")
