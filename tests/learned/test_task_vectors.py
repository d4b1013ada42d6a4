"""Where task vectors are and how gradients add up: memory for time, never another result."""

from __future__ import annotations

import pytest
import torch

from expert_merging.errors import InputError
from tests.checkpoints import BASE, EXPERTS, save_model, write_tasks
from tests.learned.training import make_trainer


@pytest.fixture(scope="module")
def usual(answered_zoo, tmp_path_factory):
    """Coefficients that are learned where there is memory enough."""
    return make_trainer(answered_zoo, tmp_path_factory.mktemp("usual")).train()


@pytest.mark.parametrize("weight_gradients", ["sample", "update"])
@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_task_vectors_give_the_same_coefficients_wherever_they_are(
    place, weight_gradients, usual, answered_zoo, tmp_path
):
    trainer = make_trainer(answered_zoo, tmp_path / "b", task_vectors=place, weight_gradients=weight_gradients)
    coefficients = trainer.train()
    assert set(trainer.gather().task_vectors.places.values()) == {place}
    assert trainer.live.accumulates == (weight_gradients == "update")
    for name, values in usual.values.items():
        torch.testing.assert_close(values, coefficients.values[name], rtol=0, atol=1e-6)


def test_task_vectors_that_do_not_fit_on_the_device_are_refused(answered_zoo, tmp_path, monkeypatch):
    monkeypatch.setattr("expert_merging.learned.memory.free_host_memory", lambda: 100)
    trainer = make_trainer(answered_zoo, tmp_path, task_vectors="device")
    with pytest.raises(
        InputError, match=r"--task_vectors device needs 0\.4 MiB, and cpu has 0\.0 MiB to spare; use auto, h"
    ):
        trainer.train()


def test_task_vectors_that_do_not_fit_in_host_memory_are_refused(answered_zoo, tmp_path, monkeypatch):
    monkeypatch.setattr("expert_merging.learned.memory.free_host_memory", lambda: 100)
    trainer = make_trainer(answered_zoo, tmp_path, task_vectors="host")
    problem = (
        r"--task_vectors host needs 0\.4 MiB for each process, and host memory has 0\.0 MiB for each of those on this"
    )
    with pytest.raises(InputError, match=problem):
        trainer.train()


def test_without_memory_to_spare_everything_is_read_from_the_files(usual, answered_zoo, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("expert_merging.learned.memory.free_host_memory", lambda: 0)
    caplog.set_level("INFO")
    frugal = make_trainer(answered_zoo, tmp_path / "b").train()
    assert "0.4 MiB read from the files when needed" in caplog.text
    assert "weight gradients are used once per sample" in caplog.text
    for name, values in usual.values.items():
        torch.testing.assert_close(values, frugal.values[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_options_that_save_memory_do_not_change_the_result(tiny_zoo, tmp_path):
    """Also where the model has dropout, which must stay off while layers are computed again."""
    save_model(tmp_path / BASE, 0, attention_dropout=0.5)
    for folder in EXPERTS.values():
        (tmp_path / folder).symlink_to(tiny_zoo / folder)
    write_tasks(tmp_path / "dataset", responses=dict.fromkeys(EXPERTS, "abc"))
    usual = make_trainer(tmp_path, tmp_path / "a").train()
    trainer = make_trainer(tmp_path, tmp_path / "b", gradient_checkpointing=True, logits_chunk_tokens=3)
    frugal = trainer.train()
    layers = trainer.live.model.model.layers
    assert all(layer.training and not layer.self_attn.training for layer in layers)
    for name, values in usual.values.items():
        torch.testing.assert_close(values, frugal.values[name], rtol=1e-4, atol=1e-5)
