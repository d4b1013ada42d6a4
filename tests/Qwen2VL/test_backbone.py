"""Loading and inputs of the Qwen2-VL family, against the published rules."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from expert_merging.errors import InputError
from expert_merging.questions.calibration import Sample
from expert_merging.questions.picture_sources import HeldPicture
from Qwen2VL.backbone import encode_prompt, file_name, load_model, load_processor, parameter_names
from tests.checkpoints import tensors_of, write_index
from tests.command import given
from tests.qwen2vl import (
    BASE,
    CONFIG,
    CONFIG_2_5,
    PREPROCESSOR,
    SILENT_TEMPLATE,
    TEMPLATE,
    newer_name,
    save_model,
    save_picture,
    with_newer_names,
)
from tests.Qwen2VL.reference import chat, patches, picture_size, positions, tokens


@pytest.fixture(scope="session")
def base(qwen_zoo: Path) -> Path:
    return qwen_zoo / BASE


@pytest.fixture(scope="session")
def processor(base):
    return load_processor(base)


@pytest.fixture(scope="session")
def model(base):
    return load_model(base, torch.float32)


PLACE = "Chart.json, entry 7 (counted from 0)"


def sample(question: str, *images: Path) -> Sample:
    return Sample("Chart", "Chart", question, None, "7", images=images, file=Path("Chart.json"), number=7)


def copied(base: Path, target: Path) -> Path:
    shutil.copytree(base, target)
    return target


def test_names_of_every_naming_lead_to_the_published_ones(base):
    published = set(tensors_of(base))
    assert {"visual.patch_embed.proj.weight", "model.layers.2.mlp.up_proj.weight", "lm_head.weight"} <= published
    assert {file_name(name) for name in published} == published
    assert {file_name(newer_name(name)) for name in published} == published
    assert {file_name(name) for name in parameter_names(base)} == published


@pytest.mark.parametrize("config", [CONFIG, CONFIG_2_5], ids=["Qwen2-VL", "Qwen2.5-VL"])
def test_both_namings_load_the_same_weights(config, tmp_path):
    save_model(tmp_path / "old", 1, config=config)
    with_newer_names(tmp_path / "old", tmp_path / "new")
    files = tensors_of(tmp_path / "old")
    for folder in (tmp_path / "old", tmp_path / "new"):
        loaded = dict(load_model(folder, torch.float32).named_parameters())
        assert list(map(file_name, loaded)) == list(map(file_name, parameter_names(folder)))
        assert all(torch.equal(parameter, files[file_name(name)]) for name, parameter in loaded.items())


def test_the_type_of_the_weights_is_the_asked_one(base):
    model = load_model(base, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training


def test_a_tied_head_needs_no_tensor(tmp_path):
    save_model(tmp_path / "tied", 1, config={**CONFIG, "tie_word_embeddings": True})
    assert "lm_head.weight" not in tensors_of(tmp_path / "tied")
    model = load_model(tmp_path / "tied", torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_missing_tensors_are_refused_and_never_made_up(base, tmp_path):
    folder = copied(base, tmp_path / "base")
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / weight_map.pop("model.layers.1.mlp.up_proj.weight")
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    write_index(folder, weight_map)
    with pytest.raises(InputError) as caught:
        load_model(folder, torch.float32)
    assert caught.value.problems == (
        f"{folder} lacks model.layers.1.mlp.up_proj.weight, which the model of its config.json has; download it again",
    )


def test_shapes_that_differ_are_refused(base, tmp_path):
    folder = copied(base, tmp_path / "base")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "intermediate_size": 40}))
    with pytest.raises(InputError) as caught:
        load_model(folder, torch.float32)
    assert caught.value.problems == (
        f"{folder}: model.layers.0.mlp.down_proj.weight has shape [32, 48], and [32, 40] by config.json; "
        "download both again",
    )


@pytest.mark.parametrize("function", [parameter_names, lambda folder: load_model(folder, torch.float32)])
def test_other_models_are_refused(function, base, tmp_path):
    folder = copied(base, tmp_path / "base")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": "qwen3_vl"}))
    with pytest.raises(InputError) as caught:
        function(folder)
    assert caught.value.problems == (
        f'{folder}/config.json has the model_type "qwen3_vl"; learning with the Qwen2-VL family takes qwen2_vl and '
        "qwen2_5_vl",
    )


PICTURES = {
    "smaller than a patch": (5, 3),
    "one pixel": (1, 1),
    "three pixels high": (40, 3),
    "wide": (90, 40),
    "tall": (30, 70),
    "exact": (84, 56),
    "half way between sizes": (70, 98),
    "long": (300, 2),
    "large": (500, 400),
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("bounds", [(None, None), (3136, 20000), (60000, 70000), (784, 784)])
def test_pictures_and_tokens_follow_the_published_rule(name, bounds, base, tmp_path):
    width, height = PICTURES[name]
    file = save_picture(tmp_path / "picture.png", width, height)
    low, high = bounds[0] or 3136, bounds[1] or 12845056
    processor = load_processor(base, min_pixels=bounds[0], max_pixels=bounds[1])
    inputs = encode_prompt(processor, sample("What is it?", file), None)
    with Image.open(file) as picture:
        pixels, grid = patches(picture, low, high)
    columns, rows = picture_size(width, height, low, high)
    expected = tokens(chat((columns // 28, rows // 28), "What is it?"))
    assert inputs["image_grid_thw"].tolist() == [grid]
    assert inputs["input_ids"].tolist() == [expected]
    assert inputs["mm_token_type_ids"].tolist() == [[int(token == 6) for token in expected]]
    assert inputs["attention_mask"].tolist() == [[1] * len(expected)]
    torch.testing.assert_close(inputs["pixel_values"], pixels, rtol=1e-5, atol=1e-5)


def test_several_pictures_come_in_order(processor, tmp_path):
    wide, tall = save_picture(tmp_path / "wide.png", 90, 40), save_picture(tmp_path / "tall.png", 30, 70, seed=1)
    for question, prompt in (
        ("Compare.", chat((3, 2), (2, 4), "Compare.")),
        ("Is <image> like <image>?", chat("Is ", (3, 2), " like ", (2, 4), "?")),
        ("<image>\n<image>\nSame?", chat((3, 2), "\n", (2, 4), "\nSame?")),
        ("Which is it: <image>?", chat((3, 2), "Which is it: ", (2, 4), "?")),
    ):
        inputs = encode_prompt(processor, sample(question, wide, tall), None)
        assert inputs["input_ids"].tolist() == [tokens(prompt)]
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6], [1, 8, 4]]
    pixels = [patches(Image.open(file))[0] for file in (wide, tall)]
    torch.testing.assert_close(inputs["pixel_values"], torch.cat(pixels), rtol=1e-5, atol=1e-5)


def test_a_question_without_pictures_is_text_alone(processor):
    inputs = encode_prompt(processor, sample("What is 2 + 2?"), None)
    assert inputs["input_ids"].tolist() == [tokens(chat("What is 2 + 2?"))]
    assert set(inputs) == {"input_ids", "attention_mask", "mm_token_type_ids"}
    assert not inputs["mm_token_type_ids"].any()


def test_a_prompt_template_takes_the_place_of_the_chat_template(processor, tmp_path):
    file = save_picture(tmp_path / "wide.png", 90, 40)
    picture = f"<|vision_start|>{'<|image_pad|>' * 6}<|vision_end|>"
    for template, question, expected in (
        ("Q: {question} A:", "Why?", f"Q: {picture}Why? A:"),
        ("Q: {question} A:", "Why <image>?", f"Q: Why {picture}? A:"),
        ("<image> Q: {question} A:", "Why?", f"{picture} Q: Why? A:"),
    ):
        inputs = encode_prompt(processor, sample(question, file), given(template))
        assert inputs["input_ids"].tolist() == [tokens(expected)]


def test_transparent_pictures_lie_on_white_and_grey_ones_have_three_equal_colours(processor, tmp_path):
    clear = save_picture(tmp_path / "clear.png", 56, 56, mode="RGBA")
    with Image.open(clear) as picture:
        white = Image.new("RGBA", picture.size, "white")
        expected = patches(Image.alpha_composite(white, picture).convert("RGB"))[0]
    inputs = encode_prompt(processor, sample("?", clear), None)
    torch.testing.assert_close(inputs["pixel_values"], expected, rtol=1e-5, atol=1e-5)
    grey = save_picture(tmp_path / "grey.png", 56, 56, mode="L")
    with Image.open(grey) as picture:
        expected = patches(Image.merge("RGB", [picture] * 3))[0]
    inputs = encode_prompt(processor, sample("?", grey), None)
    torch.testing.assert_close(inputs["pixel_values"], expected, rtol=1e-5, atol=1e-5)


def test_a_turned_photograph_is_seen_upright(processor, tmp_path):
    upright = save_picture(tmp_path / "upright.png", 90, 40)
    with Image.open(upright) as picture:
        turned = picture.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6  # shown after a quarter turn to the right
        turned.save(tmp_path / "turned.png", exif=exif)
    expected, actual = (
        encode_prompt(processor, sample("?", file), None) for file in (upright, tmp_path / "turned.png")
    )
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def refused(processor, asked: Sample, template: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        encode_prompt(processor, asked, template and given(template))
    (problem,) = caught.value.problems
    return problem


def test_extreme_shapes_are_refused(processor, tmp_path):
    file = save_picture(tmp_path / "line.png", 402, 2)
    problem = refused(processor, sample("?", file))
    assert problem.startswith(f"{PLACE}: {file} (402 x 2 pixels): ")
    assert "aspect ratio must be smaller than 200, got 201" in problem


def test_damaged_pictures_are_refused(processor, tmp_path):
    whole = save_picture(tmp_path / "whole.png", 90, 40)
    cut, text = tmp_path / "cut.png", tmp_path / "text.png"
    cut.write_bytes(whole.read_bytes()[:3000])
    text.write_text("no picture")
    for file in (cut, text):
        assert refused(processor, sample("?", file)).startswith(f"{PLACE}: {file} cannot be read as a picture (")


def test_pictures_beyond_what_is_safe_to_open_are_refused(processor, tmp_path, monkeypatch):
    file = save_picture(tmp_path / "bomb.png", 90, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "bomb.png has more than 1000 pixels, too many to be read safely" in refused(processor, sample("?", file))


def test_texts_with_tokens_of_pictures_are_refused(processor):
    assert refused(processor, sample("What is <|image_pad|>?")) == (
        f"{PLACE}: <|image_pad|> stands for picture content and cannot be part of a question, response or "
        "prompt template; where a picture belongs, write <image>"
    )
    stands = "stands for picture content"
    assert f"<|vision_start|> {stands}" in refused(processor, sample("A"), "<|vision_start|>{question}")
    answered = Sample("Chart", "Chart", "A", "<|video_pad|>", "7")
    assert f"<|video_pad|> {stands}" in refused(processor, answered)


def test_answers_have_no_tokens_of_pictures(base, processor):
    """Whatever the model finds most likely; the answer must be readable again."""
    model = load_model(base, torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[6:8] *= 100
    inputs = encode_prompt(processor, sample("What?"), None)
    assert model(**inputs).logits[0, -1].argmax() in (6, 7)
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert not torch.isin(answer, torch.tensor([6, 7])).any()


def test_marks_beyond_the_pictures_are_refused(processor, tmp_path):
    file = save_picture(tmp_path / "wide.png", 90, 40)
    assert refused(processor, sample("<image> or <image>?", file)) == (
        f"{PLACE}: 2 <image> marks for 1 pictures; add image_path or remove marks"
    )
    assert "1 <image> marks for 0 pictures" in refused(processor, sample("<image>?"))
    assert "2 <image> marks for 1 pictures" in refused(processor, sample("<image>?", file), "<image>{question}")


def test_a_chat_template_that_has_a_place_for_one_picture_alone_refuses_two(base, tmp_path):
    folder = copied(base, tmp_path / "base")
    template = (
        "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}<|image_pad|>"
        "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
    )
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    file = save_picture(tmp_path / "wide.png", 90, 40)
    assert refused(load_processor(folder), sample("?", file, file)) == (
        f"{PLACE}: the chat template of base has 1 places for 2 pictures; give --prompt_template with {{question}} in "
        "it"
    )


def test_chat_templates_are_found_wherever_they_are_kept(base, tmp_path):
    """In the order in which transformers looks: a file of its own, the older file, the tokenizer's settings."""
    folder = copied(base, tmp_path / "base")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "tokenizer"}))
    assert load_processor(folder).tokenizer.chat_template == TEMPLATE
    (folder / "chat_template.json").unlink()
    assert load_processor(folder).tokenizer.chat_template == "tokenizer"
    (folder / "chat_template.jinja").write_text("file")
    assert load_processor(folder).tokenizer.chat_template == "file"


def test_without_a_chat_template_that_asks_the_published_conversation_is_taken(base, tmp_path):
    folder = copied(base, tmp_path / "base")
    file = save_picture(tmp_path / "wide.png", 90, 40)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    for template in (None, SILENT_TEMPLATE):
        (folder / "chat_template.json").unlink()
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
        processor = load_processor(folder)
        for question, expected in (
            (sample("Why?"), chat("Why?")),
            (sample("Why <image>?", file), chat("Why ", (3, 2), "?")),
        ):
            assert encode_prompt(processor, question, None)["input_ids"].tolist() == [tokens(system + expected)]
    assert encode_prompt(processor, sample("Why?"), given("{question}"))["input_ids"].tolist() == [tokens("Why?")]


def test_settings_of_newer_processors_are_read(base, tmp_path):
    folder = copied(base, tmp_path / "base")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    size = {"shortest_edge": 784, "longest_edge": settings.pop("max_pixels")}
    del settings["min_pixels"]
    nested = {"image_processor": {**settings, "size": size}, "processor_class": "Qwen2VLProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    found = [dict(load_processor(folder, max_pixels=bound).image_processor.size) for bound in (None, 8000)]
    assert [(size["shortest_edge"], size["longest_edge"]) for size in found] == [(784, 12845056), (784, 8000)]


BOUNDS = {"min_pixels": 784, "max_pixels": 8000}
EDGES = {"shortest_edge": 784, "longest_edge": 8000}


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        (BOUNDS, 784, 8000),
        ({"size": BOUNDS}, 784, 8000),
        ({"size": EDGES}, 784, 8000),
        ({"size": {"shortest_edge": 1, "longest_edge": 2}, **BOUNDS}, 784, 8000),
        ({"size": {**EDGES, "min_pixels": None, "max_pixels": None}}, 784, 8000),
        ({"size": {"max_pixels": 8000}}, 56 * 56, 8000),
        ({"size": None}, 56 * 56, 28 * 28 * 1280),
    ],
)
def test_bounds_on_pictures_are_read_in_every_form(settings, low, high, base, tmp_path):
    folder = copied(base, tmp_path / "base")
    others = {name: value for name, value in PREPROCESSOR.items() if name not in BOUNDS}
    (folder / "preprocessor_config.json").write_text(json.dumps({**others, **settings}))
    for bounds in ({}, {"min_pixels": 4000}, {"max_pixels": 5000}):
        images = load_processor(folder, **bounds).image_processor
        wanted = (bounds.get("min_pixels", low), bounds.get("max_pixels", high))
        assert (images.size["shortest_edge"], images.size["longest_edge"]) == wanted
    assert encode_prompt(load_processor(folder), sample("?", save_picture(tmp_path / "a.png", 90, 40)), None)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            {"size": {"height": 3, "width": 3}},
            'the size {"height": 3, "width": 3}; it must have min_pixels and max_pixels, or shortest_edge and '
            "longest_edge",
        ),
        ({"size": 3}, "the size 3; it must have min_pixels and max_pixels, or shortest_edge and longest_edge"),
        ({"min_pixels": "a"}, 'bounds pictures by "a" pixels'),
        ({"size": {"longest_edge": -1}}, "bounds pictures by -1 pixels"),
    ],
)
def test_bounds_that_are_none_are_refused(settings, problem, base, tmp_path):
    folder = copied(base, tmp_path / "base")
    others = {name: value for name, value in PREPROCESSOR.items() if name not in BOUNDS}
    (folder / "preprocessor_config.json").write_text(json.dumps({**others, **settings}))
    for bounds in ({}, {"max_pixels": 5000}):
        if bounds and "longest_edge" in str(settings):
            continue  # which replaces what is wrong
        with pytest.raises(InputError) as caught:
            load_processor(folder, **bounds)
        (found,) = caught.value.problems
        assert found.startswith(f"{folder} has a preprocessor_config.json ")
        assert found.endswith(problem)


def test_missing_settings_of_the_processor_are_named(base, tmp_path):
    folder = copied(base, tmp_path / "base")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputError) as caught:
        load_processor(folder)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{folder} has no processor that transformers reads: ")
    assert "preprocessor_config.json" in problem
    assert "\n" not in problem


def test_a_picture_in_an_entry_is_as_good_as_a_file(processor, tmp_path):
    file = save_picture(tmp_path / "picture.png", 90, 40)
    held = encode_prompt(processor, sample("What?", HeldPicture(file.read_bytes())), None)
    for name, value in encode_prompt(processor, sample("What?", file), None).items():
        assert torch.equal(held[name], value)
    damaged = HeldPicture(file.read_bytes()[:100])
    with pytest.raises(InputError, match=rf"{re.escape(PLACE)}: {damaged.name} cannot be read as a picture \("):
        encode_prompt(processor, sample("What?", damaged), None)


def test_bounds_must_leave_something_between_them(base):
    with pytest.raises(InputError, match="--min_pixels 3136 is above --max_pixels 1000; pictures get a size between"):
        load_processor(base, max_pixels=1000)


def test_hidden_states_and_answers_have_picture_positions(model, processor, tmp_path):
    """The decoder alone, the whole model, and positions given from outside agree."""
    wide, tall = save_picture(tmp_path / "wide.png", 90, 40), save_picture(tmp_path / "tall.png", 30, 70)
    inputs = encode_prompt(processor, sample("Is <image> like <image>?", wide, tall), None)
    given = positions(inputs["input_ids"][0].tolist(), inputs["image_grid_thw"].tolist())
    with torch.no_grad():
        decoder = model.base_model(**inputs, output_hidden_states=True, use_cache=False)
        whole = model(**inputs, output_hidden_states=True)
        placed = model.base_model(**inputs, position_ids=given[:, None], output_hidden_states=True, use_cache=False)
        plain = torch.arange(given.shape[1]).expand(3, 1, -1)
        flat = model.base_model(**inputs, position_ids=plain, use_cache=False)
    assert len(decoder.hidden_states) == CONFIG["num_hidden_layers"] + 1
    for ours, theirs, outside in zip(decoder.hidden_states, whole.hidden_states, placed.hidden_states, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, outside)
    logits = model.get_output_embeddings()(decoder.last_hidden_state)
    assert torch.equal(logits, whole.logits)
    assert not torch.allclose(decoder.last_hidden_state, flat.last_hidden_state, atol=1e-3)
    answer = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert answer[0, -1] == logits[0, -1].argmax()


def test_nothing_of_a_sample_stays_in_the_model(base, processor, tmp_path):
    """The model keeps what the last pictures shifted its positions by; it must not reach the next sample."""
    file = save_picture(tmp_path / "tall.png", 30, 200)
    shown, text = encode_prompt(processor, sample("What?", file), None), encode_prompt(processor, sample("Why?"), None)
    expected = {}
    for name, inputs in (("shown", shown), ("text", text)):
        fresh = load_model(base, torch.float32)
        expected[name] = fresh.base_model(**inputs, use_cache=False).last_hidden_state
        answer = fresh.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
        expected[f"{name} answer"] = answer
    used = load_model(base, torch.float32)
    for name, inputs in (("text", text), ("shown", shown), ("text", text), ("shown", shown)):
        assert torch.equal(used.base_model(**inputs, use_cache=False).last_hidden_state, expected[name])
        answer = used.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(answer, expected[f"{name} answer"])
