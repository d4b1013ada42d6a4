"""Labelled questions: what an entry says is right, and what cannot be used."""

from __future__ import annotations

import json

import pytest

from expert_merging.errors import InputError
from expert_merging.questions.calibration import Sample
from expert_merging.questions.labelled import Question, digest_of, last_number, load_questions


def load(folder, *entries, **options):
    (folder / "Math.json").write_text(json.dumps(list(entries)))
    return load_questions(folder, **options)


def refusal(folder, *entries, **options):
    with pytest.raises(InputError) as raised:
        load(folder, *entries, **options)
    return raised.value.problems


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It costs $1,250.50.", 1250.5),
        ("3-4", 4),
        ("so it is -4", -4),
        ("= \N{MINUS SIGN}.5", -0.5),
        ("#### 72", 72),
        ("1,2,3", 3),
        ("2e3 or so", 2000),
        ("12,3456", 3456),
        ("10.0.", 10),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == number


def test_what_an_entry_has_decides_how_it_is_judged(tmp_path):
    found = load(
        tmp_path,
        {"question": "a", "answer": "red"},
        {"question": "b", "answer": 42},
        {"question": "c", "answer": ["red", "blue"]},
        {"question": "d", "response": "green"},
        {"question": "e", "choices": ["x", "y"], "answer": "y"},
        {"question": "f", "choices": ["x", "y"], "answer": "b"},
        {"question": "g", "choices": ["x", "y"], "answer": 1},
        {"question": "h", "choices": [1, 0], "answer": 0},
        {"instruction": "i", "output": "black"},
    )
    assert [one.kind for one in found] == [
        *("exact_match", "numbers", "exact_match", "exact_match"),
        *("choice", "choice", "choice", "choice", "exact_match"),
    ]
    assert [one.answers for one in found] == [
        *(("red",), ("42",), ("red", "blue"), ("green",)),
        *(("y",), ("y",), ("y",), ("0",), ("black",)),
    ]
    assert found[2].is_right(" blue\n")
    assert not found[2].is_right("red blue")
    assert found[1].is_right("6 times 7 is 42.0, I think")
    assert not found[1].is_right("42 or 43")
    assert not found[1].is_right("forty-two")


def test_texts_can_be_judged_by_their_numbers(tmp_path):
    (found,) = load(tmp_path, {"question": "a", "answer": "so #### 1,000"}, numbers=True)
    assert found.kind == "numbers"
    assert found.is_right("1000")
    (problem,) = refusal(tmp_path, {"question": "a", "answer": "red"}, numbers=True)
    assert problem.endswith("""Math.json, entry 0 (counted from 0): 'answer' has no number in it, got "red\"""")


def test_entries_may_have_no_answer_where_that_is_wanted(tmp_path):
    entries = [{"question": "a"}, {"question": "b", "answer": 42}, {"question": "c", "response": "so"}]
    found = load(tmp_path, *entries, without_answers=True)
    assert [(one.kind, one.answers) for one in found] == [("open", ()), ("numbers", ("42",)), ("exact_match", ("so",))]
    assert not found[0].is_right("anything")
    (choice,) = load(tmp_path, {"question": "d", "choices": ["x", 2]}, without_answers=True)
    assert (choice.kind, choice.answers, choice.choices) == ("choice", (), ("x", "2"))
    wrong = [{"question": "a", "answer": [{}]}, {"question": "b", "choices": ["x"]}]
    assert len(refusal(tmp_path, *wrong, without_answers=True)) == 2, "what is there must be usable"
    assert "'answer' must be" in refusal(tmp_path, entries[0])[0]


def test_the_first_questions_alone_and_the_expert_of_a_task(tmp_path):
    entries = [{"question": str(number), "answer": "x"} for number in range(3)]
    found = load(tmp_path, *entries, count=2, experts={"Math": "Numbers"})
    assert [one.sample.question for one in found] == ["0", "1"]
    assert {one.sample.expert for one in found} == {"Numbers"}
    assert load(tmp_path, *entries)[0].sample.expert == "Math"


def test_the_digest_is_of_questions_and_answers(tmp_path):
    digests = {
        digest_of(load(tmp_path, {"question": question, "answer": answer}))
        for question, answer in [("a", "x"), ("a", "y"), ("b", "x"), ("a", ["x", "y"])]
    }
    assert len(digests) == 4


def test_what_cannot_be_used_is_told_once_for_all_entries(tmp_path):
    problems = refusal(
        tmp_path,
        {"question": "a"},
        {"question": "b", "answer": "x"},
        {"question": "c"},
        {"question": "d", "answer": True},
        {"question": "e", "choices": ["x"], "answer": "x"},
        {"question": "f", "choices": ["x", "y"], "answer": "z"},
        {"question": "g", "choices": ["x", "y"], "answer": 2},
        {"answer": "x"},
    )
    file = tmp_path / "Math.json"
    answer = "'answer' must be a text, a number, or a list of them (a 'response' counts where there is none), got"
    chosen = "'answer' must be one of the choices, its letter (A is the first) or its number (0 is the first), got"
    assert problems[0] == f"{file}, entries 0, 2 (counted from 0): {answer} null"
    assert problems[1] == f"{file}, entry 3 (counted from 0): {answer} true"
    assert (
        problems[2] == f"""{file}, entry 4 (counted from 0): 'choices' must be a list of two texts or more, got ["x"]"""
    )
    assert problems[3] == f'{file}, entry 5 (counted from 0): {chosen} "z"'
    assert problems[4] == f"{file}, entry 6 (counted from 0): {chosen} 2"
    assert "'question' must be a text that is not empty" in problems[5]
    assert len(problems) == 6


def test_a_folder_without_questions_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"--questions .*absent is no folder; give one with a file of labelled questions"
    ):
        load_questions(tmp_path / "absent")
    with pytest.raises(InputError, match=r"--questions .* holds no TASK\.json and no TASK\.jsonl"):
        load_questions(tmp_path)


@pytest.mark.parametrize(
    ("text", "can"),
    [
        ("", True),
        (" \n", True),
        ("He", True),
        (" it's 4", True),
        ("it 's", True),  # some tokenizers take the space back
        ("gr\ufffd", True),  # the rest of the character is to come
        ("grün\n", True),
        ("grüne", False),
        ("h", False),
        ("it's 5", False),
        ("\ufffdgr", False),
    ],
)
def test_what_a_right_answer_may_begin_with(text, can):
    question = Question(Sample("A", "A", "?", None, "0"), (" Hello", "it's 42", "grün"), "exact_match")
    assert question.can_begin_with(text) is can
