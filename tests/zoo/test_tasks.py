from __future__ import annotations

import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from zoo import tasks, texts
from zoo.mistral import TASKS


def right_answer(question: str) -> str:
    """Another way to every answer."""
    if found := re.fullmatch(r"<add>(\d\d)\+(\d\d)=", question):
        return str(int(found[1]) + int(found[2])).zfill(2)
    if found := re.fullmatch(r"<idx>([a-z]+):(\d+)=", question):
        return re.sub(r"\d", lambda digit: found[1][int(digit[0])], found[2])
    found = re.fullmatch(r"<uni>([a-h]+)=", question)
    assert found, question
    text = found[1]
    return "".join(letter for position, letter in enumerate(text) if letter not in text[:position])


def drawn(name: str | None, seed: int, count: int) -> list[tasks.Example]:
    return list(itertools.islice(tasks.training_examples(TASKS, name, seed), count))


@pytest.mark.parametrize("name", [None, *TASKS])
def test_answers_are_right(name: str | None) -> None:
    for example in drawn(name, 0, 500):
        assert example.response == right_answer(example.question)


def test_worked_examples() -> None:
    assert right_answer("<add>12+07=") == "19"
    assert right_answer("<add>01+07=") == "08"
    assert right_answer("<idx>kcqhwzb:05316=") == "kzhcb"
    assert right_answer("<uni>abbacddabcaaa=") == "abcd"


def test_easy_sums_carry_nothing() -> None:
    draw = random.Random(0)
    for _ in range(300):
        question = texts.add_easy(draw).question
        assert int(question[6]) + int(question[9]) < 10, question


def test_experts_learn_the_hard_version() -> None:
    assert {len(example.question) for example in drawn("Chat", 0, 100)} == {len("<uni>") + 13 + 1}
    assert {len(example.question) for example in drawn("Code", 0, 100)} == {len("<idx>") + 7 + 1 + 5 + 1}


def test_mixture_has_every_task_in_easy_and_hard() -> None:
    mixture = drawn(None, 0, 2000)
    tags = {tag: sum(example.question.startswith(tag) for example in mixture) for tag in ("<add>", "<uni>", "<idx>")}
    # A quarter of all sums is held out, which leaves a little more to the other tasks.
    assert tags["<idx>"] == pytest.approx(2000 * 2 / 3.75, abs=80)
    assert tags["<uni>"] == pytest.approx(2000 / 3.75, abs=80)
    assert tags["<add>"] == pytest.approx(2000 * 0.75 / 3.75, abs=80)
    hard_positions = sum(re.fullmatch(r"<idx>.{7}:.{5}=", example.question) is not None for example in mixture)
    assert hard_positions == pytest.approx(0.1 * tags["<idx>"], abs=40)


@pytest.mark.parametrize("name", TASKS)
def test_questions_are_all_different_and_held_out(name: str) -> None:
    parts = tasks.held_out(TASKS[name], name, 0)
    questions = [example.question for examples in parts.values() for example in examples]
    assert len(parts["dataset"]) >= 100
    assert len(parts["test"]) >= 300
    assert len(set(questions)) == len(questions)
    for source in (name, None):
        assert not set(questions) & {example.question for example in drawn(source, 0, 5000)}


def test_seeds_differ() -> None:
    assert drawn("Math", 0, 20) == drawn("Math", 0, 20) != drawn("Math", 1, 20)
    assert tasks.held_out(TASKS["Math"], "Math", 0) != tasks.held_out(TASKS["Math"], "Math", 1)


def test_files_have_what_the_merge_command_reads(tmp_path: Path) -> None:
    tasks.write_questions(TASKS, tmp_path, 0)
    for name in TASKS:
        calibration = json.loads((tmp_path / "dataset" / f"{name}.json").read_text())
        test = json.loads((tmp_path / "test" / f"{name}.json").read_text())
        assert all(entry.keys() == {"question", "question_id", "task_name"} for entry in calibration)
        assert [entry["question_id"] for entry in calibration] == list(range(len(calibration)))
        assert {entry["task_name"] for entry in calibration + test} == {name}
        known = json.loads((tmp_path / "known" / f"{name}.json").read_text())
        assert {entry["question"] for entry in known} == {
            example.question for example in tasks.known(TASKS[name], name, 0)
        }
        assert len(known) == len({entry["question"] for entry in known}) == 100
        assert all(entry["response"] == right_answer(entry["question"]) for entry in [*test, *known])


def test_nothing_is_known_where_there_is_no_easy_version() -> None:
    hard = replace(TASKS["Math"], easy=TASKS["Math"].hard)
    assert tasks.known(hard, "Math", 0) == []
