"""What was measured of runs, and questions with answers: good files, and the readers of what users see of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

from expert_merging.comparing.finished import read_answers, read_runs
from expert_merging.comparing.report_tables import (
    answer_tables,
    divergence_tables,
    option_tables,
    response_tables,
    score_table,
)
from expert_merging.comparing.run_tables import csv_table, json_table, markdown_table
from expert_merging.comparing.runs import find_runs, ordered
from expert_merging.comparing.scores_file import Scores, SetScore, TaskScore, add_scores
from expert_merging.comparing.sweep_record import Record, Scored
from expert_merging.outcome import Meter
from expert_merging.questions.labelled import digest_of, load_questions
from expert_merging.run import Run

MEASURED = tuple(f"ties/a/{name}" for name in ("config.json", "outcome.json", "scores.json", "responses.json"))


def measure(folder: Path) -> None:
    """Two runs with all that is known of them, and their answers."""
    task = TaskScore(50.0, 1.0, 99.0, 2, (1.0, 0.0), "abc")
    for number, name in enumerate("ab"):
        run = Run(folder / "ties" / name)
        run.model.mkdir(parents=True)
        options = {"density": 0.1 + number, "base_model_path": "/base", "expert": {"A": "/a"}, "post": None}
        record = {"family": "Mistral", "method": "ties", "seed": 1, "options": options, "inputs": {"Chat": "a" * 40}}
        run.config.write_text(json.dumps({**record, "checkpoints": {"base": "x"}, "run": {"device": "cpu"}}))
        Meter(continued=False).save(run.outcome, 0.5, "cpu")
        add_scores(run.scores, Scores({"quiz": SetScore({"Chat": task, "Math": task})}, {"Chat": 0.5, "Math": 0.25}))
        run.responses.write_text(json.dumps({"Chat/0/why": {"response": "so"}, "digest": "x"}))
    answers = [{"task": "Chat", "question": "why", "right": ["so"], "answers": {"ties/a": {"text": "so", "points": 1}}}]
    (folder / "answers.json").write_text(json.dumps(answers))


def read_measured(folder: Path) -> None:
    """The tables of runs and of a report."""
    rows = find_runs([folder])
    for name in ("seed", "seconds", "quiz", "density"):
        if any(row.value(name) is not None for row in rows):
            ordered(rows, name, descending=False)
    for table in (csv_table, json_table, markdown_table):
        table(rows)
    runs = read_runs([folder / "ties" / name for name in "ab"])
    answer_tables(read_answers(folder / "answers.json"))
    for tables in (divergence_tables, option_tables, response_tables):
        tables(runs)
    score_table("quiz", {run.label: one for run in runs for one in run.scores.sets.values()})


def sweep(folder: Path) -> None:
    """A sweep's record."""
    folder.mkdir(exist_ok=True)
    record = Record(folder / "sweep.json", {"family": "Mistral"})
    record.add(Scored({"seed": 1}, "k", 0.5, {"Chat": math.nan}, {"Chat": [1.0, 0.0]}, 2.5))
    record.add(Scored({"seed": 2}, "l", problem="none"))


def read_sweep(folder: Path) -> None:
    """A sweep's record, its points from the best to the worst."""
    record = Record(folder / "sweep.json", {"family": "Mistral"})
    for select in ("divergence", "accuracy"):
        sorted(record.scored.values(), key=lambda one: one.badness(select))
    for one in list(record.scored.values()):
        record.add(one)


def label(folder: Path) -> None:
    """Questions with answers of every kind."""
    folder.mkdir(exist_ok=True)
    choice = {"question": "c", "choices": ["yes", "no"], "answer": "B"}
    entries = [{"question": "a", "answer": "so"}, {"question": "b", "answer": [1, 2.5]}, choice]
    (folder / "Chat.json").write_text(json.dumps(entries))
    (folder / "Math.jsonl").write_text('{"instruction": "d", "output": "#### 1,000"}\n')


def read_labelled(folder: Path) -> None:
    """Questions, and whether each one's own answer is right."""
    questions = load_questions(folder)
    digest_of(questions)
    for question in questions:
        assert question.is_right(question.answers[0])
