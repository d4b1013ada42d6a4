"""The InternVL family: InternVL2.5-1B and its OCR, VQA, Geometry, Chart and Grounding experts.

Other sizes of InternVL2.5 and its successors load as well where their language model is a Qwen2 or a Llama.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset.pictures import BENCHMARKS, EXPERTS, TASK_EXPERTS, TEST_QUESTIONS
from expert_merging import stored
from expert_merging.backbone import Backbone, Evaluation
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.checkpoints.reading import reading
from expert_merging.errors import InputError
from expert_merging.flags import Count
from expert_merging.questions.entries import MARK
from expert_merging.questions.formats import Asking, Format
from expert_merging.questions.pictures import marked_question, read_picture
from InternVL import remote
from InternVL.images import Tiling, pixel_values
from InternVL.layout import IMAGE_TOKEN, native_config, published_name, read_config, tile_size, tile_tokens
from InternVL.native import CLASS, load_published, load_tokenizer, open_published

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from expert_merging.questions.calibration import Sample

IMAGE_START, IMAGE_END = "<img>", "</img>"
END = "<|im_end|>"

TEMPLATE_NAME = "internvl2_5"
# "You are InternVL ..., developed by Shanghai AI Laboratory, Tsinghua University and partners", as published.
SYSTEM_MESSAGE = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
)
TEMPLATE = f"<|im_start|>system\n{SYSTEM_MESSAGE}{END}\n<|im_start|>user\n{{question}}{END}\n<|im_start|>assistant\n"
# A turn's line break counts: the published code trains on it.
TURN_END = f"{END}\n"
CONVERSATION = Format(f"the published conversation {TEMPLATE_NAME}", TEMPLATE, end=TURN_END)

# Tasks whose pictures have small print or need exact places.
MAX_TILES = {"Chart": 12, "OCRVQA": 12, "Grounding": 12}


@dataclass(frozen=True)
class Processor:
    """What turns questions and pictures into model inputs.

    Args:
        folder: the checkpoint that it is from.
        tokenizer: the tokenizer.
        tiling: how pictures are cut.
        tile_tokens: tokens that stand for a tile.
        template: name of the conversation template that the checkpoint was trained with; None where it is not said.
    """

    folder: Path
    tokenizer: Any
    tiling: Tiling
    tile_tokens: int
    template: str | None


def load_model(folder: Path, dtype: torch.dtype, words: Path | None = None, *, trust_remote_code: bool = False) -> Any:
    """The model of the folder, in evaluation mode.

    Args:
        folder: the checkpoint.
        dtype: type of the weights in memory.
        words: the folder of the tokenizer that prompts are made with; the checkpoint itself by default.
        trust_remote_code: run the Python files in the checkpoint folders, for variants that transformers' own InternVL
            classes do not cover.

    Raises:
        InputError: transformers does not cover the variant, or tensors are missing, left over or of another shape.
    """
    tokenizer = _load_tokenizer(words or folder, trust_remote_code)
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    model = (remote.load if trust_remote_code else load_published)(folder, dtype, image_token)
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)} - {None, tokenizer.unk_token_id}
    model.generation_config.eos_token_id = sorted(ends)
    # A picture token in an answer would have to be given a picture when the answer is read again.
    model.generation_config.suppress_tokens = [image_token]
    return model


def parameter_names(folder: Path, *, trust_remote_code: bool = False) -> list[str]:
    """Names of the model's parameters in memory, from ``config.json`` alone.

    Args:
        folder: the checkpoint.
        trust_remote_code: run the Python files in the checkpoint folders, for variants that transformers' own InternVL
            classes do not cover.
    """
    if trust_remote_code:  # the original class calls parameters what the files call them
        remote.check_code(folder)
        return [*Checkpoint(folder).entries]
    _, config, tied = open_published(folder)
    with reading(folder, "configuration"):
        return stored.parameter_names(CLASS, native_config(config, tied=tied))


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> Processor:
    """Tokenizer and picture settings of the folder.

    Args:
        folder: the checkpoint.
        trust_remote_code: run the Python files in the checkpoint folders, for variants that transformers' own InternVL
            classes do not cover.

    Raises:
        InputError: transformers does not cover the variant, or the tokenizer cannot be read.
    """
    config = read_config(folder)
    return Processor(
        folder=folder,
        tokenizer=_load_tokenizer(folder, trust_remote_code),
        tiling=Tiling(tile_size(config), bool(config["dynamic_image_size"]), bool(config["use_thumbnail"])),
        tile_tokens=tile_tokens(config),
        template=config.get("template"),
    )


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer, which must have the tokens that surround and stand for pictures."""
    tokenizer = remote.load_tokenizer(folder) if trust_remote_code else load_tokenizer(folder)
    vocabulary = tokenizer.get_vocab()
    lacking = [token for token in (IMAGE_START, IMAGE_TOKEN, IMAGE_END) if token not in vocabulary]
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise InputError(f"{folder} lacks the tokenizer's vocabulary (vocab.json and merges.txt, or tokenizer.json)")
    if lacking:
        raise InputError(f"the tokenizer in {folder} lacks {', '.join(lacking)}; is added_tokens.json missing?")
    return tokenizer


def encode_prompt(
    processor: Processor,
    sample: Sample,
    asked: Format | None,
    *,
    max_tiles: Count = 6,
    max_tiles_dict: dict[str, Count] = MAX_TILES,
) -> dict[str, Tensor]:
    """Model inputs of question and pictures.

    Args:
        processor: tokenizer and picture settings.
        sample: the question and its pictures.
        asked: how it is asked; None for the published conversation.
        max_tiles: largest number of tiles that a picture is cut into; its thumbnail comes on top.
        max_tiles_dict: largest number of tiles by task, for tasks that need another one; entries are added to the
            default ones or replace them.

    Returns:
        ``input_ids`` and ``attention_mask``, ``(1, tokens)``; with pictures also ``pixel_values``,
        ``(tiles of all pictures, 3, size, size)`` float32.

    Raises:
        InputError: the sample cannot be encoded; says which and why.
    """
    import torch

    most = {**MAX_TILES, **max_tiles_dict}.get(sample.task, max_tiles)
    try:
        text = _prompt(processor, sample, asked or CONVERSATION)
        pixels = [pixel_values(read_picture(file), processor.tiling, most) for file in sample.images]
    except InputError as error:
        raise InputError(f"{sample.place}: {error}") from None
    for tiles in pixels:
        places = IMAGE_TOKEN * (processor.tile_tokens * len(tiles))
        text = text.replace(MARK, IMAGE_START + places + IMAGE_END, 1)
    tokens = torch.tensor([processor.tokenizer(text)["input_ids"]])
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return {**inputs, "pixel_values": torch.cat(pixels)} if pixels else inputs


def _prompt(processor: Processor, sample: Sample, asked: Format) -> str:
    """Text of the prompt with one mark for each picture."""
    if asked is CONVERSATION and processor.template != TEMPLATE_NAME:
        asks = "names no conversation template"
        if processor.template is not None:
            asks = f"asks for the conversation template {processor.template!r} and only {TEMPLATE_NAME!r} is known"
        raise InputError(f"{processor.folder / 'config.json'} {asks}; give --prompt_template with {{question}} in it")
    question = marked_question(sample, asked.text, mark=f"{MARK}\n", reserved=(IMAGE_TOKEN,))
    return asked.prompt(question)


BACKBONE = Backbone(
    name="InternVL",
    base_folder="InternVL2_5-1B",
    expert_folders={expert: f"InternVL2_5-1B_{expert}" for expert in EXPERTS},
    vision_tower="vision_model.*",
    exclude_params=("vision_model.*", ".*lm_head.*", ".*norm.*", ".*embed_tokens.*", ".*bias.*"),
    defaults={
        "scaling_coefficient": 0.1,
        "samples_per_task": 5,
        "sparsity_reg_weight": 5.0,
        # As published for InternVL; they start at the sum of the task vectors too.
        **{f"{method}.scaling_coefficient": 0.1 for method in ("wudi", "wudi2", "iwudi", "swudi", "aswudi")},
    },
    load_model=load_model,
    parameter_names=parameter_names,
    load_processor=load_processor,
    encode_prompt=encode_prompt,
    asking=Asking(conversation=CONVERSATION, end=TURN_END, reads_templates=False),
    task_experts=TASK_EXPERTS,
    takes_images=True,
    picture_bounds=("max_tiles", "max_tiles_dict"),
    file_name=published_name,
    test_questions=TEST_QUESTIONS,
    evaluation={
        "internvl_chat": Evaluation(
            commands=(
                "python run.py --config {eval} --verbose  # in VLMEvalKit",
                "accelerate launch -m lmms_eval --model internvl2 --batch_size 1 --model_args pretrained={model} "
                "--tasks refcoco_bbox_rec_val,refcoco+_bbox_rec_val,refcocog_bbox_rec_val "
                "--output_path {model}/../lmms_eval",
            ),
            vlmeval={"class": "InternVLChat", "version": "V2.0"},  # as it has for all of InternVL 2 to 3.5
            benchmarks=BENCHMARKS,
        )
    },
    loading=(
        'AutoModel.from_pretrained("{model}", torch_dtype="auto", trust_remote_code=True)  # with transformers 4',
        'AutoTokenizer.from_pretrained("{model}", trust_remote_code=True)',
    ),
)
