"""The score without labels: known distances, held-out questions, and the command."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch
from rich.console import Console

from expert_merging.commands.main import main
from expert_merging.comparing.align import held_out, relative
from expert_merging.comparing.compare import Compared, _table, _why_not_hidden, find_models
from expert_merging.errors import InputError
from expert_merging.questions.calibration import Sample
from tests.checkpoints import BASE, EXPERTS, perturb, save_model, write_checkpoint, write_tasks
from tests.command import TENSORS, flags, merge, merged
from tests.learned.twin import Example, Twin


@pytest.fixture
def runs(answered_zoo, tmp_path):
    """A finished run of a method that learns and one of a closed form."""
    common = ["--cache_dir", str(answered_zoo), "--output_path", str(tmp_path / "out"), "--log_with", "none"]
    learning = ["--data_dir", str(answered_zoo / "dataset"), "--samples_per_task", "2"]
    learning += ["--samples_per_task_dict", '{"Code": 3}', "--prompt_template", "{question}!"]
    assert merge(*common, *learning, "--run_name", "r") == 0
    assert merge(*common, "--method", "task_arithmetic", "--run_name", "r") == 0
    return tmp_path / "out" / "expert_merging" / "r", tmp_path / "out" / "task_arithmetic" / "r"


def align(*arguments):
    return main(["align", "--device", "cpu", *map(str, arguments)])


def refusal(capsys, *arguments):
    capsys.readouterr()
    assert align(*arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


def numbers(tmp_path, *arguments):
    assert align(*arguments, "--json", tmp_path / "numbers.json") == 0
    return json.loads((tmp_path / "numbers.json").read_text())


def test_the_base_has_one_and_an_expert_zero_on_its_own_task(runs, answered_zoo, tmp_path, capsys):
    experts = {name: answered_zoo / folder for name, folder in EXPERTS.items()}
    found = numbers(tmp_path, *runs, answered_zoo / BASE, *experts.values())["models"]
    for name, folder in experts.items():
        assert found[folder.name]["relative"][name]["divergence"] == pytest.approx(0, abs=1e-6)
        assert found[folder.name]["relative"][name]["hidden"] == pytest.approx(0, abs=1e-6)
        assert found[BASE]["relative"][name]["divergence"] == pytest.approx(1, rel=1e-5)
    assert set(found) == {"expert_merging/r", "task_arithmetic/r", BASE, *(path.name for path in experts.values())}
    for model in found.values():
        means = [model["relative"][task]["divergence"] for task in EXPERTS]
        assert model["relative"]["mean"]["divergence"] == pytest.approx(sum(means) / 3)
    shown = capsys.readouterr().out
    assert "Divergence from each task's expert (0: the expert, 1: the base)" in shown
    assert "on 4 questions of Chat, 3 questions of Code, 4 questions of Math" in shown


def test_experts_are_asked_once(runs, answered_zoo, tmp_path, monkeypatch):
    """Where a run is in its output folder; a copy elsewhere has no place to keep what they say."""
    monkeypatch.chdir(runs[0].parent)
    first = {name: model["absolute"] for name, model in numbers(tmp_path, "r", runs[1])["models"].items()}
    with monkeypatch.context() as patch:
        patch.setattr("expert_merging.running.targets.load_on", None)
        again = numbers(tmp_path, *runs)["models"]
    assert {name: model["absolute"] for name, model in again.items()} == first
    kept = {path.name for path in (tmp_path / "out" / "targets").iterdir()}
    copy = shutil.copytree(runs[1], tmp_path / "elsewhere" / "method" / "r")
    assert align(copy, "--data_dir", answered_zoo / "dataset") == 0
    assert {path.name for path in (tmp_path / "out" / "targets").iterdir()} == kept
    assert not (tmp_path / "elsewhere" / "targets").exists()


def test_distances_are_those_of_the_definition(runs, answered_zoo, tmp_path):
    """Against whole logits of the merged checkpoint and of the experts, on the questions that were not learned from and
    with the template that was."""
    run = runs[0]
    found = numbers(tmp_path, run, "--loss_tokens", "all")["models"]["expert_merging/r"]["absolute"]
    experts = {name: answered_zoo / folder for name, folder in EXPERTS.items()}
    some = ["model.layers.0.mlp.up_proj.weight"]  # to which next to nothing is added
    twin = Twin(base=run / "model", experts=experts, merged=some, initial=[1e-9] * 3, layers=[1])
    responses = {"Chat": "Certainly", "Math": "42", "Code": "def f():"}
    for task in EXPERTS:
        used = 3 if task == "Code" else 2
        samples = [Example(task, task, f"{task} question {number}?!", responses[task]) for number in range(used, 6)]
        with torch.no_grad():
            losses = torch.stack([torch.stack(twin.losses(sample)) for sample in samples]).mean(0)
        assert [found[task]["divergence"], found[task]["hidden"]] == pytest.approx(losses.tolist(), rel=1e-4)


def test_an_experts_own_head_counts(tmp_path):
    """Also where learning would take the merged model's for the expert's."""
    save_model(tmp_path / BASE, 0)
    perturb(tmp_path / BASE, tmp_path / "expert", 1)
    shutil.copytree(tmp_path / BASE, tmp_path / "other")
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["lm_head.weight"] *= 2
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    write_tasks(tmp_path / "dataset", responses={"Math": "42"})
    given = ["--family", "Mistral", "--base_model_path", tmp_path / BASE, "--expert", f"Math={tmp_path / 'expert'}"]
    found = numbers(tmp_path, tmp_path / "other", tmp_path / "expert", *given, "--data_dir", tmp_path / "dataset")
    assert found["models"]["expert"]["relative"]["mean"]["divergence"] == pytest.approx(0, abs=1e-6)
    assert abs(found["models"]["other"]["relative"]["mean"]["divergence"] - 1) > 0.01
    assert found["models"]["other"]["relative"]["mean"]["hidden"] == pytest.approx(1)


def test_other_questions_leave_nothing_out(runs, answered_zoo, tmp_path):
    write_tasks(tmp_path / "other", count=3, responses=dict.fromkeys(EXPERTS, "yes"))
    assert numbers(tmp_path, *runs, "--data_dir", tmp_path / "other")["questions"] == dict.fromkeys(EXPERTS, 3)
    assert numbers(tmp_path, *runs, "--data_dir", tmp_path / "other", "--samples", 1)["questions"] == dict.fromkeys(
        EXPERTS, 1
    )


def test_what_is_missing_is_said(runs, answered_zoo, tmp_path, capsys):
    learned, closed = runs
    assert "which questions? no run says what it learned from; give --data_dir" in refusal(capsys, closed)
    bare = answered_zoo / BASE
    assert "none of these models was made by a run that says what it was made of; give --family" in refusal(
        capsys, bare
    )
    assert f"{tmp_path} holds no model" in refusal(capsys, tmp_path)
    assert "--family must be one of" in refusal(capsys, learned, "--family", "Llama")
    assert "--samples must be a whole number in [1, inf), got 0" in refusal(capsys, learned, "--samples", "0")
    assert "--device must be auto, cpu, cuda" in refusal(capsys, learned, "--device", "tpu")


def test_runs_of_different_experts_are_not_compared(runs, answered_zoo, tmp_path, capsys):
    common = ["--cache_dir", str(answered_zoo), "--output_path", str(tmp_path / "out"), "--method", "weight_average"]
    experts = ["--expert", f"Math={answered_zoo / EXPERTS['Math']}"]
    assert merge(*common, *experts, "--run_name", "r") == 0
    nowhere = tmp_path / "no" / "numbers.json"
    told_first = f"--json {nowhere}: there is no folder {nowhere.parent}; make it first"
    assert refusal(capsys, runs[0], "--json", nowhere) == told_first
    assert refusal(capsys, runs[0], "--prompt_template", "Q") == "--prompt_template must contain {question}, got 'Q'"
    shown = refusal(capsys, runs[0], tmp_path / "out" / "weight_average" / "r")
    assert "made of different things" in shown
    assert "give --expert" in shown


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"family": 1}, "does not say what was merged; was it edited?"),
        ({"options": {"base_model_path": 7}}, "does not say what was merged; was it edited?"),
        ({"options": {"expert": {"A": None}}}, "does not say what was merged; was it edited?"),
        ({"options": {"post": 5}}, "does not say what was merged; was it edited?"),
        *(
            ({"method": "expert_merging", "options": options}, "does not say which samples it has read; was it edited?")
            for options in (
                {"data_dir": None},
                {"samples_per_task": "x"},
                {"samples_per_task_dict": {"A": None}},
                {"task_expert": ["A"]},
                {"prompt_template": 3},
                {"prompt_template": {"A": 3}},
            )
        ),
    ],
)
def test_a_record_that_was_edited_is_refused(changes, problem, tmp_path, capsys):
    base, expert = (write_checkpoint(tmp_path / name, TENSORS) for name in ("base", "A"))
    run = merged(tmp_path, "--method", "ties", *flags(base, A=expert))
    record = json.loads(run.config.read_text())
    options = {**record["options"], "data_dir": "x", "samples_per_task": 5, **changes.get("options", {})}
    run.config.write_text(json.dumps({**record, **changes, "options": options}))
    assert refusal(capsys, run.folder).endswith(problem)


@pytest.mark.slow
def test_runs_that_learned_from_different_questions_need_a_choice(runs, answered_zoo, tmp_path, capsys):
    shutil.copytree(answered_zoo / "dataset", tmp_path / "other")
    common = ["--cache_dir", str(answered_zoo), "--output_path", str(tmp_path / "out"), "--log_with", "none"]
    assert merge(*common, "--data_dir", str(tmp_path / "other"), "--run_name", "other") == 0
    both = [runs[0], tmp_path / "out" / "expert_merging" / "other"]
    assert f"these runs learned from {answered_zoo / 'dataset'} and {tmp_path / 'other'}" in refusal(capsys, *both)
    assert numbers(tmp_path, *both, "--data_dir", tmp_path / "other")["questions"] == dict.fromkeys(EXPERTS, 1)


def test_questions_that_were_used_are_left_out_and_some_must_stay():
    samples = [Sample("a", "a", str(number), None, str(number)) for number in range(3)]
    assert [sample.question for sample in held_out(samples, {"a": 2})] == ["2"]
    with pytest.raises(InputError, match=r"all 3 samples of a\.json were used for learning; give --data_dir"):
        held_out(samples, {"a": 3})


def test_a_base_like_its_expert_cannot_be_a_measure():
    with pytest.raises(InputError, match="the base and the expert of t predict the same"):
        relative({"base": {"t": {"divergence": 0.0, "hidden": 1.0}}})


def test_models_with_the_same_name_are_told_apart(answered_zoo, tmp_path):
    for parent in ("x", "y"):
        shutil.copytree(answered_zoo / BASE, tmp_path / parent / "same")
    labels = [model.label for model in find_models([tmp_path / "x" / "same", tmp_path / "y" / "same"])]
    assert labels == [str(tmp_path / "x" / "same"), str(tmp_path / "y" / "same")]


@pytest.mark.parametrize("names", [["Chat", "Math", "Code"], ["OCR", "VQA", "Geometry", "Chart", "Grounding"]])
def test_the_table_has_whole_names_in_80_columns(names, capsys):
    row = {name: {"divergence": 0.5, "hidden": 0.25} for name in [*names, "mean"]}
    label = "expert_merging++/a-run-with-a-long-name-of-its-own"
    console = Console(soft_wrap=True, highlight=False, width=80)
    console.print(_table({"base": row, label: row}), soft_wrap=False)
    shown = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    after = shown[shown.index(" base ") :].splitlines()[1:]
    assert "".join(line.split()[0] for line in after if line.strip()) == label
    assert all(name in shown for name in [*names, "mean", "hidden", "states"])
    without = {name: {"divergence": 0.5} for name in row}
    console.print(_table({"base": without, label: without}), soft_wrap=False)
    assert "hidden" not in capsys.readouterr().out


def test_why_hidden_states_are_not_compared_is_said(tmp_path):
    aligned = Compared("m/aligned", tmp_path, {"options": {"align_experts": "weight_matching"}})
    other, unknown = Compared("m/other", tmp_path, {"options": {"align_experts": None}}), Compared("x", tmp_path, None)
    assert _why_not_hidden([other, aligned]) == ("m/aligned put experts' units in another order than the experts have")
    assert _why_not_hidden([other, unknown]) == "the base's config.json does not say how many layers there are"


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
def test_analyse_draws_a_finished_run_again(runs, capsys):
    learned, closed = runs
    before = {file.name: file.read_bytes() for file in (learned / "analysis").iterdir()}
    for file in (learned / "analysis").glob("*.png"):
        file.unlink()
    assert main(["analyse", str(learned)]) == 0
    assert {file.name: file.read_bytes() for file in (learned / "analysis").iterdir()} == before
    assert str(learned / "analysis" / "importance.png") in capsys.readouterr().out
    with (learned / "analysis" / "layers.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 21
    assert sum(float(row["importance"]) for row in rows) == pytest.approx(1)
    assert main(["analyse", str(closed)]) == 1
    assert (
        f"{closed} has no folder analysis; give a finished run of a method that learns, or of one that has searched "
        "for coefficients in several tasks"
    ) in capsys.readouterr().err
