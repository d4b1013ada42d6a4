"""The Qwen2-VL family: Qwen2-VL-7B and its OCR, VQA, Geometry, Chart and Grounding experts; Qwen2.5-VL loads as well.

Pictures always go through the checkpoint's image processor in its Pillow form, whatever is installed: the same file
gives the same pixels everywhere. transformers' own processor class would also want a video processor, which needs
torchvision, so what it does with pictures and text is put together here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset.pictures import BENCHMARKS, EXPERTS, TASK_EXPERTS, TEST_QUESTIONS
from expert_merging import stored
from expert_merging.backbone import Backbone, Evaluation, load_tokenizer, load_whole
from expert_merging.checkpoints.folders import refuse_pointers, required_object
from expert_merging.checkpoints.reading import reading
from expert_merging.errors import InputError, excerpt
from expert_merging.flags import Count
from expert_merging.libraries import import_transformers
from expert_merging.questions.entries import MARK
from expert_merging.questions.formats import Asking, Format
from expert_merging.questions.pictures import marked_question, read_picture
from expert_merging.questions.templates import ChatTemplate, template_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from expert_merging.questions.calibration import Sample
    from expert_merging.questions.picture_sources import Picture

_CLASS = "AutoModelForImageTextToText"
# A picture in a prompt; the middle one is repeated for every token that the picture takes.
PICTURE_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
# What files call the bounds on pictures.
_LOW, _HIGH = ("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")
# What texts may not contain, since the model would take it for a picture or a video.
_RESERVED = (*PICTURE_TOKENS, "<|video_pad|>")

END = "<|im_end|>\n"
# The published conversation. The published base has a template of its own, which goes through parts where messages are
# and writes nothing.
TEMPLATE = ChatTemplate(
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "Qwen2-VL as published",
)
CONVERSATION = Format(f"the chat template of {TEMPLATE.name}", "", TEMPLATE, END)
ASKING = Asking(conversation=CONVERSATION, end=END, picture=PICTURE_TOKENS[1])


def file_name(name: str) -> str:
    """Name of a parameter in the published checkpoints: ``model.layers...``, ``visual...``, ``lm_head.weight``.

    Newer ones, and models in memory, have ``model.language_model.layers...`` and ``model.visual...``.
    """
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model of the folder, in evaluation mode.

    Raises:
        InputError: the folder lacks a tensor of the model, or has one of another shape.
    """
    _config(folder)
    model = load_whole(_CLASS, folder, dtype, file_name)
    # A picture token in an answer would have to be given a picture when the answer is read again.
    model.generation_config.suppress_tokens = [model.config.image_token_id, model.config.video_token_id]
    return model


def parameter_names(folder: Path) -> list[str]:
    """Names of the model's parameters in memory, from ``config.json`` alone.

    Raises:
        InputError: the folder has a model of another kind.
    """
    config = _config(folder)
    with reading(folder, "configuration"):
        return stored.parameter_names(_CLASS, config)


def _config(folder: Path) -> Any:
    kind = required_object(folder / "config.json").get("model_type")
    if not isinstance(kind, str) or kind not in EVALUATION:
        raise InputError(
            f"{folder / 'config.json'} has the model_type {json.dumps(kind)}; learning with the Qwen2-VL family "
            f"takes {' and '.join(EVALUATION)}"
        )
    with reading(folder, "configuration"):
        return import_transformers().AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@dataclass(frozen=True)
class Processor:
    """What turns questions and pictures into model inputs.

    Args:
        folder: the checkpoint that it is from.
        tokenizer: the tokenizer, with the chat template.
        image_processor: cuts pictures into patches.
    """

    folder: Path
    tokenizer: Any
    image_processor: Any


def load_processor(folder: Path, *, min_pixels: Count | None = None, max_pixels: Count | None = None) -> Processor:
    """Tokenizer, chat template and image processor of the folder.

    Args:
        folder: the checkpoint.
        min_pixels: smaller pictures are enlarged to this many pixels (by default what the checkpoint says, 3136 in the
            published ones).
        max_pixels: larger pictures are reduced to this many pixels (by default what the checkpoint says, 12845056 in
            the published ones); 784 make one token, so a lower bound saves memory and time.

    Raises:
        InputError: files are missing, or the bounds leave nothing between them.
    """
    refuse_pointers(folder.glob("*token*"))
    transformers = import_transformers()
    with reading(folder, "processor"):
        images = _image_processor(folder, min_pixels, max_pixels)
        tokenizer = load_tokenizer(folder)
        settings, _ = transformers.Qwen2VLProcessor.get_processor_dict(folder, local_files_only=True)
    # As in transformers: a template beside the processor's settings counts before the tokenizer's own.
    tokenizer.chat_template = settings.get("chat_template") or tokenizer.chat_template
    return Processor(folder, tokenizer, images)


def _image_processor(folder: Path, min_pixels: int | None, max_pixels: int | None) -> Any:
    """The folder's image processor with the bounds that are given, or else with its own.

    Files have bounds as ``min_pixels`` and ``max_pixels``, or in ``size``, under the same names or as edges.
    """
    kind = import_transformers().Qwen2VLImageProcessorPil
    settings, _ = kind.get_image_processor_dict(folder, local_files_only=True)
    size = settings.get("size") or {}
    if not isinstance(size, dict) or not set(size) <= {*_LOW, *_HIGH}:
        raise InputError(
            f"{folder} has a preprocessor_config.json with the size {excerpt(size)}; it must have min_pixels and "
            "max_pixels, or shortest_edge and longest_edge"
        )
    defaults = kind().size
    low = min_pixels or settings.get("min_pixels") or _first(size, _LOW) or defaults["shortest_edge"]
    high = max_pixels or settings.get("max_pixels") or _first(size, _HIGH) or defaults["longest_edge"]
    for bound in (low, high):
        if not isinstance(bound, int) or bound < 1:
            raise InputError(f"{folder} has a preprocessor_config.json that bounds pictures by {excerpt(bound)} pixels")
    if low > high:
        raise InputError(f"--min_pixels {low} is above --max_pixels {high}; pictures get a size between the two")
    bounds = {"shortest_edge": low, "longest_edge": high}
    return kind.from_pretrained(folder, local_files_only=True, size=bounds, min_pixels=low, max_pixels=high)


def _first(size: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((size[name] for name in names if size.get(name)), None)


def encode_prompt(processor: Processor, sample: Sample, asked: Format | None) -> dict[str, Tensor]:
    """Model inputs of question and pictures.

    Args:
        processor: tokenizer and image processor.
        sample: the question and its pictures.
        asked: how it is asked; None for the checkpoint's chat template, or the published one where that asks nothing.

    Returns:
        ``input_ids``, ``attention_mask`` and ``mm_token_type_ids`` (1 where a picture is), ``(1, tokens)``; with
        pictures also ``pixel_values``, ``(patches, values of a patch)``, and ``image_grid_thw``, ``(pictures, 3)``:
        time, height and width in patches, which is what the model derives rotary positions (M-RoPE) from.

    Raises:
        InputError: the sample cannot be encoded; says which and why.
    """
    import torch

    try:
        text = _prompt(sample, asked or ASKING.format_of(template_of(processor.tokenizer)))
        pictures = [_patches(processor, file) for file in sample.images]
    except InputError as error:
        raise InputError(f"{sample.place}: {error}") from None
    prompt, *rest = text.split(PICTURE_TOKENS[1])
    for picture, piece in zip(pictures, rest, strict=True):
        count = int(picture["image_grid_thw"].prod()) // processor.image_processor.merge_size**2
        prompt += PICTURE_TOKENS[1] * count + piece
    tokens = torch.tensor([processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    place = processor.tokenizer.convert_tokens_to_ids(PICTURE_TOKENS[1])
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == place).long(),
    }
    pixels = {name: [picture[name] for picture in pictures] for name in ("pixel_values", "image_grid_thw")}
    return inputs | ({name: torch.cat(values) for name, values in pixels.items()} if pictures else {})


def _patches(processor: Processor, path: Picture) -> Any:
    """Pixels of one picture, resized by the processor's rule and cut into patches."""
    picture = read_picture(path, on_white=True)  # as only newer versions of the processor do
    try:
        return processor.image_processor(picture, return_tensors="pt")
    except ValueError as error:  # sides that differ too much
        raise InputError(f"{path} ({picture.width} x {picture.height} pixels): {error}") from None


def _prompt(sample: Sample, asked: Format) -> str:
    """Text of the prompt, with the three tokens of a picture where each belongs."""
    question = marked_question(sample, asked.text, mark=MARK, reserved=_RESERVED)
    pictures = len(sample.images)
    if asked.template is None:
        return asked.prompt(question).replace(MARK, "".join(PICTURE_TOKENS))
    content: Any = question
    if pictures:  # a question without pictures stays a plain text, which every template takes
        start, *rest = ({"type": "text", "text": text} for text in question.split(MARK))
        content = [start, *(part for text in rest for part in ({"type": "image"}, text))]
    text = asked.prompt(content)
    if text.count(PICTURE_TOKENS[1]) != pictures:
        raise InputError(
            f"{asked.origin} has {text.count(PICTURE_TOKENS[1])} places for {pictures} pictures; give "
            "--prompt_template with {question} in it"
        )
    return text


def _commands(model_type: str) -> tuple[str, ...]:
    return (
        "python run.py --config {eval} --verbose  # in VLMEvalKit",
        f"accelerate launch -m lmms_eval --model {model_type} --model_args pretrained={{model}},max_pixels=2359296 "
        "--tasks refcoco_bbox_rec_val,refcoco+_bbox_rec_val,refcocog_bbox_rec_val --batch_size 1",
    )


# As in VLMEvalKit's own configurations. Its class tells the generations apart by words in the path.
_VLMEVAL = {"class": "Qwen2VLChat", "min_pixels": 1280 * 28 * 28, "max_pixels": 16384 * 28 * 28}
EVALUATION = {
    "qwen2_vl": Evaluation(
        _commands("qwen2_vl"), _VLMEVAL, vlmeval_path=r"(?!.*(2\.5|2_5|qwen25|omni))", benchmarks=BENCHMARKS
    ),
    "qwen2_5_vl": Evaluation(
        _commands("qwen2_5_vl"),
        {**_VLMEVAL, "use_custom_prompt": False},
        vlmeval_path=r"(?!.*omni).*(2\.5|2_5|qwen25)",
        benchmarks=BENCHMARKS,
        run_name="Qwen2_5VL",
    ),
}

BACKBONE = Backbone(
    name="Qwen2VL",
    base_folder="Qwen2-VL-7B",
    expert_folders={expert: f"Qwen2-VL-7B-{expert}" for expert in EXPERTS},
    vision_tower="visual.*",
    exclude_params=("visual.*", ".*lm_head.*", ".*norm.*", ".*embed_tokens.*", ".*bias.*"),
    defaults={
        "scaling_coefficient": 0.3,
        "samples_per_task": 10,
        "sparsity_reg_weight": 0.8,
        # As published for Qwen2-VL, whose experts were trained with LoRA.
        "wudi.scaling_coefficient": 0.3,
        "wudi2.wudi2_variant": "lora",
        **{f"{method}.scaling_coefficient": 0.2 for method in ("iwudi", "swudi", "aswudi")},
    },
    load_model=load_model,
    parameter_names=parameter_names,
    load_processor=load_processor,
    encode_prompt=encode_prompt,
    asking=ASKING,
    takes_images=True,
    picture_bounds=("max_pixels",),
    file_name=file_name,
    task_experts=TASK_EXPERTS,
    test_questions=TEST_QUESTIONS,
    evaluation=EVALUATION,
    loading=(
        'AutoModelForImageTextToText.from_pretrained("{model}", dtype="auto")',
        'AutoProcessor.from_pretrained("{model}")',
    ),
)
