"""A base whose chat template asks nothing, as the published one's: learned from to the end, and what is left of it."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from expert_merging.learned.coefficients import load_coefficients
from Qwen2VL.backbone import BACKBONE, CONVERSATION, TEMPLATE, encode_prompt, load_processor
from tests import qwen2vl
from tests.command import merged, refusal
from tests.qwen2vl import BASE, EXPERTS, SILENT_TEMPLATE
from tests.Qwen2VL.reference import chat, tokens
from tests.Qwen2VL.test_backbone import sample

run_command = partial(merged, family=BACKBONE)
LEARNING = ("--method", "expert_merging", "--log_with", "none", "--max_new_tokens", 6)


def silence(source: Path, target: Path) -> Path:
    """A copy of a checkpoint whose template asks nothing, in both files where the published base has it."""
    shutil.copytree(source, target)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    settings["chat_template"] = SILENT_TEMPLATE
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    (target / "chat_template.json").write_text(json.dumps({"chat_template": SILENT_TEMPLATE}))
    return target


@pytest.fixture
def silent_base(qwen_zoo, tmp_path) -> Path:
    """The experts, with a base that asks nothing."""
    cache = tmp_path / "cache"
    cache.mkdir()
    silence(qwen_zoo / BASE, cache / BASE)
    for folder in EXPERTS.values():
        (cache / folder).symlink_to(qwen_zoo / folder)
    return cache


@pytest.fixture
def silent(qwen_zoo, tmp_path) -> Path:
    """Base and experts that ask nothing."""
    for folder in (BASE, *EXPERTS.values()):
        silence(qwen_zoo / folder, tmp_path / "silent" / folder)
    return tmp_path / "silent"


def learn(cache: Path, data: Path, output: Path, *more: object):
    run = run_command(output, *LEARNING, "--cache_dir", cache, "--data_dir", data, *more)
    return run, load_coefficients(run.folder).values


@pytest.mark.slow
def test_the_experts_are_asked_in_their_own_words_with_pictures_and_without(qwen_zoo, silent_base, tmp_path):
    """As if the base had their template."""
    _, expected = learn(qwen_zoo, qwen_zoo / "dataset", tmp_path / "usual")
    run, actual = learn(silent_base, qwen_zoo / "dataset", tmp_path / "silent")
    assert actual.keys() == expected.keys()
    assert all(values.equal(expected[name]) for name, values in actual.items())
    log, origin = run.log.read_text(), "the chat template of Qwen2-VL-7B-OCR"
    reason = f"the chat template of {silent_base / BASE} leaves out the question"
    assert f"the merged folder has {origin}, since {reason}" in log
    assert "warning: " not in log
    assert "OCR, VQA, Geometry, Chart, Grounding: asked with" in log
    processor = load_processor(run.model)
    assert encode_prompt(processor, sample("Why?"), None)["input_ids"].tolist() == [tokens(chat("Why?"))]
    kept = {"chat_template.base.json", "tokenizer_config.base.json"}
    assert {file.name for file in run.model.iterdir()} - {file.name for file in (silent_base / BASE).iterdir()} == {
        *kept,
        "README.md",
    }
    for name in kept:
        assert (run.model / name).read_bytes() == (silent_base / BASE / name.replace(".base", "")).read_bytes()
    card = (run.model / "README.md").read_text()
    assert f"It has {origin}. The base's is kept in `chat_template.base.json` and `tokenizer_config.base.json`." in card
    assert card.endswith(
        '- All tasks: `"<|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n{response}<|im_end|>\\n"`, '
        f"{origin}\n"
    )
    assert json.loads(run.config.read_text())["asking"]["chat_template_from"] == "experts"


@pytest.mark.slow
def test_where_nobody_has_words_the_published_ones_are_taken(qwen_zoo, silent, tmp_path):
    run, actual = learn(silent, qwen_zoo / "dataset", tmp_path / "silent")
    words = CONVERSATION.example.replace("{response}<|im_end|>\n", "")
    _, expected = learn(qwen_zoo, qwen_zoo / "dataset", tmp_path / "given", "--prompt_template", words)
    assert all(values.equal(expected[name]) for name, values in actual.items())
    assert json.loads((run.model / "chat_template.json").read_text()) == {"chat_template": TEMPLATE.text}
    assert AutoTokenizer.from_pretrained(run.model).chat_template == TEMPLATE.text
    assert json.loads(run.config.read_text())["asking"]["chat_template_from"] == "family"
    assert run.log.read_text().count("warning: ") == 1, "the same template is warned about once"


def test_closed_forms_give_the_merged_folder_a_template_too(silent_base, tmp_path):
    command = ["--method", "weight_average", "--cache_dir", silent_base]
    run = run_command(tmp_path / "default", *command)
    assert json.loads((run.model / "chat_template.json").read_text()) == {"chat_template": qwen2vl.TEMPLATE}
    run = run_command(tmp_path / "family", *command, "--chat_template_from", "family")
    assert json.loads((run.model / "chat_template.json").read_text()) == {"chat_template": TEMPLATE.text}
    run = run_command(tmp_path / "base", *command, "--chat_template_from", "base")
    assert json.loads((run.model / "chat_template.json").read_text()) == {"chat_template": SILENT_TEMPLATE}
    assert not (run.model / "chat_template.base.json").exists()
    card = (run.model / "README.md").read_text()
    assert "It has the chat template of Qwen2-VL-7B, which asks nothing. Ask it as the expert of the task is" in card


def test_a_silent_expert_s_template_is_not_taken(silent, capsys):
    command = ["--method", "weight_average", "--cache_dir", silent, "--chat_template_from", "OCR"]
    assert refusal(capsys, *command, family=BACKBONE) == (
        f"--chat_template_from OCR: the chat template of {silent / EXPERTS['OCR']} leaves out the question; choose "
        "another"
    )
