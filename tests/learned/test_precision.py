"""Half precision, loss scaling and GPUs against float32 on the processor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from expert_merging.errors import InputError
from expert_merging.learned.coefficients import load_coefficients
from expert_merging.learned.trainer import Trainer
from tests.command import forget_accelerate
from tests.learned.training import make_trainer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.slow
def test_bfloat16_training_tracks_float32_training(answered_zoo, tmp_path):
    full = make_trainer(answered_zoo, tmp_path / "full", learning_rate=0.1).train()
    forget_accelerate()
    half = make_trainer(answered_zoo, tmp_path / "half", learning_rate=0.1, mixed_precision="bf16").train()
    change = torch.cat([(full.values[name] - 0.3).flatten() for name in full.values])
    change_half = torch.cat([(half.values[name] - 0.3).flatten() for name in full.values])
    assert torch.nn.functional.cosine_similarity(change, change_half, dim=0) > 0.95
    assert all(value.dtype == torch.float32 for value in half.values.values())


@pytest.mark.slow
def test_float16_training_with_loss_scaling_tracks_float32_training(answered_zoo, tmp_path):
    """Weights, activations and their gradients in float16, as on a V100; coefficients and theirs in float32."""
    full = make_trainer(answered_zoo, tmp_path / "full", learning_rate=0.1).train()
    forget_accelerate()
    trainer = make_trainer(answered_zoo, tmp_path / "half", learning_rate=0.1)
    trainer.settings = replace(trainer.settings, asked=replace(trainer.settings.asked, precision="fp16"))
    scale_losses(trainer, 2.0**10)
    half = trainer.train()
    assert {parameter.dtype for parameter in trainer.live.model.parameters()} == {torch.float16}
    assert trainer.live.gradient.dtype == torch.float32
    change = torch.cat([(full.values[name] - 0.3).flatten() for name in full.values])
    change_half = torch.cat([(half.values[name] - 0.3).flatten() for name in full.values])
    assert torch.nn.functional.cosine_similarity(change, change_half, dim=0) > 0.99


@needs_gpu
@pytest.mark.parametrize("weight_gradients", ["sample", "update"])
@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_a_gpu_learns_what_the_processor_learns(place, weight_gradients, answered_zoo, tmp_path):
    usual = make_trainer(answered_zoo, tmp_path / "a", learning_rate=0.1).train()
    forget_accelerate()
    options = {"learning_rate": 0.1, "task_vectors": place, "weight_gradients": weight_gradients}
    trainer = make_trainer(answered_zoo, tmp_path / "b", device="cuda", **options)
    coefficients = trainer.train()
    assert {parameter.device.type for parameter in trainer.live.model.parameters()} == {"cuda"}
    assert set(trainer.gather().task_vectors.places.values()) == {place}
    for name, values in usual.values.items():
        # Adam's first steps are as long whatever a gradient's size, so the rounding of small ones shows.
        torch.testing.assert_close(coefficients.values[name], values, rtol=0, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_half_precision_on_a_gpu_tracks_float32_on_the_processor(precision, checkpointing, answered_zoo, tmp_path):
    full = make_trainer(answered_zoo, tmp_path / "full", learning_rate=0.1).train()
    forget_accelerate()
    options = {"learning_rate": 0.1, "mixed_precision": precision, "gradient_checkpointing": checkpointing}
    half = make_trainer(answered_zoo, tmp_path / "half", device="cuda", **options).train()
    change = torch.cat([(full.values[name] - 0.3).flatten() for name in full.values])
    change_half = torch.cat([(half.values[name] - 0.3).flatten() for name in full.values])
    assert torch.nn.functional.cosine_similarity(change, change_half, dim=0) > 0.95


def test_small_gradients_survive_float16(answered_zoo, tmp_path):
    """What is divided by many tokens and improbable words would vanish in float16 before the scaler could help."""
    from expert_merging.running.losses import logit_alignment

    torch.manual_seed(0)
    head = torch.nn.Linear(64, 50_000, bias=False).requires_grad_(False)
    hidden = torch.randn(40, 64)
    expert = hidden + 1e-3 * torch.randn(40, 64)
    gradients = {}
    for dtype in (torch.float64, torch.float16):
        states = hidden.to(torch.float16).to(dtype).requires_grad_(True)
        loss = logit_alignment(
            expert.to(torch.float16).to(dtype), states, head.to(dtype), head.to(dtype), temperature=1.0, slice_tokens=16
        )
        (loss * 2.0**16).backward()
        gradients[dtype] = states.grad.double().flatten()
    assert torch.nn.functional.cosine_similarity(*gradients.values(), dim=0) > 0.99


def scale_losses(trainer: Trainer, scale: float) -> torch.amp.GradScaler:
    """Give the trainer what accelerate sets up for fp16, which it refuses to do on a CPU."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.accelerator.native_amp = True
    trainer.accelerator.state._mixed_precision = "fp16"
    return trainer.accelerator.scaler


def test_half_precision_overflow_is_skipped_and_counted(answered_zoo, tmp_path):
    """A scaler like the one accelerate uses for fp16 skips an update whose gradient is not finite."""
    trainer = make_trainer(answered_zoo, tmp_path, samples_per_task=1, num_epochs=2, log_with="tensorboard")
    scaler = scale_losses(trainer, 4.0)
    original = Trainer._collect

    def overflow_first(self, group, advance):
        sums = original(self, group, advance)
        if self.state.skipped == 0:
            self.live.gradient.fill_(float("inf"))
        return sums

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_collect", overflow_first)
        trainer.train()
    assert trainer.state.skipped == 1
    assert trainer.state.updates == 2
    assert scaler.get_scale() == 2.0
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("skipped_updates")] == [(1, 1.0), (2, 1.0)]
    # The samples of the skipped attempt are not lost: they come again with the smaller scale.
    forget_accelerate()
    plain = make_trainer(answered_zoo, tmp_path / "plain", samples_per_task=1, num_epochs=2).train()
    for name, value in load_coefficients(tmp_path).values.items():
        torch.testing.assert_close(value, plain.values[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_loss_scaling_does_not_change_the_result(answered_zoo, tmp_path):
    plain = make_trainer(answered_zoo, tmp_path / "plain").train()
    trainer = make_trainer(answered_zoo, tmp_path / "scaled")
    scale_losses(trainer, 1024.0)
    scaled = trainer.train()
    for name in plain.values:
        torch.testing.assert_close(plain.values[name], scaled.values[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_overflow_at_every_loss_scale_ends_training(answered_zoo, tmp_path, monkeypatch):
    trainer = make_trainer(answered_zoo, tmp_path, samples_per_task=1)
    scale_losses(trainer, 4.0)
    collect = Trainer._collect

    def overflow(self, group, advance):
        sums = collect(self, group, advance)
        self.live.gradient.fill_(float("inf"))
        return sums

    monkeypatch.setattr(Trainer, "_collect", overflow)
    with pytest.raises(InputError, match="float16 overflows at every loss scale"):
        trainer.train()
