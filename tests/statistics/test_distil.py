"""Distil against whole models whose layers are trained one after the other, by autograd from the coefficients."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from expert_merging.running import samples
from expert_merging.statistics import distil, distilling
from InternVL.backbone import BACKBONE as internvl  # noqa: N811
from Qwen2VL.backbone import BACKBONE as qwen2vl  # noqa: N811
from tests import internvl as internvl_checkpoints
from tests import qwen2vl as qwen2vl_checkpoints
from tests.checkpoints import BASE, EXPERTS, SIZES, perturb, save_tokenizer, tensors_of
from tests.command import contents, merge, merged, refusal
from tests.statistics.faults import refusal_of_nan, stop_at_the_last_layer
from tests.statistics.twin import RESPONSES, answered

# Of Adam, in which these tiny models change visibly in a few steps.
RATE, EPOCHS, GROUP = 0.05, 3, 4


@pytest.fixture
def arguments(tiny_zoo, dataset):
    given = ["--cache_dir", tiny_zoo, "--data_dir", dataset, "--samples_per_task", 2, "--run_name", "r"]
    settings = ["--distil_rate", RATE, "--distil_epochs", EPOCHS, "--distil_group", GROUP]
    return ["--method", "prodistill", *given, *settings]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def outputs(model, inputs, weights=None):
    """What comes out of each layer, ``(tokens, hidden)``, with the model's weights or with others."""
    seen = []
    hooks = [layer.register_forward_hook(lambda *given: seen.append(given[2][0])) for layer in model.model.layers]
    functional_call(model, weights or {}, (), inputs)
    for hook in hooks:
        hook.remove()
    return seen


def trained_plainly(zoo, fineness, initial):
    """Every layer's coefficients are leaves, and each pass goes through the whole model that they make."""
    base, tokenizer = load(zoo / BASE), AutoTokenizer.from_pretrained(zoo / BASE)
    experts = {name: load(zoo / folder) for name, folder in EXPERTS.items()}
    samples = [
        (name, inputs)
        for name in sorted(EXPERTS)  # as files are read
        for inputs, _ in answered(tokenizer, name, RESPONSES[name], range(2))
    ]
    weights = {name: weight.detach() for name, weight in base.named_parameters()}
    task_vectors = {
        name: torch.stack([expert.get_parameter(name).detach() - weight for expert in experts.values()])
        for name, weight in weights.items()
        if "proj" in name
    }
    for name, own in task_vectors.items():
        weights[name] = weights[name] + initial * own.sum(0)
    with torch.no_grad():
        wanted = [outputs(experts[name], inputs) for name, inputs in samples]
    mean = sum(own[0].numel() for own in wanted) / len(EXPERTS)
    for layer in range(len(base.model.layers)):
        own = {name: task_vector for name, task_vector in task_vectors.items() if f"layers.{layer}." in name}
        shapes = {"entry": slice(None), "row": (..., slice(0, 1)), "layer": (..., slice(0, 1), slice(0, 1))}
        leaves = {name: torch.zeros_like(own[name][shapes[fineness]]).requires_grad_() for name in own}
        optimizer, order = torch.optim.Adam(leaves.values(), lr=RATE), torch.Generator().manual_seed(0)
        for _ in range(EPOCHS):
            for group in torch.randperm(len(samples), generator=order).split(GROUP):
                made = weights | {name: weights[name] + (leaves[name] * own[name]).sum(0) for name in own}
                loss = torch.zeros(())
                for sample in group.tolist():
                    name, inputs = samples[sample]
                    of_expert = [number for number, (other, _) in enumerate(samples) if other == name]
                    size = sum(wanted[number][layer].numel() for number in of_expert)
                    missing = outputs(base, inputs, made)[layer] - wanted[sample][layer]
                    loss = loss + missing.square().sum() * mean / size
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for name in own:
            weights[name] = weights[name] + (leaves[name].detach() * own[name]).sum(0)
    return weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "fineness", "initial"),
    [
        ([], "entry", 1 / 3),
        (["--distil_fineness", "row", "--scaling_coefficient", 1.5, "--loss_tokens", "response"], "row", 0.5),
        (["--distil_fineness", "layer"], "layer", 1 / 3),
    ],
)
def test_it_trains_as_the_plain_twin(options, fineness, initial, arguments, tiny_zoo, tmp_path):
    run = merged(tmp_path / "out", *arguments, *options)
    expected = trained_plainly(tiny_zoo, fineness, initial)
    base, experts = tensors_of(tiny_zoo / BASE), [tensors_of(tiny_zoo / folder) for folder in EXPERTS.values()]
    for name, tensor in tensors_of(run.model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-5)
        if "proj" in name:
            before = base[name] + initial * sum(own[name] - base[name] for own in experts)
            assert (tensor - before).abs().max() > 1e-3
        else:
            assert tensor.equal(base[name])


@pytest.mark.slow
def test_training_brings_outputs_nearer(arguments, tiny_zoo, tmp_path):
    """With many steps, the last layer's outputs on the samples are nearly the experts'."""
    runs = [
        merged(tmp_path / f"{epochs}", *arguments, "--distil_epochs", epochs, "--distil_rate", 0.1)
        for epochs in (1, 20)
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny_zoo / BASE)
    distances = []
    for model in (load(run.model) for run in runs):
        total = 0.0
        with torch.no_grad():
            for name, folder in EXPERTS.items():
                expert = load(tiny_zoo / folder)
                for inputs, _ in answered(tokenizer, name, RESPONSES[name], range(2)):
                    total += (outputs(model, inputs)[-1] - outputs(expert, inputs)[-1]).square().mean().item()
        distances.append(total)
    assert distances[1] < distances[0] / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "checkpoints"), [(internvl, internvl_checkpoints), (qwen2vl, qwen2vl_checkpoints)], ids=lambda one: ""
)
def test_layers_of_a_model_that_sees_pictures_are_trained(family, checkpoints, tmp_path):
    zoo = checkpoints.make_zoo(tmp_path / "zoo")
    checkpoints.write_tasks(tmp_path / "dataset")
    given = ["--cache_dir", zoo, "--data_dir", tmp_path / "dataset", "--method", "task_arithmetic"]
    more = ["--max_new_tokens", 2, "--synthesize", 1, "--distil_epochs", 1, "--post", "distil"]
    run = merged(tmp_path / "out", *given, *more, family=family)
    before = tensors_of(merged(tmp_path / "plain", *given, family=family).model)
    changed = {name for name, tensor in tensors_of(run.model).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".layers." in name and name.endswith("_proj.weight")}


@pytest.fixture
def mixtures(tmp_path):
    """Models of three experts in each layer, to the last of which no token is sent."""
    zoo = tmp_path / "mixtures"
    sizes = {**SIZES, "num_hidden_layers": 2, "num_local_experts": 3, "num_experts_per_tok": 1}
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**sizes)).save_pretrained(zoo / BASE)
    save_tokenizer(zoo / BASE)
    for number, folder in enumerate(EXPERTS.values()):
        perturb(zoo / BASE, zoo / folder, number)
    for folder in (BASE, *EXPERTS.values()):
        tensors = tensors_of(zoo / folder)
        for name, tensor in tensors.items():
            if name.endswith("gate.weight"):
                tensor[1:] = torch.stack([-tensor[0], torch.zeros_like(tensor[0])])
        save_file(tensors, zoo / folder / "model.safetensors", {"format": "pt"})
    return zoo


def test_matrices_of_a_mixture_that_no_token_comes_by_stay_as_they_are_merged(mixtures, dataset, tmp_path):
    given = ["--cache_dir", mixtures, "--data_dir", dataset, "--samples_per_task", 2]
    fixed = ["--exclude_params", ".*gate\\.weight", ".*norm.*", ".*embed_tokens.*", ".*lm_head.*"]
    run = merged(tmp_path / "out", *given, *fixed, "--method", "prodistill", "--distil_epochs", 2)
    before = tensors_of(merged(tmp_path / "plain", *given, *fixed, "--method", "weight_average").model)
    found = tensors_of(run.model)
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert len([name for name in changed if "self_attn" in name]) == 2 * 4
    assert {name.split(".experts.")[1][0] for name in changed if ".experts." in name} == {"0", "1"}
    alone = [*given, *fixed[:1], r"(?!.*experts\.2\.).*", "--method", "prodistill", "--distil_epochs", 1]
    found = tensors_of(merged(tmp_path / "alone", *alone).model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.items() if ".experts.2." in name)


@pytest.mark.slow
def test_it_goes_on_with_the_layer_that_is_missing(arguments, tiny_zoo, tmp_path, monkeypatch):
    expected = contents(merged(tmp_path / "whole", *arguments).model)
    layers = stop_at_the_last_layer(monkeypatch, *arguments, "--output_path", tmp_path / "parts")
    assert contents(merged(tmp_path / "parts", *arguments).model) == expected
    assert layers == ["layer-0002"]


@pytest.fixture
def half(monkeypatch):
    """Models run in float16, which users get on a GPU alone."""
    monkeypatch.setattr(samples, "_precision", lambda *_: "fp16")


@pytest.mark.usefixtures("half")
@pytest.mark.slow
def test_gradients_that_float16_cannot_hold_are_taken_of_a_smaller_loss(arguments, tmp_path, monkeypatch, capsys):
    """Looked at in the first layer alone, since rounding changes what goes into the others, and they amplify it."""
    usual = tensors_of(merged(tmp_path / "usual", *arguments).model)
    lessons, factor = distilling._Distilling._lessons, 2.0**12

    def heavy(*given):
        return [one._replace(weight=factor * one.weight) for one in lessons(*given)]

    monkeypatch.setattr(distilling._Distilling, "_lessons", heavy)
    found = tensors_of(merged(tmp_path / "heavy", *arguments).model)
    first = [name for name in found if "layers.0." in name and "proj" in name]
    assert len(first) == 7
    for name in first:  # single gradients that are nearly 0 may change their sign
        assert (found[name] - usual[name]).abs().mean() < 2e-5
    factor = 2.0**60
    assert merge(*arguments, "--output_path", tmp_path / "out") == 1
    told = "layer 0: gradients are infinite; give a smaller --distil_rate, or --mixed_precision bf16 or no"
    assert told in capsys.readouterr().err


def test_crossed_questions_are_learned_from(arguments, tmp_path, capsys):
    for task in EXPERTS:
        questions = [f"{task}: one and two", f"{task}: three and four"]
        (tmp_path / f"{task}.json").write_text(json.dumps([{"question": question} for question in questions]))
    given = [*arguments, "--data_dir", tmp_path, "--synthesize", 1, "--output_path", tmp_path / "out"]
    assert merge(*given, "--dry_run") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "21 matrices are drawn to the experts on 9 samples, a layer at a time, --distil_epochs 3" in told


def test_the_most_memory_is_told(tiny_zoo, dataset, monkeypatch, tmp_path, capsys):
    """That of the largest layer, and of the hidden states of all samples: what was there when a layer was trained.

    And that of an expert's outputs, which are held until its file is written.
    """
    given = ["--cache_dir", tiny_zoo, "--data_dir", dataset, "--samples_per_task", 2, "--method", "prodistill"]
    given += ["--distil_epochs", 1, "--exclude_params", ".*layers.0.mlp.*", ".*norm.*", ".*embed_tokens.*"]
    train, taken = distilling._Distilling._train, []

    def watch(self, own, layer, number, lessons):
        train(self, own, layer, number, lessons)
        numbers = [tensor for matrix in own.values() for tensor in (matrix.before, matrix.task_vectors)]
        numbers += [tensor for matrix in own.values() for tensor in [matrix.coefficients] * 4]  # and Adam's
        numbers += [tensor for lesson in lessons for tensor in (lesson.stream.hidden, lesson.wanted)]
        taken.append(sum(tensor.nbytes for tensor in numbers))

    find, held = distilling._outputs, []

    def measured(*given):
        found = find(*given)
        held.append(sum(gram.values.nbytes for gram in found.values()))
        return found

    monkeypatch.setattr(distilling._Distilling, "_train", watch)
    monkeypatch.setattr(distilling, "_outputs", measured)
    monkeypatch.setattr(distil, "gib", lambda count: f"{count} bytes")
    merged(tmp_path / "out", *given)
    assert taken[0] < taken[1] == taken[2]
    assert merge(*given, "--output_path", tmp_path / "other", "--dry_run") == 0
    said = " ".join(capsys.readouterr().out.split())
    told = int(re.search(r"at most (\d+) bytes beside a model", said)[1])
    assert taken[1] <= told < 1.5 * taken[1]
    told = int(re.search(r"its layers takes about (\d+) bytes of memory beside it", said)[1])
    assert max(held) <= told < 1.1 * max(held)


def test_an_expert_that_computes_nan_is_named(arguments, tmp_path, capsys, monkeypatch):
    told = refusal_of_nan(monkeypatch, capsys, "fp16", *arguments, "--output_path", tmp_path / "out")
    assert told == "expert Math computes NaN or infinite outputs of layer 1"


def test_problems_are_told(arguments, tmp_path, capsys):
    given = [*arguments, "--output_path", tmp_path / "out"]
    told = "distil changes matrices of the language model's layers, and --exclude_params leaves none"
    assert refusal(capsys, *given, "--exclude_params", ".*proj.*") == told
    assert merge(*given, "--distil_rate", 1e30) == 1
    assert "layer 0: the loss is" in capsys.readouterr().err


def test_no_error_is_about_a_question_that_was_made_of_others(arguments, dataset, tmp_path, capsys):
    long = tmp_path / "long"
    shutil.copytree(dataset, long)
    entries = [{"question": letter * 200, "question_id": number} for number, letter in enumerate("abc")]
    (long / "Math.json").write_text(json.dumps(entries))
    given = [long if argument == dataset else argument for argument in arguments]
    assert refusal(capsys, *given, "--synthesize", 5, "--output_path", tmp_path / "out") == (
        f"{long / 'Math.json'}, entries 0, 1 (counted from 0): prompt and response have up to 202 tokens and the model "
        "takes at most 128; shorten the samples"
    )
