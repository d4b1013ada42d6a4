"""InternVL folders under other names than published: in containers, from transformers' own class, of text alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from expert_merging.checkpoints.adapter import Adapter
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.methods.linear import task_arithmetic
from InternVL.backbone import BACKBONE, load_model
from tests.checkpoints import tensors_of, write_checkpoint
from tests.command import assert_same_bytes, flags, merge, merge_plainly, merged, refused
from tests.internvl import BASE, EXPERTS
from tests.test_naming import renamed

METHOD = ("--method", "task_arithmetic")
RULE = partial(task_arithmetic, scaling_coefficient=0.1)
LEARNING = ("--method", "expert_merging", "--log_with", "none")
run_command = partial(merged, family=BACKBONE)


@pytest.fixture(scope="module")
def native(internvl_zoo, tmp_path_factory) -> Callable[[str], Path]:
    """A checkpoint of the zoo as transformers' own class saves it."""

    def save(name: str) -> Path:
        folder = tmp_path_factory.mktemp("native") / name
        load_model(internvl_zoo / name, torch.float32).save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("prefix", ["module.", "model.", "base_model.model.", "trainer.policy."])
def test_the_vision_tower_of_a_base_in_a_container_keeps_its_values(prefix, internvl_zoo, tmp_path, capsys):
    base = renamed(internvl_zoo / BASE, tmp_path / "base", lambda name: prefix + name)
    expert = internvl_zoo / EXPERTS["OCR"]
    run = run_command(tmp_path / "out", *METHOD, *flags(base, OCR=expert))
    expected = merge_plainly(internvl_zoo / BASE, [expert], RULE, BACKBONE.exclude_params)
    assert_same_bytes(tensors_of(run.model), {prefix + name: tensor for name, tensor in expected.items()})
    assert f"the base: names of tensors are read without {prefix!r}" in capsys.readouterr().out


def test_a_vision_tower_that_no_pattern_finds_is_warned_about(internvl_zoo, tmp_path, capsys):
    def eyes(name: str) -> str:
        return name.replace("vision_model.", "eyes.")

    base = renamed(internvl_zoo / BASE, tmp_path / "base", eyes)
    expert = renamed(internvl_zoo / EXPERTS["OCR"], tmp_path / "expert", eyes)
    assert merge(*METHOD, *flags(base, OCR=expert), "--dry_run", family=BACKBONE) == 0
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warned == [
        "warning: the base has no tensor that 'vision_model.*' matches, the pattern of the vision tower: if it has one "
        "under another name (names are such as eyes.embeddings.class_embedding), that is merged; give --exclude_params"
    ]


def test_an_expert_of_transformers_own_class_goes_by_the_published_names(native, internvl_zoo, tmp_path):
    expert = native(EXPERTS["OCR"])
    assert any(name.startswith("vision_tower.") for name in tensors_of(expert))
    run = run_command(tmp_path / "out", *METHOD, *flags(internvl_zoo / BASE, OCR=expert))
    expected = merge_plainly(internvl_zoo / BASE, [internvl_zoo / EXPERTS["OCR"]], RULE, BACKBONE.exclude_params)
    assert_same_bytes(tensors_of(run.model), expected)


def test_a_base_of_transformers_own_class_keeps_its_names(native, internvl_zoo, tmp_path):
    base, expert = native(BASE), native(EXPERTS["OCR"])
    before = tensors_of(base)
    for number, other in enumerate((expert, internvl_zoo / EXPERTS["OCR"])):
        run = run_command(tmp_path / f"out{number}", *METHOD, *flags(base, OCR=other))
        after = tensors_of(run.model)
        assert after.keys() == before.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert {name.split(".")[0] for name in changed} == {"language_model", "multi_modal_projector"}
        assert not any("embed_tokens" in name or "lm_head" in name for name in changed)


def test_attention_that_one_class_cuts_into_three_is_named_where_it_is_merged(native, internvl_zoo, tmp_path, capsys):
    given = (*METHOD, "--exclude_params", "language_model.*", "--output_path", tmp_path / "out")
    published, own = internvl_zoo / BASE, native(EXPERTS["OCR"])
    for base, expert, here, there in ((published, own, 3, 1), (native(BASE), internvl_zoo / EXPERTS["OCR"], 1, 3)):
        found = refused(capsys, *given, *flags(base, OCR=expert), family=BACKBONE)
        assert found == [
            f"expert OCR ({expert}): vision_model.encoder.layers.{layer}.attn.qkv.{kind} is {here} tensors here and "
            f"{there} in the base: they were saved by classes that cut it differently; save both by the same class (or "
            "exclude it)"
            for layer in range(2)
            for kind in ("bias", "weight")
        ]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_expert_of_text_alone_goes_into_the_language_model(prefix, internvl_zoo, tmp_path, capsys):
    source = internvl_zoo / EXPERTS["OCR"]
    text = {
        prefix + name.removeprefix("language_model."): tensor
        for name, tensor in tensors_of(source).items()
        if name.startswith("language_model.")
    }
    expert = write_checkpoint(tmp_path / "text", text, config={"model_type": "qwen2"})
    given = flags(internvl_zoo / BASE, Text=expert)
    run = run_command(tmp_path / "out", *METHOD, *given)
    words = (
        "without 'module.' and with 'language_model.' before them" if prefix else "with 'language_model.' before them"
    )
    plan = capsys.readouterr().out
    assert f"expert Text: names of tensors are read {words}" in plan
    assert f"expert Text {expert} (a language model alone, with the base's mlp1 and vision_model)\n" in plan
    excluded = ["mlp1.*", *BACKBONE.exclude_params]
    assert_same_bytes(tensors_of(run.model), merge_plainly(internvl_zoo / BASE, [source], RULE, excluded))
    learning = (*LEARNING, *given, "--data_dir", internvl_zoo / "dataset", "--output_path", tmp_path / "learned")
    found = refused(capsys, *learning, family=BACKBONE)
    assert any(line.startswith("expert Text cannot be loaded as a model: transformers knows") for line in found)
    assert not (tmp_path / "learned").exists()


def test_an_adapter_of_text_alone_goes_into_the_language_model(internvl_zoo, tmp_path):
    """It is the same as the adapter of the whole model whose names it lacks, and can be run as that can."""
    base = Checkpoint(internvl_zoo / BASE)
    name = "model.layers.0.self_attn.q_proj"
    outputs, inputs = base.entries[f"language_model.{name}.weight"].shape
    settings = {"peft_type": "LORA", "lora_alpha": 4, "r": 2}
    change = {"lora_A": torch.ones(2, inputs) / 8, "lora_B": torch.ones(outputs, 2) / 4}
    runs = []
    for prefix in ("", "language_model."):
        tensors = {f"base_model.model.{prefix}{name}.{role}.weight": matrix for role, matrix in change.items()}
        folder = tmp_path / f"adapter {prefix}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        save_file(tensors, folder / "adapter_model.safetensors")
        adapter = Adapter(folder, base, BACKBONE.file_name)
        assert adapter.changed == {f"language_model.{name}.weight"}
        runs.append(run_command(tmp_path / f"out {prefix}", *METHOD, *flags(base.folder, Text=folder)))
    written, wanted, before = (tensors_of(folder) for folder in (runs[0].model, runs[1].model, base.folder))
    assert_same_bytes(written, wanted)
    assert [key for key, tensor in written.items() if not tensor.equal(before[key])] == [
        f"language_model.{name}.weight"
    ]


def test_an_expert_of_text_alone_that_is_not_whole_is_refused(internvl_zoo, tmp_path, capsys):
    """Neither a part of the language model that it lacks nor all of another model is made up for."""
    language = {
        name: tensor for name, tensor in tensors_of(internvl_zoo / EXPERTS["OCR"]).items() if name.startswith("lang")
    }
    lacking = "language_model.model.layers.1.mlp.up_proj.weight"
    del language[lacking]
    whole = {"h.0.weight": torch.ones(3)}
    for tensors, problem in ((language, f"lacks the tensor {lacking}"), (whole, "lacks the tensor language_model")):
        expert = write_checkpoint(tmp_path / problem, tensors, config={"model_type": "qwen2"})
        found = refused(capsys, *METHOD, *flags(internvl_zoo / BASE, Text=expert), family=BACKBONE)
        assert any(f"expert Text ({expert}): {problem}" in line for line in found)
