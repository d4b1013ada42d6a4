"""The trainer against its plain twin, and what users rely on while it runs."""

from __future__ import annotations

import gc
import json
import pickle
import re
import shutil
import signal
import subprocess
import sys
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from expert_merging.cli import main
from expert_merging.errors import InputError
from expert_merging.learned import Context, stages
from expert_merging.learned.coefficients import load_coefficients
from expert_merging.learned.live import LiveModel
from expert_merging.learned.objectives import alignment_losses
from expert_merging.learned.options import LearningOptions
from expert_merging.learned.settings import check
from expert_merging.learned.state import TrainingState
from expert_merging.learned.trainer import Trainer, epoch_order
from expert_merging.plan import make_plan
from expert_merging.run import Run
from Mistral.backbone import BACKBONE
from tests.checkpoints import BASE, EXPERTS, perturb, save_model, tensors_of, write_checkpoint, write_tasks
from tests.learned.twin import Example, Twin

EXCLUDED = list(BACKBONE.exclude_params)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@contextmanager
def no_progress(title, total, unit):
    yield lambda count, note="": None


def make_trainer(
    cache: Path, folder: Path, *, exclude=EXCLUDED, experts=tuple(EXPERTS), log_with="none", device="cpu", **options
):
    plan = make_plan(cache / BASE, {name: cache / EXPERTS[name] for name in experts}, exclude)
    run = Run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    context = Context(BACKBONE, run, 3, device, log_with, no_progress)
    settings = check(
        plan, context, LearningOptions(**{"data_dir": str(cache / "dataset"), "max_new_tokens": 8, **options})
    )
    return Trainer(plan, context, settings)


def make_twin(trainer: Trainer, **options) -> tuple[Twin, list[Example]]:
    plan, settings = trainer.plan, trainer.settings
    twin = Twin(
        base=plan.base.folder,
        experts={name: checkpoint.folder for name, checkpoint in plan.experts.items()},
        merged=list(plan.merged),
        initial=list(settings.initial),
        layers=list(settings.objective.layers),
        **options,
    )
    answers = json.loads(trainer.context.run.responses.read_text()) if trainer.context.run.responses.exists() else {}
    examples = [
        Example(
            sample.expert,
            sample.task,
            sample.question,
            sample.response or answers[f"{sample.task}/{sample.identity}/{sample.question}"]["response"],
        )
        for sample in settings.samples
    ]
    return twin, examples


VARIANTS = {
    "published": ({"sparsity_reg_weight": 0.8}, {"regularisation": 0.8}),
    "temperature": ({"temperature": 2.5, "sparsity_reg_weight": 0.0}, {"temperature": 2.5}),
    "response tokens": ({"loss_tokens": "response", "sparsity_reg_weight": 0.0}, {"response_only": True}),
    "no logits": (
        {"logits_weight": 0.0, "hidden_states_layers": "all", "sparsity_reg_weight": 0.1},
        {"logits_weight": 0.0, "regularisation": 0.1},
    ),
    "no hidden states": ({"hidden_states_layers": "none", "sparsity_reg_weight": 0.0}, {}),
    "several layers": (
        {"hidden_states_layers": [0, 2, 3], "hidden_states_weight": 2.0},
        {"hidden_weight": 2.0, "regularisation": 0.8},
    ),
    "task weights": (
        {"loss_alphas": {"Math": 2.5, "Code": 0.0}},
        {"task_weights": {"Math": 2.5, "Code": 0.0}, "regularisation": 0.8},
    ),
    "scaled task vectors": (
        {"task_vector_coeffs_dict": {"Chat": 0.5}},
        {"scale": [0.5, 1.0, 1.0], "regularisation": 0.8},
    ),
    "initial per expert": ({"scaling_coefficient": [0.1, 0.3, 0.8]}, {"regularisation": 0.8}),
    "other accumulation": (
        {"gradient_accumulation_steps": 4, "num_epochs": 2, "learning_rate": 0.1},
        {"accumulation": 4, "learning_rate": 0.1, "regularisation": 0.8},
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_training_gives_the_coefficients_of_the_plain_twin(name, answered_zoo, tmp_path):
    options, twin_options = VARIANTS[name]
    trainer = make_trainer(answered_zoo, tmp_path, **options)
    coefficients = trainer.train()
    twin, examples = make_twin(trainer, **twin_options)
    twin.train(examples, options.get("num_epochs", 1), seed=3)
    for parameter, values in coefficients.values.items():
        torch.testing.assert_close(values, twin.coefficients(parameter).detach(), rtol=1e-4, atol=2e-5)


def test_chunks_and_fixed_parameters_train_like_the_twin(answered_zoo, tmp_path):
    sizes = {"*mlp*": 3, "*q_proj*": 5, "*layers.0*": 0}
    trainer = make_trainer(answered_zoo, tmp_path, coeffs_size_dict=sizes, sparsity_reg_weight=0.0)
    coefficients = trainer.train()
    chunks = dict(trainer.settings.chunks)
    assert {0, 1, 3, 5} == set(chunks.values())
    twin, examples = make_twin(trainer, chunks=chunks)
    twin.train(examples, 1, seed=3)
    for parameter, values in coefficients.values.items():
        torch.testing.assert_close(values, twin.coefficients(parameter).detach(), rtol=1e-4, atol=2e-5)
    assert set(coefficients.fixed) == {name for name in chunks if ".layers.0." in name}


def prepared(trainer: Trainer):
    """The live model and the targets of a trainer, as `train` makes them."""
    material = trainer.gather()
    trainer.vector = trainer.settings.make_vector(torch.device("cpu"))
    trainer.live = LiveModel(material.model, material.task_vectors, trainer.vector, lambda name: name)
    trainer.live.rebuild()
    return material.targets


def twin_gradients(twin: Twin, group: list[Example]) -> torch.Tensor:
    """The twin's gradient with respect to coefficients (not raw ones), laid out like the trainer's."""
    gradients = twin.update(group)
    return torch.cat([(gradients[name] / (start * (1 - start))).flatten() for name, start in twin.start.items()])


def test_losses_and_gradients_equal_the_twins(answered_zoo, tmp_path):
    trainer = make_trainer(answered_zoo, tmp_path)
    targets = prepared(trainer)
    twin, examples = make_twin(trainer)
    for target, example in zip(targets, examples, strict=True):
        ours = trainer.settings.objective.losses(trainer.live.model, target)
        theirs = twin.losses(example)
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-5, atol=1e-7)
        (sum(ours) / 8).backward()
    expected = twin_gradients(twin, examples)
    torch.testing.assert_close(trainer.live.gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tied", [False, True])
def test_head_and_embeddings_train_exactly_also_where_they_share_a_weight(tied, tmp_path):
    """A weight that is used twice gets the sum of both uses' gradients, once."""
    save_model(tmp_path / BASE, 5, tie_word_embeddings=tied)
    for number, folder in enumerate(EXPERTS.values()):
        perturb(tmp_path / BASE, tmp_path / folder, 6 + number)
    write_tasks(tmp_path / "dataset", responses=dict.fromkeys(EXPERTS, "abc"))
    trainer = make_trainer(tmp_path, tmp_path / "run", exclude=[])
    targets = prepared(trainer)
    assert any("embed_tokens" in name for name in trainer.plan.merged)
    twin, examples = make_twin(trainer)
    trainer._collect(targets, lambda *_: None)
    torch.testing.assert_close(trainer.live.gradient, twin_gradients(twin, examples), rtol=1e-3, atol=1e-6)


def test_gradient_is_the_same_with_gradient_checkpointing(answered_zoo, tmp_path):
    trainer = make_trainer(answered_zoo, tmp_path)
    targets = prepared(trainer)
    trainer._collect(targets, lambda *_: None)
    plain = trainer.live.gradient.clone()
    model = trainer.live.model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    for reentrant in (False, True):
        trainer.live.rebuild()
        enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        trainer._collect(targets, lambda *_: None)
        torch.testing.assert_close(trainer.live.gradient, plain, rtol=1e-5, atol=1e-8)


def test_sliced_logits_give_the_same_gradient(answered_zoo, tmp_path, monkeypatch):
    trainer = make_trainer(answered_zoo, tmp_path)
    targets = prepared(trainer)
    trainer._collect(targets, lambda *_: None)
    whole = trainer.live.gradient.clone()
    monkeypatch.setattr("expert_merging.learned.objectives._SLICE_BYTES", 4 * 4 * 80)  # four tokens of this vocabulary
    trainer.live.rebuild()
    trainer._collect(targets, lambda *_: None)
    torch.testing.assert_close(trainer.live.gradient, whole, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("rank_batches", ["sample", "update"])
@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_task_vectors_give_the_same_coefficients_wherever_they_are(place, rank_batches, answered_zoo, tmp_path):
    usual = make_trainer(answered_zoo, tmp_path / "a").train()
    trainer = make_trainer(answered_zoo, tmp_path / "b", task_vectors=place, rank_batches=rank_batches)
    coefficients = trainer.train()
    assert set(trainer.gather().task_vectors.places.values()) == {place}
    assert trainer.live.accumulates == (rank_batches == "update")
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


def test_without_memory_to_spare_everything_is_read_from_the_files(answered_zoo, tmp_path, monkeypatch, caplog):
    usual = make_trainer(answered_zoo, tmp_path / "a").train()
    monkeypatch.setattr("expert_merging.learned.memory.free_host_memory", lambda: 0)
    caplog.set_level("INFO")
    frugal = make_trainer(answered_zoo, tmp_path / "b").train()
    assert "0.4 MiB read from the files when needed" in caplog.text
    assert "weight gradients are used once per sample" in caplog.text
    for name, values in usual.values.items():
        torch.testing.assert_close(values, frugal.values[name], rtol=0, atol=1e-6)


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


def test_a_model_without_gradient_checkpointing_is_refused(answered_zoo, tmp_path, monkeypatch):
    from transformers import MistralForCausalLM

    def refuse(*_args, **_keywords):
        raise ValueError("MistralForCausalLM is not compatible with gradient checkpointing.")

    monkeypatch.setattr(MistralForCausalLM, "_set_gradient_checkpointing", refuse)
    trainer = make_trainer(answered_zoo, tmp_path, gradient_checkpointing=True)
    with pytest.raises(InputError, match="--gradient_checkpointing: MistralForCausalLM is not compatible"):
        trainer.train()


def test_weight_gradients_are_freed_as_they_come(answered_zoo, tmp_path):
    trainer = make_trainer(answered_zoo, tmp_path)
    targets = prepared(trainer)
    trainer._collect(targets[:1], lambda *_: None)
    assert all(parameter.grad is None for parameter in trainer.live.model.parameters())


def test_strong_regularisation_keeps_task_arithmetic(answered_zoo, tmp_path):
    free = make_trainer(answered_zoo, tmp_path / "free", learning_rate=0.05, sparsity_reg_weight=0.0).train()
    held = make_trainer(answered_zoo, tmp_path / "held", learning_rate=0.05, sparsity_reg_weight=1e4).train()
    distance = {
        kind: max(float((value - 0.3).abs().max()) for value in result.values.values())
        for kind, result in {"free": free, "held": held}.items()
    }
    assert distance["held"] < distance["free"]


def test_a_single_expert_is_recovered(tiny_zoo, tmp_path):
    """With one expert and no regulariser, the best coefficients are 1."""
    (tmp_path / BASE).symlink_to(tiny_zoo / BASE)
    perturb(tiny_zoo / BASE, tmp_path / EXPERTS["Math"], 3, change=0.002)
    write_tasks(tmp_path / "dataset", responses={"Math": "42"})
    options = {"num_epochs": 60, "sparsity_reg_weight": 0.0, "gradient_accumulation_steps": 5, "learning_rate": 0.2}
    trainer = make_trainer(tmp_path, tmp_path / "run", experts=("Math",), **options)
    means = torch.stack([value.mean() for value in trainer.train().values.values()])
    assert means.mean() > 0.8


def test_a_task_weight_moves_the_balance(answered_zoo, tmp_path):
    """What a task weighs more, the merged model matches better."""
    distances = []
    for weight in (0.2, 5.0):
        trainer = make_trainer(answered_zoo, tmp_path / str(weight), loss_alphas={"Math": weight}, num_epochs=4)
        trainer.train()
        targets = [target for target in trainer._make_targets(torch.device("cpu")) if target.sample.task == "Math"]
        trainer.live.rebuild()
        with torch.no_grad():
            distances.append(sum(float(alignment_losses(trainer.live.model, target, (), 1.0)[0]) for target in targets))
    assert distances[1] < distances[0]


def test_bfloat16_training_tracks_float32_training(answered_zoo, tmp_path):
    full = make_trainer(answered_zoo, tmp_path / "full", learning_rate=0.1).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    half = make_trainer(answered_zoo, tmp_path / "half", learning_rate=0.1, mixed_precision="bf16").train()
    change = torch.cat([(full.values[name] - 0.3).flatten() for name in full.values])
    change_half = torch.cat([(half.values[name] - 0.3).flatten() for name in full.values])
    assert torch.nn.functional.cosine_similarity(change, change_half, dim=0) > 0.95
    assert all(value.dtype == torch.float32 for value in half.values.values())


def test_float16_training_with_loss_scaling_tracks_float32_training(answered_zoo, tmp_path):
    """Weights, activations and their gradients in float16, as on a V100; coefficients and theirs in float32."""
    full = make_trainer(answered_zoo, tmp_path / "full", learning_rate=0.1).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = make_trainer(answered_zoo, tmp_path / "half", learning_rate=0.1)
    trainer.settings = replace(trainer.settings, precision="fp16")
    scale_losses(trainer, 2.0**10)
    half = trainer.train()
    assert {parameter.dtype for parameter in trainer.live.model.parameters()} == {torch.float16}
    assert trainer.live.gradient.dtype == torch.float32
    change = torch.cat([(full.values[name] - 0.3).flatten() for name in full.values])
    change_half = torch.cat([(half.values[name] - 0.3).flatten() for name in full.values])
    assert torch.nn.functional.cosine_similarity(change, change_half, dim=0) > 0.99


@needs_gpu
@pytest.mark.parametrize("rank_batches", ["sample", "update"])
@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_a_gpu_learns_what_the_processor_learns(place, rank_batches, answered_zoo, tmp_path):
    usual = make_trainer(answered_zoo, tmp_path / "a", learning_rate=0.1).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {"learning_rate": 0.1, "task_vectors": place, "rank_batches": rank_batches}
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
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {"learning_rate": 0.1, "mixed_precision": precision, "gradient_checkpointing": checkpointing}
    half = make_trainer(answered_zoo, tmp_path / "half", device="cuda", **options).train()
    change = torch.cat([(full.values[name] - 0.3).flatten() for name in full.values])
    change_half = torch.cat([(half.values[name] - 0.3).flatten() for name in full.values])
    assert torch.nn.functional.cosine_similarity(change, change_half, dim=0) > 0.95


def test_small_gradients_survive_float16(answered_zoo, tmp_path):
    """What is divided by many tokens and improbable words would vanish in float16 before the scaler could help."""
    from expert_merging.learned.losses import logit_alignment

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


def test_experts_write_missing_responses_once(tiny_zoo, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_zoo, tmp_path, samples_per_task=2)
    first = trainer._make_targets(torch.device("cpu"))
    written = json.loads(trainer.context.run.responses.read_text())
    assert len(written) == 6

    def refuse(*_):
        raise AssertionError("a kept response must not be written again")

    monkeypatch.setattr("expert_merging.learned.targets.generate", refuse)
    second = trainer._make_targets(torch.device("cpu"))
    assert [target.sample for target in first] == [target.sample for target in second]


def answering(monkeypatch, *tokens):
    """Let the experts answer with these tokens."""
    monkeypatch.setattr("expert_merging.learned.targets.generate", lambda *_: ("text", list(tokens)))


def test_an_expert_is_matched_on_the_tokens_that_it_wrote(tiny_zoo, tmp_path, monkeypatch):
    """With its end token if it came to one, without if it was cut off; tokens that the base lacks end the answer."""
    for written, kept in {(5, 6, 1): [5, 6, 1], (5, 6): [5, 6], (5, 6, 80, 7): [5, 6]}.items():
        answering(monkeypatch, *written)
        trainer = make_trainer(tiny_zoo, tmp_path / str(written), samples_per_task=1)
        for target in trainer._make_targets(torch.device("cpu")):
            prompt = len(target.sample.question) + 1
            assert target.inputs["input_ids"][0, prompt:].tolist() == kept


def test_an_empty_answer_is_refused_with_its_sample(tiny_zoo, tmp_path, monkeypatch):
    answering(monkeypatch)
    trainer = make_trainer(tiny_zoo, tmp_path)
    with pytest.raises(
        InputError, match=r"Chat\.json, entry 0 \(counted from 0\): expert Chat answered with nothing; "
    ):
        trainer.train()


def test_a_sample_longer_than_the_models_context_is_refused_before_any_expert_is_asked(tiny_zoo, tmp_path):
    folder = tmp_path / "dataset"
    write_tasks(folder, count=8, responses={"Math": "4" * 200})
    for count, places in ((8, "entries 0, 1, 2, 3, 4 and 3 more"), (5, "entries 0, 1, 2, 3, 4"), (1, "entry 0")):
        with pytest.raises(InputError) as caught:
            make_trainer(tiny_zoo, tmp_path / "run", data_dir=str(folder), samples_per_task=count)
        (problem,) = caught.value.problems
        up_to, samples = ("", "sample") if count == 1 else ("up to ", "samples")
        assert problem == (
            f"{folder / 'Math.json'}, {places} (counted from 0): prompt and response have {up_to}218 tokens and the "
            f"model takes at most 128; shorten the {samples}"
        )


def test_an_answer_longer_than_the_models_context_is_refused(tiny_zoo, tmp_path, monkeypatch):
    answering(monkeypatch, *[5] * 200)
    told = r"entry 0 \(counted from 0\): .* have 2\d\d tokens .* 128; shorten the sample or lower --max_new_tokens$"
    with pytest.raises(InputError, match=told):
        make_trainer(tiny_zoo, tmp_path).train()


def test_a_nan_in_an_expert_is_found_before_it_is_asked(tiny_zoo, tmp_path):
    for folder in (BASE, EXPERTS["Chat"], EXPERTS["Code"]):
        (tmp_path / folder).symlink_to(tiny_zoo / folder)
    perturb(tiny_zoo / BASE, tmp_path / EXPERTS["Math"], 3, change=float("nan"))
    trainer = make_trainer(tmp_path, tmp_path / "run", data_dir=str(tiny_zoo / "dataset"))
    torch.set_num_threads(2)
    with pytest.raises(InputError, match=r"expert Math has \d+ NaN or infinite values in model\.layers"):
        trainer.train()
    assert not list((tmp_path / "run").iterdir())
    assert torch.get_num_threads() == 2, "an error must not leave the caller with one thread"
    torch.set_num_threads(1)


def test_a_loss_that_is_not_a_number_ends_training(answered_zoo, tmp_path, monkeypatch):
    trainer = make_trainer(answered_zoo, tmp_path)
    collect = Trainer._collect
    monkeypatch.setattr(Trainer, "_collect", lambda *arguments: collect(*arguments) * float("nan"))
    with pytest.raises(InputError, match="the loss is not a number after 0 updates; lower --learning_rate"):
        trainer.train()
    assert not trainer.context.run.coefficients.exists()


def test_the_model_is_freed_after_training(answered_zoo, tmp_path):
    trainer = make_trainer(answered_zoo, tmp_path)
    trainer.train()
    model = weakref.ref(trainer.live.model)
    del trainer
    gc.collect()
    assert model() is None


def test_the_best_threads_for_a_small_model_are_used_and_put_back(answered_zoo, tmp_path, monkeypatch):
    trainer = make_trainer(answered_zoo, tmp_path)
    seen = []
    monkeypatch.setattr(trainer, "_learn", lambda targets: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    trainer.train()
    assert (seen, torch.get_num_threads()) == ([1], 2)
    torch.set_num_threads(1)


@pytest.mark.parametrize("damage", ["optimizer.bin", "coefficients.safetensors", "training.json", "version", "custom"])
def test_a_damaged_state_is_passed_over(damage, answered_zoo, tmp_path):
    """Training starts again; and what a state's files hold is never executed."""
    whole = make_trainer(answered_zoo, tmp_path / "whole", num_epochs=2).train()
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
    else:
        (state / damage).write_bytes(b"")
    again = make_trainer(answered_zoo, tmp_path / "run", num_epochs=2).train()
    assert all(torch.equal(again.values[name], whole.values[name]) for name in whole.values)
    assert not (tmp_path / "executed").exists()


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_every_expert_comes_equally_often_in_an_order_of_the_seed():
    experts = ["a", "a", "a", "b", "c", "c"]
    order = epoch_order(experts, seed=1, epoch=0)
    assert sorted(experts[index] for index in order) == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    assert set(order) == set(range(6))
    assert order == epoch_order(experts, seed=1, epoch=0)
    assert order != epoch_order(experts, seed=1, epoch=1)
    assert order != epoch_order(experts, seed=2, epoch=0)


def test_training_stops_after_three_epochs_without_a_better_mean_loss(answered_zoo, tmp_path, monkeypatch):
    trainer = make_trainer(answered_zoo, tmp_path, num_epochs=50, samples_per_task=1, learning_rate=1e-12)
    updates = []
    monkeypatch.setattr(TrainingState, "end_epoch", _never_better(updates))
    trainer.train()
    assert len(updates) == 3


def _never_better(calls):
    def end_epoch(state):
        calls.append(state.updates)
        state.epochs_without_better += 1

    return end_epoch


def test_epoch_means_decide_what_is_better():
    state = TrainingState()
    for mean, waiting in ((2.0, 0), (2.5, 1), (1.0, 0), (1.0, 1)):
        for loss, samples in ((mean - 0.3, 4), (mean + 0.6, 2)):
            state.add({"total": loss}, samples)
        state.end_epoch()
        assert state.epochs_without_better == waiting


def test_tensorboard_has_curves_per_task_and_a_picture(answered_zoo, tmp_path):
    trainer = make_trainer(answered_zoo, tmp_path, log_with="tensorboard", num_epochs=2)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"loss/total", "loss/logits", "loss/hidden_states", "loss/regularisation", "learning_rate"} <= scalars
    assert {f"task_logits/{task}" for task in EXPERTS} <= scalars
    assert {f"coefficient_{kind}/{expert}" for kind in ("mean", "spread") for expert in EXPERTS} <= scalars
    assert [point.step for point in events.Scalars("loss/total")] == [1, 2, 3, 4]
    assert events.Tags()["images"]
    assert {"importance", "submodules", "depth", "coefficients", "chunks"} == set(events.Tags()["images"])
    assert all((tmp_path / "analysis" / f"{name}.png").stat().st_size > 1000 for name in events.Tags()["images"])


def test_the_log_has_the_curves_means_of_every_epoch(answered_zoo, tmp_path):
    common = ["--cache_dir", str(answered_zoo), "--data_dir", str(answered_zoo / "dataset"), "--device", "cpu"]
    assert main(BACKBONE, [*common, "--num_epochs", "2", "--output_path", str(tmp_path), "--run_name", "r"]) == 0
    run = Run(tmp_path / "expert_merging" / "r")
    events = EventAccumulator(str(run.board))
    events.Reload()
    lines = [line for line in run.log.read_text().splitlines() if "mean loss" in line]
    for epoch, line in enumerate(lines, 1):
        shown = re.search(rf"epoch {epoch} of 2: mean losses: (.*) \((.*)\); mean (coefficient \S+)$", line)
        assert shown
        numbers = dict(part.split() for part in [shown[1], *shown[2].split(", "), shown[3]])
        for name in ("total", "logits", "hidden_states", "regularisation"):
            first, second = [point.value for point in events.Scalars(f"loss/{name}")][2 * epoch - 2 : 2 * epoch]
            mean = (8 * first + 7 * second) / 15  # samples of the two updates
            assert float(numbers[name]) == pytest.approx(mean, rel=1e-3), name
        means = [events.Scalars(f"coefficient_mean/{expert}")[2 * epoch - 1].value for expert in EXPERTS]
        assert float(numbers["coefficient"]) == pytest.approx(sum(means) / 3, rel=1e-3)
    assert len(lines) == 2


def test_files_of_a_finished_training(answered_zoo, tmp_path):
    trainer = make_trainer(answered_zoo, tmp_path, coeffs_size_dict={"*q_proj*": 2})
    coefficients = trainer.train()
    published = json.loads((tmp_path / "weight_coeffs.json").read_text())
    assert set(published) == {name.replace(".", "_") for name in trainer.plan.merged}
    assert torch.tensor(published["model_layers_0_self_attn_q_proj_weight"]).shape == (3, 2)
    assert torch.tensor(published["model_layers_0_self_attn_k_proj_weight"]).shape == (3,)
    loaded = load_coefficients(tmp_path)
    assert loaded.experts == tuple(EXPERTS)
    assert all(torch.equal(loaded.values[name], coefficients.values[name]) for name in coefficients.values)
    assert not (tmp_path / "state").exists()


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
    AcceleratorState._reset_state(reset_partial_state=True)
    plain = make_trainer(answered_zoo, tmp_path / "plain", samples_per_task=1, num_epochs=2).train()
    for name, value in load_coefficients(tmp_path).values.items():
        torch.testing.assert_close(value, plain.values[name], rtol=1e-5, atol=1e-6)


def test_loss_scaling_does_not_change_the_result(answered_zoo, tmp_path):
    plain = make_trainer(answered_zoo, tmp_path / "plain").train()
    trainer = make_trainer(answered_zoo, tmp_path / "scaled")
    scale_losses(trainer, 1024.0)
    scaled = trainer.train()
    for name in plain.values:
        torch.testing.assert_close(plain.values[name], scaled.values[name], rtol=1e-5, atol=1e-6)


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from expert_merging.cli import main
from expert_merging.learned.trainer import Trainer
from Mistral.backbone import BACKBONE
save = Trainer._save_state
def die_after(self):
    if self.state.updates == {updates} and {inside}:
        self.accelerator.save_state = lambda folder: (os.mkdir(folder), os.kill(os.getpid(), signal.SIGKILL))
    save(self)
    if self.state.updates == {updates}:
        os.kill(os.getpid(), signal.SIGKILL)
Trainer._save_state = die_after
sys.exit(main(BACKBONE, {arguments!r}))
"""


@pytest.mark.parametrize("method", ["expert_merging", "expert_merging++"])
def test_two_processes_learn_what_one_learns(method, tiny_zoo, tmp_path):
    """Uneven groups: 15 samples in groups of 8 and 7 for two processes; the drawn seed is shared."""
    arguments = ["--method", method, "--cache_dir", str(tiny_zoo), "--data_dir", str(tiny_zoo / "dataset")]
    arguments += ["--max_new_tokens", "6", "--run_name", "r", "--device", "cpu", "--output_path"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(Path(__file__).parents[2] / "Mistral" / "model_merging.py")
    done = subprocess.run(
        [*command, script, *arguments, str(tmp_path / "two"), "--seed", "-1"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "in 2 processes" in done.stdout
    two = tmp_path / "two" / method / "r"
    seed = json.loads((two / "config.json").read_text())["seed"]
    assert main(BACKBONE, [*arguments, str(tmp_path / "one"), "--seed", str(seed)]) == 0
    one = load_coefficients(tmp_path / "one" / method / "r")
    for name, value in load_coefficients(two).values.items():
        # Sums in another order, which up to two stages of updates magnify more with some seeds than with others.
        torch.testing.assert_close(value, one.values[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("inside", [False, True], ids=["after saving", "while saving"])
def test_killed_training_continues_to_the_same_coefficients(inside, tiny_zoo, tmp_path):
    root = str(Path(__file__).parents[2])

    def arguments(output):
        return [
            "--cache_dir",
            str(tiny_zoo),
            "--data_dir",
            str(tiny_zoo / "dataset"),
            "--output_path",
            str(tmp_path / output),
            "--num_epochs",
            "3",
            "--max_new_tokens",
            "6",
            "--run_name",
            "r",
            "--method",
            "expert_merging",
            "--device",
            "cpu",
        ]

    from expert_merging.cli import main

    assert main(BACKBONE, arguments("whole")) == 0
    script = KILLED.format(root=root, updates=3, inside=inside, arguments=arguments("killed"))
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -signal.SIGKILL
    killed = tmp_path / "killed" / "expert_merging" / "r"
    assert not (killed / "model").exists()
    assert (killed / "state").is_dir()
    assert main(BACKBONE, arguments("killed")) == 0
    whole = tmp_path / "whole" / "expert_merging" / "r"
    assert "continuing after update" in (killed / "merge.log").read_text()
    for name in ("coefficients.safetensors", "weight_coeffs.json", "model/model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_learning_is_not_repeated_when_only_merging_was_killed(answered_zoo, tmp_path, monkeypatch):
    from expert_merging.cli import main

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
    monkeypatch.setattr("expert_merging.merge.write_merged", _interrupted)
    with pytest.raises(RuntimeError, match="interrupted"):
        main(BACKBONE, arguments)
    monkeypatch.undo()
    monkeypatch.setattr(stages.Trainer, "train", None)
    assert main(BACKBONE, arguments) == 0


def _interrupted(*_args, **_keywords):
    raise RuntimeError("interrupted")


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


def test_what_is_merged_must_be_parameters_of_the_model(answered_zoo, tmp_path, monkeypatch):
    names = BACKBONE.parameter_names
    monkeypatch.setattr(
        "tests.learned.test_trainer.BACKBONE",
        replace(BACKBONE, parameter_names=lambda folder: [name.replace("q_proj", "query") for name in names(folder)]),
    )
    with pytest.raises(
        InputError, match=r"q_proj\.weight is in the checkpoint but is no parameter of the model; exclude"
    ):
        make_trainer(answered_zoo, tmp_path)


def changed_config(source: Path, target: Path, **changes) -> Path:
    """A cache folder whose base has another ``config.json``."""
    for folder in EXPERTS.values():
        target.mkdir(exist_ok=True)
        (target / folder).symlink_to(source / folder)
    (target / "dataset").symlink_to(source / "dataset")
    (target / BASE).mkdir()
    for file in (source / BASE).iterdir():
        (target / BASE / file.name).write_bytes(file.read_bytes())
    config = {**json.loads((source / BASE / "config.json").read_text()), **changes}
    (target / BASE / "config.json").write_text(json.dumps(config))
    return target


def test_a_model_that_changes_its_logits_is_refused(answered_zoo, tmp_path):
    cache = changed_config(answered_zoo, tmp_path / "cache", final_logit_softcapping=30.0)
    with pytest.raises(InputError, match="changes its logits after the output head"):
        make_trainer(cache, tmp_path / "run")


def test_a_model_that_is_not_whole_is_refused(tmp_path):
    """Otherwise transformers would fill it up with random numbers."""
    save_model(tmp_path / "whole", 0, tie_word_embeddings=True)
    assert BACKBONE.load_model(tmp_path / "whole", torch.float32).lm_head.weight.any()
    tensors = tensors_of(tmp_path / "whole")
    folder = write_checkpoint(tmp_path / "part", {name: tensors[name] for name in sorted(tensors)[:-2]})
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        BACKBONE.load_model(folder, torch.float32)
    first = sorted(tensors)[-2]
    assert caught.value.problems == (
        f"{folder} lacks {first} and 1 more, which the model of its config.json has; download it again",
    )
    write_checkpoint(folder, tensors)
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(InputError) as caught:
        BACKBONE.load_model(folder, torch.float32)
    assert caught.value.problems == (
        f"{folder}: model.layers.0.mlp.down_proj.weight has shape [32, 48], and [32, 40] by config.json; "
        "download both again",
    )


def test_what_the_model_lacks_is_found_before_any_work(tiny_zoo, tmp_path):
    for folder in [BASE, *EXPERTS.values()]:
        tensors = tensors_of(tiny_zoo / folder)
        shutil.copytree(tiny_zoo / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        del tensors["model.norm.weight"]
        write_checkpoint(tmp_path / folder, tensors, config=json.loads((tiny_zoo / folder / "config.json").read_text()))
    write_tasks(tmp_path / "dataset")
    with pytest.raises(InputError) as caught:
        make_trainer(tmp_path, tmp_path / "run")
    assert caught.value.problems == (
        f"{tmp_path / BASE} lacks model.norm.weight, which the model of its config.json has; download it again",
    )


def test_code_of_a_checkpoint_is_not_executed(answered_zoo, tmp_path):
    changes = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}}
    cache = changed_config(answered_zoo, tmp_path / "cache", **changes)
    (cache / BASE / "configuration_mine.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    with pytest.raises(
        InputError, match="no causal language model that transformers knows, and code of checkpoints is"
    ):
        make_trainer(cache, tmp_path / "run")
    assert not (tmp_path / "executed").exists()
