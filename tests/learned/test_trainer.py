"""The trainer against its plain twin, and what users rely on while it runs."""

from __future__ import annotations

import gc
import json
import re
import weakref
from dataclasses import fields, replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from expert_merging.cli import main
from expert_merging.errors import InputError
from expert_merging.learned.coefficients import kept_or_made, load_coefficients
from expert_merging.learned.epochs import epoch_order
from expert_merging.learned.live import LiveModel
from expert_merging.learned.options import AnswerOptions, DivergingOptions
from expert_merging.learned.state import TrainingState
from expert_merging.learned.trainer import Trainer
from expert_merging.run import Run
from expert_merging.running.objectives import distance
from expert_merging.running.scores import score_by_task
from expert_merging.running.targets import Target
from Mistral.backbone import BACKBONE
from tests.checkpoints import BASE, EXPERTS, perturb, save_model, write_tasks
from tests.learned.training import make_trainer, make_twin
from tests.learned.twin import Example, Twin

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
    "uphill": ({"sam": 0.05, "sparsity_reg_weight": 0.8}, {"sam": 0.05, "regularisation": 0.8}),
    "confident": ({"confident": True, "sparsity_reg_weight": 0.0}, {"confident": True}),
    "Jensen-Shannon": (
        {"logits_divergence": "js", "temperature": 2.0, "sparsity_reg_weight": 0.0},
        {"symmetric": True, "temperature": 2.0},
    ),
    "other accumulation": (
        {"gradient_accumulation_steps": 4, "num_epochs": 2, "learning_rate": 0.1},
        {"accumulation": 4, "learning_rate": 0.1, "regularisation": 0.8},
    ),
}


FAST = ("published", "response tokens", "several layers")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_training_gives_the_coefficients_of_the_plain_twin(name, answered_zoo, tmp_path):
    options, twin_options = VARIANTS[name]
    trainer = make_trainer(answered_zoo, tmp_path, **options)
    coefficients = trainer.train()
    twin, examples = make_twin(trainer, **twin_options)
    twin.train(examples, options.get("num_epochs", 1), seed=3)
    for parameter, values in coefficients.values.items():
        torch.testing.assert_close(values, twin.coefficients(parameter).detach(), rtol=1e-4, atol=2e-5)


def test_divmerge_begins_at_the_mean_and_makes_the_divergence_of_jensen_and_shannon_small(answered_zoo, tmp_path):
    trainer = make_trainer(answered_zoo, tmp_path / "three", kind=DivergingOptions)
    assert trainer.settings.layout.initial == pytest.approx([1 / 3] * 3)
    coefficients = trainer.train()
    twin, examples = make_twin(trainer, symmetric=True)
    assert not twin.layers
    twin.train(examples, 1, seed=3)
    for parameter, values in coefficients.values.items():
        torch.testing.assert_close(values, twin.coefficients(parameter).detach(), rtol=1e-4, atol=2e-5)
    alone = make_trainer(answered_zoo, tmp_path / "one", kind=DivergingOptions, experts=["Math"])
    assert alone.settings.layout.initial == (0.5,)
    given = make_trainer(answered_zoo, tmp_path / "given", kind=DivergingOptions, scaling_coefficient=0.2)
    assert given.settings.layout.initial == (0.2,) * 3


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["response", "all"])
def test_supermerge_makes_the_answers_likely_with_coefficients_of_either_sign(tokens, answered_zoo, tmp_path):
    given = {"loss_tokens": tokens, "scaling_coefficient": [-0.2, 0.0, 0.3], "num_epochs": 2, "learning_rate": 0.1}
    trainer = make_trainer(answered_zoo, tmp_path, kind=AnswerOptions, **given)
    coefficients = trainer.train()
    wanted = {"likelihood": True, "signed": True, "response_only": tokens == "response"}
    twin, examples = make_twin(trainer, learning_rate=0.1, **wanted)
    twin.train(examples, 2, seed=3)
    for parameter, values in coefficients.values.items():
        torch.testing.assert_close(values, twin.coefficients(parameter).detach(), rtol=1e-4, atol=3e-4)
    every = torch.cat([*coefficients.values.values()])
    assert every.min() < 0 < every.max()


def test_chunks_and_fixed_parameters_train_like_the_twin(answered_zoo, tmp_path):
    sizes = {"*mlp*": 3, "*q_proj*": 5, "*layers.0*": 0}
    trainer = make_trainer(answered_zoo, tmp_path, coeffs_size_dict=sizes, sparsity_reg_weight=0.0)
    coefficients = trainer.train()
    chunks = dict(trainer.settings.layout.chunks)
    assert {0, 1, 3, 5} == set(chunks.values())
    twin, examples = make_twin(trainer, chunks=chunks)
    twin.train(examples, 1, seed=3)
    for parameter, values in coefficients.values.items():
        torch.testing.assert_close(values, twin.coefficients(parameter).detach(), rtol=1e-4, atol=2e-5)
    assert set(coefficients.fixed) == {name for name in chunks if ".layers.0." in name}


def prepared(trainer: Trainer):
    """The live model and the targets of a trainer, as `train` makes them."""
    material = trainer.gather()
    trainer.vector = trainer.settings.layout.vector(torch.device("cpu"))
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
        ours = trainer.settings.objective.losses(trainer.live.model, [target])[0]
        theirs = twin.losses(example)
        torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-5, atol=1e-7)
        (ours.sum() / 8).backward()
    expected = twin_gradients(twin, examples)
    torch.testing.assert_close(trainer.live.gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_samples_together_teach_what_they_teach_one_by_one(answered_zoo, tmp_path):
    learned = {}
    for tokens in (1, 40, 2048):
        trainer = make_trainer(answered_zoo, tmp_path / str(tokens), batch_tokens=tokens, num_epochs=2)
        passes = count_calls(trainer)
        learned[tokens] = torch.cat([table.flatten() for table in trainer.train().values.values()])
        assert (len(passes) < sum(map(len, passes))) == (tokens > 1)
    for tokens in (40, 2048):
        torch.testing.assert_close(learned[tokens], learned[1], rtol=1e-4, atol=1e-6)


def count_calls(trainer: Trainer) -> list[list[Target]]:
    """The samples of every pass that training will make."""
    objective, passes = trainer.settings.objective, []

    class Counting(type(objective)):
        def losses(self, model, targets):
            passes.append(targets)
            return super().losses(model, targets)

    counting = Counting(**{field.name: getattr(objective, field.name) for field in fields(objective)})
    trainer.settings = replace(trainer.settings, objective=counting)
    return passes


def test_sliced_logits_give_the_same_gradient(answered_zoo, tmp_path, monkeypatch):
    trainer = make_trainer(answered_zoo, tmp_path)
    targets = prepared(trainer)
    trainer._collect(targets, lambda *_: None)
    whole = trainer.live.gradient.clone()
    monkeypatch.setattr("expert_merging.running.objectives._SLICE_BYTES", 4 * 4 * 80)  # four tokens of this vocabulary
    trainer.live.rebuild()
    trainer._collect(targets, lambda *_: None)
    torch.testing.assert_close(trainer.live.gradient, whole, rtol=1e-5, atol=1e-8)


def test_weight_gradients_are_freed_as_they_come(answered_zoo, tmp_path):
    trainer = make_trainer(answered_zoo, tmp_path)
    targets = prepared(trainer)
    trainer._collect(targets[:1], lambda *_: None)
    assert all(parameter.grad is None for parameter in trainer.live.model.parameters())


@pytest.mark.slow
def test_strong_regularisation_keeps_task_arithmetic(answered_zoo, tmp_path):
    free = make_trainer(answered_zoo, tmp_path / "free", learning_rate=0.05, sparsity_reg_weight=0.0).train()
    held = make_trainer(answered_zoo, tmp_path / "held", learning_rate=0.05, sparsity_reg_weight=1e4).train()
    distance = {
        kind: max(float((value - 0.3).abs().max()) for value in result.values.values())
        for kind, result in {"free": free, "held": held}.items()
    }
    assert distance["held"] < distance["free"]


@pytest.mark.slow
def test_a_single_expert_is_recovered(tiny_zoo, tmp_path):
    """With one expert and no regulariser, the best coefficients are 1."""
    (tmp_path / BASE).symlink_to(tiny_zoo / BASE)
    perturb(tiny_zoo / BASE, tmp_path / EXPERTS["Math"], 3, change=0.002)
    write_tasks(tmp_path / "dataset", responses={"Math": "42"})
    options = {"num_epochs": 60, "sparsity_reg_weight": 0.0, "gradient_accumulation_steps": 5, "learning_rate": 0.2}
    trainer = make_trainer(tmp_path, tmp_path / "run", experts=("Math",), **options)
    means = torch.stack([value.mean() for value in trainer.train().values.values()])
    assert means.mean() > 0.8


@pytest.mark.slow
def test_a_task_weight_moves_the_balance(answered_zoo, tmp_path):
    """What a task weighs more, the merged model matches better."""
    distances = []
    for weight in (0.2, 5.0):
        trainer = make_trainer(answered_zoo, tmp_path / str(weight), loss_alphas={"Math": weight}, num_epochs=4)
        trainer.train()
        targets = [target for target in trainer._make_targets(torch.device("cpu")) if target.sample.task == "Math"]
        trainer.live.rebuild()
        with torch.no_grad():
            distances.append(sum(float(distance(()).losses(trainer.live.model, [target])[0, 0]) for target in targets))
    assert distances[1] < distances[0]


def test_a_loss_that_is_not_a_number_ends_training(answered_zoo, tmp_path, monkeypatch):
    trainer = make_trainer(answered_zoo, tmp_path)
    collect = Trainer._collect
    monkeypatch.setattr(Trainer, "_collect", lambda *arguments: collect(*arguments) * float("nan"))
    with pytest.raises(InputError, match="the loss is not a number after 0 updates; lower --learning_rate"):
        trainer.train()
    assert not trainer.context.run.coefficients.exists()


@pytest.mark.slow
def test_the_model_is_freed_after_training(answered_zoo, tmp_path):
    trainer = make_trainer(answered_zoo, tmp_path)
    trainer.train()
    model = weakref.ref(trainer.live.model)
    del trainer
    gc.collect()
    assert model() is None


def test_the_best_threads_for_a_small_model_are_used_and_put_back(answered_zoo, tmp_path):
    context = make_trainer(answered_zoo, tmp_path).context
    torch.set_num_threads(2)
    assert (kept_or_made(context, torch.get_num_threads), torch.get_num_threads()) == (1, 2)
    torch.set_num_threads(1)


def test_every_expert_comes_equally_often_in_an_order_of_the_seed():
    experts = ["a", "a", "a", "b", "c", "c"]
    order = epoch_order(experts, seed=1, epoch=0)
    assert sorted(experts[index] for index in order) == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    assert set(order) == set(range(6))
    assert order == epoch_order(experts, seed=1, epoch=0)
    assert order != epoch_order(experts, seed=1, epoch=1)
    assert order != epoch_order(experts, seed=2, epoch=0)


@pytest.mark.parametrize("patience", [1, 3])
def test_training_stops_after_epochs_without_a_better_mean_loss(patience, answered_zoo, tmp_path, monkeypatch, caplog):
    trainer = make_trainer(
        answered_zoo, tmp_path, num_epochs=50, samples_per_task=1, learning_rate=1e-12, patience=patience
    )
    updates = []
    monkeypatch.setattr(TrainingState, "end_epoch", _never_better(updates))
    with caplog.at_level("INFO"):
        trainer.train()
    assert len(updates) == patience
    assert f"stopped early: {patience} epoch{'s' if patience > 1 else ''} without a better mean loss" in caplog.text


def test_the_held_out_samples_stop_training_and_their_divergence_is_shown(answered_zoo, tmp_path, caplog):
    """At a rate that can only harm, the first epoch is the last, and the start is what is kept."""
    options = {"samples_per_task": 4, "num_epochs": 9, "held_out": 0.5, "learning_rate": 500.0, "patience": 1}
    trainer = make_trainer(answered_zoo, tmp_path, log_with="tensorboard", **options)
    with caplog.at_level("INFO"):
        trainer.train()
    assert "stopped early: 1 epoch without a better loss on the held-out samples" in caplog.text
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    first, last = events.Scalars("held_out/divergence")
    assert (first.step, last.step) == (0, trainer.state.updates)
    tasks = [events.Scalars(f"held_out_divergence/{task}")[0].value for task in EXPERTS]
    assert first.value == pytest.approx(sum(tasks) / 3)
    trainer.live.rebuild()  # with the start's coefficients again
    found = score_by_task(distance((), 1), trainer.live.model, trainer.held_out)
    assert tasks == pytest.approx([found[task]["divergence"] for task in EXPERTS], rel=1e-4)
    assert events.Scalars("final/held_out_loss")[0].value == 1
    assert events.Scalars("final/held_out_divergence")[0].value == first.value


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


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
def test_tensorboard_has_curves_per_task_and_a_picture(answered_zoo, tmp_path):
    trainer = make_trainer(answered_zoo, tmp_path, log_with="tensorboard", num_epochs=2)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "board"), {"histograms": 0})
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"loss/total", "loss/logits", "loss/hidden_states", "loss/regularisation", "learning_rate"} <= scalars
    assert {f"task_logits/{task}" for task in EXPERTS} <= scalars
    assert {f"coefficient_{kind}/{expert}" for kind in ("mean", "spread") for expert in EXPERTS} <= scalars
    assert [point.step for point in events.Scalars("loss/total")] == [1, 2, 3, 4]
    assert events.Tags()["images"]
    pictures = {"importance", "submodules", "depth", "coefficients", "chunks", "over_time"}
    assert pictures == set(events.Tags()["images"])
    assert [point.step for point in events.Histograms("coefficients/Math")] == [0, 1, 2, 3, 4]
    assert [point.step for point in events.Scalars("loss/total_epoch_mean")] == [2, 4]
    losses = [point.value for point in events.Scalars("loss/total")]
    smoothed = [point.value for point in events.Scalars("loss/total_smoothed")]
    for count, mean in enumerate(smoothed, 1):
        weights = [0.9 ** (count - 1 - place) for place in range(count)]
        assert mean == pytest.approx(
            sum(w * loss for w, loss in zip(weights, losses, strict=False)) / sum(weights), rel=1e-5
        )
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    assert all((tmp_path / "analysis" / f"{name}.png").stat().st_size > 1000 for name in events.Tags()["images"])


def test_the_log_has_the_curves_means_of_every_epoch(answered_zoo, tmp_path):
    common = ["--cache_dir", str(answered_zoo), "--data_dir", str(answered_zoo / "dataset"), "--device", "cpu"]
    assert main(BACKBONE, [*common, "--num_epochs", "2", "--output_path", str(tmp_path), "--run_name", "r"]) == 0
    run = Run(tmp_path / "expert_merging" / "r")
    events = EventAccumulator(str(run.board))
    events.Reload()
    check_options(events, method="expert_merging", family="Mistral", num_epochs=2, samples_per_task=5)
    lines = [line for line in run.log.read_text().splitlines() if "mean loss" in line]
    for epoch, line in enumerate(lines, 1):
        shown = re.search(rf"epoch {epoch} of 2: mean losses: (.*) \((.*)\); mean (coefficient \S+)$", line)
        assert shown
        numbers = dict(part.split() for part in [shown[1], *shown[2].split(", "), shown[3]])
        for name in ("total", "logits", "hidden_states", "regularisation"):
            first, second = [point.value for point in events.Scalars(f"loss/{name}")][2 * epoch - 2 : 2 * epoch]
            mean = (8 * first + 7 * second) / 15  # samples of the two updates
            assert float(numbers[name]) == pytest.approx(mean, rel=1e-3), name
            assert events.Scalars(f"loss/{name}_epoch_mean")[epoch - 1].value == pytest.approx(mean)
        means = [events.Scalars(f"coefficient_mean/{expert}")[2 * epoch - 1].value for expert in EXPERTS]
        assert float(numbers["coefficient"]) == pytest.approx(sum(means) / 3, rel=1e-3)
    assert len(lines) == 2


def check_options(events, **expected):
    """Check what TensorBoard's table of hyperparameters is told."""
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    options = metadata.parse_session_start_info_plugin_data(content).hparams
    shown = {name: getattr(options[name], options[name].WhichOneof("kind")) for name in expected}
    assert shown == expected
    with pytest.raises(KeyError):  # this would fix options and scores for all runs
        events.SummaryMetadata(metadata.EXPERIMENT_TAG)


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
    assert {file.name for file in (tmp_path / "state").iterdir()} == {
        *("coefficients.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"),
        *("training.json", "digests.json"),
    }
