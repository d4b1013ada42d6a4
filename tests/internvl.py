"""Small random InternVL checkpoints in the published layout, and pictures, for the tests."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from tests.checkpoints import perturb, write_checkpoint
from zoo.tokens import save_slow_tokenizer

BASE = "InternVL2_5-1B"
EXPERTS = {name: f"{BASE}_{name}" for name in ("OCR", "VQA", "Geometry", "Chart", "Grounding")}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
TOKENS = {token: 256 + number for number, token in enumerate(SPECIAL)}
CODE = (
    "configuration_intern_vit.py",
    "configuration_internvl_chat.py",
    "conversation.py",
    "modeling_intern_vit.py",
    "modeling_internvl_chat.py",
)

# As the published config.json is, in a small size: a tile of 28 pixels has 16 patches and takes 4 tokens.
CONFIG: dict[str, Any] = {
    "architectures": ["InternVLChatModel"],
    "auto_map": {
        "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
        "AutoModel": "modeling_internvl_chat.InternVLChatModel",
        "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
    },
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 28,
    "llm_config": {
        "_attn_implementation": "flash_attention_2",
        "_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 1024,
        "max_window_layers": 2,
        "model_type": "qwen2",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "output_attentions": False,
        "output_hidden_states": False,
        "return_dict": True,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_bfloat16": True,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 264,
    },
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "model_type": "internvl_chat",
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internvl2_5",
    "torch_dtype": "bfloat16",
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "use_thumbnail": True,
    "vision_config": {
        "architectures": ["InternVisionModel"],
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": 16,
        "image_size": 28,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 24,
        "layer_norm_eps": 1e-06,
        "model_type": "intern_vit_6b",
        "norm_type": "layer_norm",
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": 7,
        "qk_normalization": False,
        "qkv_bias": True,
        "torch_dtype": "bfloat16",
        "use_flash_attn": True,
    },
}


def make_config(changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The configuration with changes, by keys such as ``vision_config.norm_type``."""
    config = copy.deepcopy(CONFIG)
    for key, value in (changes or {}).items():
        part = config
        *parents, last = key.split(".")
        for parent in parents:
            part = part[parent]
        part[last] = value
    return config


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the published tensors by name."""
    vision, language = config["vision_config"], config["llm_config"]
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    found: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (1, 1, width),
        "vision_model.embeddings.position_embedding": (1, (vision["image_size"] // patch) ** 2 + 1, width),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "vision_model.embeddings.patch_embedding.bias": (width,),
    }
    for layer in range(vision["num_hidden_layers"]):
        block = {
            "ls1": (width,),
            "ls2": (width,),
            "attn.qkv.weight": (3 * width, width),
            **({"attn.qkv.bias": (3 * width,)} if vision["qkv_bias"] else {}),
            **({f"attn.{part}_norm.weight": (width,) for part in "qk"} if vision["qk_normalization"] else {}),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "mlp.fc1.weight": (inner, width),
            "mlp.fc1.bias": (inner,),
            "mlp.fc2.weight": (width, inner),
            "mlp.fc2.bias": (width,),
        }
        kinds = ("weight", "bias") if vision["norm_type"] == "layer_norm" else ("weight",)
        block |= {f"{norm}.{kind}": (width,) for norm in ("norm1", "norm2") for kind in kinds}
        found |= {f"vision_model.encoder.layers.{layer}.{name}": shape for name, shape in block.items()}
    hidden, inner = language["hidden_size"], language["intermediate_size"]
    found |= {
        "mlp1.0.weight": (4 * width,),
        "mlp1.0.bias": (4 * width,),
        "mlp1.1.weight": (hidden, 4 * width),
        "mlp1.1.bias": (hidden,),
        "mlp1.3.weight": (hidden, hidden),
        "mlp1.3.bias": (hidden,),
        "language_model.model.embed_tokens.weight": (language["vocab_size"], hidden),
    }
    keys = hidden // language["num_attention_heads"] * language["num_key_value_heads"]
    biased = language["architectures"] == ["Qwen2ForCausalLM"]
    for layer in range(language["num_hidden_layers"]):
        block = {"self_attn.o_proj.weight": (hidden, hidden)}
        for part, rows in {"q": hidden, "k": keys, "v": keys}.items():
            block[f"self_attn.{part}_proj.weight"] = (rows, hidden)
            block |= {f"self_attn.{part}_proj.bias": (rows,)} if biased else {}
        block |= {f"mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        block["mlp.down_proj.weight"] = (hidden, inner)
        block |= {f"{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        found |= {f"language_model.model.layers.{layer}.{name}": shape for name, shape in block.items()}
    found["language_model.model.norm.weight"] = (hidden,)
    if not language["tie_word_embeddings"]:
        found["language_model.lm_head.weight"] = (language["vocab_size"], hidden)
    return found


def make_tensors(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Random weights large enough that every part of the model matters: norms about 1, the others about 0."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.2 * torch.randn(shape, generator=generator)
        + ("norm" in name or ".ls" in name or name == "mlp1.0.weight")
        for name, shape in shapes(config).items()
    }


def save_model(folder: Path, seed: int, changes: Mapping[str, Any] | None = None, *, shards: int = 1) -> Path:
    """A random checkpoint in the published layout with tokenizer, preprocessor and its code, which must not run."""
    config = make_config(changes)
    tensors = make_tensors(config, seed)
    parts = [dict(list(tensors.items())[start::shards]) for start in range(shards)]
    write_checkpoint(folder, *parts, config=config)
    save_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text('{"crop_size": 448, "do_normalize": true}\n', encoding="utf-8")
    for name in CODE:
        (folder / name).write_text("raise RuntimeError('code of a checkpoint was executed')\n", encoding="utf-8")
    return folder


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def save_tokenizer(folder: Path) -> None:
    """A slow Qwen2 tokenizer as the published folders have it, with a token for each byte."""
    settings = {
        "add_bos_token": False,
        "additional_special_tokens": SPECIAL[1:],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 8192,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "unk_token": None,
    }
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    save_slow_tokenizer(folder, vocabulary, [], TOKENS, settings)


def make_picture(file: Path, size: tuple[int, int] = (90, 40), *, seed: int = 0) -> Path:
    """A picture whose corners, colours and sides can all be told apart."""
    width, height = size
    image = Image.new("RGB", size, (200, 30 + 40 * (seed % 5), 90))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width // 2, height // 3), fill=(10, 220, 40 * (seed % 6)))
    draw.line((0, height - 1, width - 1, height // 2), fill=(255, 255, 255), width=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
    return file


def write_tasks(folder: Path, *, count: int = 2, response: str | None = "yes") -> None:
    """Calibration files under public names with a picture for every question but the last of each."""
    for number, task in enumerate(("VizWiz", "MathVista", "Chart", "TextVQA", "Grounding")):
        entries = []
        for index in range(count):
            make_picture(folder / "images" / f"{task}{index}.png", (60 + 30 * index, 40), seed=number + index)
            entry: dict[str, Any] = {"question": f"{task} {index}?", "question_id": index}
            if index < count - 1:
                entry["image_path"] = f"images/{task}{index}.png"
            entries.append({**entry, **({"response": f"{response} {task}"} if response else {})})
        (folder / f"{task}.json").write_text(json.dumps(entries), encoding="utf-8")


def make_zoo(cache: Path, changes: Mapping[str, Any] | None = None, *, response: str | None = "yes") -> Path:
    """A base and five experts below ``cache`` under their published names, with calibration files in ``dataset``."""
    save_model(cache / BASE, 0, changes)
    for number, folder in enumerate(EXPERTS.values()):
        perturb(cache / BASE, cache / folder, 1 + number)
    write_tasks(cache / "dataset", response=response)
    return cache
