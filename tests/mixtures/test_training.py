"""Routers that are trained: against a plain loop over whole models, and what is left as it was."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from expert_merging.mixtures import training
from expert_merging.mixtures.fitting import conditions
from expert_merging.running import samples
from tests.checkpoints import BASE, EXPERTS, perturb, tensors_of, write_tasks
from tests.command import contents, merge, merged, refusal
from tests.mixtures.test_moe import KINDS, MOE, save_dense
from tests.statistics.twin import RESPONSES, answered

COUNT, EPOCHS, RATE = 2, 3, 0.02


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    write_tasks(folder, responses=RESPONSES)
    return folder


@pytest.fixture
def arguments(tiny_zoo, questions):
    given = [*MOE, "--cache_dir", tiny_zoo, "--data_dir", questions, "--samples_per_task", COUNT, "--router", "random"]
    return [*given, "--seed", 1, "--run_name", "r", "--router_epochs", EPOCHS, "--router_learning_rate", RATE]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def plainly(model, experts, asked, balance):
    """AdamW on a mixture's routers, all samples in each update, with transformers' own outputs.

    Returns:
        The routers by name in memory, and the loss at the beginning.
    """
    model.requires_grad_(False)
    routers = {name: weight.requires_grad_() for name, weight in model.named_parameters() if ".gate.weight" in name}
    optimizer = torch.optim.AdamW(routers.values(), lr=RATE, weight_decay=0)
    with torch.no_grad():
        wanted = {name: [experts[name](**inputs).logits.log_softmax(-1) for inputs, _ in asked[name]] for name in asked}
    losses = []
    for _ in range(EPOCHS):
        total = torch.zeros(())
        for name, own in asked.items():
            for (inputs, _), target in zip(own, wanted[name], strict=True):
                found = model(**inputs, output_router_logits=True)
                apart = (target.exp() * (target - found.logits.log_softmax(-1))).sum(-1).mean()
                total = total + apart + balance * load_balancing_loss_func(found.router_logits, 3, 2)
        losses.append(float(total.detach() / 6))
        optimizer.zero_grad()
        (total / 6).backward()
        torch.nn.utils.clip_grad_norm_(routers.values(), 1.0)
        optimizer.step()
    return {name: weight.detach() for name, weight in routers.items()}, losses


@pytest.mark.slow
@pytest.mark.parametrize("balance", [0.5])
@pytest.mark.parametrize("kind", ["mistral", "llama", "qwen2", "qwen3"])
def test_routers_are_those_of_the_plain_twin_and_all_else_is_as_it_was(kind, balance, arguments, questions, tmp_path):
    zoo = tmp_path / "zoo"
    save_dense(zoo / BASE, kind, **{**KINDS[kind], "tie_word_embeddings": kind == "llama"})
    for number, folder in enumerate(EXPERTS.values()):
        perturb(zoo / BASE, zoo / folder, number)
    given = [*arguments, "--cache_dir", zoo, "--held_out", 0, "--router_balance", balance]
    plain = merged(tmp_path / "plain", *given)
    run = merged(tmp_path / "out", *given, "--train_router")
    tokenizer = AutoTokenizer.from_pretrained(zoo / BASE)
    asked = {name: answered(tokenizer, name, RESPONSES[name], range(COUNT)) for name in EXPERTS}
    experts = {name: load(zoo / folder) for name, folder in EXPERTS.items()}
    expected, losses = plainly(load(plain.model), experts, asked, balance)
    assert losses[0] > 0
    found, before = dict(load(run.model).named_parameters()), dict(load(plain.model).named_parameters())
    for name, weight in found.items():
        if name in expected:
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-4)
            assert (weight - before[name]).abs().max() > RATE
        else:
            assert torch.equal(weight, before[name]), name
    assert tensors_of(run.model).keys() == tensors_of(plain.model).keys()


def held_out_losses(run):
    """Divergences on held-out samples that a run has told, after and before."""
    (line,) = [line for line in run.log.read_text().splitlines() if "on held-out samples" in line]
    after, before = line.split("samples: ")[1].split(" with trained routers, ")
    return float(after), float(before.split()[0])


@pytest.mark.slow
def test_the_best_routers_on_held_out_samples_are_taken(arguments, tmp_path):
    """Those before training where none is better, as with a rate that is far too high."""
    given = [*arguments, "--held_out", 0.5]
    after, before = held_out_losses(merged(tmp_path / "good", *given, "--train_router"))
    assert after < before
    untrained = merged(tmp_path / "plain", *given)
    spoiled = merged(tmp_path / "bad", *given, "--train_router", "--router_learning_rate", 1e4)
    after, before = held_out_losses(spoiled)
    assert after <= before
    if after == before:
        assert contents(spoiled.model)["model.safetensors"] == contents(untrained.model)["model.safetensors"]


@pytest.mark.slow
def test_a_finished_training_is_not_done_again(arguments, tmp_path, monkeypatch):
    given = [*arguments, "--train_router", "--output_path", tmp_path / "parts"]
    expected = contents(merged(tmp_path / "whole", *arguments, "--train_router").model)

    def stop(*_given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("expert_merging.writing.ShardWriter.finish", stop)
        assert merge(*given) == 130
    monkeypatch.setattr(training, "live_mixture", None)
    assert contents(merged(tmp_path / "parts", *given[:-2]).model) == expected


@pytest.mark.slow
def test_balance_spreads_tokens_over_experts(arguments, tmp_path):
    """The probabilities of experts, in the mean over tokens, come nearer to each other."""

    def unevenness(run):
        model = load(run.model)
        with torch.no_grad():
            logits = model(torch.arange(4, 40)[None], output_router_logits=True).router_logits
        return sum(float(own.softmax(-1).mean(0).std()) for own in logits)

    given = [*arguments, "--held_out", 0, "--train_router", "--router_epochs", 15]
    free = unevenness(merged(tmp_path / "free", *given, "--router_balance", 0))
    assert unevenness(merged(tmp_path / "even", *given, "--router_balance", 100)) < free


@pytest.mark.slow
def test_the_plan_and_the_record_tell_of_training(arguments, tmp_path, capsys):
    assert merge(*arguments, "--train_router", "--output_path", tmp_path, "--dry_run") == 0
    assert f"routers are trained on 6 samples, {EPOCHS} times, against the experts' own predictions" in (
        capsys.readouterr().out
    )
    run = merged(tmp_path / "out", *arguments, "--train_router")
    assert json.loads(run.config.read_text())["inputs"]["calibration"]
    told = "Routers began as random numbers. They were then trained against the experts' own predictions."
    assert told in (run.model / "README.md").read_text()
    assert told in run.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("router", ["ridge", "embedding"])
def test_the_report_is_of_trained_routers(router, arguments, tmp_path):
    run = merged(tmp_path, *arguments, "--router", router, "--train_router")
    routers = {name: tensor for name, tensor in tensors_of(run.model).items() if name.endswith(".gate.weight")}
    told = json.loads((run.folder / "routing.json").read_text())["condition"]
    assert told == pytest.approx(conditions(routers), rel=1e-3)


@pytest.mark.slow
def test_problems_of_training_are_told(arguments, tmp_path, capsys, monkeypatch):
    given = [*arguments, "--output_path", tmp_path / "out"]
    assert "does not exist; give --data_dir" in refusal(capsys, *given, "--train_router", "--data_dir", tmp_path / "no")
    assert "--router_balance must be" in refusal(capsys, *given, "--train_router", "--router_balance", -1)
    monkeypatch.setattr(training._Balance, "loss", lambda _: torch.tensor(torch.inf))
    told = refusal(capsys, *given, "--train_router")
    assert told == "training routers: the loss is NaN or infinite; give a lower --router_learning_rate"


def test_training_in_float16_is_refused(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(samples, "_precision", lambda *_: "fp16")
    told = refusal(capsys, *arguments, "--train_router", "--output_path", tmp_path / "out")
    assert told == ("--train_router needs gradients, which overflow in float16; give --mixed_precision bf16 or no")


def test_flags_of_training_are_idle_without_it(arguments, tmp_path, capsys):
    assert merge(*arguments, "--output_path", tmp_path, "--dry_run") == 0
    told = capsys.readouterr().out
    assert "ignored with --train_router False: --router_epochs" in told
    assert "ignored with --router random: --samples_per_task" in told
    assert merge(*arguments, "--train_router", "--output_path", tmp_path, "--dry_run") == 0
    assert "ignored" not in capsys.readouterr().out
