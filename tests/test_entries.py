"""Task files of other makers are read, or one short sentence says what is wrong with which entry."""

from __future__ import annotations

import base64
import io
import json
import logging

import pytest
from PIL import Image

from expert_merging.errors import InputError, excerpt
from expert_merging.questions.calibration import find_tasks, load_samples
from expert_merging.questions.entries import Exchange, read_entries, read_exchange
from expert_merging.questions.picture_sources import HeldPicture
from expert_merging.questions.pictures import read_picture
from tests.internvl import make_picture

ENTRIES = [{"question": "a\u2028b"}, {"question": "c"}]
LINES = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in ENTRIES)


def load(folder, *experts, **given):
    defaults = {"default_count": 2, "counts": {}, "task_expert": {}}
    return load_samples(folder, experts, **{**defaults, **given})


def refusal(function, *arguments, **given):
    with pytest.raises(InputError) as caught:
        function(*arguments, **given)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(ENTRIES, ensure_ascii=False, indent=1)),
        ("a.jsonl", json.dumps(ENTRIES, ensure_ascii=False)),
        ("a.jsonl", LINES),
        ("a.JSONL", "\n" + LINES.replace("\n", "\r\n\r\n") + "\r\n"),
        ("a.json", LINES),
        ("a.json", LINES.replace("\n", "\r\n") + "\n\n"),
    ],
)
def test_lists_and_lines_are_read_in_every_unicode(name, text, encoding, tmp_path):
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read_entries(tmp_path / name) == ENTRIES


def test_a_single_line_is_one_entry(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(ENTRIES[0]))
    assert read_entries(tmp_path / "a.jsonl") == ENTRIES[:1]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        (
            "a.jsonl",
            LINES + "\n{",
            "is not valid JSON Lines: line 3: Expecting property name enclosed in double quotes",
        ),
        ("a.json", LINES + "\n\nx", "is not valid JSON Lines: line 4: Expecting value"),
        ("a.jsonl", "[" * 100_000, "is not valid JSON: nested too deeply"),
        ("a.jsonl", "{}\n" + '{"a":' * 100_000, "is not valid JSON Lines: line 2: nested too deeply"),
        (
            "a.jsonl",
            " \n",
            "must hold a list of objects with a 'question' each, and has an empty list; see dataset/README.md",
        ),
    ],
)
def test_files_that_are_neither_are_told(name, text, problem, tmp_path):
    (tmp_path / name).write_text(text)
    assert refusal(read_entries, tmp_path / name) == f"{tmp_path / name} {problem}"


USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("entry", "exchange"),
    [
        ({"question": "Why?", "messages": 3}, Exchange("Why?", None)),
        ({"messages": [USER, ANSWER]}, Exchange("Why?", "So.")),
        ({"messages": [USER]}, Exchange("Why?", None)),
        ({"messages": [USER], "response": "Yes."}, Exchange("Why?", "Yes.")),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}]}, Exchange("Why?", None)),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, Exchange("Why?", None)),
        (
            {"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]},
            Exchange("Why?", "So.", (), ("a system message", "turns after the first answer")),
        ),
        (
            {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
            Exchange("Why?", "So."),
        ),
        (
            {"conversations": [{"from": "GPT", "value": "Hi"}, {"from": "Human", "value": "Why?"}]},
            Exchange("Why?", None, (), ("turns before the user's",)),
        ),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, Exchange("Add.\n1 2", "3")),
        ({"instruction": "Add.", "input": "", "output": "3"}, Exchange("Add.", "3")),
        ({"instruction": "Add.", "input": None}, Exchange("Add.", None)),
        (
            {"instruction": "And?", "output": "Bye.", "system": "Be.", "history": [["Why?", "So."]]},
            Exchange("Why?", "So.", (), ("a system message", "turns after the first answer")),
        ),
        ({"instruction": "Why?", "output": "So.", "history": [], "system": ""}, Exchange("Why?", "So.")),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]}
                ]
            },
            Exchange("Why?", None),
        ),
    ],
)
def test_the_first_exchange_of_every_form(entry, exchange):
    assert read_exchange(entry) == exchange


PART = {"type": "image"}


@pytest.mark.parametrize(
    ("entry", "question", "pictures"),
    [
        ({"question": "What?", "image_path": "a.png"}, "What?", ("a.png",)),
        ({"question": "What?", "image": "a.png", "image_path": None}, "What?", ("a.png",)),
        ({"question": "What?", "image": "b.png", "image_path": "a.png", "Photo": 3}, "What?", ("a.png",)),
        ({"question": "What?", "images": ["a.png", "b.png"]}, "What?", ("a.png", "b.png")),
        ({"instruction": "What?", "images": ["a.png"]}, "What?", ("a.png",)),
        (
            {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]},
            "<image>\nWhat?",
            ("a.png",),
        ),
        (
            {
                "images": ["a.png", "b.png"],
                "messages": [
                    {"role": "user", "content": "<image>What?"},
                    {"role": "assistant", "content": "A."},
                    {"role": "user", "content": "<image>And here?"},
                ],
            },
            "<image>What?",
            ("a.png",),
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "a.png"}},
                            {"type": "text", "text": "Between "},
                            {"type": "image", "image": "b.png"},
                            {"type": "input_text", "text": "?"},
                        ],
                    }
                ]
            },
            "Between <image>?",
            ({"url": "a.png"}, "b.png"),
        ),
        (
            {
                "images": ["a.png", "b.png"],
                "messages": [{"role": "user", "content": [PART, PART, {"type": "text", "text": "?"}]}],
            },
            "?",
            ("a.png", "b.png"),
        ),
    ],
)
def test_pictures_of_every_form(entry, question, pictures):
    exchange = read_exchange(entry)
    assert (exchange.question, exchange.pictures) == (question, pictures)


LONG = "x" * 12_000
CUT = json.dumps(LONG)[:60] + "..."


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (LONG, f"must be an object with a 'question', got {CUT}"),
        ({LONG: 1}, f"'question' must be a text that is not empty, got null (its fields: {LONG[:60]}...)"),
        ({"messages": "Why?"}, "'messages' must be a list of turns, got \"Why?\""),
        ({"messages": []}, "has no turn of the user, whose question would be asked"),
        ({"messages": [SYSTEM, ANSWER]}, "has no turn of the user, whose question would be asked"),
        (
            {"messages": [{"role": "tool", "content": "x"}, USER]},
            "has a turn of \"tool\" before the user's; only 'system' may stand there",
        ),
        (
            {"conversations": [LONG]},
            f"'conversations' must have turns with 'role' and 'content', or 'from' and 'value', got {CUT}",
        ),
        (
            {"messages": [{"role": 3}]},
            "'messages' must have turns with 'role' and 'content', or 'from' and 'value', got {\"role\": 3}",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]},
            'a content may have parts of the types \'text\' and \'image\', got {"type": "video", "video": "a.mp4"}',
        ),
        (
            {"messages": [{"role": "user", "content": [LONG]}]},
            f"a content may have parts of the types 'text' and 'image', got {CUT}",
        ),
        (
            {"images": ["a"], "messages": [{"role": "user", "content": [PART, PART]}]},
            "has 2 places for pictures and 1 pictures beside them",
        ),
        ({"instruction": 3}, "'instruction' must be a text, got 3"),
        ({"instruction": "a", "input": [LONG]}, f"'input' must be a text, got {('[' + CUT)[:60]}..."),
        (
            {"instruction": "a", "history": ["b"]},
            "'history' must be a list of questions with their answers, got \"b\"",
        ),
        (
            {"question": "a", "image": "b", "images": ["c"]},
            "has 'image' and 'images'; keep the one that names its pictures",
        ),
        (
            {"messages": [USER], "photo": "b"},
            "has 'photo', and pictures are named by 'image_path'; rename it, or take it out if the question is to be "
            "asked without a picture",
        ),
    ],
)
def test_what_is_no_exchange_is_told_in_one_short_sentence(entry, problem):
    assert refusal(read_exchange, entry) == problem
    assert len(problem) < 220


def test_what_a_prompt_cannot_have_is_told_once_a_file(tmp_path, caplog):
    entries = [{"messages": [SYSTEM, USER, ANSWER]}, {"messages": [SYSTEM, USER, ANSWER, USER]}]
    (tmp_path / "Chat.json").write_text(json.dumps(entries))
    with caplog.at_level(logging.WARNING, "expert_merging"):
        samples = load(tmp_path, "Chat")
    assert [(sample.question, sample.response) for sample in samples] == [("Why?", "So.")] * 2
    assert caplog.messages == [
        f"{tmp_path / 'Chat.json'}, entries 0, 1 (counted from 0): a system message cannot be part of a prompt and is "
        "left out",
        f"{tmp_path / 'Chat.json'}, entry 1 (counted from 0): turns after the first answer cannot be part of a prompt "
        "and are left out",
    ]


def touch(folder, *names):
    for name in names:
        (folder / name).write_text(json.dumps(ENTRIES))


def test_names_of_files_may_be_in_other_cases(tmp_path):
    touch(tmp_path, "code.json", "CHAT.jsonl", "gqa.JSON", "gsm8K.json", "other.json", "other.jsonl", "notes.txt")
    (tmp_path / "Math.json").mkdir()
    experts, usual = ("Code", "Chat", "VQA"), {"GQA": "VQA"}
    samples = load(tmp_path, *experts, family_tasks=usual, task_expert={"GSM8k": "Chat"}, counts={"Code": 1})
    assert [(sample.task, sample.file.name) for sample in samples] == [
        *[("Chat", "CHAT.jsonl")] * 2,
        ("Code", "code.json"),
        *[("GQA", "gqa.JSON")] * 2,
        *[("GSM8k", "gsm8K.json")] * 2,
    ]
    touch(tmp_path, "Code.json")
    assert {sample.file.name for sample in load(tmp_path, "Code")} == {"Code.json"}, "the very name comes first"


@pytest.mark.parametrize("second", ["Code.jsonl", "CODE.json"])
def test_several_files_for_a_task_are_refused(second, tmp_path):
    first = "Code.json" if second == "Code.jsonl" else "code.json"
    touch(tmp_path, first, second)
    one, two = sorted([first, second])
    assert refusal(load, tmp_path, "Code") == (
        f"{tmp_path / one} and {tmp_path / two} are both for the task Code; keep one of them"
    )


def test_a_file_whose_name_fits_two_experts_is_nobody_s(tmp_path):
    touch(tmp_path, "code.json")
    assert [*find_tasks(tmp_path, ["Code", "CODE"])] == ["code"]


@pytest.fixture
def picture(tmp_path):
    return make_picture(tmp_path / "a b.png")


def with_picture(folder, value):
    (folder / "Chart.json").write_text(json.dumps([{"question": "What?", "image_path": value}]))
    return load(folder, "Chart")[0].images[0]


@pytest.mark.parametrize("form", ["data:image/png;base64,{}", "{}", "wrapped"])
def test_pictures_in_entries_are_read(form, picture, tmp_path):
    text = base64.b64encode(picture.read_bytes()).decode()
    text = "\n".join([text[:76], text[76:]]) if form == "wrapped" else form.format(text)
    held = with_picture(tmp_path, text)
    assert held == HeldPicture(picture.read_bytes())
    assert read_picture(held).tobytes() == read_picture(picture).tobytes()
    assert str(held) == held.name
    assert len(held.name) == len("picture-") + 16
    assert text not in repr(held)
    assert with_picture(tmp_path, {"url": text}) == held


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_bare_base64_of_every_usual_kind_is_known(kind, tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, kind)
    held = with_picture(tmp_path, base64.b64encode(buffer.getvalue()).decode())
    assert read_picture(held).size == (40, 30)


def test_files_are_found_by_address_and_by_path(picture, tmp_path):
    for address in (f"file://{tmp_path}/a%20b.png", f"file://localhost{tmp_path}/a%20b.png", "file://a%20b.png"):
        assert with_picture(tmp_path, address) == picture
    assert with_picture(tmp_path, {"path": "a b.png", "bytes": None}) == picture


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (
            "https://a.org/" + LONG,
            "image_path https://a.org/{long} is not on this machine; download the picture and name the file",
        ),
        ("s3://a/b.png", "image_path s3://a/b.png is not on this machine; download the picture and name the file"),
        (LONG, "image_path {long} does not exist (looked in {places})"),
        ("a\0b", "image_path a\0b does not exist (looked in {places})"),
        (
            "data:text/plain;base64,AAAA",
            'image_path is "data:text/plain;base64,AAAA"; a data: address must have a picture in base64',
        ),
        ("data:image/png,AAAA", 'image_path is "data:image/png,AAAA"; a data: address must have a picture in base64'),
        (
            "iVBORw0KGgo" + "=" * 5000,
            'image_path is a picture in base64 that cannot be decoded ("{long}); is it complete?',
        ),
        ({"bytes": LONG}, '\'image_path\' must be a text or a list of texts, got {{"bytes": "{long}'),
        ([LONG, 3], "image_path {long} does not exist (looked in {places})"),
        ({"url": " "}, "'image_path' is empty; leave it out where there is no picture"),
    ],
)
def test_pictures_that_cannot_be_had_are_told_in_one_short_sentence(value, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = refusal(with_picture, tmp_path, value)
    start = f"{tmp_path / 'Chart.json'}, entry 0 (counted from 0): "
    assert told.startswith(start)
    for expected in problem.replace("{places}", f"{tmp_path}, {tmp_path.parent}, {tmp_path}").split("{long}"):
        assert expected.replace("{{", "{") in told
    assert len(told) < 300 + 4 * len(str(tmp_path))


def test_a_value_is_shown_by_its_beginning():
    assert excerpt("ab") == '"ab"'
    assert excerpt("ab", quoted=False) == "ab"
    assert len(excerpt(LONG)) == len(excerpt(LONG, quoted=False)) == 63
