"""RegMean++ against whole models whose layers are merged one after the other."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.checkpoints import BASE, EXPERTS, tensors_of
from tests.command import contents, merge, merged, refusal
from tests.statistics.faults import stop_at_the_last_layer
from tests.statistics.twin import RESPONSES, answered, inputs_of_layers, least_squares


@pytest.fixture
def arguments(tiny_zoo, dataset):
    given = ["--method", "regmean++", "--cache_dir", tiny_zoo, "--data_dir", dataset]
    return [*given, "--samples_per_task", 2, "--run_name", "r"]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def merged_plainly(zoo, asked, ratio):
    """Every expert's layer runs in a copy of the model whose layers below it are merged; norms are the expert's own."""
    model, experts = load(zoo / BASE), {name: load(zoo / folder) for name, folder in EXPERTS.items()}
    weights = dict(model.named_parameters())
    theirs = [dict(expert.named_parameters()) for expert in experts.values()]
    for layer in range(len(model.model.layers)):
        seen = []
        for name, expert in experts.items():
            mixed = copy.deepcopy(model)
            mixed.model.layers[layer] = expert.model.layers[layer]
            seen.append(inputs_of_layers(mixed, asked[name]))
        for name in [name for name in seen[0] if name.startswith(f"model.layers.{layer}.")]:
            given = torch.stack([expert[name].detach() for expert in theirs])
            weights[name].data = least_squares(given, [own[name] for own in seen], ratio)
    return {name: weight.detach() for name, weight in weights.items()}


@pytest.mark.parametrize(("options", "ratio"), [([], 0.9), (["--reduce_non_diagonal_ratio", 0.5], 0.5)])
def test_it_merges_as_the_plain_twin(options, ratio, arguments, tiny_zoo, tmp_path):
    run = merged(tmp_path / "out", *arguments, *options)
    tokenizer = AutoTokenizer.from_pretrained(tiny_zoo / BASE)
    asked = {name: answered(tokenizer, name, RESPONSES[name], range(2)) for name in EXPERTS}
    expected, base = merged_plainly(tiny_zoo, asked, ratio), tensors_of(tiny_zoo / BASE)
    plain = tensors_of(merged(tmp_path / "plain", *arguments, *options, "--method", "regmean").model)
    differing = 0
    for name, tensor in tensors_of(run.model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-5)
        differing += (tensor - plain[name]).abs().max() > 2e-4
        assert tensor.equal(base[name]) == ("proj" not in name)
    assert differing > 2 * 7, "the first layer's inputs are those of plain RegMean but for the embeddings"


def test_it_goes_on_with_the_layer_that_is_missing(arguments, tiny_zoo, tmp_path, monkeypatch):
    given = [*arguments, "--data_dir", tiny_zoo / "dataset", "--max_new_tokens", 4]
    expected = contents(merged(tmp_path / "whole", *given).model)
    layers = stop_at_the_last_layer(monkeypatch, *given, "--output_path", tmp_path / "parts")
    monkeypatch.setattr("expert_merging.running.targets.load_on", None)
    assert contents(merged(tmp_path / "parts", *given).model) == expected
    assert layers == ["layer-0002"]


def test_problems_and_the_plan_are_told(arguments, tmp_path, capsys):
    given = [*arguments, "--output_path", tmp_path / "out"]
    told = "regmean++ changes matrices of the language model's layers, and --exclude_params leaves none"
    assert refusal(capsys, *given, "--exclude_params", ".*proj.*") == told
    assert merge(*given, "--dry_run") == 0
    assert "21 matrices are solved for from 6 samples, a layer at a time" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "out").exists()
