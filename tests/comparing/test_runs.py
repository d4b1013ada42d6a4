"""Runs as a table: what differs, what was measured, chosen and ordered."""

from __future__ import annotations

import csv
import io
import json

import pytest

from expert_merging.commands.main import main
from expert_merging.comparing.run_tables import duration
from expert_merging.comparing.runs import find_runs
from expert_merging.comparing.scores_file import Scores, SetScore, TaskScore, add_scores
from expert_merging.run import Run
from tests.command import merge


@pytest.fixture
def logs(tiny, tmp_path):
    """Three runs of task arithmetic and an interrupted one of TIES."""
    output = tmp_path / "out"
    for name, coefficient in {"low": "0.2", "high": "1.5", "middle": "0.4"}.items():
        arguments = ("--scaling_coefficient", coefficient, "--output_path", output, "--run_name", name)
        assert merge(*tiny, *arguments) == 0
    assert merge(*tiny, "--method", "ties", "--output_path", output, "--run_name", "cut") == 0
    (output / "ties" / "cut" / "model").rename(output / "ties" / "cut" / "model.partial")
    return output


def measured(logs, name, exact, share):
    tasks = {"A": TaskScore(exact), "B": TaskScore(exact + 2)}
    add_scores(logs / "task_arithmetic" / name / "scores.json", Scores({"quiz": SetScore(tasks)}, {"A": share}))


@pytest.fixture
def scored(logs):
    """The same, two of them with scores."""
    measured(logs, "low", 50.0, 0.75)
    measured(logs, "high", 70.0, 0.25)
    return logs


def shown(capsys, *arguments):
    """What the command prints."""
    capsys.readouterr()
    assert main(["runs", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def records(capsys, *arguments):
    return json.loads(shown(capsys, *arguments, "--json"))


def refused(capsys, *arguments):
    """The errors of the command."""
    capsys.readouterr()
    assert main(["runs", *map(str, arguments)]) == 1
    return [line.removeprefix("error: ") for line in capsys.readouterr().err.splitlines()]


def test_runs_come_by_method_and_what_differs_with_what_they_took(logs, capsys):
    lines = [line.split() for line in shown(capsys, logs).splitlines() if line.strip()]
    assert lines[0] == ["method", "what", "differs", "seed", "time", "peak", "memory", "change", "state", "run"]
    rows = [(line[0], line[1], line[-2], line[-1]) for line in lines[2:]]
    assert rows == [
        ("task_arithmetic", "scaling_coefficient=0.2", "complete", "low"),
        ("task_arithmetic", "scaling_coefficient=0.4", "complete", "middle"),
        ("task_arithmetic", "scaling_coefficient=1.5", "complete", "high"),
        ("ties", "0", "interrupted", "cut"),
    ]


def test_options_in_which_all_runs_of_a_method_agree_are_not_shown(logs):
    rows = find_runs([logs / "task_arithmetic" / "low", logs / "ties"])
    assert [row.differing for row in rows] == [{}, {}]


def test_modifiers_are_always_shown_and_their_options_only_where_they_differ(logs, tiny, capsys):
    for name, k in {"two": 2, "one": 1}.items():
        arguments = ("--post", "consensus", "--consensus_k", k, "--run_name", name, "--output_path", logs)
        assert merge(*tiny, *arguments) == 0
    of_both = [(row.run.name, row.differing) for row in find_runs([logs / "task_arithmetic"])]
    post = {"post": ["consensus"]}
    assert of_both == [
        *((name, {"scaling_coefficient": number}) for name, number in {"low": 0.2, "middle": 0.4, "high": 1.5}.items()),
        ("one", {**post, "consensus_k": 1}),
        ("two", {**post, "consensus_k": 2}),
    ]
    (line,) = csv.DictReader(io.StringIO(shown(capsys, logs / "task_arithmetic" / "one", "--csv")))
    assert line["post"] == '["consensus"]'


def test_a_set_that_is_called_like_another_column_does_not_take_its_place(scored, capsys):
    folder = scored / "task_arithmetic" / "low"
    add_scores(folder / "scores.json", Scores({name: SetScore({"A": TaskScore(7.0)}) for name in ("state", "seconds")}))
    (row,) = records(capsys, folder)
    assert (row["state"], row["scores"]["state"]["mean"]) == ("complete", 7.0)
    assert 0 < row["seconds"] != 7.0
    assert shown(capsys, folder).split()[:12] == [
        *("method", "what", "differs", "seed", "time", "peak", "memory", "change", "divergence", "quiz", "state", "run")
    ]
    (line,) = csv.DictReader(io.StringIO(shown(capsys, folder, "--csv")))
    assert line["state"] == "complete"


def test_a_folder_named_twice_gives_each_run_once(logs):
    assert len(find_runs([logs, logs / "ties", logs / "ties" / "cut"])) == 4


def test_scores_and_divergence_have_columns(scored, capsys):
    lines = shown(capsys, scored, "--markdown").splitlines()
    assert lines[0] == (
        "| method | what differs | seed | time | peak memory | change | divergence | quiz | state | run |"
    )
    assert lines[1].count("---:") == 6
    cells = [[cell.strip() for cell in line.split("|")][1:-1] for line in lines[2:]]
    assert [(line[1], line[6], line[7], line[-1]) for line in cells] == [
        ("`scaling_coefficient=0.2`", "0.75", "51.0", "`low`"),
        ("`scaling_coefficient=0.4`", "", "", "`middle`"),
        ("`scaling_coefficient=1.5`", "0.25", "71.0", "`high`"),
        ("", "", "", "`cut`"),
    ]


def test_numbers_of_which_the_lower_is_better_keep_their_digits(logs, capsys):
    for name, bits in (("low", 1.234), ("high", 1.251)):
        texts = SetScore({"A": TaskScore(bits)}, "bits_per_byte", higher_is_better=False)
        add_scores(logs / "task_arithmetic" / name / "scores.json", Scores({"general": texts}))
    lines = shown(capsys, logs, "--markdown", "--sort", "general").splitlines()[2:]
    assert [" 1.234 |" in lines[0], " 1.251 |" in lines[1]] == [True, True]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--sort", "divergence"), ["high", "low", "middle", "cut"]),
        (("--sort", "quiz", "--descending"), ["high", "low", "middle", "cut"]),
        (("--sort", "scaling-coefficient", "--descending"), ["high", "cut", "middle", "low"]),  # that of TIES is 1
        (("--descending",), ["cut", "high", "middle", "low"]),
        (("--sort", "change"), ["low", "middle", "cut", "high"]),
        (("--sort", "state"), ["low", "middle", "high", "cut"]),
        (("--where", "method=ties"), ["cut"]),
        (("--where", "scaling_coefficient=0.40"), ["middle"]),
        (("--where", "state=complete", "--where", "scaling_coefficient=1.5"), ["high"]),
        (("--where", "base_model_path=base", "--where", "run=low"), ["low"]),
    ],
)
def test_runs_are_chosen_and_ordered(scored, capsys, arguments, names):
    assert [row["run"] for row in records(capsys, scored, *arguments)] == names


def test_what_differs_is_that_of_the_chosen_runs(logs, capsys):
    (row,) = records(capsys, logs, "--where", "run=low")
    assert row["differing"] == {}
    assert row["options"]["scaling_coefficient"] == 0.2


def test_csv_has_a_column_for_each_option_that_differs(scored, capsys):
    rows = list(csv.DictReader(io.StringIO(shown(capsys, scored, "--csv"))))
    assert [row["scaling_coefficient"] for row in rows] == ["0.2", "0.4", "1.5", "1.0"]
    assert [row["quiz"] for row in rows] == ["51.0", "", "71.0", ""]
    assert float(rows[0]["seconds"]) > 0
    assert int(rows[0]["peak_memory"]) > 1 << 20
    assert rows[0]["folder"] == str(scored / "task_arithmetic" / "low")


def test_json_has_every_score(scored, capsys):
    (row,) = records(capsys, scored, "--where", "run=high")
    assert row["scores"]["quiz"]["tasks"]["B"]["mean"] == 72.0
    assert row["divergence"] == 0.25
    assert row["relative_change"] > 0


def test_other_experts_differ_by_their_names_and_retrained_ones_by_a_digest(tiny, logs, tmp_path):
    assert merge(*tiny[:-2], "--output_path", logs, "--run_name", "single") == 0  # without expert B
    rows = {row.run.name: row for row in find_runs([logs])}
    assert rows["single"].differing["expert"] == '{"A": "a"}'
    assert "checkpoints" not in rows["single"].differing
    record = json.loads((logs / "ties" / "cut" / "config.json").read_text())
    again = Run(logs / "ties" / "again")
    again.folder.mkdir()
    again.config.write_text(json.dumps({**record, "checkpoints": {**record["checkpoints"], "A": "0" * 64}}))
    differing = [row.differing for row in find_runs([logs / "ties"])]
    assert [list(one) for one in differing] == [["checkpoints"], ["checkpoints"]]
    assert len(differing[0]["checkpoints"]) == 6


def test_a_run_of_an_earlier_version_has_gaps(logs):
    (logs / "ties" / "cut" / "outcome.json").unlink()
    (row,) = find_runs([logs / "ties"])
    assert row.values["seconds"] is None


def test_time_and_memory_of_a_continued_run_are_lower_bounds(tiny, logs, capsys):
    assert merge(*tiny, "--method", "ties", "--output_path", logs, "--run_name", "cut") == 0
    line = shown(capsys, logs / "ties", "--markdown").splitlines()[-1]
    assert "≥ " in line


def test_a_run_that_is_being_written_is_running(logs):
    run = Run(logs / "ties" / "cut")
    run.begin({})
    assert [row.state for row in find_runs([run.folder])] == ["running"]
    run.release()
    assert [row.state for row in find_runs([run.folder])] == ["interrupted"]


def test_names_of_any_kind_are_shown_as_they_are(tiny, tmp_path, capsys):
    assert merge(*tiny, "--output_path", tmp_path / "out", "--run_name", "[red]a|b`c") == 0
    assert "[red]a|b`c" in shown(capsys, tmp_path / "out")
    assert "``[red]a\\|b`c``" in shown(capsys, tmp_path / "out", "--markdown")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--where", "ties"), "--where takes NAME=VALUE, such as method=ties, got 'ties'"),
        (("--where", "metod=ties"), "--where metod=ties: no run has 'metod'. Did you mean 'method'?"),
        (
            ("--where", "method=svd"),
            "--where method=svd: no run has that; there are task_arithmetic, ties",
        ),
        (("--sort", "divergense"), "--sort divergense: there is no such column or option. Did you mean 'divergence'?"),
    ],
)
def test_what_no_run_has_is_told(logs, capsys, arguments, message):
    assert refused(capsys, logs, *arguments) == [message]


def test_folders_without_runs_are_told(tmp_path, capsys):
    assert refused(capsys, tmp_path, tmp_path / "a", tmp_path / "b") == [
        f"{tmp_path / name} is no folder; runs are written to results/logs, or to their --output_path" for name in "ab"
    ]
    assert refused(capsys, tmp_path) == [f"there is no run in {tmp_path}; a run's folder has a config.json of its own"]


def test_scores_that_cannot_be_read_are_told(logs, capsys):
    file = logs / "ties" / "cut" / "scores.json"
    file.write_text("{")
    (line,) = refused(capsys, logs)
    assert line.startswith(f"{file} is not valid JSON")


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (99.9, "99.9 s"), (100, "2 min"), (6000, "1 h 40 min")]
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words
