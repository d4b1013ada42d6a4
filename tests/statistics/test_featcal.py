"""FeatCal against its equations, and against whole models that are changed layer by layer."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from expert_merging.statistics import featcal
from expert_merging.statistics.calibrating import Pair, Pull, new_weights
from InternVL.backbone import BACKBONE as internvl  # noqa: N811
from tests import internvl as internvl_checkpoints
from tests.checkpoints import BASE, EXPERTS, SIZES, perturb, save_tokenizer, tensors_of
from tests.command import contents, merge, merged, refusal
from tests.statistics.faults import stop_at_the_last_layer
from tests.statistics.twin import RESPONSES, answered, inputs_of_layers

DEFAULT, OTHER = Pull(0.3, 0.05, 1.0), Pull(0.4, 0.1, 1.5)


@pytest.fixture
def arguments(tiny_zoo, dataset):
    given = ["--method", "task_arithmetic", "--post", "featcal", "--cache_dir", tiny_zoo, "--data_dir", dataset]
    return [*given, "--samples_per_task", 2, "--run_name", "r"]


def plainly(base, experts, merged, pairs, shifts, pull):
    """The paper's equations as they stand: Gram matrices of all inputs, a right side, and one system of equations."""
    base, merged = base.double(), merged.double()
    left = pull.ridge * torch.eye(base.shape[1], dtype=torch.float64)
    right = pull.ridge * (base + pull.reach * (merged - base)).T
    for expert, inputs, own in pairs:
        inputs, own = inputs.double(), own.double()
        mixed = pull.mix * own + (1 - pull.mix) * inputs
        gram = inputs.T @ inputs / len(inputs)
        outputs = mixed @ experts[expert].double().T + shifts[expert]
        left += gram / gram.norm()
        right = right + inputs.T @ outputs / len(inputs) / gram.norm()
    return torch.linalg.solve(left, right).T


@pytest.mark.parametrize("counts", [(3, 2), (20, 15), (3, 20)], ids=["few tokens", "many", "few and many"])
def test_weights_solve_the_equations(counts):
    torch.manual_seed(0)
    base, merged = torch.randn(2, 4, 12)
    task_vectors, shifts = torch.randn(3, 4, 12), torch.randn(3, 4)
    pairs = [Pair(number, *torch.randn(2, count, 12)) for number, count in zip((0, 2), counts, strict=True)]
    found = new_weights(base, task_vectors, merged, pairs, shifts, OTHER)
    torch.testing.assert_close(found, plainly(base, base + task_vectors, merged, pairs, shifts, OTHER))


def test_inputs_that_are_all_zero_change_nothing():
    base, merged = torch.randn(2, 4, 12)
    nothing = [Pair(0, *torch.zeros(2, 3, 12))]
    found = new_weights(base, torch.randn(1, 4, 12), merged, nothing, torch.zeros(1, 4), DEFAULT)
    torch.testing.assert_close(found, merged.double())


def calibrated_plainly(base, model, experts, asked, pull):
    """Change a merged model layer by layer; the whole of it runs anew for each."""
    own = {name: inputs_of_layers(expert, asked[name]) for name, expert in experts.items()}
    weights, start = dict(model.named_parameters()), dict(base.named_parameters())
    theirs = [dict(expert.named_parameters()) for expert in experts.values()]
    for layer in range(len(model.model.layers)):
        names = [name for name in own["Chat"] if name.startswith(f"model.layers.{layer}.")]
        seen = [inputs_of_layers(model, asked[name]) for name in experts]
        new = {}
        for name in names:
            pairs = [
                (number, one[name], own[expert][name])
                for number, (expert, one) in enumerate(zip(experts, seen, strict=True))
            ]
            nothing = torch.zeros(len(experts), len(weights[name]))
            matrices = [expert[name].detach() for expert in theirs]
            new[name] = plainly(start[name].detach(), matrices, weights[name].detach(), pairs, nothing, pull)
        for name, value in new.items():
            weights[name].data = value.float()
    return {name: weight.detach() for name, weight in weights.items()}


@pytest.mark.parametrize("pull", [DEFAULT, OTHER], ids=["default", "others"])
def test_it_changes_a_model_as_the_plain_twin(pull, arguments, tiny_zoo, tmp_path):
    given = [f"--featcal_{name}={value}" for name, value in pull._asdict().items()]
    run = merged(tmp_path / "out", *arguments, *given)
    plain = merged(tmp_path / "plain", *arguments[:2], *arguments[4:])
    tokenizer = AutoTokenizer.from_pretrained(tiny_zoo / BASE)
    asked = {name: answered(tokenizer, name, RESPONSES[name], range(2)) for name in EXPERTS}

    def load(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    experts = {name: load(tiny_zoo / folder) for name, folder in EXPERTS.items()}
    expected = calibrated_plainly(load(tiny_zoo / BASE), load(plain.model), experts, asked, pull)
    found, before, changed = tensors_of(run.model), tensors_of(plain.model), 0
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-5)
        changed += (tensor - before[name]).abs().max() > 2e-4
    assert changed == 3 * 7


def test_it_goes_on_with_the_layer_that_is_missing(arguments, tmp_path, monkeypatch):
    """What experts see and the layers that were changed are there; a damaged one is changed again."""
    expected = contents(merged(tmp_path / "whole", *arguments).model)
    layers = stop_at_the_last_layer(monkeypatch, *arguments, "--output_path", tmp_path / "parts")
    folder = tmp_path / "parts" / "task_arithmetic" / "r" / "calibrated" / "featcal"
    damaged = folder / "layer-0001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    monkeypatch.setattr("expert_merging.running.targets.load_on", None)
    run = merged(tmp_path / "parts", *arguments)
    assert layers == ["layer-0001", "layer-0002"]
    assert contents(run.model) == expected


def test_it_follows_a_method_that_gathers_statistics_of_its_own(arguments, tmp_path):
    """And another modifier may follow it."""
    run = merged(tmp_path, *arguments, "--method", "regmean", "--post", "consensus", "--consensus_k", 0)
    alone = merged(tmp_path / "alone", *arguments, "--method", "regmean")
    assert json.loads(run.config.read_text())["options"]["post"] == ["featcal", "consensus"]
    assert contents(run.model).keys() == contents(alone.model).keys()
    assert len([*run.statistics.iterdir()]) == len([*(run.calibrated / "featcal" / "inputs").iterdir()]) == 3
    for name, tensor in tensors_of(run.model).items():
        assert torch.equal(tensor, tensors_of(alone.model)[name]), "consensus_k 0 keeps everything"


def test_it_follows_regmean_pp_that_keeps_layers_of_its_own(arguments, tmp_path):
    """What it does to them is what it does to the same merge that is read from files."""
    first = merged(tmp_path / "first", *arguments[:1], "regmean++", *arguments[4:])
    both = merged(tmp_path / "both", *arguments, "--method", "regmean++")
    assert {folder.name for folder in both.calibrated.iterdir()} == {"regmean++", "featcal"}
    before, found = tensors_of(first.model), tensors_of(both.model)
    changed = [name for name in found if (found[name] - before[name]).abs().max() > 2e-4]
    assert len(changed) == 3 * 7


@pytest.mark.parametrize("method", [["--method", "regmean++"], ["--method", "task_arithmetic", "--post", "featcal"]])
def test_experts_of_a_mixture_stay_as_they_are_and_that_is_said(method, dataset, tmp_path):
    zoo = make_mixtral(tmp_path / "zoo")
    given = ["--cache_dir", zoo, "--data_dir", dataset, "--samples_per_task", 2]
    run = merged(tmp_path / "out", *method, *given)
    plain = merged(tmp_path / "plain", *given, "--method", "weight_average" if len(method) == 2 else method[1])
    before, found = tensors_of(plain.model), tensors_of(run.model)
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert len([name for name in changed if "self_attn" in name]) == 2 * 4
    assert not [name for name in changed if ".experts." in name]
    assert "ran on the same tokens in all models: not changed" in run.log.read_text()


def make_mixtral(zoo):
    config = MixtralConfig(**{**SIZES, "num_hidden_layers": 2, "num_local_experts": 3, "num_experts_per_tok": 2})
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(zoo / BASE)
    save_tokenizer(zoo / BASE)
    for number, folder in enumerate(EXPERTS.values()):
        perturb(zoo / BASE, zoo / folder, number)
    return zoo


@pytest.mark.slow
def test_models_with_pictures_have_their_language_model_calibrated(tmp_path):
    zoo = internvl_checkpoints.make_zoo(tmp_path / "zoo")
    given = ["--cache_dir", zoo, "--data_dir", zoo / "dataset", "--method", "task_arithmetic"]
    run = merged(tmp_path / "out", *given, "--post", "featcal", family=internvl)
    before = tensors_of(merged(tmp_path / "plain", *given, family=internvl).model)
    changed = {name for name, tensor in tensors_of(run.model).items() if not torch.equal(tensor, before[name])}
    assert len(changed) == 3 * 7
    assert all(".layers." in name and "proj" in name and "vision" not in name for name in changed)


def test_a_bias_that_an_expert_has_changed_counts(tmp_path):
    """As if an input of 1 came in, whose weight stays."""
    torch.manual_seed(0)
    base, merged_, task_vectors = torch.randn(4, 12), torch.randn(4, 12), torch.randn(1, 4, 12)
    inputs, own = torch.randn(2, 5, 12)
    shifts = torch.randn(1, 4)
    found = new_weights(base, task_vectors, merged_, [Pair(0, inputs, own)], shifts, Pull(0.3, 1e-9, 1.0))
    wanted = torch.lerp(inputs, own, 0.3).double() @ (base + task_vectors[0]).double().T + shifts.double()
    torch.testing.assert_close(inputs.double() @ found.T, wanted, rtol=1e-5, atol=1e-5)


def test_problems_are_told_before_anything_runs(arguments, tiny_zoo, tmp_path, capsys, monkeypatch):
    given = [*arguments, "--output_path", tmp_path / "out"]
    assert refusal(capsys, *given, "--featcal_mix", 1.5) == "--featcal_mix must be a number in [0, 1], got 1.5"
    assert "--featcal_ridge must be" in refusal(capsys, *given, "--featcal_ridge", 0)
    told = "featcal changes matrices of the language model's layers, and --exclude_params leaves none"
    assert refusal(capsys, *given, "--exclude_params", ".*proj.*") == told
    assert "does not exist; give --data_dir" in refusal(capsys, *given, "--data_dir", tmp_path / "none")
    told = "--post names featcal twice, which keeps one result in a run; name it once"
    assert refusal(capsys, *given, "--post", "featcal", "featcal") == told
    size = (tiny_zoo / BASE / "model.safetensors").stat().st_size
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=size + 1000))
    assert "the result needs 0.0 GB and the disk of" in refusal(capsys, *given)
    assert not (tmp_path / "out").exists()


def test_the_plan_tells_what_is_kept(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(featcal, "gib", lambda count: f"{count} bytes")
    assert merge(*arguments, "--output_path", tmp_path / "out", "--dry_run") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "features of 21 matrices are calibrated on 6 samples, a layer at a time" in said
    # Of two samples of 27 tokens at most; what layers share is counted for each.
    assert f"layers takes at most {4 * 2 * 27 * 3 * (6 * 32 + 48)} bytes of memory beside it" in said
    assert "in all, which can be removed once the merged model is there" in said
    assert not [*tmp_path.iterdir()]
