"""Chat templates: where they are kept, what is wrong with them, and how a turn ends."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from expert_merging.errors import InputError
from expert_merging.questions import templates
from expert_merging.questions.templates import ChatTemplate, default_of, fault, put_template, read_template, turn_end
from tests.qwen2vl import SILENT_TEMPLATE, TEMPLATE

INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message.role == 'user' %}"
    "{{ '[INST] ' + message.content + ' [/INST]' }}{% else %}{{ message.content + eos_token + ' ' }}{% endif %}"
    "{% endfor %}"
)
TOKENS = (("bos_token", "<s>"), ("eos_token", "</s>"))
PICTURE = "<|image_pad|>"


def template(text: str) -> ChatTemplate:
    return ChatTemplate(text, "X", TOKENS)


def write(folder: Path, **files: object) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        suffix = "jinja" if name == "jinja" else "json"
        stem = {"jinja": "chat_template", "legacy": "chat_template"}.get(name, name)
        (folder / f"{stem}.{suffix}").write_text(text, encoding="utf-8")
    return folder


def test_a_template_is_found_in_the_order_of_transformers(tmp_path):
    folder = write(tmp_path / "x", tokenizer_config={"chat_template": "in settings"})
    assert read_template(folder).text == "in settings"
    write(folder, legacy={"chat_template": "legacy"})
    assert read_template(folder).text == "legacy"
    write(folder, jinja="own file")
    assert read_template(folder).text == "own file"
    assert read_template(tmp_path) is None
    assert read_template(write(tmp_path / "y", tokenizer_config={"eos_token": "</s>"})) is None


def test_the_default_of_several_templates_counts():
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert default_of(named) == "b"
    assert default_of({"default": "b", "rag": "c"}) == "b"
    assert default_of(named[:1]) is None
    assert default_of(7) is None


def test_special_tokens_are_read_as_texts_and_as_records(tmp_path):
    settings = {"bos_token": "<b>", "eos_token": {"content": "<e>", "lstrip": False}, "add_bos_token": True}
    text = "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ add_bos_token }}"
    tokens = {"pad_token": "<p>", "unk_token": "<u>"}
    write(tmp_path, tokenizer_config={**settings, "chat_template": text}, special_tokens_map=tokens)
    assert read_template(tmp_path).special_tokens == (
        ("bos_token", "<b>"),
        ("eos_token", "<e>"),
        ("pad_token", "<p>"),
    ), "what the template does not name changes nothing"


def test_a_file_that_is_no_json_is_named(tmp_path):
    write(tmp_path, tokenizer_config="{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json is not valid JSON \(.*\); download it again"):
        read_template(tmp_path)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"chat_template\.jinja is no text in UTF-8; download it again"):
        read_template(tmp_path)


def test_templates_that_ask_have_no_fault():
    assert fault(template(INSTRUCT)) is None
    assert fault(template(TEMPLATE), PICTURE) is None
    assert template(INSTRUCT).ask("Why?") == "<s>[INST] Why? [/INST]"


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


MULTIPLIED = "{% set x = namespace(a='a') %}{% for a in range(99) %}{% set x.a = x.a * 9 %}{% endfor %}"


@pytest.mark.parametrize(
    ("text", "picture", "expected"),
    [
        (SILENT_TEMPLATE, "", "the chat template of X leaves out the question"),
        ("", "", "the chat template of X leaves out the question"),
        ("{{ raise_exception('no users here') }}", "", "the chat template of X raises an error (no users here)"),
        ("{{ 1 / 0 }}", "", "the chat template of X raises an error (division by zero)"),
        ("{{ messages[3].content }}", "", "the chat template of X raises an error (list object has no element 3)"),
        (
            "{% if %}",
            "",
            "the chat template of X raises an error (Expected an expression, got 'end of statement block')",
        ),
        ("{{ messages.append(1) }}", "", "access to attribute 'append' of 'list' object is unsafe"),
        (ENDLESS, "", "the chat template of X does not come to an end"),
        ("{{ 'a' * 10000000000 }}", "", "the chat template of X raises an error (MemoryError)"),
        ("{{ 'a'.ljust(10000000000) }}", "", "the chat template of X raises an error (MemoryError)"),
        (MULTIPLIED, "", "the chat template of X raises an error (MemoryError)"),
        ("{{ 9 ** 9 ** 9 }}", "", "the chat template of X computes a power (**), which none needs and none may"),
        ("{% break %}", "", "the chat template of X raises an error ('break' outside loop"),
        ("{{ cycler() }}", "", "the chat template of X raises an error (at least one item has to be provided)"),
        (
            "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
            "",
            "the chat template of X raises an error (maximum recur",
        ),
        ("{{ messages[0].content }}", PICTURE, "the chat template of X has 0 places for 1 picture"),
        ("{% for p in messages[0].content %}{{ p.text }}{% endfor %}", PICTURE, "leaves out the question"),
    ],
)
def test_the_fault_of_a_template_is_one_clear_sentence(text, picture, expected, monkeypatch):
    monkeypatch.setattr(templates, "_SECONDS", 0.2)
    found = fault(template(text), picture)
    assert found is not None
    assert expected in found
    assert "\n" not in found


def test_arguments_that_are_unpacked_are_no_powers():
    text = "{% macro a(b) %}{{ b }}{% endmacro %}{{ a(**{'b': messages[0].content}) }}{{ a(*['x'], **{}) }}"
    assert template(text).ask("Why?") == "Why?x"


def test_templates_are_rendered_in_other_threads_too():
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(template(INSTRUCT).ask("Why?")))
    thread.start()
    thread.join()
    assert found == ["<s>[INST] Why? [/INST]"]


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (INSTRUCT, "</s>"),
        (TEMPLATE, "<|im_end|>\n"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{{ messages[0].content }}", None),
        ("{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}{{ messages[0].content }}", None),
    ],
)
def test_a_turn_ends_as_the_template_says(text, end):
    """Blanks before the next turn are none of this one's."""
    assert turn_end(template(text)) == end


def test_a_new_template_takes_every_place_of_the_old_one(tmp_path):
    settings = {"eos_token": "</s>", "chat_template": [{"name": "default", "template": "old"}]}
    write(tmp_path, tokenizer_config=settings, legacy={"chat_template": "old"})
    assert put_template("new", tmp_path) == ["chat_template.base.json", "tokenizer_config.base.json"]
    assert json.loads((tmp_path / "chat_template.json").read_text()) == {"chat_template": "new"}
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {**settings, "chat_template": "new"}
    assert json.loads((tmp_path / "tokenizer_config.base.json").read_text()) == settings
    assert not (tmp_path / "chat_template.jinja").exists()


def test_a_file_that_has_the_template_already_is_left_alone(tmp_path):
    """Such as one that came with an expert's tokenizer."""
    write(tmp_path, jinja="new", tokenizer_config={"chat_template": "old"})
    assert put_template("new", tmp_path) == ["tokenizer_config.base.json"]
    assert put_template("new", tmp_path) == []
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "tokenizer_config.base.json",
        "tokenizer_config.json",
    ]


def test_a_folder_without_a_template_gets_a_file_for_it(tmp_path):
    write(tmp_path, tokenizer_config={"eos_token": "</s>"})
    assert put_template("new", tmp_path) == []
    assert (tmp_path / "chat_template.jinja").read_text() == "new"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"eos_token": "</s>"}


def test_a_template_in_a_file_of_its_own_is_replaced_there(tmp_path):
    write(tmp_path, jinja="old")
    assert put_template("new", tmp_path) == ["chat_template.base.jinja"]
    assert (tmp_path / "chat_template.base.jinja").read_text() == "old"
    assert read_template(tmp_path).text == "new"


class Loops:
    def __del__(self):
        loop()


def loop():
    while True:
        pass


def loop_twice():
    Loops()  # which nobody has, so that it is let go of at once
    loop()


def test_the_end_of_time_is_heard_a_second_time_where_the_first_is_lost_in_silence(monkeypatch, capfd):
    monkeypatch.setattr(templates, "_SECONDS", 0.1)
    with pytest.raises(TimeoutError), templates._limited():
        loop_twice()
    assert capfd.readouterr().err == ""
