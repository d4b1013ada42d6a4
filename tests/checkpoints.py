"""Small random checkpoints in the layout that users have, for the tests."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from expert_merging.outputs import index_of
from zoo.tokens import character_tokenizer

SPECIAL = ["<s>", "</s>", "<pad>", "<unk>"]
CHARACTERS = [*SPECIAL, *string.ascii_letters, *string.digits, *" .,:;?!+-=()'\n"]
EXPERTS = {"Chat": "Mistral-7B-Instruct-v0.1", "Math": "MAmmoTH2-7B", "Code": "Mistral-7B-codealpaca-lora"}
BASE = "Mistral-7B-v0.1"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SIZES = {
    "vocab_size": len(CHARACTERS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def write_checkpoint(
    folder: Path,
    *shards: Mapping[str, torch.Tensor],
    config: Mapping[str, object] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A checkpoint of the given tensors that no model class knows: one file, or shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "mistral"}), encoding="utf-8")
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, tensors in zip(names if len(shards) > 1 else ["model.safetensors"], shards, strict=True):
        save_file(dict(tensors), folder / name, metadata=dict(metadata or {"format": "pt"}))
    if len(shards) > 1:
        index = index_of({name: list(tensors) for name, tensors in zip(names, shards, strict=True)}, size=0)
        (folder / INDEX).write_bytes(index)
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    """The index of a sharded checkpoint that says what it is told to, be it wrong."""
    content = json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    (folder / INDEX).write_text(content, encoding="utf-8")


def save_tokenizer(folder: Path) -> None:
    """A character tokenizer that adds the start token."""
    names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), SPECIAL, strict=True))
    vocabulary = {token: number for number, token in enumerate(CHARACTERS)}
    character_tokenizer(vocabulary, SPECIAL, **names).save_pretrained(folder)


def save_model(folder: Path, seed: int, *, max_shard_size: str = "5GB", **changes: object) -> None:
    """A random Mistral with its tokenizer; ``changes`` overrides the configuration."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(seed)
    model = MistralForCausalLM(MistralConfig(**{**SIZES, **changes}))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(folder)


def perturb(source: Path, target: Path, seed: int, *, change: float = 0.05, dtype: torch.dtype | None = None) -> None:
    """A copy of a checkpoint whose weights differ a little, as a fine-tune's do."""
    target.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            tensors = {
                name: (tensor + change * torch.randn(tensor.shape, generator=generator)).to(dtype or tensor.dtype)
                for name, tensor in sorted(load_file(file).items())
            }
            save_file(tensors, target / file.name, metadata={"format": "pt"})
        else:
            (target / file.name).write_bytes(file.read_bytes())


def make_zoo(cache: Path, *, seed: int = 0, max_shard_size: str = "5GB", **changes: object) -> Path:
    """A base and three experts below ``cache`` under the published names, with calibration files in
    ``cache/dataset``."""
    save_model(cache / BASE, seed, max_shard_size=max_shard_size, **changes)
    for number, folder in enumerate(EXPERTS.values()):
        perturb(cache / BASE, cache / folder, seed + 1 + number)
    write_tasks(cache / "dataset")
    return cache


def write_tasks(folder: Path, *, count: int = 6, responses: Mapping[str, str] | None = None) -> None:
    """Calibration files; with a response for every question where one is given for the task."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in EXPERTS:
        entries = [{"question": f"{task} question {number}?", "question_id": number} for number in range(count)]
        if responses and task in responses:
            entries = [{**entry, "response": responses[task]} for entry in entries]
        (folder / f"{task}.json").write_text(json.dumps(entries), encoding="utf-8")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder."""
    merged: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        merged |= load_file(file)
    return merged
