"""What was measured of runs, and questions with answers: good files, and the readers of what users see of them."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import openpyxl
from rich.console import Console

from expert_merging.comparing.columns import BENCHMARKS, VLMEVALKIT, joined
from expert_merging.comparing.evaluated import show
from expert_merging.comparing.finished import read_answers, read_runs
from expert_merging.comparing.imported import read_folder
from expert_merging.comparing.report import _others
from expert_merging.comparing.report_tables import (
    answer_tables,
    divergence_tables,
    option_tables,
    response_tables,
    score_table,
)
from expert_merging.comparing.run_tables import csv_table, json_table, markdown_table
from expert_merging.comparing.runs import find_runs, ordered
from expert_merging.comparing.scores_file import (
    Scores,
    SetScore,
    TaskScore,
    add_scores,
    as_json,
    read_scores,
)
from expert_merging.comparing.sweep_record import Record, Scored
from expert_merging.errors import InputError
from expert_merging.outcome import Meter
from expert_merging.questions.calibration import Sample
from expert_merging.questions.labelled import Question, digest_of, load_questions
from expert_merging.routing.record import Record as RoutedRecord
from expert_merging.routing.telling import tell
from expert_merging.run import Run
from expert_merging.running.answers import Answered

MEASURED = (
    *(f"ties/a/{name}" for name in ("config.json", "outcome.json", "scores.json", "responses.json")),
    "models.json",
)


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
    models = {"base": {"folder": "base"} | as_json(Scores({"quiz": SetScore({"Chat": task})}))}
    (folder / "models.json").write_text(json.dumps({"models": models}))


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
    scores = {**_others([str(folder / "models.json")], runs), **{run.label: run.scores for run in runs}}
    score_table("quiz", {label: one for label, own in scores.items() for one in own.sets.values()})


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


TOOLKITS = (
    *("harness/results_1.json", "harness/samples_t_1.jsonl", "boxes/refcoco_val_260102030405.json"),
    *("judged/annotations.json", "kit/kit_VizWiz_acc.json", "kit/kit_MathVision_MINI_x_score.csv"),
    *("kit/kit_GQA_TestDev_Balanced_acc.csv", "kit/kit_GQA_TestDev_Balanced_results.xlsx"),
    "kit/kit_TextVQA_VAL_results.tsv",
)


def toolkits(folder: Path) -> None:
    """What other toolkits write."""
    for name in ("harness", "boxes", "judged", "kit"):
        (folder / name).mkdir(parents=True)
    numbers = {"t": {"acc,none": 0.5}, "refcoco_bbox_rec_val": {"refcoco_ACC@0.5,none": 0.5}, "g": {"acc,none": 0.5}}
    results = {"results": numbers, "group_subtasks": {"g": ["t"]}, "higher_is_better": {"t": {"acc": True}}}
    (folder / "harness" / "results_1.json").write_text(json.dumps(results))
    lines = [{"doc_id": one, "doc_hash": "d", "target_hash": "t", "filter": "none", "acc": one} for one in (0, 1)]
    (folder / "harness" / "samples_t_1.jsonl").write_text("\n".join(map(json.dumps, lines)))
    box = {"bbox": [0, 0, 1, 1], "pred": [0, 0, 1, 0.5]}
    lines = [{"doc_id": 0, "target": "x", "input": "y", "refcoco_ACC@0.5": box}]
    (folder / "harness" / "samples_refcoco_bbox_rec_val_1.jsonl").write_text("\n".join(map(json.dumps, lines)))
    boxes = [{"answer": "[[1, 2, 3, 4]]", "gt_bbox": [0, 0, 5, 5], "hw": [9, 9]}]
    (folder / "boxes" / "refcoco_val_260102030405.json").write_text(json.dumps(boxes))
    judged = [{"generator_2": "m", "instruction": "do", "output_1": "there", "preference": 1.5}]
    (folder / "judged" / "annotations.json").write_text(json.dumps(judged))
    _write_kit(folder / "kit")


def _write_kit(folder: Path) -> None:
    """VLMEvalKit's files."""
    (folder / "kit_VizWiz_acc.json").write_text('[{"Overall": 12.5}]')
    parts = VLMEVALKIT["MathVision_MINI"].parts
    rows = ["Subject,tot,hit,acc", *(f"{part},4,2,50" for part in parts)]
    (folder / "kit_MathVision_MINI_x_score.csv").write_text("\n".join(rows))
    table = [("index", "question", "answer", "eval_score"), (0, "a", "b", 1), (1, "c", "d", 0.5)]
    for name in ("GQA_TestDev_Balanced", "TextVQA_VAL"):
        (folder / f"kit_{name}_acc.csv").write_text('"Overall"\n"75"\n')
    (folder / "kit_TextVQA_VAL_results.tsv").write_text("\n".join("\t".join(map(str, row)) for row in table))
    book = openpyxl.Workbook()
    for row in table:
        book.active.append(row)
    book.save(folder / "kit_GQA_TestDev_Balanced_results.xlsx")


def read_toolkits(folder: Path) -> None:
    """What they have measured, kept with a run and shown."""
    problems, scores = [], folder / "scores.json"
    for place in ("harness", "boxes", "judged", "kit"):
        try:
            found = read_folder(folder / place)
        except InputError as error:
            problems.extend(error.problems)
            continue
        add_scores(scores, Scores({BENCHMARKS: joined(read_scores(scores).sets.get(BENCHMARKS), found.tasks)}))
        show({"a": dict(read_scores(scores).sets)}, Console(file=io.StringIO()))
    scores.unlink(missing_ok=True)
    if problems:
        raise InputError(*problems)


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


def _routed(folder: Path) -> RoutedRecord:
    questions = [Question(Sample.test(text), ("7",), "exact_match") for text in ("why", "how")]
    return RoutedRecord(folder / "routed.json", {"experts": {"A": ["x"], "B": ["y"]}, "device": "cpu"}, questions)


def route(folder: Path) -> None:
    """Two questions that experts have answered."""
    folder.mkdir(parents=True)
    record = _routed(folder)
    for number in (0, 1):
        for expert, value in {"A": 1.5, "B": 2.5}.items():
            record.add_perplexity(number, expert, value)
        record.add_answer(number, {"A": 0.75, "B": 0.25}, Answered("7", 1.0))
    record.save()


def read_routed(folder: Path) -> None:
    """Go on with what is kept of them, and tell of it."""
    record = _routed(folder)
    record.file = folder / "told.json"
    if not record.unanswered():
        tell(record, Console(file=io.StringIO()))
