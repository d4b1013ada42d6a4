"""Prompts and tokenizers of the InternVL family, against the published rules."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expert_merging.errors import InputError
from expert_merging.questions.calibration import Sample
from InternVL.backbone import BACKBONE, encode_prompt, load_model, load_processor
from tests.command import given
from tests.InternVL import reference
from tests.internvl import BASE, TOKENS, make_config, make_picture, save_model


@pytest.fixture(scope="session")
def processor(internvl_zoo: Path):
    return load_processor(internvl_zoo / BASE)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    return [make_picture(folder / f"{seed}.png", (20 + 45 * seed, 50), seed=seed) for seed in range(3)]


PLACE = r"GQA\.json, entry 7 \(counted from 0\)"


def sample(question: str, *images: Path, task: str = "GQA") -> Sample:
    return Sample(task, "VQA", question, None, "7", images=images, file=Path(f"{task}.json"), number=7)


def picture_tokens(tiles: int) -> list[int]:
    return [TOKENS["<img>"], *[TOKENS["<IMG_CONTEXT>"]] * (4 * tiles), TOKENS["</img>"]]


QUESTIONS = {
    "text": ("How are you?", 0),
    "picture first": ("What is this?", 1),
    "pictures first": ("What are these?", 3),
    "mark in the middle": ("In <image>, what is this?", 1),
    "marks": ("<image> and <image>\nand then <image>", 3),
    "other scripts": ("这是什么？ naïve 🦜\n\n 3.14", 1),  # noqa: RUF001
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_tokens_and_pixels_are_the_published_ones(name, processor, pictures):
    question, count = QUESTIONS[name]
    inputs = encode_prompt(processor, sample(question, *pictures[:count]), None)
    tokens, pixels = reference.encode(question, pictures[:count], make_config(), 6)
    assert inputs["input_ids"].tolist() == tokens.tolist()
    assert inputs["attention_mask"].tolist() == [[1] * tokens.shape[1]]
    if count:
        assert torch.equal(inputs["pixel_values"], pixels)
        assert (tokens == TOKENS["<IMG_CONTEXT>"]).sum() == 4 * len(pixels)
    else:
        assert "pixel_values" not in inputs


def test_the_prompt_in_full(processor, tmp_path):
    """Written out once, so that reference and code cannot be wrong together."""
    inputs = encode_prompt(processor, sample("Why?", make_picture(tmp_path / "a.png", (28, 28))), None)
    system = (
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
    )
    question = "<img><IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT></img>\nWhy?"
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_pictures_without_marks_come_before_those_with(processor, pictures):
    inputs = encode_prompt(processor, sample("Compare with <image>", *pictures[:2]), given("{question}"))
    pixels = [reference.encode("", [file], make_config(), 6)[1] for file in pictures[:2]]
    expected = [
        *picture_tokens(len(pixels[0])),
        *b"\nCompare with ",
        *picture_tokens(len(pixels[1])),
    ]
    assert inputs["input_ids"][0].tolist() == expected
    assert torch.equal(inputs["pixel_values"], torch.cat(pixels))


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        ("Q: {question} A:", b"Q: ", b"\nWhy? A:"),
        ("<image> Q: {question}", b"", b" Q: Why?"),
        ("{question}", b"", b"\nWhy?"),
    ],
)
def test_another_template_replaces_all_but_the_pictures(template, before, after, processor, pictures):
    inputs = encode_prompt(processor, sample("Why?", pictures[0]), given(template))
    tiles = len(inputs["pixel_values"])
    assert inputs["input_ids"][0].tolist() == [*before, *picture_tokens(tiles), *after]


@pytest.mark.parametrize(
    ("task", "given", "tiles"),
    [
        ("GQA", {}, 6),
        ("OCR", {}, 6),
        ("TextVQA", {}, 6),
        ("Chart", {}, 12),
        ("OCRVQA", {}, 12),
        ("Grounding", {}, 12),
        ("GQA", {"max_tiles": 2}, 2),
        ("Chart", {"max_tiles": 2}, 12),
        ("Chart", {"max_tiles_dict": {"Chart": 3}}, 3),
        ("Grounding", {"max_tiles_dict": {"Chart": 3}}, 12),
        ("GQA", {"max_tiles_dict": {"GQA": 9}}, 9),
    ],
)
def test_largest_number_of_tiles_depends_on_the_task(task, given, tiles, processor, tmp_path):
    wide = make_picture(tmp_path / "wide.png", (5000, 10))
    inputs = encode_prompt(processor, sample("What?", wide, task=task), None, **given)
    assert len(inputs["pixel_values"]) == tiles + 1
    assert (inputs["input_ids"] == TOKENS["<IMG_CONTEXT>"]).sum() == 4 * (tiles + 1)


def test_more_marks_than_pictures_are_refused(processor, pictures):
    for question, images, count in (("<image> and <image>", pictures[:1], 1), ("see <image>", [], 0)):
        marks = question.count("<image>")
        with pytest.raises(
            InputError,
            match=f"^{PLACE}: {marks} <image> marks for {count} pictures; add image",
        ):
            encode_prompt(processor, sample(question, *images), None)


@pytest.mark.parametrize(
    ("question", "response", "template"),
    [
        ("What is <IMG_CONTEXT>?", None, None),
        ("What?", "It is <IMG_CONTEXT>", None),
        ("What?", None, "<IMG_CONTEXT>{question}"),
    ],
)
def test_the_token_of_picture_content_is_no_text(question, response, template, processor):
    message = rf"^{PLACE}: <IMG_CONTEXT> stands for picture content and cannot be part of a question, response or"
    with pytest.raises(InputError, match=message):
        encode_prompt(processor, replace(sample(question), response=response), template and given(template))


def test_answers_have_no_picture_tokens(internvl_zoo, processor):
    model = load_model(internvl_zoo / BASE, torch.float32)
    inputs = encode_prompt(processor, sample("Why?"), None)
    with torch.no_grad():
        model.lm_head.weight[TOKENS["<IMG_CONTEXT>"]] = model.base_model(**inputs).last_hidden_state[0, -1]
    written = model.generate(**inputs, do_sample=False, max_new_tokens=5, pad_token_id=256)
    assert TOKENS["<IMG_CONTEXT>"] not in written


def test_an_unreadable_picture_is_named_with_its_entry(processor, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(InputError, match=rf"^{PLACE}: .*a\.png cannot be read as a picture"):
        encode_prompt(processor, sample("What?", tmp_path / "a.png"), None)


def test_other_conversation_templates_are_refused_unless_one_is_given(tmp_path):
    folder = save_model(tmp_path / "model", 1, {"template": "Hermes-2"})
    processor = load_processor(folder)
    with pytest.raises(
        InputError,
        match=r"config\.json asks for the conversation template 'Hermes-2' and only 'internvl2_5' is known; give --pro",
    ):
        encode_prompt(processor, sample("Why?"), None)
    assert encode_prompt(processor, sample("Why?"), given("{question}"))["input_ids"].tolist() == [[*b"Why?"]]
    silent = load_processor(save_model(tmp_path / "silent", 1, {"template": None}))
    with pytest.raises(InputError, match=r"config\.json names no conversation template; give --prompt_template with"):
        encode_prompt(silent, sample("Why?"), None)


def test_picture_settings_come_from_the_checkpoint(tmp_path, pictures):
    changes = {"force_image_size": None, "vision_config.image_size": 42, "use_thumbnail": False}
    processor = load_processor(save_model(tmp_path / "model", 1, changes))
    inputs = encode_prompt(processor, sample("Why?", pictures[2]), None)
    config = make_config({"force_image_size": 42, "use_thumbnail": False})
    tokens, pixels = reference.encode("Why?", [pictures[2]], config, 6)
    assert processor.tile_tokens == 9
    assert torch.equal(inputs["input_ids"], tokens)
    assert torch.equal(inputs["pixel_values"], pixels)


def test_a_tokenizer_without_picture_tokens_is_refused(tmp_path):
    folder = save_model(tmp_path / "model", 1)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"added_tokens_decoder": {}, "additional_special_tokens": []}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").unlink()
    (folder / "special_tokens_map.json").unlink()
    with pytest.raises(InputError, match=r"lacks <img>, <IMG_CONTEXT>, </img>; is added_tokens\.json missing"):
        load_processor(folder)


@pytest.mark.parametrize("gone", [["vocab.json", "merges.txt"], ["vocab.json", "merges.txt", "tokenizer_config.json"]])
def test_a_folder_without_vocabulary_is_refused(gone, tmp_path):
    """transformers would make do with the special tokens alone."""
    folder = save_model(tmp_path / "model", 1)
    for name in gone:
        (folder / name).unlink()
    for load in (load_processor, lambda folder: load_model(folder, torch.float32)):
        with pytest.raises(InputError, match=r"lacks the tokenizer's vocabulary \(vocab\.json and merges\.txt, or tok"):
            load(folder)


def test_a_damaged_tokenizer_is_refused(tmp_path):
    folder = save_model(tmp_path / "model", 1)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json is not valid JSON \(Expecting property name"):
        load_processor(folder)


def test_generation_ends_at_the_end_of_the_turn(internvl_zoo, pictures, processor, tmp_path):
    """A model that would say the end token stops there, pictures or not."""
    folder = shutil.copytree(internvl_zoo / BASE, tmp_path / "model")
    model = load_model(folder, torch.float32)
    assert model.generation_config.eos_token_id == [TOKENS["<|im_end|>"]]
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[TOKENS["<|im_end|>"]] = 1e-9
    for question in (sample("Why?"), sample("Why?", pictures[0])):
        inputs = encode_prompt(processor, question, None)
        with torch.no_grad():
            hidden = model.base_model(**inputs).last_hidden_state[0, -1]
            model.lm_head.weight[TOKENS["<|im_end|>"]] = hidden
        written = model.generate(**inputs, do_sample=False, max_new_tokens=5, pad_token_id=256)
        assert written[0, inputs["input_ids"].shape[1] :].tolist() == [TOKENS["<|im_end|>"]]


def test_facts_of_the_family():
    assert BACKBONE.expert_folders["Grounding"] == "InternVL2_5-1B_Grounding"
    assert list(BACKBONE.expert_folders) == ["OCR", "VQA", "Geometry", "Chart", "Grounding"]
    assert set(BACKBONE.task_experts.values()) <= set(BACKBONE.expert_folders)
    for question in BACKBONE.test_questions:
        assert all(picture.is_file() for picture in question.images)
