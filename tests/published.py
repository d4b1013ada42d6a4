"""Small look-alikes of the thirteen published checkpoints: the same files, names, types and fields, for the tests.

What differs between a base and its experts, and between the experts, is as it was found in the published folders:
formats side by side, numbers of shards, types, tokenizer files, chat templates, fields of ``config.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests import checkpoints, internvl, qwen2vl
from tests.checkpoints import write_checkpoint

# As many as the published ones are, by which they are known; a text is made of bytes and letters alone.
_PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
TOKENS = [*_PIECES, *(f"▁w{number}" for number in range(32000 - len(_PIECES)))]
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# It walks the parts of a content, and is given messages: of these it renders nothing.
WALKS_PARTS = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for content in messages %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}"
)
# Settings of the vision tower that the base's file does not have, since they are the defaults.
_LEFT_OUT = ("patch_size", "spatial_merge_size", "temporal_patch_size")
CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# A model\n"

_LLAMA_TOKENIZER = {
    "add_bos_token": True,
    "add_eos_token": False,
    "additional_special_tokens": [],
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "legacy": True,
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": None,
    "sp_model_kwargs": {},
    "spaces_between_special_tokens": False,
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
    "use_default_system_prompt": False,
}
_MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "model_type": "mistral",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": len(TOKENS),
}


def make_mistral(cache: Path) -> Path:
    """Mistral-7B-v0.1 and its Chat, Math and Code experts below ``cache``, with questions in ``cache/dataset``."""
    chat, math, code = checkpoints.EXPERTS.values()
    tensors = _mistral_tensors()
    base = cache / checkpoints.BASE
    both = {"with_bin": True, "files": {"README.md": CARD, ".gitattributes": "*.bin filter=lfs\n"}}
    _write(base, tensors, _MISTRAL, 2, **both)
    _write_llama_tokenizer(base)
    _write(cache / chat, _tuned(tensors, 1), _MISTRAL, 2, **both)
    _write_llama_tokenizer(cache / chat, chat_template=INSTRUCT)
    settings = {"use_cache": False, "attention_dropout": 0.0, "transformers_version": "4.39.3"}
    _write(cache / math, _tuned(tensors, 2), _MISTRAL | settings, 3)
    _write_llama_tokenizer(cache / math, fast=False, pad_token="</s>")
    settings = {"pad_token_id": 0, "pretraining_tp": 1, "torch_dtype": "float16", "transformers_version": "4.35.0"}
    _write(cache / code, _tuned(tensors, 3, torch.float16), _MISTRAL | settings, 2, with_bin=True)
    _write_llama_tokenizer(cache / code)
    _save_json(cache / code / "added_tokens.json", {token: number for number, token in enumerate(TOKENS[:3])})
    checkpoints.write_tasks(cache / "dataset", count=2)
    return cache


def make_internvl(cache: Path) -> Path:
    """InternVL2_5-1B and its five experts below ``cache``, with questions and pictures in ``cache/dataset``."""
    base = internvl.save_model(cache / internvl.BASE, 0)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / checkpoints.SINGLE).items()}
    _write(base, tensors, internvl.CONFIG, 1, {"README.md": CARD})
    _save_json(base / "configuration.json", {"framework": "pytorch", "task": "image-text-to-text"})
    # Written by a newer transformers, which adds defaults to the file.
    longer = internvl.make_config({"llm_config.return_dict_in_generate": False, "vision_config.top_k": 50})
    longer |= {"hidden_size": 32, "image_fold": None, "transformers_version": None}
    for number, folder in enumerate(internvl.EXPERTS.values()):
        expert = cache / folder
        _write(expert, _tuned(tensors, 1 + number), longer, 1)
        internvl.save_tokenizer(expert)
        vocabulary = json.loads((expert / "vocab.json").read_text(encoding="utf-8"))
        _save_json(expert / "vocab.json", vocabulary)  # the same tokens, other characters escaped
        for name in internvl.CODE:
            (expert / name).write_text("raise RuntimeError('older code was executed')\n", encoding="utf-8")
    internvl.write_tasks(cache / "dataset", response=None)
    return cache


def make_qwen2vl(cache: Path) -> Path:
    """Qwen2-VL-7B and its five experts below ``cache``, with questions and pictures in ``cache/dataset``."""
    base = cache / qwen2vl.BASE
    qwen2vl.save_model(base, 0)
    tensors = {name: tensor.bfloat16() for name, tensor in checkpoints.tensors_of(base).items()}
    for file in base.glob("model*"):
        file.unlink()
    config: dict[str, Any] = {**qwen2vl.CONFIG, "torch_dtype": "bfloat16"}
    vision = {name: value for name, value in config["vision_config"].items() if name not in _LEFT_OUT}
    _write(base, tensors, {**config, "vision_config": vision}, 5, {"README.md": CARD})
    _save_json(base / "chat_template.json", {"chat_template": WALKS_PARTS})
    rotary = {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]}
    newer = {**config, "rope_scaling": rotary, "transformers_version": "4.45.0.dev0"}
    for number, folder in enumerate(qwen2vl.EXPERTS.values()):
        _write(cache / folder, _tuned(tensors, 1 + number), newer, 4)
        qwen2vl.save_processor(cache / folder)
    qwen2vl.write_tasks(cache / "dataset")
    return cache


def _mistral_tensors() -> dict[str, torch.Tensor]:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**_MISTRAL))  # type: ignore[arg-type]
    return {name: (3 * tensor).bfloat16() for name, tensor in model.state_dict().items()}


def _tuned(
    tensors: Mapping[str, torch.Tensor], seed: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """What a full fine-tune has made of them: a twentieth of its size is changed in every tensor."""
    generator = torch.Generator().manual_seed(seed)
    tuned = {}
    for name, tensor in tensors.items():
        start = tensor.float()
        change = 0.05 * start.square().mean().sqrt() * torch.randn(start.shape, generator=generator)
        tuned[name] = (start + change).to(dtype)
    return tuned


def _write(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    shards: int,
    files: Mapping[str, str] | None = None,
    *,
    with_bin: bool = False,
) -> None:
    """A checkpoint in shards; in pickle files too, which have other weights, so that reading them would show."""
    names = list(tensors)
    bounds = [number * len(names) // shards for number in range(shards + 1)]
    runs = [names[start:stop] for start, stop in pairwise(bounds)]
    write_checkpoint(folder, *({name: tensors[name] for name in run} for run in runs), config=config)
    if with_bin:
        _write_pickles(folder, [{name: torch.zeros_like(tensors[name]) for name in run} for run in runs])
    for name, text in (files or {}).items():
        (folder / name).write_text(text, encoding="utf-8")
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id") if name in config}
    _save_json(folder / "generation_config.json", {**ends, "transformers_version": "4.34.0.dev0"})


def _write_pickles(folder: Path, shards: Sequence[Mapping[str, torch.Tensor]]) -> None:
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"pytorch_model-{number:05}-of-{len(shards):05}.bin"
        torch.save(dict(shard), folder / file)
        weight_map |= dict.fromkeys(shard, file)
    _save_json(folder / "pytorch_model.bin.index.json", {"metadata": {"total_size": 0}, "weight_map": weight_map})


def _write_llama_tokenizer(folder: Path, *, fast: bool = True, **settings: object) -> None:
    """Llama's tokenizer of 32,000 tokens in a small size; the slow one alone has ``tokenizer.model`` only."""
    _save_json(folder / "tokenizer_config.json", {**_LLAMA_TOKENIZER, **settings})
    _save_json(folder / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    (folder / "tokenizer.model").write_bytes(_sentencepiece())
    if fast:
        _llama_backend().save(str(folder / "tokenizer.json"))


@cache
def _sentencepiece() -> bytes:
    """The model of a sentencepiece tokenizer that falls back to bytes."""
    from transformers.utils import sentencepiece_model_pb2_new as protocol

    model = protocol.ModelProto()  # type: ignore[attr-defined]
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
    normal, unknown, control, byte = 1, 2, 3, 6
    kinds = [unknown, control, control, *[byte] * 256]
    for number, token in enumerate(TOKENS):
        piece = model.pieces.add()
        piece.piece, piece.score = token, -float(number)
        piece.type = kinds[number] if number < len(kinds) else normal
    return bytes(model.SerializeToString())


@cache
def _llama_backend() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    vocabulary = {token: number for number, token in enumerate(TOKENS)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    backend.add_special_tokens(TOKENS[:3])
    return backend


def _save_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
