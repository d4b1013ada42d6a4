"""Results of other toolkits: what their folders look like, which columns they become, and refusals."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from expert_merging.commands.main import main
from expert_merging.comparing.columns import BENCHMARKS
from expert_merging.comparing.imported import read_folder
from expert_merging.comparing.report_tables import score_table
from expert_merging.comparing.scores_file import Scores, SetScore, TaskScore, add_scores, read_scores
from expert_merging.errors import InputError
from expert_merging.run import Run
from tests.command import merge
from tests.comparing.test_evaluate import evaluate, refusal

GEOMETRY = ("metric geometry - angle", "metric geometry - area", "metric geometry - length", "solid geometry")


def csv(*rows):
    return "".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in rows)


def vlmevalkit(folder, name="merged", *, points=(1.0, 0.0, 0.3, 1.0)):
    """A model's folder as VLMEvalKit of 2025 leaves it, with tables of points as newer versions write them."""
    folder = folder / name
    folder.mkdir(parents=True)

    def put(ending, text):
        (folder / f"{name}_{ending}").write_text(text)

    put("VizWiz_acc.csv", csv(["Overall"], [31.25]))
    put("GQA_TestDev_Balanced_acc.csv", csv(["Overall"], [56.5]))
    put("TextVQA_VAL_acc.csv", csv(["Overall"], [100 * sum(points) / 4]))
    rows = [[number, f"what is {number}?", "yes", point] for number, point in enumerate(points)]
    table = [["index", "question", "answer", "eval_score"], *rows]
    put("TextVQA_VAL_results.tsv", "".join("\t".join(map(str, row)) + "\n" for row in table))
    put("ChartQA_TEST_acc.csv", csv(["test_human", "test_augmented", "Overall"], [50, 90, 70]))
    skills = [["Overall", 1000, 400, 40], ["Geometry reasoning", 100, 30, 30], ["algebraic reasoning", 90, 45, 50]]
    head = ["Task&Skill", "tot", "hit", "acc"]
    put("MathVista_MINI_gpt-4o-mini_score.csv", csv(head, *skills, ["geometry problem solving", 80, 56, 70]))
    subjects = [[name, 19, hits, 100 * hits / 19] for name, hits in zip(GEOMETRY, (4, 5, 6, 1), strict=True)]
    put(
        "MathVision_MINI_gpt-4o-mini_score.csv", csv(["Subject", "tot", "hit", "acc"], *subjects, ["algebra", 19, 1, 5])
    )
    put("MMBench_DEV_EN_acc.csv", csv(["split", "Overall"], ["dev", 0.7]))
    put("GQA_TestDev_Balanced.xlsx", "predictions, which are not read")
    return folder


def harness(folder, numbers, samples=(), *, date="2026-01-02T03-04-05", better=None, groups=None, lmms=False):
    """A model's folder as lm_eval or lmms-eval leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"results": numbers, "higher_is_better": better or {}, "group_subtasks": groups or {}}
    (folder / (f"{date}_results.json" if lmms else f"results_{date}.json")).write_text(json.dumps(content))
    for task, lines in dict(samples).items():
        name = f"{date}_samples_{task}.jsonl" if lmms else f"samples_{task}_{date}.jsonl"
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def answers(points, metric="exact_match", **more):
    """Samples of lm_eval, not in the order of the questions."""
    lines = [
        {"doc_id": number, "doc_hash": f"d{number}", "target_hash": "t", "filter": "none", metric: point, **more}
        for number, point in enumerate(points)
    ]
    return lines[::-1]


def boxes(*overlaps):
    """Samples of lmms-eval, in which a box of height 1 is found in part."""
    return [
        {
            "doc_id": number,
            "doc_hash": f"<image at 0x{number}>",
            "target": "[0, 0, 1, 1]",
            "input": f"where is {number}?",
            "refcoco_ACC@0.5": {"bbox": [0, 0, 1, 1], "pred": [0, 0, 1, overlap]},
            "refcoco_IoU": {"bbox": [0, 0, 1, 1], "pred": [0, 0, 1, overlap]},
        }
        for number, overlap in enumerate(overlaps)
    ]


REC = {"refcoco_IoU,none": 0.6, "refcoco_IoU_stderr,none": "N/A", "refcoco_ACC@0.5,none": 0.5, "alias": "x"}


@pytest.fixture
def run(tiny_zoo, tmp_path):
    common = ["--cache_dir", tiny_zoo, "--output_path", tmp_path / "out", "--method", "task_arithmetic"]
    assert merge(*common, "--run_name", "r") == 0
    return tmp_path / "out" / "task_arithmetic" / "r"


def test_the_published_columns_come_from_two_toolkits(run, tmp_path, capsys):
    first = vlmevalkit(tmp_path / "outputs")
    tasks = [f"refcoco{kind}_bbox_rec_val" for kind in ("", "+", "g")]
    second = harness(
        tmp_path / "logs" / "merged",
        dict.fromkeys(tasks, REC),
        dict.fromkeys(tasks, boxes(0.4, 0.6, 1.0, 0.2)),
        lmms=True,
    )
    assert evaluate(run, "--import", second) == 0
    shutil.rmtree(Run(run).model)  # which nobody needs any more
    assert evaluate(run, "--import", first) == 0
    shown = capsys.readouterr().out
    assert "benchmarks: score in %, with 95 % intervals" in shown
    assert "task_arithmetic/r: not among the scores, as no share of right answers is known: MMBench_DEV_EN" in shown
    kept = read_scores(Run(run).scores).sets[BENCHMARKS]
    assert list(kept.tasks) == [
        *("VizWiz", "GQA", "MathVista", "MATH-Vision", "ChartQA", "TextVQA", "RefCOCO", "RefCOCO+", "RefCOCOg")
    ]
    means = {name: round(score.mean, 6) for name, score in kept.tasks.items()}
    assert means["MathVista"] == 50  # of 30, 50 and 70, whatever the other skills have
    assert means["MATH-Vision"] == round(100 * 16 / 76, 6)
    assert means["ChartQA"] == 70
    assert means["RefCOCO+"] == 50
    assert kept.mean == pytest.approx(sum(means.values()) / 9)
    vision, text, box = (kept.tasks[name] for name in ("MATH-Vision", "TextVQA", "RefCOCO"))
    assert (vision.count, vision.correct) == (76, ())
    assert vision.low < vision.mean < vision.high
    assert text.correct == (1, 0, 0.3, 1)
    assert text.low < text.mean < text.high
    assert box.correct == (0, 1, 1, 0)
    assert kept.tasks["VizWiz"] == TaskScore(31.25)
    assert main(["runs", str(tmp_path / "out"), "--csv"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert float(dict(zip(head.split(","), row.split(","), strict=True))[BENCHMARKS]) == pytest.approx(kept.mean)
    table = score_table(BENCHMARKS, {"r": kept})
    assert list(table.columns) == [*kept.tasks, "mean"]


def test_a_model_that_no_run_has_made_is_shown_alone(tiny_zoo, tmp_path, capsys):
    folder = next(one for one in tiny_zoo.iterdir() if any(one.glob("*.safetensors")))
    assert evaluate(folder, "--import", vlmevalkit(tmp_path), "--json", tmp_path / "s.json") == 0
    assert "MathVista" in capsys.readouterr().out
    assert not (folder / "scores.json").exists()
    (model,) = json.loads((tmp_path / "s.json").read_text())["models"].values()
    assert model["scores"][BENCHMARKS]["tasks"]["VizWiz"] == {"mean": 31.25}


def test_new_columns_join_earlier_ones_and_replace_those_of_their_name(run, tmp_path):
    old = {"other": TaskScore(10.0), "VizWiz": TaskScore(1.0)}
    add_scores(Run(run).scores, Scores({BENCHMARKS: SetScore(old), "quiz": SetScore({"x": TaskScore(2.0)})}))
    folder = vlmevalkit(tmp_path)
    for file in folder.iterdir():
        if "VizWiz" not in file.name:
            file.unlink()
    assert evaluate(run, "--import", folder) == 0
    sets = read_scores(Run(run).scores).sets
    assert {name: score.mean for name, score in sets[BENCHMARKS].tasks.items()} == {"VizWiz": 31.25, "other": 10.0}
    assert sets[BENCHMARKS].mean == pytest.approx((31.25 + 10) / 2)
    assert sets["quiz"].mean == 2


def test_the_newest_evaluation_of_vlmevalkit_counts(tmp_path):
    folder = vlmevalkit(tmp_path)
    old, new = folder / "T20260101_Gabcdef12", folder / "T20260818_Gabcdef12"
    old.mkdir()
    for file in list(folder.glob("merged_*")):
        file.rename(old / file.name)
    shutil.copytree(old, new)
    (new / "merged_VizWiz_acc.csv").write_text(csv(["Overall"], [40]))
    (new / "merged_GQA_TestDev_Balanced_acc.csv").unlink()
    found = read_folder(folder).tasks
    assert (found["VizWiz"].mean, found["GQA"].mean) == (40, 56.5)
    assert read_folder(old).tasks["VizWiz"].mean == 31.25
    (folder / "merged_VizWiz_acc.csv").symlink_to(old / "merged_VizWiz_acc.csv")
    assert read_folder(folder).tasks["VizWiz"].mean == 31.25


def test_tables_of_vlmevalkit_come_in_several_forms(tmp_path):
    folder = vlmevalkit(tmp_path)
    (folder / "merged_VizWiz_acc.csv").unlink()
    (folder / "merged_VizWiz_acc.json").write_text('[{"Overall": 12.5}]')
    rows = [{"index": 0, "question": "q", "answer": "a", "eval_score": 1}]
    rows += [{"index": 1, "question": "q", "answer": "b", "eval_score": 0}]
    (folder / "merged_GQA_TestDev_Balanced_results.json").write_text(json.dumps(rows))
    (folder / "merged_GQA_TestDev_Balanced_acc.csv").write_text(csv(["Overall"], [50]))
    found = read_folder(folder).tasks
    assert found["VizWiz"].mean == 12.5
    assert found["GQA"].correct == (1, 0)


def test_points_whose_mean_is_another_number_are_no_points(tmp_path):
    """As of DocVQA, whose table has distances."""
    folder = vlmevalkit(tmp_path)
    (folder / "merged_TextVQA_VAL_acc.csv").write_text(csv(["Overall"], [99]))
    assert read_folder(folder).tasks["TextVQA"] == TaskScore(99.0)


def test_points_are_read_from_workbooks(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    folder = vlmevalkit(tmp_path)
    book = openpyxl.Workbook()
    for row in [["index", "question", "answer", "eval_score"], [0, "q", "a", 1], [1, "q", "=b", 0.5]]:
        book.active.append(row)
    book.save(folder / "merged_GQA_TestDev_Balanced_results.xlsx")
    (folder / "merged_GQA_TestDev_Balanced_acc.csv").write_text(csv(["Overall"], [75]))
    assert read_folder(folder).tasks["GQA"].correct == (1, 0.5)


def test_without_openpyxl_it_is_said_what_to_do(tmp_path, monkeypatch):
    folder = vlmevalkit(tmp_path)
    file = folder / "merged_GQA_TestDev_Balanced_results.xlsx"
    file.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(InputError) as raised:
        read_folder(folder)
    assert str(raised.value) == (
        f"--import {folder}: {file} is read with openpyxl; pip install openpyxl, or run VLMEvalKit with PRED_FORMAT=tsv"
    )


def test_results_of_the_harness_and_the_points_of_its_questions(tmp_path):
    gsm8k = {"alias": "gsm8k", "sample_len": 4, "exact_match,strict-match": 0.0, "exact_match,flexible-extract": 0.75}
    numbers = {
        "gsm8k": {"exact_match_stderr,strict-match": 0.1, **gsm8k},
        "arc": {"acc,none": 0.5, "acc_norm,none": 0.25},
        "wikitext": {"word_perplexity,none": 12.5, "bits_per_byte,none": 0.5},
        "f1": {"f1,none": 0.4},
    }
    better = {"wikitext": {"word_perplexity": False, "bits_per_byte": False}}
    lines = [*answers([0, 0, 0, 0], filter="strict-match"), *answers([1, 0, 1, 1], filter="flexible-extract")]
    samples = {"gsm8k": lines, "f1": answers([[1, 1], [0, 1]], "f1")}
    folder = harness(tmp_path / "m", numbers, samples, better=better)
    found = read_folder(tmp_path)
    assert {name: score.mean for name, score in found.tasks.items()} == {"gsm8k": 75, "arc": 50, "f1": 40}
    assert found.left_out == ["wikitext"]
    assert found.tasks["gsm8k"].correct == (1, 0, 1, 1)
    assert found.tasks["f1"].correct == ()
    assert read_folder(folder, "acc_norm").tasks["arc"].mean == 25
    assert read_folder(folder, "strict-match").tasks["gsm8k"].mean == 0
    harness(folder, {"arc": {"acc,none": 0.6}}, date="2026-01-03T03-04-05")
    later = read_folder(folder).tasks
    assert (later["arc"].mean, later["gsm8k"].mean) == (60, 75)


@pytest.mark.parametrize(("share", "known"), [(0.6, True), (0.75, True), (0.7, False)])
def test_a_group_is_one_column(tmp_path, share, known):
    """Its number is the mean over questions or over tasks, and then it has an interval."""
    numbers = {"maths": {"acc,none": share}, "one": {"acc,none": 1.0}, "two": {"acc,none": 0.5}, "rest": {"alias": "x"}}
    samples = {"one": answers([1], "acc"), "two": answers([1, 0, 1, 0], "acc")}
    groups = {"maths": ["one", "two"], "rest": [], "one": [], "two": []}
    folder = harness(tmp_path, numbers, samples, groups=groups)
    found = read_folder(folder)
    assert list(found.tasks) == ["maths"]
    assert found.left_out == []
    assert (found.tasks["maths"].low is not None) == known
    assert found.tasks["maths"].mean == 100 * share


def test_the_same_questions_are_known_again(tmp_path):
    def digest(name, lines, task="refcoco_bbox_rec_val", column="RefCOCO", numbers=REC):
        return read_folder(harness(tmp_path / name, {task: numbers}, {task: lines})).tasks[column].questions

    first = digest("a", boxes(0.4, 0.6))
    moved = [{**line, "doc_hash": "<image at 0x77>"} for line in boxes(0.7, 0.1)]
    assert digest("b", moved) == first != ""
    assert digest("c", [{**line, "input": "?"} for line in moved]) != first
    numbers = {"acc,none": 0.5}
    one = digest("d", answers([1, 0], "acc"), "t", "t", numbers)
    assert digest("e", answers([0, 1], "acc"), "t", "t", numbers) == one
    assert digest("f", answers([0, 1], "acc", doc_hash="x"), "t", "t", numbers) != one
    assert digest("g", answers([0, 1], "acc_norm"), "t", "t", {"acc_norm,none": 0.5}) != one


def problems(folder, metric=None):
    with pytest.raises(InputError) as raised:
        read_folder(folder, metric)
    return [problem.removeprefix(f"--import {folder}: ") for problem in raised.value.problems]


def test_what_holds_no_results_is_refused(tmp_path):
    nothing = (
        "no results are there; lm_eval and lmms-eval write them as results_DATE.json and DATE_results.json, VLMEvalKit "
        "as MODEL_DATASET_acc.csv and MODEL_DATASET_JUDGE_score.csv in a folder called MODEL, InternVL's script as "
        "refcoco_val_DATE.json, alpaca_eval as annotations.json"
    )
    assert problems(tmp_path / "no") == ["there is no such folder"]
    assert problems(tmp_path) == [nothing]
    renamed = vlmevalkit(tmp_path).rename(tmp_path / "elsewhere")
    assert problems(renamed) == [nothing]
    other = tmp_path / "other"
    other.mkdir()
    (other / "other_MMBench_DEV_EN_acc.csv").write_text(csv(["Overall"], [0.5]))
    assert problems(other) == ["no share of right answers is known of MMBench_DEV_EN"]


def test_results_of_several_models_or_judges_are_refused(run, tmp_path, capsys):
    for name in ("a", "b"):
        harness(tmp_path / "m" / name, {"t": {"acc,none": 0.5}})
    expected = f"results of several models: {tmp_path / 'm' / 'a'}, {tmp_path / 'm' / 'b'}; give the folder of one"
    assert problems(tmp_path / "m") == [expected]
    folder = vlmevalkit(tmp_path)
    (folder / "merged_MathVista_MINI_exact_score.csv").write_text("")
    (line,) = problems(folder)
    assert line == (
        f"{folder} has scores on MathVista_MINI by several judges: merged_MathVista_MINI_exact_score.csv, "
        "merged_MathVista_MINI_gpt-4o-mini_score.csv; move all but one away"
    )
    assert refusal(capsys, run, tmp_path, "--import", folder) == [
        "--import has the results of one model; give it one run, got 2"
    ]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("VizWiz_acc.csv", "", "does not hold scores as VLMEvalKit writes them; let VLMEvalKit write it again"),
        ("VizWiz_acc.csv", csv(["Overall"], ["much"]), "does not hold scores as VLMEvalKit writes them; let"),
        ("VizWiz_acc.csv", csv(["Overall"], [101]), "does not hold scores as VLMEvalKit writes them; let"),
        ("VizWiz_acc.csv", '"Overall\n', "is no table (unexpected end of data); let VLMEvalKit write it again"),
        ("VizWiz_acc.csv", b"\xff", "is no text in UTF-8; let VLMEvalKit write it again"),
        ("VizWiz_acc.json", "{}", "is no list of rows; let VLMEvalKit write it again"),
        (
            "MathVision_MINI_judge_score.csv",
            csv(["Subject", "tot", "hit", "acc"], [GEOMETRY[0], 1, 1, 100], [GEOMETRY[3], 1, 1, 100]),
            f"lacks {GEOMETRY[1]}, {GEOMETRY[2]}; MATH-Vision is the mean of {', '.join(GEOMETRY)}",
        ),
        (
            "TextVQA_VAL_results.tsv",
            "index\teval_score\n0\t1\n",
            "does not hold points of questions as VLMEvalKit writes them; let VLMEvalKit write it again",
        ),
        ("TextVQA_VAL_results.xlsx", b"PK", "is no workbook; let VLMEvalKit write it again"),
    ],
)
def test_damaged_files_of_vlmevalkit_are_named(tmp_path, name, text, expected):
    if name.endswith("xlsx"):
        pytest.importorskip("openpyxl")
    folder = vlmevalkit(tmp_path)
    for file in folder.glob(f"merged_{name.split('_')[0]}*"):
        if not (name.startswith("TextVQA") and file.name.endswith("acc.csv")):
            file.unlink()
    file = folder / f"merged_{name}"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    (line,) = problems(folder)
    assert line.startswith(f"{file} {expected}")


def test_damaged_files_of_a_harness_are_named(tmp_path):
    folder = harness(tmp_path, {"t": {"acc,none": 0.5}}, {"t": answers([1, 0], "acc")})
    (results,), (samples,) = folder.glob("*.json"), folder.glob("*.jsonl")
    assert problems(folder, "acc_norm") == ["no task has the metric acc_norm; they have acc,none"]
    advice = "let the harness write it again"
    samples.write_text('{"doc_id": 1}\n[1]\n')
    assert problems(folder) == [f"{samples}, line 2 is no sample of a harness ([1]); {advice}"]
    samples.write_text('{"doc_id": 1}\n{"doc')
    (line,) = problems(folder)
    assert line.startswith(f"{samples}, line 2 is not valid JSON (")
    samples.write_text('{"doc_id": 1, "acc": 1}\n{"doc_id": "x", "acc": 0}\n')
    form = f"{results} does not hold results as lm_eval and lmms-eval write them; {advice}"
    assert problems(folder) == [form]
    for broken in ({"t": 3}, {"t": {"acc,none": True}}):
        results.write_text(json.dumps({"results": broken}))
        assert problems(folder) == [form]
    circle = {"results": {"t": {"acc,none": 0.5}, "s": {}}, "group_subtasks": {"t": ["s"], "s": ["s"]}}
    results.write_text(json.dumps(circle))
    assert problems(folder) == [form]
    results.write_text("{")
    (line,) = problems(folder)
    assert line.startswith(f"{results} is not valid JSON (")


def test_boxes_of_internvl_s_own_script(tmp_path):
    """In thousandths or shares of the picture's sides, and half of the right box is enough."""
    answers = [
        "<ref>dog</ref><box>[[0, 0, 500, 250]]</box>",
        "[[0.0, 0.0, 0.5, 0.24]]",
        "[0, 0, 500, 500]",
        "[a, b, c, d]",
    ]
    entries = [{"answer": text, "gt_bbox": [0, 0, 50, 100], "hw": [200, 100]} for text in [*answers, "nothing"]]
    (tmp_path / "refcoco+_val_260102030405.json").write_text(json.dumps(entries))
    (tmp_path / "refcoco_testA_260102030405.json").write_text("[]")
    found = read_folder(tmp_path)
    assert found.tasks["RefCOCO+"].correct == (1, 0, 1, 0, 0)
    assert found.tasks["RefCOCO+"].mean == 40
    assert found.left_out == ["refcoco_testA"]
    (tmp_path / "refcoco+_val_260102030406.json").write_text(json.dumps(entries))
    assert problems(tmp_path) == [
        f"{tmp_path} has refcoco+_val_260102030405.json, refcoco+_val_260102030406.json, which do not say whose they "
        "are; leave those of one model there"
    ]


def test_preferences_of_alpacaeval(tmp_path):
    entry = {"generator_2": "merged", "output_1": "there"}
    values = (1, 2, 1.5, 0, 1.9, None, float("nan"))
    entries = [{**entry, "instruction": f"do {number}", "preference": one} for number, one in enumerate(values)]
    file = tmp_path / "weighted_alpaca_eval_gpt4_turbo" / "annotations.json"
    file.parent.mkdir()
    file.write_text(json.dumps(entries))
    found = read_folder(tmp_path).tasks["AlpacaEval"]
    assert found.correct == pytest.approx((0, 1, 0.5, 0.5, 0.9))
    assert found.mean == pytest.approx(58)
    file.write_text(json.dumps([*entries, {**entries[0], "generator_2": "other"}]))
    assert problems(tmp_path) == [f"{file} has preferences about several models: merged, other; give those of one"]
    shutil.copy(file, tmp_path)
    (line,) = problems(tmp_path)
    assert line.startswith("preferences of several judges or models: ")


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("refcoco_val_260102030405.json", [{"answer": "", "gt_bbox": [0, 0], "hw": [1, 1]}]),
        ("refcoco_val_260102030405.json", [{"answer": 3, "gt_bbox": [0, 0, 1, 1], "hw": [1, 1]}]),
        ("refcoco_val_260102030405.json", []),
        ("refcoco_val_260102030405.json", {"answer": 3}),
        ("annotations.json", [{"preference": 3, "generator_2": "a", "instruction": "b", "output_1": "c"}]),
        ("annotations.json", [{"preference": 1}]),
        ("annotations.json", {"preference": 1}),
    ],
)
def test_damaged_boxes_and_preferences_are_named(tmp_path, name, broken):
    (tmp_path / name).write_text(json.dumps(broken))
    what = "preferences as alpaca_eval" if name == "annotations.json" else "boxes as InternVL's script"
    who = "alpaca_eval" if name == "annotations.json" else "InternVL's script"
    assert problems(tmp_path) == [f"{tmp_path / name} does not hold {what} writes them; let {who} write it again"]
