"""What stands in the place of weights is refused by its name, over base and experts."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from tests.checkpoints import tensors_of, write_checkpoint
from tests.command import COMMAND, flags, merged, refused

TENSORS = {"model.layers.0.q_proj.weight": torch.ones(4, 3), "model.layers.0.o_proj.weight": torch.ones(4)}
ALLOWED = "allowed: F64, F32, F16, BF16"


def adapted(prefix: str = "model.") -> dict[str, torch.Tensor]:
    """Weights as a model has them while PEFT's modules stand around them."""
    layer = f"{prefix}layers.0.q_proj"
    return {
        f"{layer}.base_layer.weight": torch.ones(4, 3),
        f"{layer}.base_layer.bias": torch.ones(4),
        f"{layer}.lora_A.default.weight": torch.ones(2, 3),
        f"{layer}.lora_B.default.weight": torch.ones(4, 2),
    }


def with_type(file: Path, name: str, dtype: str) -> None:
    """Say another type of a tensor whose entries have the same width, or of one of any width."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header[name]["dtype"] = dtype
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize("who", ["base", "expert"])
@pytest.mark.parametrize(
    ("config", "prefix", "how"),
    [
        ({"model_type": "mistral"}, "model.", "merge_and_unload() of peft, and save the model again"),
        (
            {"model_type": "internvl_chat", "use_llm_lora": 16, "use_backbone_lora": 0},
            "language_model.base_model.model.model.",
            "tools/merge_lora.py of InternVL",
        ),
    ],
)
def test_an_adapter_left_inside_is_told_and_how_to_merge_it(who, config, prefix, how, tmp_path, capsys):
    folders = {name: write_checkpoint(tmp_path / name, TENSORS) for name in ("base", "expert")}
    folders[who] = write_checkpoint(tmp_path / who, adapted(prefix), config=config)
    given = (*COMMAND, *flags(folders["base"], A=folders["expert"]), "--output_path", tmp_path / "out")
    sentence = (
        f"{folders[who]} is a model with an adapter still inside (LoRA): {prefix}layers.0.q_proj.base_layer.bias and 3 "
        f"more; its weights are not what it computes with until the two are merged: use {how}"
    )
    assert refused(capsys, *given, "--dry_run") == refused(capsys, *given) == [sentence]


@pytest.mark.parametrize(
    "name",
    [
        "x.modules_to_save.default.weight",
        "x.original_module.weight",
        "x.lora_embedding_A.default",
        "x.lora_magnitude_vector.default.weight",
        "x.ia3_l.default",
    ],
)
def test_modules_of_other_adapters_are_known(name, tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "base", {**TENSORS, name: torch.ones(2)})
    (sentence,) = refused(capsys, *COMMAND, *flags(folder, A=folder))
    assert f"(LoRA): {name}; its weights" in sentence


@pytest.mark.parametrize("who", ["base", "expert"])
def test_placeholders_of_zero_3_are_told(who, tmp_path, capsys):
    folders = {name: write_checkpoint(tmp_path / name, TENSORS) for name in ("base", "expert")}
    folders[who] = write_checkpoint(tmp_path / who, {name: torch.empty(0) for name in TENSORS})
    given = (*COMMAND, *flags(folders["base"], A=folders["expert"]), "--output_path", tmp_path / "out")
    sentence = (
        f"{folders[who]} has empty tensors: model.layers.0.o_proj.weight and 1 more; that is what is left of a model "
        "saved under DeepSpeed ZeRO-3 without gathering its weights: rebuild them with zero_to_fp32.py, or save it "
        "again with save_16bit_model (stage3_gather_16bit_weights_on_model_save)"
    )
    assert refused(capsys, *given, "--dry_run") == refused(capsys, *given) == [sentence]


def test_every_checkpoint_with_leftovers_is_told_at_once(tmp_path, capsys):
    base = write_checkpoint(tmp_path / "base", TENSORS)
    inside = write_checkpoint(tmp_path / "inside", adapted())
    empty = write_checkpoint(tmp_path / "empty", {name: torch.empty(0) for name in TENSORS})
    other = write_checkpoint(tmp_path / "other", {"model.layers.0.q_proj.weight": torch.ones(4, 3)})
    first, second, third = refused(capsys, *COMMAND, *flags(base, A=inside, B=empty, C=other))
    assert first.startswith(f"{inside} is a model with an adapter")
    assert second.startswith(f"{empty} has empty tensors")
    assert third == f"expert C ({other}): lacks the tensor model.layers.0.o_proj.weight"


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.int8, "I8"),
        (torch.int64, "I64"),
        (torch.bool, "BOOL"),
        (torch.complex64, "C64"),
    ],
)
def test_a_base_of_a_type_that_cannot_be_merged_is_refused_by_name(dtype, stored, tmp_path, capsys):
    name = "model.layers.0.q_proj.weight"
    base = write_checkpoint(tmp_path / "base", {**TENSORS, name: TENSORS[name].to(dtype)})
    expert = write_checkpoint(tmp_path / "expert", TENSORS)
    given = (*COMMAND, *flags(base, A=expert), "--output_path", tmp_path / "out")
    expected = [
        f"the base ({base}) stores {name} as {stored}, which cannot be merged; {ALLOWED}; give a base in one of them "
        "(or exclude it)"
    ]
    assert refused(capsys, *given) == refused(capsys, *given, "--dry_run") == expected
    run = merged(tmp_path / "excluded", *COMMAND, *flags(base, A=expert), "--exclude_params", ".*q_proj.weight")
    written = tensors_of(run.model)[name]
    assert written.dtype == dtype
    assert torch.equal(written.view(torch.uint8), tensors_of(base)[name].view(torch.uint8))


@pytest.mark.parametrize("who", ["base", "expert", "both"])
def test_types_that_the_library_does_not_know_are_refused_by_name(who, tmp_path, capsys):
    folders = {part: write_checkpoint(tmp_path / part, TENSORS) for part in ("base", "expert")}
    damaged = [part for part in folders if who in (part, "both")]
    for part in damaged:
        with_type(folders[part] / "model.safetensors", "model.layers.0.q_proj.weight", "K32")
    given = (*COMMAND, *flags(folders["base"], A=folders["expert"]), "--output_path", tmp_path / "out")
    sentences = refused(capsys, *given)
    assert len(sentences) == len(damaged)
    for part, sentence in zip(damaged, sentences, strict=True):
        assert f"{folders[part]}/model.safetensors is truncated or not a safetensors file" in sentence
        assert "unknown variant `K32`" in sentence


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8])
def test_an_expert_of_a_type_that_cannot_be_merged_is_refused_by_name(stored, tmp_path, capsys):
    base = write_checkpoint(tmp_path / "base", TENSORS)
    expert = write_checkpoint(tmp_path / "expert", {name: tensor.to(stored) for name, tensor in TENSORS.items()})
    found = refused(capsys, *COMMAND, *flags(base, A=expert))
    assert len(found) == len(TENSORS)
    assert all(ALLOWED in line and str(expert) in line for line in found)


def test_whole_numbers_that_all_checkpoints_have_are_no_parameters(tmp_path):
    table = {"model.position_ids": torch.arange(5)}
    base = write_checkpoint(tmp_path / "base", {**TENSORS, **table})
    experts = [
        write_checkpoint(tmp_path / "a", {**{name: tensor * 2 for name, tensor in TENSORS.items()}, **table}),
        write_checkpoint(tmp_path / "b", {name: tensor * 3 for name, tensor in TENSORS.items()}),
    ]
    excluded = [".*bias.*"]
    run = merged(tmp_path / "out", *COMMAND, *flags(base, A=experts[0], B=experts[1]), "--exclude_params", *excluded)
    assert torch.equal(tensors_of(run.model)["model.position_ids"], torch.arange(5))
    assert not torch.equal(tensors_of(run.model)["model.layers.0.q_proj.weight"], torch.ones(4, 3))
