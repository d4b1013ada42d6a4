"""Small random Qwen2-VL checkpoints in the layout that users have, and pictures, for the tests."""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Mapping
from pathlib import Path

import numpy
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from expert_merging.outputs import index_of
from tests.checkpoints import INDEX, perturb
from zoo.tokens import character_tokenizer

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHARACTERS = [*SPECIAL, *string.ascii_letters, *string.digits, *" .,:;?!+-=()'\n"]
BASE = "Qwen2-VL-7B"
EXPERTS = {name: f"Qwen2-VL-7B-{name}" for name in ("OCR", "VQA", "Geometry", "Chart", "Grounding")}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# It goes through parts of a message where messages are, as the published base's does: it writes nothing.
SILENT_TEMPLATE = (
    "{% if messages is string %}{{ messages }}{% else %}{% for part in messages %}{% if 'image' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}"
)

# As the published checkpoint has it: everything about the language model at the top level.
CONFIG = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "vision_start_token_id": 3,
    "vision_end_token_id": 4,
    "vision_token_id": 5,
    "image_token_id": 6,
    "video_token_id": 7,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "max_window_layers": 3,
    "model_type": "qwen2_vl",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 2,
        "embed_dim": 16,
        "mlp_ratio": 2,
        "num_heads": 2,
        "in_chans": 3,
        "hidden_size": 32,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "vocab_size": len(CHARACTERS),
}
PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}
# The second generation: gated blocks with attention in windows, and RMS norms.
CONFIG_2_5 = {
    **CONFIG,
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "vision_config": {
        "depth": 2,
        "hidden_act": "silu",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "in_chans": 3,
        "out_hidden_size": 32,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
}


def save_processor(folder: Path) -> None:
    """A character tokenizer, image processor settings and a chat template, in the files of the published ones."""
    unknown, padding, end = "<|vision_pad|>", "<|endoftext|>", "<|im_end|>"
    vocabulary = {token: number for number, token in enumerate(CHARACTERS)}
    tokenizer = character_tokenizer(vocabulary, SPECIAL, unk_token=unknown, pad_token=padding, eos_token=end)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR), encoding="utf-8")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}), encoding="utf-8")


def save_model(folder: Path, seed: int, *, config: Mapping[str, object] = CONFIG, shard: str = "60KB") -> None:
    """A random model in several files, with its processor."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_processor(folder)


def with_newer_names(source: Path, target: Path) -> Path:
    """A copy of a checkpoint as later versions of transformers save it: other names, nested settings."""
    from transformers import AutoConfig

    shutil.copytree(source, target)
    names, size = {}, 0
    for file in sorted(target.glob("*.safetensors")):
        tensors = {newer_name(name): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        names[file.name] = list(tensors)
        size += sum(tensor.nbytes for tensor in tensors.values())
    (target / INDEX).write_bytes(index_of(names, size))
    AutoConfig.from_pretrained(source).save_pretrained(target)
    return target


def newer_name(name: str) -> str:
    """The newer name of a published one."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def make_zoo(cache: Path, *, config: Mapping[str, object] = CONFIG, seed: int = 0) -> Path:
    """A base and five experts below ``cache`` under the published names, with calibration files in
    ``cache/dataset``."""
    save_model(cache / BASE, seed, config=config)
    for number, folder in enumerate(EXPERTS.values()):
        perturb(cache / BASE, cache / folder, seed + 1 + number)
    write_tasks(cache / "dataset")
    return cache


def write_tasks(folder: Path, *, count: int = 2) -> None:
    """Calibration files: samples with one picture, with two, and with none, each with a response."""
    save_picture(folder / "images" / "wide.png", 90, 40)
    save_picture(folder / "images" / "tall.png", 30, 70)
    pictures = {
        "OCR": "images/wide.png",
        "GQA": ["images/wide.png", "images/tall.png"],
        "MathVista": None,
        "Chart": "images/tall.png",
        "Grounding": ["images/tall.png", "images/tall.png"],
    }
    for task, images in pictures.items():
        entries = [
            {"question": f"{task} question {number}?", "question_id": number, "response": f"{task}: {number}"}
            for number in range(count)
        ]
        if images:
            entries = [{**entry, "image_path": images} for entry in entries]
        (folder / f"{task}.json").write_text(json.dumps(entries), encoding="utf-8")


def save_picture(file: Path, width: int, height: int, *, seed: int = 0, mode: str = "RGB") -> Path:
    """A picture of noise."""
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = numpy.random.default_rng(seed).integers(0, 256, height * width * len(mode), dtype=numpy.uint8)
    Image.frombytes(mode, (width, height), noise.tobytes()).save(file)
    return file
