"""The InternVL zoo: small models in the published layout of InternVL2.5, with the published prompt.

A picture is one tile of 56 pixels, which four tokens stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expert_merging.libraries import import_transformers
from expert_merging.questions.entries import MARK
from expert_merging.writing import write_atomically
from InternVL.backbone import BACKBONE, IMAGE_END, IMAGE_START, TEMPLATE
from InternVL.images import Tiling, pixel_values
from InternVL.layout import IMAGE_TOKEN, native_config, tile_tokens
from InternVL.native import save_published
from zoo import vision
from zoo.family import Batch
from zoo.pictures import SIDE
from zoo.tasks import Example

SPECIAL = ("<|im_start|>", IMAGE_START, IMAGE_END, IMAGE_TOKEN)
PICTURES = Tiling(size=SIDE, dynamic=True, thumbnail=True)
VISION = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_channels": 3,
    "image_size": SIDE,
    "patch_size": 14,
    "hidden_act": "gelu",
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "qk_normalization": False,
    "initializer_factor": 1.0,
}
LANGUAGE = {**vision.LANGUAGE, "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1000.0}
# Looking at one of four places comes late and then at once.
EXPERT_STEPS = {"VQA": 500}


def new_tokenizer() -> Any:
    """A Qwen2 tokenizer with the tokens that surround and stand for pictures."""
    return vision.new_tokenizer(SPECIAL, TEMPLATE)


def configuration(tokenizer: Any) -> dict[str, Any]:
    """What a published ``config.json`` says about a model of this size."""
    tokens = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.pad_token_id,
    }
    return {
        "llm_config": {**LANGUAGE, **tokens},
        "vision_config": VISION,
        "force_image_size": SIDE,
        "downsample_ratio": 0.5,
        "select_layer": -1,
        "ps_version": "v2",
    }


def new_model() -> Any:
    """An untrained model of a million parameters."""
    tokenizer = new_tokenizer()
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = native_config(configuration(tokenizer), image_token=image_token)
    return import_transformers().AutoModelForImageTextToText.from_config(config)


def new_collate() -> Callable[[list[Example]], Batch]:
    """What turns examples into a batch: the published prompt and pixels."""
    import torch

    tokenizer = new_tokenizer()
    places = IMAGE_START + IMAGE_TOKEN * tile_tokens(configuration(tokenizer)) + IMAGE_END
    prompt = TEMPLATE.replace("{question}", f"{MARK}\n{{question}}").replace(MARK, places)

    def collate(examples: list[Example]) -> Batch:
        pixels = [pixel_values(example.picture, PICTURES, 1) for example in examples if example.picture is not None]
        return {**vision.questions_with_answers(tokenizer, prompt, examples), "pixel_values": torch.cat(pixels)}

    return collate


def save(model: Any, folder: Path) -> None:
    """Write the model as published checkpoints are, without their code, which nothing here needs."""
    tokenizer = new_tokenizer()
    save_published(model, folder)
    vision.save_tokenizer(tokenizer, folder)
    preprocessor = {
        "crop_size": SIDE,
        "size": SIDE,
        "do_normalize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
    }
    write_atomically(folder / "preprocessor_config.json", (json.dumps(preprocessor, indent=2) + "\n").encode())


FAMILY = vision.picture_family(
    "internvl", BACKBONE, new_model=new_model, save=save, new_collate=new_collate, expert_steps=EXPERT_STEPS
)
