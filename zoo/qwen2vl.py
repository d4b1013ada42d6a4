"""The Qwen2-VL zoo: small models with the files of Qwen2-VL, and its prompt.

A picture has 4 x 4 patches, which four tokens stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expert_merging.libraries import import_transformers
from expert_merging.writing import write_atomically
from Qwen2VL.backbone import BACKBONE, PICTURE_TOKENS
from zoo import vision
from zoo.family import Batch
from zoo.pictures import SIDE
from zoo.tasks import Example

SPECIAL = ("<|im_start|>", *PICTURE_TOKENS, "<|video_pad|>")
# What the published template makes of a question with a picture; the template itself also knows videos and roles.
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    + "".join(PICTURE_TOKENS)
    + "{question}<|im_end|>\n<|im_start|>assistant\n"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "min_pixels": SIDE**2,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
# Looking at one of four places comes late and then at once; so does the second row of digits, of which this base,
# unlike InternVL's, has read none.
EXPERT_STEPS = {"VQA": 500, "OCR": 500}


def new_tokenizer() -> Any:
    """A Qwen2 tokenizer with the tokens that surround and stand for pictures."""
    return vision.new_tokenizer(SPECIAL, PROMPT)


def new_model() -> Any:
    """An untrained model of a million parameters."""
    transformers = import_transformers()
    tokenizer = new_tokenizer()
    start, picture, end = tokenizer.convert_tokens_to_ids(list(PICTURE_TOKENS))
    config = transformers.Qwen2VLConfig(
        text_config={
            **vision.LANGUAGE,
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 3,
            "embed_dim": 96,
            "hidden_size": 128,
            "mlp_ratio": 2,
            "num_heads": 4,
            "patch_size": PREPROCESSOR["patch_size"],
            "spatial_merge_size": PREPROCESSOR["merge_size"],
            "temporal_patch_size": PREPROCESSOR["temporal_patch_size"],
            "initializer_range": 0.04,
        },
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=picture,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        tie_word_embeddings=False,
    )
    model = transformers.Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def new_collate() -> Callable[[list[Example]], Batch]:
    """What turns examples into a batch: the published prompt, and pixels as the processor makes them."""
    tokenizer, processor = new_tokenizer(), import_transformers().Qwen2VLImageProcessorPil(**PREPROCESSOR)
    picture = tokenizer.convert_tokens_to_ids(PICTURE_TOKENS[1])
    count = (SIDE // (processor.patch_size * processor.merge_size)) ** 2
    prompt = PROMPT.replace(PICTURE_TOKENS[1], PICTURE_TOKENS[1] * count)

    def collate(examples: list[Example]) -> Batch:
        batch = vision.questions_with_answers(tokenizer, prompt, examples)
        pixels = processor([example.picture for example in examples], return_tensors="pt")
        return {**batch, "mm_token_type_ids": (batch["input_ids"] == picture).long(), **pixels}

    return collate


def save(model: Any, folder: Path) -> None:
    """Write the model with tokenizer, chat template and settings of the image processor."""
    model.save_pretrained(folder)
    vision.save_tokenizer(new_tokenizer(), folder)
    for name, content in {
        "preprocessor_config.json": PREPROCESSOR,
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }.items():
        write_atomically(folder / name, (json.dumps(content, indent=2) + "\n").encode())


FAMILY = vision.picture_family(
    "qwen2vl", BACKBONE, new_model=new_model, save=save, new_collate=new_collate, expert_steps=EXPERT_STEPS
)
