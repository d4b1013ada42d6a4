"""The command that sweeps: scores are those of what would be written, it goes on, and it refuses nonsense."""

from __future__ import annotations

import json
import math
import os
from contextlib import contextmanager

import pytest
import torch

from expert_merging.commands.main import main
from expert_merging.commands.sweep import read
from expert_merging.comparing.scores_file import read_scores
from expert_merging.comparing.sweep import Scoring
from expert_merging.comparing.sweep_record import Record, Scored
from expert_merging.comparing.sweep_run import Bench
from expert_merging.errors import InputError
from expert_merging.learned.coefficients import Coefficients
from expert_merging.plan import make_plan
from expert_merging.run import Run
from expert_merging.writing import take_hold
from Mistral.backbone import BACKBONE
from tests.checkpoints import BASE, EXPERTS, write_tasks
from tests.command import merge
from tests.search.searching import score_plainly


@pytest.fixture(scope="session")
def answered(tiny_zoo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answered")
    write_tasks(folder, count=2, responses={"Chat": "Certainly", "Math": "42", "Code": "def f():"})
    return folder


@pytest.fixture
def questions(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    entries = [{"question": f"{number}?", "choices": ["yes", "no"], "answer": "yes"} for number in range(4)]
    (folder / "Math.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def command(tiny_zoo, answered, tmp_path):
    return ["--family", "Mistral", "--cache_dir", tiny_zoo, "--data_dir", answered, "--output_path", tmp_path / "out"]


def sweep(*arguments):
    return main(["sweep", *map(str, arguments), "--device", "cpu"])


def refusal(capsys, *arguments):
    capsys.readouterr()
    assert sweep(*arguments) == 1
    return [line.removeprefix("error: ") for line in capsys.readouterr().err.splitlines()]


def record_of(out):
    (file,) = out.glob("sweeps/*/sweep.json")
    return file, json.loads(file.read_text())["points"]


@pytest.mark.slow
def test_scores_are_those_of_the_models_that_would_be_written(command, tiny_zoo, answered, questions, tmp_path, capsys):
    """Methods that are fed entries, matrices and statistics of the whole, a learned one, and an excluded tensor."""
    out, file = tmp_path / "out", tmp_path / "sweep.yaml"
    file.write_text(
        "sweep:\n"
        "- {method: [task_arithmetic], scaling_coefficient: '0.1:0.3:0.2'}\n"
        "- {method: [iso, ties]}\n"
        "- {method: [expert_merging], num_epochs: [2]}\n"
        "- {method: [task_arithmetic], exclude_params: [['.*mlp.*', '.*lm_head.*']]}\n"
        "select: divergence\n"
    )
    page = tmp_path / "page.html"
    assert sweep(file, *command, "--questions", questions, "--write", "all", "--report", page) == 0
    shown = capsys.readouterr().out
    assert str(page) in shown
    for words in (
        ">ties</th>",
        ">task_arithmetic, scaling_coefficient 0.3</th>",
        "Scores: mine",
        "Learning",
    ):
        assert words in page.read_text(), words
    assert "The best of 6 points by divergence (divergence: 0 is the experts, 1 the base)" in shown
    recorded, points = record_of(out)
    assert f"all scores: {recorded}" in shown
    runs = {run.parent: Run(run.parent) for run in out.glob("*/*/model")}
    assert len(runs) == len(points) == 6
    found = {}
    for run in runs.values():
        scores = read_scores(run.scores)
        plainly = score_plainly(run.model, tiny_zoo, answered)
        assert sum(scores.divergence.values()) / 3 == pytest.approx(plainly, rel=1e-4)
        found[round(plainly, 6)] = scores.sets["mine"]
    in_memory = sorted(sum(point["divergence"].values()) / 3 for point in points)
    assert in_memory == pytest.approx(sorted(found), rel=1e-4)
    assert main(["evaluate", *map(str, runs), "--questions", str(questions), "--device", "cpu"]) == 0
    for run in runs.values():
        kept = read_scores(run.scores)
        assert kept.sets["mine"] in found.values()
        assert kept.divergence
    assert {path.name for path in (out / "sweeps").iterdir()} == {recorded.parent.name}
    assert {path.name for path in recorded.parent.iterdir()} == {"sweep.json", "responses.json", ".lock"}


def test_a_sweep_goes_on_from_its_record_and_takes_more_points(command, tmp_path, monkeypatch, capsys):
    given = [*command, "--sweep", "method=task_arithmetic", "--write", "none"]
    scored, score = [], Bench.score

    def counted(self, planned, share):
        if len(scored) == 1:
            raise KeyboardInterrupt
        scored.append(planned.point["scaling_coefficient"])
        return score(self, planned, share)

    monkeypatch.setattr(Bench, "score", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep(*given, "--sweep", "scaling_coefficient=0.1,0.2")
    _, points = record_of(tmp_path / "out")
    assert [point["point"]["scaling_coefficient"] for point in points] == [0.1]
    scored.clear()
    monkeypatch.setattr(Bench, "score", lambda *arguments: scored.append(arguments[1].point) or score(*arguments))
    capsys.readouterr()
    assert sweep(*given, "--sweep", "scaling_coefficient=0.1:0.3:0.1") == 0
    shown = capsys.readouterr().out
    assert "1 of 3 points are known already" in shown
    assert "scored task_arithmetic, scaling_coefficient 0.3" in shown, "no terminal shows bars here"
    assert [point["scaling_coefficient"] for point in scored] == [0.2, 0.3]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"sweeps", "targets"}
    scored.clear()
    monkeypatch.setattr(Bench, "open", None)
    assert sweep(*given, "--sweep", "scaling_coefficient=0.1:0.3:0.1") == 0
    assert scored == []


def test_a_report_shows_points_that_are_not_written_too(command, questions, tmp_path, capsys):
    """And where it cannot be, nothing is done."""
    pytest.importorskip("plotly")
    given = [*command, "--method", "task_arithmetic", "--sweep", "scaling_coefficient=0,0.3", "--write", "none"]
    given += ["--questions", questions]
    assert refusal(capsys, *given, "--report", tmp_path) == [f"--report {tmp_path} is a folder; name a file in it"]
    assert not (tmp_path / "out").exists()
    page = tmp_path / "page.html"
    assert sweep(*given, "--report", page) == 0
    text = page.read_text()
    assert text.count("scaling_coefficient 0.3</th>") >= 2, "with its accuracy, and its divergence"
    _, points = record_of(tmp_path / "out")
    assert f"{sum(points[1]['divergence'].values()) / 3:.3f}" in text
    assert "scaling_coefficient: 0.3</code>" in text, "how it is repeated"


def test_how_many_samples_are_learned_from_may_be_swept(command, tmp_path):
    """Points are scored on the same samples all the same."""
    given = [*command, "--method", "expert_merging", "--num_epochs", 1, "--write", "none", "--samples_per_task", 2]
    assert sweep(*given, "--sweep", "samples_per_task=1,2") == 0
    _, points = record_of(tmp_path / "out")
    assert points[0]["divergence"] != points[1]["divergence"]
    assert sweep(*given, "--sweep", "num_epochs=1") == 0
    _, again = record_of(tmp_path / "out")
    assert len(again) == 2, "the same as with samples_per_task 2"


def test_one_problem_of_many_points_is_told_once(command, capsys):
    told = refusal(capsys, *command, "--sweep", "method=tie", "--sweep", "seed=0,1,2", "--sweep", "density=0.1")
    assert told == ["point tie, seed 0, density 0.1 and 2 more: no method named 'tie'. Did you mean 'ties'?"]


def test_of_two_points_with_one_score_the_other_score_decides():
    near, far = (
        Scored({"seed": 1}, "a", 1.0, {"x": 0.2}, {"x": [1, 0]}),
        Scored({}, "b", 1.0, {"x": 0.4}, {"x": [0, 1]}),
    )
    right = Scored({}, "c", 1.0, {"x": 0.4}, {"x": [1, 1]})
    assert sorted([far, right, near], key=lambda one: one.rank("accuracy")) == [right, near, far]
    assert sorted([far, right, near], key=lambda one: one.rank("divergence")) == [near, right, far]
    nothing = Scored({}, "d", problem="no")
    assert sorted([nothing, far], key=lambda one: one.rank("divergence")) == [far, nothing]


@pytest.mark.slow
def test_several_processes_score_as_one_does(command, questions, tmp_path, monkeypatch, capsys):
    """In all rounds of halving; they read what the experts have said, and one that is not kept cannot be shared."""
    given = [*command, "--sweep", "scaling_coefficient=0.1:0.3:0.1", "--method", "iso", "--write", "none"]
    given += ["--questions", questions, "--halving", 2]
    found = []
    for name, *jobs in (("one",), ("two", "--jobs", 2)):
        assert sweep(*given, "--sweep_name", name, *jobs) == 0
        points = json.loads((tmp_path / "out" / "sweeps" / name / "sweep.json").read_text())["points"]
        found.append({(point["key"], point["share"]): point | {"seconds": 0} for point in points})
    assert found[0] == found[1]
    assert {share for _, share in found[0]} == {0.5, 1.0}
    assert {path.name for path in (tmp_path / "out" / "sweeps").iterdir()} == {"one", "two"}
    assert refusal(capsys, *given, "--jobs", 2, "--keep_targets", "false") == [
        "--jobs needs what experts say to be kept, which all processes read; leave --keep_targets out"
    ]


def test_another_process_is_waited_for_and_what_it_has_scored_is_kept(command, tmp_path, capsys, monkeypatch):
    given = [*command, "--method", "task_arithmetic", "--write", "none"]
    assert sweep(*given, "--sweep", "scaling_coefficient=0.1") == 0
    file, _ = record_of(tmp_path / "out")
    other = take_hold(file.parent / ".lock", "--flag")
    assert refusal(capsys, *given, "--sweep", "scaling_coefficient=0.2") == [
        f"another process is writing to {file.parent}; wait for it or choose another --sweep_name"
    ]
    os.close(other)
    file.rename(tmp_path / "theirs.json")

    def ends_just_before(lock, flag):
        (tmp_path / "theirs.json").rename(file)
        return take_hold(lock, flag)

    monkeypatch.setattr("expert_merging.comparing.sweep_run.take_hold", ends_just_before)
    assert sweep(*given, "--sweep", "scaling_coefficient=0.2") == 0
    _, points = record_of(tmp_path / "out")
    assert [point["point"]["scaling_coefficient"] for point in points] == [0.1, 0.2]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"sweeps", "targets"}


def test_the_best_is_written_as_an_ordinary_run(command, tiny_zoo, tmp_path):
    assert sweep(*command, "--method", "task_arithmetic", "--sweep", "scaling_coefficient=0.1,5.0") == 0
    (folder,) = (tmp_path / "out" / "task_arithmetic").iterdir()
    assert Run(folder).record["options"]["scaling_coefficient"] == 0.1
    assert "ignored" not in Run(folder).log.read_text(), "samples are what the sweep has scored by"
    given = ["--cache_dir", tiny_zoo, "--output_path", tmp_path / "out", "--method", "task_arithmetic"]
    assert merge(*given, "--scaling_coefficient", 0.1) == 0  # finds it complete
    assert [path.name for path in (tmp_path / "out" / "task_arithmetic").iterdir()] == [folder.name]


def test_edits_of_coefficients_are_swept(command, tiny_zoo, tmp_path):
    """Values with commas stand in quotation marks; with all coefficients at 0, the merge is the base."""
    experts = {name: tiny_zoo / folder for name, folder in EXPERTS.items()}
    plan = make_plan(tiny_zoo / BASE, experts, list(BACKBONE.exclude_params))
    values = {name: torch.full((3, 1), 0.3) for name in plan.merged}
    file = tmp_path / "coefficients.safetensors"
    Coefficients(tuple(experts), values, (1.0, 1.0, 1.0), checkpoints=plan.contents).save(file)
    given = [*command, "--method", "coefficients", "--coefficients", file]
    assert sweep(*given, "--sweep", 'edit="Math: 1.2, mlp: 0.8","Math Chat: 0, Code: 0"') == 0
    _, points = record_of(tmp_path / "out")
    divergence = {point["point"]["edit"]: sum(point["divergence"].values()) / 3 for point in points}
    assert divergence["Math Chat: 0, Code: 0"] == pytest.approx(1, rel=1e-5)
    assert divergence["Math: 1.2, mlp: 0.8"] < 0.95
    (folder,) = (tmp_path / "out" / "coefficients").iterdir()
    assert Run(folder).record["options"]["edit"] == "Math: 1.2, mlp: 0.8"


def test_hopeless_points_are_left_by_halving(command, tmp_path):
    given = [*command, "--method", "task_arithmetic", "--sweep", "scaling_coefficient=0.05,0.1,3.0,4.0"]
    assert sweep(*given, "--halving", 2, "--write", "none") == 0
    _, points = record_of(tmp_path / "out")
    by_share = {}
    for point in points:
        by_share.setdefault(point["share"], set()).add(point["point"]["scaling_coefficient"])
    assert by_share == {0.5: {0.05, 0.1, 3.0, 4.0}, 1.0: {0.05, 0.1}}


@pytest.mark.slow
def test_also_the_last_rounds_of_halving_are_shared_out_when_it_goes_on(command, monkeypatch):
    given = [*command, "--method", "task_arithmetic", "--sweep", "scaling_coefficient=0.1:0.8:0.1", "--halving", 2]
    given += ["--write", "none", "--samples_per_task", 2]
    score, begun = Bench.score, []

    def interrupted(self, planned, share):
        if planned.point["scaling_coefficient"] == 0.8:
            raise KeyboardInterrupt
        return score(self, planned, share)

    @contextmanager
    def shared(sweep, shares, size, progress):
        begun.append(size)
        bench = Bench(sweep, shares)
        yield lambda points, number, note: [note(bench.score(planned, shares[number])) for planned in points]

    monkeypatch.setattr(Bench, "score", interrupted)
    monkeypatch.setattr("expert_merging.comparing.sweep_run._shared", shared)
    with pytest.raises(KeyboardInterrupt):
        sweep(*given, "--jobs", 9)
    begun.append("again")
    monkeypatch.setattr(Bench, "score", score)
    assert sweep(*given, "--jobs", 9) == 0
    assert begun == [8, "again", 4], "one point of the first round was left, and then there are four"
    assert sweep(*given, "--jobs", 9) == 0
    assert begun == [8, "again", 4], "all is known"


def test_rounds_follow_from_points_and_samples():
    assert Scoring().shares(100, 100) == [1.0]
    assert Scoring(halving=3).shares(9, 100) == pytest.approx([1 / 9, 1 / 3, 1])
    assert Scoring(halving=3).shares(100, 5) == pytest.approx([1 / 3, 1])
    assert Scoring(halving=2).shares(1, 8) == [1.0]


def test_a_point_that_cannot_be_merged_is_told_and_the_others_go_on(command, tmp_path, capsys, monkeypatch):
    from expert_merging.comparing import sweep_run as module

    prepare = module.prepare

    def failing(job):
        if job.resolved.options["scaling_coefficient"] == 0.2:
            raise InputError("no solution")
        return prepare(job)

    monkeypatch.setattr(module, "prepare", failing)
    given = [*command, "--method", "task_arithmetic", "--write", "none"]
    assert sweep(*given, "--sweep", "scaling_coefficient=0.2,0.1") == 0
    shown = capsys.readouterr().out
    assert shown.rindex("scaling_coefficient 0.1") < shown.rindex("scaling_coefficient 0.2")
    assert "no solution" in shown
    assert refusal(capsys, *given, "--sweep", "scaling_coefficient=0.2") == [
        "no point has a score; the first one: no solution"
    ]


def test_a_plan_is_shown_and_same_points_are_one(command, tmp_path, capsys):
    given = ["--sweep", "method=weight_average,ties", "--sweep", "density=0.1,0.2", "--dry_run"]
    assert sweep(*command, *given) == 0
    same, *lines = capsys.readouterr().out.splitlines()
    assert same == "weight_average, density 0.2: the same as weight_average"
    assert lines[0].startswith(f"3 points would be scored, in {tmp_path / 'out' / 'sweeps' / 'Mistral-'}")
    assert lines[1:] == ["weight_average", "ties, density 0.1", "ties, density 0.2"]
    assert not (tmp_path / "out").exists()


def test_the_family_is_that_of_the_base_by_flags_file_or_record(command, tiny_zoo, tmp_path, capsys):
    flags, file = [*command[2:], "--dry_run", "--sweep", "scaling_coefficient=0.1,0.2"], tmp_path / "sweep.yaml"
    assert sweep(*flags, "--method", "ties") == 0
    file.write_text(f"cache_dir: {tiny_zoo}\ndata_dir: {command[5]}\nmethod: ties\n")
    assert sweep(file, *flags[4:]) == 0
    (tmp_path / "config.json").write_text(json.dumps({"family": "Mistral", "method": "ties", "options": {}}))
    assert sweep(*flags, "--config", tmp_path / "config.json") == 0
    shown = capsys.readouterr().out
    assert shown.count("2 points would be scored, in ") == shown.count("/sweeps/Mistral-") == 3


def test_what_cannot_be_swept_is_said(command, questions, tmp_path, capsys):
    one = ["--sweep", "scaling_coefficient=0.1", "--method", "task_arithmetic"]
    assert refusal(capsys, *one, "--cache_dir", tmp_path)[0].startswith(f"{tmp_path} has the base of no family: ")
    assert "--family must be one of" in refusal(capsys, "--family", "Llama", *one)[0]
    assert "what is to be swept?" in refusal(capsys, *command)[0]
    assert refusal(capsys, *command, "--sweep", "scaling=1") == [
        "--sweep scaling: no such option. Did you mean 'scaling_coefficient'?"
    ]
    assert refusal(capsys, *command, "--sweep", "seed") == ["--sweep takes OPTION=VALUES, each option once, got 'seed'"]
    assert refusal(capsys, *command, "--sweep", "seed=1", "--sweep", "seed=2") == [
        "--sweep takes OPTION=VALUES, each option once, got 'seed=2'"
    ]
    assert refusal(capsys, *command, *one, "--select", "accuracy") == [
        "--select accuracy needs --questions FOLDER with labelled questions"
    ]
    assert refusal(capsys, *command, *one, "--write", "all", "--run_name", "x") == [
        "--write all writes several runs, which cannot have one --run_name; leave it out"
    ]
    assert "--sweep_name is the name of a folder, at most 200 bytes long, got 'a/b'" in refusal(
        capsys, *command, *one, "--sweep_name", "a/b"
    )
    assert "no flag --scalin_coefficient. Did you mean '--scaling_coefficient'?" in refusal(
        capsys, *command, *one, "--scalin_coefficient", "1"
    )
    assert refusal(capsys, *command, "--sweep", "method=tall,ties", "--sweep", "density=0.5,7") == [
        "point tall, density 0.5 and 1 more: tall writes something else than one model, so it cannot be swept",
        "point ties, density 7: --density must be a number in (0, 1], got 7; for 7 % write 0.07",
    ]
    assert refusal(capsys, *command, *one, "--tokenizer", "union") == [
        "point scaling_coefficient 0.1: --tokenizer makes a model with other words than the base's, so it cannot be "
        "swept"
    ]
    (questions / "See.json").write_text(json.dumps([{"question": "what?", "answer": "x", "image_path": "p.png"}]))
    (questions / "p.png").write_bytes(b"")
    (line,) = refusal(capsys, *command, *one, "--questions", questions)
    assert line.endswith("See.json, entry 0 (counted from 0) has a picture, and Mistral is a language model")
    (line,) = refusal(capsys, *command, *one, "--samples_per_task", "0")
    assert line == "--samples_per_task must be a whole number in [1, inf), got 0"
    assert list(tmp_path.glob("out/*")) == []


def test_a_file_that_is_no_sweep_is_refused(command, tmp_path, capsys):
    file = tmp_path / "sweep.yaml"
    file.write_text("a: [")
    assert f"{file} is no YAML" in refusal(capsys, file)[0]
    file.write_text("- a")
    assert refusal(capsys, file) == [
        f"{file} must hold options by name, such as 'family: Mistral', and 'sweep' with values by option"
    ]
    file.write_text("family: Mistral\nmethd: ties\nsweep: {seed: [1]}")
    assert refusal(capsys, file) == ["no option 'methd'. Did you mean 'method'?"]


def test_a_file_may_name_a_file_of_further_options(command, tmp_path, capsys):
    file, options = tmp_path / "sweep.yaml", tmp_path / "options.yaml"
    options.write_text("method: ties\nscaling_coefficient: 0.7\n")
    file.write_text(f"family: Mistral\nconfig: {options}\nsweep: {{density: [0.1, 0.2]}}")
    _, merging, _ = read({"more": [str(file)]})
    assert (merging["method"], merging["scaling_coefficient"]) == ("ties", 0.7)
    file.write_text(f"scaling_coefficient: 0.4\n{file.read_text()}")
    assert read({"more": [str(file)]})[1]["scaling_coefficient"] == 0.4, "the sweep's own file counts more"
    assert read({"more": [str(file), "--config", str(options)]})[1]["scaling_coefficient"] == 0.4
    _, merging, _ = read({"more": [str(file), "--scaling_coefficient", "0.2"]})
    assert merging["scaling_coefficient"] == "0.2"
    options.unlink()
    assert "options.yaml cannot be read" in refusal(capsys, file)[0]


def test_a_record_of_something_else_is_refused(tmp_path):
    file = tmp_path / "sweep.json"
    record = Record(file, {"calibration": "abc"})
    record.add(Scored({"seed": 1}, "k", 0.5, {"Math": math.nan, "Code": 0.5}, seconds=1.0))
    again = Record(file, {"calibration": "abc"}).known("k", 0.5)
    assert again.point == {"seed": 1}
    assert math.isnan(again.divergence["Math"])
    assert again.badness("divergence") == math.inf
    assert record.known("k", 1.0) is None
    with pytest.raises(
        InputError, match=r"has scores of another sweep \(calibration\); choose another --sweep_name, or"
    ):
        Record(file, {"calibration": "abd"})
    for text in ('{"format": 1}', '{"points": [{"point": {}}], "description": {}}', '{"points": 1, "description": {}}'):
        file.write_text(text)
        with pytest.raises(InputError, match="holds no scores of a sweep; move it away to begin again"):
            Record(file, {})


@pytest.mark.parametrize(
    "damage",
    [
        *({"point": [1]}, {"point": None}, {"key": []}, {"key": 1}, {"share": "1"}, {"share": None}),
        *({"divergence": {"Math": "x"}}, {"divergence": {"Math": math.inf}}, {"divergence": 1}),
        *({"correct": 1}, {"correct": {"Math": []}}, {"correct": {"Math": "10"}}, {"correct": {"Math": [True]}}),
        *({"seconds": "long"}, {"problem": 3}),
    ],
    ids=str,
)
def test_a_damaged_entry_is_refused(damage, tmp_path):
    file = tmp_path / "sweep.json"
    Record(file, {}).add(Scored({"seed": 1}, "k", 1.0, {"Math": 0.5}, {"Math": [1.0, 0.0]}, 1.0, "none"))
    content = json.loads(file.read_text())
    assert content["points"][0]["accuracy"] == {"Math": 50.0}
    assert Record(file, {}).known("k", 1.0).accuracy == {"Math": 50.0}
    content["points"][0] |= damage
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="holds no scores of a sweep; move it away to begin again"):
        Record(file, {})


@pytest.mark.parametrize("flag", ["--mthod", "--json"])
def test_other_commands_refuse_what_they_do_not_know(flag, capsys):
    with pytest.raises(SystemExit):
        main(["verify", "x", flag, "y"])
    assert f"unrecognized arguments: {flag} y" in capsys.readouterr().err
