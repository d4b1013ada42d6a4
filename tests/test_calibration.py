"""Calibration files become samples, and faults name the file and the entry."""

from __future__ import annotations

import json
import logging
import re

import pytest

from expert_merging.errors import InputError
from expert_merging.questions.calibration import Sample, load_samples

QUESTIONS = [{"question": f"question {number}"} for number in range(6)]


@pytest.fixture
def data(tmp_path):
    """Writes a task file; the folder of all task files."""
    folder = tmp_path / "dataset"
    folder.mkdir()

    def write(task, entries):
        text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
        (folder / f"{task}.json").write_bytes(text)
        return folder

    return write


def load(folder, experts=("Chat",), *, default_count=5, counts=None, task_expert=None, family_tasks=None):
    return load_samples(
        folder,
        tuple(experts),
        default_count=default_count,
        counts=counts or {},
        task_expert=task_expert or {},
        family_tasks=family_tasks,
    )


def problems(*arguments, **options):
    with pytest.raises(InputError) as caught:
        load(*arguments, **options)
    return list(caught.value.problems)


def test_the_first_entries_of_each_file_are_taken(data):
    data("Chat", QUESTIONS)
    folder = data("Math", QUESTIONS)
    samples = load(folder, ["Math", "Chat"], default_count=2, counts={"Math": 4})
    assert [(sample.task, sample.question) for sample in samples] == [
        *(("Chat", f"question {number}") for number in range(2)),
        *(("Math", f"question {number}") for number in range(4)),
    ]
    assert all(sample.task == sample.expert for sample in samples)


def test_an_entry_has_a_response_and_an_identity_or_not(data):
    folder = data("Chat", [{"question": "a", "response": "b", "question_id": 7, "task_name": "x"}, {"question": "c"},
                           {"question": "d", "response": ""}])  # fmt: skip
    file = folder / "Chat.json"
    assert load(folder) == [
        Sample("Chat", "Chat", "a", "b", "7", file=file),
        Sample("Chat", "Chat", "c", None, "1", file=file, number=1),
        Sample("Chat", "Chat", "d", None, "2", file=file, number=2),
    ]


def test_files_that_belong_to_no_expert_are_left_alone(data):
    data("VizWiz", b"{ not for us")
    folder = data("Chat", QUESTIONS)
    (folder / "Math.json").mkdir()
    assert {sample.task for sample in load(folder)} == {"Chat"}


def test_files_can_be_assigned_to_experts(data):
    data("gsm8k", QUESTIONS)
    data("Math", QUESTIONS)
    folder = data("Chat", QUESTIONS)
    samples = load(folder, ["Chat", "Math"], default_count=1, task_expert={"gsm8k": "Math", "Math": "Chat"})
    assert [(sample.task, sample.expert) for sample in samples] == [
        ("Chat", "Chat"),
        ("Math", "Chat"),
        ("gsm8k", "Math"),
    ]


def test_usual_tasks_of_a_family_belong_to_their_experts(data):
    data("GQA", QUESTIONS)
    data("VizWiz", QUESTIONS)
    folder = data("Chart", QUESTIONS)
    usual = {"GQA": "VQA", "VizWiz": "VQA", "TextVQA": "OCR", "Chart": "Chart"}

    def owners(experts, **given):
        return {sample.task: sample.expert for sample in load(folder, experts, family_tasks=usual, **given)}

    assert owners(["VQA", "Chart"]) == {"Chart": "Chart", "GQA": "VQA", "VizWiz": "VQA"}
    assert owners(["VQA", "Chart"], task_expert={"GQA": "Chart"}) == {"Chart": "Chart", "GQA": "Chart", "VizWiz": "VQA"}
    assert owners(["GQA", "Chart"]) == {"Chart": "Chart", "GQA": "GQA"}, "an expert of the file's own name comes first"
    assert owners(["Chart"]) == {"Chart": "Chart"}, "tasks of experts that are not merged are left alone"


def test_shorter_files_are_used_whole_and_that_is_said_in_one_line(data, caplog):
    data("Chat", QUESTIONS[:3])
    data("Code", QUESTIONS[:1])
    folder = data("Math", QUESTIONS[:2])
    with caplog.at_level(logging.INFO, "expert_merging"):
        assert len(load(folder, ["Chat", "Math", "Code"], counts={"Chat": 4, "Math": 2})) == 6
    assert caplog.messages == [
        "tasks with fewer samples than asked for, of which all are used: Chat 3 of 4, Code 1 of 5"
    ]


def test_a_missing_folder(tmp_path):
    assert problems(tmp_path / "none") == [
        f"calibration folder {tmp_path / 'none'} does not exist; give --data_dir a folder with one JSON file per task"
    ]


def test_names_of_tasks_and_experts_that_do_not_exist(data):
    folder = data("Chat", QUESTIONS)
    assert problems(folder, counts={"Chatt": 3}, task_expert={"Mat": "Chat", "Chat": "Chaat"}) == [
        f"--samples_per_task_dict names the task 'Chatt', which {folder} has no file for. Did you mean 'Chat'?",
        f"--task_expert names the task 'Mat', which {folder} has no file for. Known: Chat.",
        "--task_expert Chat=Chaat: there is no expert 'Chaat'. Did you mean 'Chat'?",
        f"expert Chat has no calibration samples: {folder} has no Chat.json, and no --task_expert TASK=Chat assigns "
        "it another file",
    ]


def test_experts_without_samples_and_faulty_files_are_reported_together(data):
    folder = data("Chat", b"[{")
    bad, no_math, no_code = problems(folder, ["Chat", "Math", "Code"])
    assert re.fullmatch(f"{re.escape(str(folder / 'Chat.json'))} is not valid JSON: .*", bad)
    assert no_math.startswith(
        f"expert Math has no calibration samples: {folder} has no Math.json, and no --task_expert"
    )
    assert no_code.startswith("expert Code has no calibration samples")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\xfa"])
def test_a_file_that_is_not_json(data, content):
    (found,) = problems(data("Chat", content))
    assert re.fullmatch(r".*Chat\.json is not valid JSON: .*", found)


@pytest.mark.parametrize("content", [{}, [], "text", {"question": "a"}, None, "a" * 80])
def test_a_file_without_a_list(data, content):
    folder = data("Chat", content)
    found = "an empty list" if content == [] else json.dumps(content)
    found = found if len(found) < 60 else found[:60] + "..."
    assert problems(folder) == [
        f"{folder / 'Chat.json'} must hold a list of objects with a 'question' each, and has {found}; see "
        "dataset/README.md"
    ]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("text", "must be an object with a 'question', got \"text\""),
        (["a"], "must be an object with a 'question', got [\"a\"]"),
        ({}, "'question' must be a text that is not empty, got null (its fields: none)"),
        ({"prompt": "a"}, "'question' must be a text that is not empty, got null (its fields: prompt)"),
        ({"question": " \n"}, "'question' must be a text that is not empty, got \" \\n\""),
        ({"question": 3}, "'question' must be a text that is not empty, got 3"),
        ({"question": "a", "response": 3}, "'response' must be a text (or left out), got 3"),
        ({"question": "a", "image_path": 3}, "'image_path' must be a text or a list of texts, got 3"),
        ({"question": "a", "image_path": ["x.jpg", 3]}, "image_path x.jpg does not exist (looked in {places})"),
        ({"question": "a", "image_path": ""}, "'image_path' is empty; leave it out where there is no picture"),
        ({"question": "a", "image_path": [" "]}, "'image_path' is empty; leave it out where there is no picture"),
        (
            {"question": "a", "Images": ["x.jpg"]},
            "has 'Images', and pictures are named by 'image_path'; rename it, or take it out if the question is to be "
            "asked without a picture",
        ),
        (
            {"question": "\ud800?"},
            "has half a character ('\\ud800'), which is no text; write the whole character, or leave it out",
        ),
        (
            {"question": "a", "response": "b\udfff"},
            "has half a character ('\\udfff'), which is no text; write the whole character, or leave it out",
        ),
    ],
)
def test_faulty_entries_are_named(data, monkeypatch, tmp_path, entry, problem):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = data("Chat", [{"question": "fine"}, entry])
    places = f"{folder}, {tmp_path}, {tmp_path / 'here'}"
    assert problems(folder) == [
        f"{folder / 'Chat.json'}, entry 1 (counted from 0): {problem.replace('{places}', places)}"
    ]


def test_all_faulty_entries_of_all_files_are_reported(data):
    data("Chat", [{"question": 1}, {"question": "fine"}, 2])
    folder = data("Math", [3])
    assert [line.split(":")[0] for line in problems(folder, ["Chat", "Math"])] == [
        f"{folder / 'Chat.json'}, entry 0 (counted from 0)",
        f"{folder / 'Chat.json'}, entry 2 (counted from 0)",
        f"{folder / 'Math.json'}, entry 0 (counted from 0)",
    ]


def test_entries_beyond_the_samples_taken_are_not_looked_at(data):
    assert len(load(data("Chat", [*QUESTIONS[:2], 3]), default_count=2)) == 2


def test_pictures_are_found_beside_the_file_its_parent_and_the_current_folder(data, monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = data("Chat", [{"question": "a", "image_path": ["1.jpg", "2.jpg", "3.jpg", str(tmp_path / "4.jpg")]}])
    expected = [folder / "1.jpg", tmp_path / "2.jpg", tmp_path / "here" / "3.jpg", tmp_path / "4.jpg"]
    for file in [*expected, tmp_path / "1.jpg"]:
        file.write_bytes(b"")
    assert load(folder)[0].images == tuple(expected)
    data(
        "Chat",
        [{"question": "a", "image_path": "2.jpg", "image_id": 7}, {"question": "b", "image_path": None, "image": ""}],
    )
    assert [sample.images for sample in load(folder)] == [(tmp_path / "2.jpg",), ()]
