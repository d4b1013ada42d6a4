"""The file that answers are kept in: who has answered what, and what an interrupted run goes on from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_merging.documents import read_object
from expert_merging.errors import InputError
from expert_merging.writing import write_atomically

if TYPE_CHECKING:
    from expert_merging.questions.labelled import Question
    from expert_merging.running.answers import Answered

FORMAT = "routed answers 1"


class Record:
    """Perplexities and answers, a dictionary for each question.

    Args:
        file: where they are kept.
        settings: all that decides them; a file of other settings is refused.
        questions: the questions.

    Raises:
        InputError: the file is no such file, or has answers of other settings.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any], questions: Sequence[Question]) -> None:
        self.file, self.settings = file, settings
        self.entries = [_entry(question) for question in questions]
        if file.exists():
            for entry, earlier in zip(self.entries, self._earlier(), strict=True):
                entry |= earlier

    def _earlier(self) -> list[dict[str, Any]]:
        """What an earlier run has found out of each question."""
        advice = "move it away, or give another --answers"
        found = read_object(self.file, advice=advice)
        settings, entries = found.get("settings"), found.get("questions")
        if found.get("format") != FORMAT or not isinstance(settings, dict) or not isinstance(entries, list):
            raise InputError(f"--answers {self.file} is no file of answers by route; {advice}")
        differing = [name for name in self.settings if settings.get(name) != self.settings[name]]
        if differing:
            raise InputError(
                f"--answers {self.file} has answers of a command that differs in {' and '.join(differing)}; {advice}"
            )
        if len(entries) != len(self.entries) or not all(map(self._is_entry, entries)):
            raise InputError(f"--answers {self.file} is damaged; {advice}")
        return [{name: entry[name] for name in ("perplexity", "experts", "answer", "points") if name in entry}
                for entry in entries]  # fmt: skip

    def _is_entry(self, entry: Any) -> bool:
        if not isinstance(entry, dict) or not _are_numbers(entry.get("perplexity")):
            return False
        if "answer" not in entry:
            return True
        experts, points = entry.get("experts"), entry.get("points", 0)
        known = _are_numbers(experts) and {*(experts or {})} <= {*self.settings["experts"]}
        return known and isinstance(entry["answer"], str) and points in (0, 1)

    def unread(self, expert: str) -> list[int]:
        """Numbers of the questions whose perplexity under an expert is not known."""
        return [number for number, entry in enumerate(self.entries) if expert not in entry["perplexity"]]

    def unanswered(self) -> list[int]:
        """Numbers of the questions that have no answer."""
        return [number for number, entry in enumerate(self.entries) if "answer" not in entry]

    def perplexities(self, expert: str) -> list[float]:
        """Of all questions under an expert."""
        return [entry["perplexity"][expert] for entry in self.entries]

    def add_perplexity(self, number: int, expert: str, value: float) -> None:
        """Note a question's perplexity under an expert; `save` keeps it."""
        self.entries[number]["perplexity"][expert] = value

    def add_answer(self, number: int, experts: Mapping[str, float], answered: Answered) -> None:
        """Note an answer; `save` keeps it.

        Args:
            number: of the question.
            experts: weights of those who have answered it.
            answered: the answer.
        """
        entry = self.entries[number]
        entry |= {"experts": dict(experts), "answer": answered.text}
        if entry["right"]:
            entry["points"] = answered.points

    def save(self, **summary: Any) -> None:
        """Write the file.

        Args:
            summary: what is said of all questions together.
        """
        content = {"format": FORMAT, "settings": self.settings, **summary, "questions": self.entries}
        write_atomically(self.file, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _entry(question: Question) -> dict[str, Any]:
    pictures = {"pictures": list(map(str, question.sample.images))} if question.sample.images else {}
    own = {"task": question.task, "question": question.sample.question, **pictures, "right": list(question.answers)}
    return {**own, "perplexity": {}}


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(type(one) in (int, float) and one >= 0 for one in value.values())
