"""Further questions that are crossed from a task's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from expert_merging.backbone import load_tokenizer
from expert_merging.questions import crossing
from expert_merging.questions.calibration import Sample
from expert_merging.questions.crossing import crossed, token_pieces
from tests.checkpoints import save_tokenizer


def sample(question: str, *pictures: str, task: str = "T", identity: str = "0") -> Sample:
    return Sample(task, task, question, "given", identity, tuple(map(Path, pictures)), file=Path("T.json"))


OWN = [sample("abcd", identity="0"), sample("efgh", identity="1"), sample("ijkl", identity="2")]


def test_they_begin_like_one_question_and_go_on_like_another(monkeypatch):
    monkeypatch.setattr(crossing, "_MUTATED", 0)
    found = crossed(OWN, 12, list, 0)
    questions = [one.question for one in found]
    assert len(set(questions)) == 12
    assert not set(questions) & {one.question for one in OWN}
    wholes = [one.question for one in OWN]
    for question in questions:
        assert any(
            question == first[:cut] + second[cut:]
            for first in wholes
            for second in wholes
            for cut in range(1, 4)
            if first != second
        )
    assert all(one.response is None and one.file is None and one.expert == "T" for one in found)
    assert len({one.identity for one in found}) == 12


def test_some_of_what_differs_between_questions_is_brought_to_other_places():
    """Three tenths of it; what all questions have in common stays."""
    own = [sample(f"<{word}={number}>") for word, number in (("abcdefgh", 1), ("ijklmnop", 2), ("qrstuvwx", 3))]
    found = [one.question for one in crossed(own, 400, list, 0)]
    assert len(found) == 400
    assert all(question[0] == "<" and question[9] == "=" and question[11:] == ">" for question in found)
    assert {letter for question in found for letter in question} == set("<abcdefghijklmnopqrstuvwx=123>")
    there = [{one.question[place] for one in own} for place in range(12)]
    away = [sum(letter not in own for letter, own in zip(question, there, strict=True)) for question in found]
    assert sum(away) / (9 * 400) == pytest.approx(0.3 * 24 / 27, abs=0.03)


def test_the_seed_and_the_task_decide_and_there_may_be_fewer_than_wanted(monkeypatch):
    assert crossed(OWN, 5, list, 1) == crossed(OWN, 5, list, 1) != crossed(OWN, 5, list, 2)
    both = crossed([*OWN, *(replace(one, task="U") for one in OWN)], 4, list, 1)
    assert [one.task for one in both] == ["T"] * 4 + ["U"] * 4
    assert len(crossed([sample("ab"), sample("cb")], 9, list, 0)) == 0
    monkeypatch.setattr(crossing, "_MUTATED", 0)
    assert [one.question for one in crossed([sample("ab"), sample("cd")], 9, list, 0)] in (["ad", "cb"], ["cb", "ad"])
    assert crossed([sample("a"), sample("b")], 3, list, 0) == []


def test_pictures_are_those_of_either_and_marks_keep_a_question_whole():
    plain = [sample("abcd", "1.png"), sample("efgh", "2.png")]
    for one in crossed(plain, 6, list, 0):
        assert one.images in ((Path("1.png"),), (Path("2.png"),))
    marked = [
        sample("<image> abcd", "1.png"),
        sample("<image> efgh", "2.png"),
        sample("<image><image>", "3.png", "4.png"),
    ]
    found = {(one.question, one.images) for one in crossed(marked, 6, list, 0)}
    assert found == {("<image> abcd", (Path("2.png"),)), ("<image> efgh", (Path("1.png"),))}


def test_one_question_has_no_other_to_be_crossed_with(caplog):
    caplog.set_level("INFO")
    assert {one.task for one in crossed([*OWN, sample("alone", task="U")], 3, list, 0)} == {"T"}
    (record,) = caplog.records
    assert record.getMessage() == "U has one question alone, so no further ones are made of it"


def test_texts_are_cut_between_tokens(tmp_path):
    save_tokenizer(tmp_path)
    pieces = token_pieces(load_tokenizer(tmp_path))
    assert "".join(pieces("Math question 1?")) == "Math question 1?"
    assert len(pieces("Math question 1?")) > 3

    class Merged:
        is_fast = True

        def __call__(self, text, **_):
            return {"offset_mapping": [(1, 3), (3, 5), (3, 5), (6, 7)]}

    assert token_pieces(Merged())("xabcd yz") == ["x", "ab", "cd ", "yz"]
    Merged.is_fast = False
    assert token_pieces(Merged())("xab") == ["x", "a", "b"]
