"""AIM against a base that is run plainly, and its two ends."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from expert_merging import preparing
from expert_merging.statistics.aim import aim
from InternVL.backbone import BACKBONE as internvl  # noqa: N811
from Qwen2VL.backbone import BACKBONE as qwen2vl  # noqa: N811
from tests import internvl as internvl_checkpoints
from tests import qwen2vl as qwen2vl_checkpoints
from tests.checkpoints import BASE, EXPERTS, tensors_of, write_tasks
from tests.command import contents, merge, merged
from tests.statistics.twin import answered

RESPONSES = {"Chat": "Certainly", "Math": "42"}  # the Code expert's are not in the files


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    write_tasks(folder, responses=RESPONSES)
    return folder


@pytest.fixture
def arguments(tiny_zoo, dataset):
    given = [
        "--method",
        "task_arithmetic",
        "--cache_dir",
        tiny_zoo,
        "--exclude_params",
        ".*embed_tokens.*",
        ".*lm_head.*",
    ]
    return [*given, "--run_name", "r"], ["--post", "aim", "--data_dir", dataset, "--samples_per_task", 2]


@torch.no_grad()
def sizes_plainly(folder):
    """The mean size of the inputs of every linear layer and norm, by the name of its weight."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "weight") and not isinstance(layer, torch.nn.Embedding):
            see = lambda _layer, given, name=name: seen.setdefault(f"{name}.weight", []).append(given[0][0].abs())  # noqa: E731
            layer.register_forward_pre_hook(see)
    for expert in EXPERTS:
        for inputs, prompt in answered(tokenizer, expert, RESPONSES.get(expert, ""), range(2)):
            tokens = inputs["input_ids"] if expert in RESPONSES else inputs["input_ids"][:, :prompt]
            model(input_ids=tokens)
    return {name: torch.cat(parts).mean(0) for name, parts in seen.items()}


def test_changes_are_relaxed_as_the_base_s_inputs_are_large(arguments, tiny_zoo, tmp_path):
    given, post = arguments
    run = merged(tmp_path / "aim", *given, *post, "--aim_omega", 0.3)
    before, base = tensors_of(merged(tmp_path / "plain", *given).model), tensors_of(tiny_zoo / BASE)
    sizes, checked = sizes_plainly(tiny_zoo / BASE), 0
    for name, tensor in tensors_of(run.model).items():
        if name in sizes and "lm_head" not in name:
            factor = 1 - sizes[name] / sizes[name].max() * (1 - 0.3)
            expected = base[name] + (before[name] - base[name]) * factor
            torch.testing.assert_close(tensor, expected, rtol=0, atol=2e-6)
            assert (tensor - before[name]).abs().max() > 1e-4
            checked += 1
        else:
            assert torch.equal(tensor, before[name])
    assert checked == 3 * 9 + 1, "seven matrices and two norms a layer, and the last norm"


def test_one_keeps_everything_and_zero_freezes_the_strongest_input(arguments, tiny_zoo, tmp_path):
    given, post = arguments
    plain = tensors_of(merged(tmp_path / "plain", *given).model)
    same = tensors_of(merged(tmp_path / "one", *given, *post, "--aim_omega", 1).model)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in same.items())
    base, frozen = (
        tensors_of(tiny_zoo / BASE),
        tensors_of(merged(tmp_path / "zero", *given, *post, "--aim_omega", 0).model),
    )
    name = "model.layers.1.mlp.down_proj.weight"
    columns = [bool(torch.equal(frozen[name][:, column], base[name][:, column])) for column in range(48)]
    assert sum(columns) == 1


def test_what_was_gathered_is_taken_again(arguments, tmp_path, monkeypatch):
    given, post = arguments
    expected = contents(merged(tmp_path / "whole", *given, *post).model)

    def stop_when_prepared(job):
        preparing.prepare(job)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("expert_merging.job.prepare", stop_when_prepared)
        merge(*given, *post, "--output_path", tmp_path / "parts")
    monkeypatch.setattr("expert_merging.statistics.activations.load_on", None)
    assert contents(merged(tmp_path / "parts", *given, *post).model) == expected


def test_tensors_that_no_sample_comes_by_stay():
    merged_ = torch.randn(2, 3)
    part = type("P", (), {"name": "w"})()
    assert torch.equal(aim(torch.zeros(1, 2, 3), part, merged_, {}, aim_omega=0.0), merged_)


@pytest.mark.slow
@pytest.mark.parametrize("family", [internvl, qwen2vl], ids=lambda family: family.name)
def test_what_is_no_linear_layer_and_no_norm_stays(family, tmp_path):
    """Such as the kernels that pictures' patches go through, which have no inputs of their own."""
    made = internvl_checkpoints if family is internvl else qwen2vl_checkpoints
    zoo = made.make_zoo(tmp_path / "zoo")
    given = ["--cache_dir", zoo, "--data_dir", zoo / "dataset", "--method", "task_arithmetic"]
    given += ["--exclude_params", ".*lm_head.*"]
    run = merged(tmp_path / "out", *given, "--post", "aim", family=family)
    before = tensors_of(merged(tmp_path / "plain", *given, family=family).model)
    changed = {name for name, tensor in tensors_of(run.model).items() if not torch.equal(tensor, before[name])}
    (kernel,) = [name for name in before if "patch_embed" in name and name.endswith("weight")]
    assert kernel not in changed
    assert any(name.startswith(family.vision_tower.partition(".")[0]) for name in changed)


def test_an_expert_may_be_called_as_its_file(arguments, tiny_zoo, dataset, tmp_path):
    given, post = arguments
    experts = [
        "--expert",
        f"activations={tiny_zoo / EXPERTS['Chat']}",
        "--expert",
        f"Math={tiny_zoo / EXPERTS['Math']}",
    ]
    more = ["--task_expert", "Chat=activations", "Code=Math", "--method", "regmean", "--max_new_tokens", 4]
    run = merged(tmp_path / "out", *given, *post, *experts, *more)
    assert len([*run.statistics.rglob("*.safetensors")]) == 3


@pytest.mark.slow
def test_models_with_pictures(tmp_path):
    zoo = internvl_checkpoints.make_zoo(tmp_path / "zoo")
    given = ["--cache_dir", zoo, "--data_dir", zoo / "dataset", "--method", "task_arithmetic"]
    run = merged(tmp_path / "out", *given, "--post", "aim", family=internvl)
    before = tensors_of(merged(tmp_path / "plain", *given, family=internvl).model)
    changed = {name for name, tensor in tensors_of(run.model).items() if not torch.equal(tensor, before[name])}
    assert len([name for name in changed if "proj" in name and ".layers." in name]) == 3 * 7
    assert any(name.startswith("mlp1.") for name in changed), "the projector of pictures too"
