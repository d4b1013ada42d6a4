"""Merged adapters: peft loads them, and they are the dense result."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, MistralForCausalLM

from expert_merging.card import inline
from expert_merging.commands.main import main
from Qwen2VL.backbone import BACKBONE as QWEN
from tests import qwen2vl
from tests.adapters import merged_by_peft, save_adapter
from tests.checkpoints import BASE, tensors_of
from tests.command import contents, flags, merge, merged, refusal
from tests.low_rank.adapters import Zoo, assert_near, draw, pairs_of, write_adapter, write_zoo

ADAPTER = ("--output", "adapter")
SUM = ("--method", "core_space", "--inner", "task_arithmetic scaling_coefficient=1")


def again(zoo: Zoo, folder: Path, output: Path) -> dict[str, torch.Tensor]:
    """What an adapter adds to the base, as one expert of a merge."""
    alone = Zoo(zoo.base, {"Merged": folder})
    return alone.change(output, "--method", "task_arithmetic", "--scaling_coefficient", 1)


def without_base_s_embedding(folder: Path) -> None:
    """Peft saves an embedding beside its factors, in case that it was resized."""
    file = folder / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "base_layer" not in name}
    assert len(kept) == len(load_file(file)) - 1
    save_file(kept, file, metadata={"format": "pt"})


def test_peft_loads_a_merged_adapter_as_the_dense_result(tiny_zoo, tmp_path):
    base = tiny_zoo / BASE
    load = partial(MistralForCausalLM.from_pretrained, base)
    settings = {
        "A": {"r": 2, "target_modules": ["q_proj", "embed_tokens"], "lora_alpha": 3},
        "B": {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    }
    experts = {
        name: save_adapter(load, tmp_path / name, seed=number, task_type="CAUSAL_LM", **own)
        for number, (name, own) in enumerate(settings.items())
    }
    without_base_s_embedding(experts["A"])
    given = ["--method", "core_space", "--inner", "ties", "--exclude_params", "none", *flags(base, **experts)]
    dense = merged(tmp_path / "dense", *given)
    adapter = merged(tmp_path / "adapter", *given, *ADAPTER)
    assert set(contents(adapter.model)) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    config = json.loads((adapter.model / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (6, 6, "CAUSAL_LM")
    assert set(config["rank_pattern"].values()) == {2, 4}
    assert config["base_model_name_or_path"] == str(base)
    loaded = merged_by_peft(load, adapter.model).state_dict()
    expected = tensors_of(dense.model)
    assert not expected["model.embed_tokens.weight"].equal(tensors_of(base)["model.embed_tokens.weight"])
    for name, tensor in expected.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    assert f"result:       {adapter.model}" in adapter.log.read_text()


def test_the_card_says_what_an_adapter_is_made_of(tmp_path):
    zoo = write_zoo(tmp_path / "a|b", pairs_of())
    run = merged(tmp_path / "out", *SUM, *ADAPTER, *zoo.flags, "--seed", 4)
    card = (run.model / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "peft", "base_model": "base", "tags": ["merge", "lora", "expert-merging"]}
    for line in (
        f"# {inline(run.name)}",
        "A LoRA adapter of `base`, merged of 3 adapters by `core_space`.",
        "| base | `base` |",
        "| B | `B` (LoRA adapter) |",
        '  "inner": "task_arithmetic scaling_coefficient=1",',
        '  "seed": 4',
        'base = AutoModelForCausalLM.from_pretrained("path/to/the/base", dtype="auto")',
    ):
        assert line in card.splitlines(), card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("method", ["core_space", "knots"])
def test_a_merged_adapter_is_an_expert_again(method, tmp_path):
    zoo = write_zoo(tmp_path, pairs_of(), alpha=5)
    given = ("--method", method, "--scaling_coefficient", 0.7)
    run = merged(tmp_path / "out", *given, *ADAPTER, *zoo.flags)
    assert_near(again(zoo, run.model, tmp_path / "again"), zoo.change(tmp_path / "dense", *given))


def test_factors_of_transposed_weights_stay_transposed(tmp_path):
    """As of GPT-2's layers, whose files have inputs as rows."""
    pairs = pairs_of({"A": 2, "B": 1}, {"c_attn": (6, 6), "c_proj": (4, 7)})
    turned = {
        expert: {module: (right.T, left.T) for module, (left, right) in own.items()} for expert, own in pairs.items()
    }
    zoo = write_zoo(tmp_path, pairs)
    experts = {
        name: write_adapter(tmp_path / f"turned {name}", own, fan_in_fan_out=True) for name, own in turned.items()
    }
    given = Zoo(zoo.base, experts)
    run = merged(tmp_path / "out", *SUM, *ADAPTER, *given.flags)
    assert json.loads((run.model / "adapter_config.json").read_text())["fan_in_fan_out"]
    assert_near(again(zoo, run.model, tmp_path / "again"), zoo.change(tmp_path / "dense", *SUM))


def test_factors_of_convolutions_keep_their_shape(tmp_path):
    pairs = pairs_of({"A": 2, "B": 3}, {"conv": (5, 12)})
    zoo = write_zoo(tmp_path, pairs)
    file = zoo.base / "model.safetensors"
    save_file({**load_file(file), "conv.weight": torch.zeros(5, 3, 2, 2)}, file, metadata={"format": "pt"})
    for folder in zoo.experts.values():
        file = folder / "adapter_model.safetensors"
        shapes = {"lora_A": (-1, 3, 2, 2), "lora_B": (5, -1, 1, 1)}
        shaped = {name: tensor.reshape(shapes[name.split(".")[-2]]) for name, tensor in load_file(file).items()}
        save_file(shaped, file, metadata={"format": "pt"})
    run = merged(tmp_path / "out", *SUM, *ADAPTER, *zoo.flags)
    stored = load_file(run.model / "adapter_model.safetensors")
    assert {name.split(".")[-2]: tuple(tensor.shape) for name, tensor in stored.items()} == {
        "lora_A": (5, 3, 2, 2),
        "lora_B": (5, 5, 1, 1),
    }
    assert_near(again(zoo, run.model, tmp_path / "again"), zoo.change(tmp_path / "dense", *SUM))


@pytest.mark.parametrize(("said", "expected"), [(["", "there/base"], "there/base"), ([None, None], None)])
def test_the_base_is_the_one_that_an_adapter_names(said, expected, tmp_path):
    zoo = write_zoo(tmp_path, pairs_of({"A": 2}))
    named = {
        str(number): write_adapter(tmp_path / str(number), pairs_of({"A": 2})["A"], base_model_name_or_path=base)
        for number, base in enumerate(said)
    }
    run = merged(tmp_path / "out", *SUM, *ADAPTER, *Zoo(zoo.base, named).flags)
    assert json.loads((run.model / "adapter_config.json").read_text())["base_model_name_or_path"] == expected


def test_the_rank_of_an_adapter_can_be_chosen(tmp_path):
    zoo = write_zoo(tmp_path, pairs_of())
    cut = (*SUM, "--merged_rank", 2)
    run = merged(tmp_path / "out", *cut, *ADAPTER, *zoo.flags)
    config = json.loads((run.model / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (2, {})
    assert_near(again(zoo, run.model, tmp_path / "again"), zoo.change(tmp_path / "dense", *cut), 1e-5)


def test_a_run_is_not_continued_with_another_output(tmp_path, capsys):
    zoo = write_zoo(tmp_path, pairs_of())
    named = ("--run_name", "r", "--output_path", tmp_path / "out")
    merged(tmp_path / "out", *SUM, *zoo.flags, "--run_name", "r")
    assert "holds a different run" in refusal(capsys, *SUM, *ADAPTER, *zoo.flags, *named)


@pytest.mark.parametrize("where", ["ShardWriter.finish", "write_atomically"])
def test_an_interrupted_run_ends_with_the_same_bytes(where, tmp_path, monkeypatch):
    """Before its weights are complete, and after that, before its other files are."""
    zoo = write_zoo(tmp_path, pairs_of())
    given = (*SUM, *ADAPTER, *zoo.flags, "--run_name", "r")
    expected = merged(tmp_path / "whole", *given)

    def stop(*_given: object, **_named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"expert_merging.merge.{where}", stop)
        patch.setattr("expert_merging.merge._COPY_BYTES", 100)
        assert merge(*given, "--output_path", tmp_path / "out") == 130
    assert not list((tmp_path / "out").glob("*/r/model"))
    run = merged(tmp_path / "out", *given)
    assert contents(run.model) == contents(expected.model)
    assert ("kept 1 finished shards" in run.log.read_text()) == (where == "write_atomically")


def test_a_merged_adapter_can_be_verified(tmp_path, capsys):
    run = merged(tmp_path / "out", *SUM, *ADAPTER, *write_zoo(tmp_path, pairs_of()).flags)
    assert main(["verify", str(run.folder)]) == 0
    assert "3 files of model (0.0 MB) are as they were written, 6 tensors; " in capsys.readouterr().out
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        file = run.model / name
        content = file.read_bytes()
        file.write_bytes(content[:-2] + b"7\n")
        assert main(["verify", str(run.folder)]) == 1
        assert name in capsys.readouterr().err
        file.write_bytes(content)


def test_factors_that_fit_into_no_file_are_refused(tmp_path, capsys):
    pairs = pairs_of({"A": 1})
    pairs["A"]["layers.0.q_proj"][0].mul_(1e36)
    given = (*SUM, *ADAPTER, "--scaling_coefficient", 1000, *write_zoo(tmp_path, pairs).flags)
    line = refusal(capsys, *given, "--output_path", tmp_path / "out")
    assert line == "the merged factors of layers.0.q_proj.weight do not fit into F32; use a smaller coefficient"
    assert not list((tmp_path / "out").glob("*/*/model"))


def test_what_is_trained_as_a_whole_has_no_place_in_an_adapter(tmp_path, capsys):
    zoo = write_zoo(tmp_path, pairs_of())
    file = zoo.experts["A"] / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.norm.weight": torch.ones(4)}, file, metadata={"format": "pt"})
    assert refusal(capsys, *SUM, *ADAPTER, *zoo.flags) == (
        "--output adapter: norm.weight is trained otherwise than by two factors, which a merged adapter has no place "
        "for; exclude it (--exclude_params), or write a dense model"
    )
    merged(tmp_path / "out", *SUM, *ADAPTER, *zoo.flags[:-1], "norm.*")


def test_experts_that_name_their_modules_differently_make_no_adapter(tmp_path, capsys):
    pair = {"layers.0.q_proj": (draw(9, 1, seed=1), draw(1, 6, seed=2))}
    zoo = write_zoo(tmp_path, {"A": pair})
    other = write_adapter(tmp_path / "B", {f"model.{name}": own for name, own in pair.items()})
    given = flags(zoo.base, A=zoo.experts["A"], B=other)
    merged(tmp_path / "out", *SUM, *given, "--exclude_params", "none")
    assert refusal(capsys, *SUM, *ADAPTER, *given, "--exclude_params", "none") == (
        "--output adapter: A and B name the factors of layers.0.q_proj.weight differently, as different versions of "
        "transformers do; save them again with one version, or write a dense model"
    )


def test_nor_do_those_that_share_no_module(tmp_path, capsys):
    """Half of it would not be found in any model."""
    left, right = draw(9, 1, seed=1), draw(1, 6, seed=2)
    zoo = write_zoo(tmp_path, {"A": {"q_proj": (left, right)}, "B": {"k_proj": (left, right)}})
    other = write_adapter(tmp_path / "C", {"model.k_proj": (left, right)})
    given = flags(zoo.base, A=zoo.experts["A"], C=other)
    merged(tmp_path / "dense", *SUM, *given)
    assert refusal(capsys, *SUM, *ADAPTER, *given) == (
        "--output adapter: A and C name their modules differently, as different versions of transformers do; save them "
        "again with one version, or write a dense model"
    )
    merged(tmp_path / "out", *SUM, *ADAPTER, *zoo.flags)
    merged(tmp_path / "excluded", *SUM, *ADAPTER, *given, "--exclude_params", "k_proj.*")


@pytest.mark.slow
def test_modules_keep_their_names_in_memory_where_files_have_others(tmp_path):
    """Qwen2-VL's files have `model.layers` for what is `model.language_model.layers` in memory, where peft looks."""
    base = tmp_path / "base"
    qwen2vl.save_model(base, 0)
    load = partial(AutoModelForImageTextToText.from_pretrained, base)
    experts = {
        name: save_adapter(load, tmp_path / name, seed=rank, r=rank, target_modules=["q_proj", "qkv"])
        for name, rank in {"OCR": 2, "VQA": 3}.items()
    }
    given = [*SUM, *flags(base, **experts)]
    dense = merged(tmp_path / "dense", *given, family=QWEN)
    adapter = merged(tmp_path / "adapter", *given, *ADAPTER, family=QWEN)
    expected = AutoModelForImageTextToText.from_pretrained(dense.model).state_dict()
    loaded = merged_by_peft(load, adapter.model).state_dict()
    changed = [name for name, tensor in load().state_dict().items() if not tensor.equal(loaded[name])]
    assert changed
    assert all("q_proj" in name for name in changed)  # the vision tower keeps the base's values
    for name, tensor in expected.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
