from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from Mistral.backbone import BACKBONE
from zoo import build as build_module
from zoo.commands import main
from zoo.family import default_folder
from zoo.report import run_labels


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that must fail."""
    assert main([str(argument) for argument in arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def make_run(zoo: Path, run: Path) -> Path:
    shutil.copytree(zoo / BACKBONE.base_folder, run / "model")
    return run


def test_help_needs_no_torch() -> None:
    code = "import sys, zoo.commands as command; command.parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_typing_mistake_is_answered_with_the_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(capsys, "build", "mistrall") == "there is no zoo family 'mistrall'. Did you mean 'mistral'?"
    assert (
        error_of(capsys, "build", "llama")
        == "there is no zoo family 'llama'. Known: internvl, mistral, qwen2vl, smollm2."
    )


def test_build_puts_the_zoo_where_it_is_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, Path, int, bool, bool]] = []
    monkeypatch.setattr(
        build_module,
        "build",
        lambda family, zoo, seed, adapters, mixture, progress: asked.append(
            (family.name, zoo, seed, adapters, mixture)
        ),
    )
    assert main(["build", "mistral", "--seed", "3"]) == 0
    assert main(["build", "mistral", "--output", str(tmp_path), "--adapters"]) == 0
    assert main(["build", "mistral", "--output", str(tmp_path), "--mixture"]) == 0
    usual = default_folder("mistral", 3)
    assert asked == [
        ("mistral", usual, 3, False, False),
        ("mistral", tmp_path, 0, True, False),
        ("mistral", tmp_path, 0, False, True),
    ]
    assert capsys.readouterr().out == "".join(f"The zoo is in {place}\n" for place in (usual, tmp_path, tmp_path))


def test_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "build", interrupted)
    assert main(["build", "mistral"]) == 130
    assert capsys.readouterr().err == "interrupted; the same command continues where this one stopped\n"


def test_table_and_numbers(own_zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(own_zoo, tmp_path / "logs" / "weight_average" / "first")
    shutil.copytree(own_zoo / "MAmmoTH2-7B", own_zoo / "mixture")
    numbers = tmp_path / "numbers.json"
    assert main(["evaluate", str(run), "--zoo", str(own_zoo), "--json", str(numbers)]) == 0
    scores = json.loads(numbers.read_text())
    experts = ["Chat expert", "Math expert", "Code expert"]
    assert list(scores) == ["base", *experts, "mixture training", "weight_average"]
    assert scores["mixture training"] == scores["Math expert"]
    assert all(list(found) == ["Chat", "Math", "Code", "mean"] for found in scores.values())
    assert scores["weight_average"] == scores["base"]
    shown = capsys.readouterr().out
    assert "weight_average" in shown
    assert "Math expert" in shown


def test_runs_are_called_by_their_method(tmp_path: Path) -> None:
    runs = [tmp_path / "ties" / "a", tmp_path / "svd" / "a", tmp_path / "ties" / "b"]
    for run in runs:
        (run / "model").mkdir(parents=True)
    plain = tmp_path / "some-model"
    plain.mkdir()
    assert run_labels([*runs, plain]) == ["ties (a)", "svd", "ties (b)", "some-model"]
    assert run_labels([runs[0] / "model", runs[1]]) == ["ties", "svd"]
    assert run_labels([runs[0], runs[0] / "model"]) == [str(runs[0]), str(runs[0] / "model")]
    assert run_labels([plain, plain]) == [str(plain), str(plain)]


def test_missing_zoo_is_answered_with_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = error_of(capsys, "evaluate", "--zoo", tmp_path)
    command = f"python -m zoo build mistral --seed 0 --output {tmp_path}"
    assert line == f"there is no zoo in {tmp_path}; build it with: {command}"


def test_incomplete_zoo_is_answered_with_the_command(capsys: pytest.CaptureFixture[str], own_zoo: Path) -> None:
    (own_zoo / "MAmmoTH2-7B").rename(own_zoo / "MAmmoTH2-7B.partial")
    line = error_of(capsys, "evaluate", "--zoo", own_zoo)
    command = f"python -m zoo build mistral --seed 0 --output {own_zoo}"
    assert line == f"the zoo in {own_zoo} is not complete (MAmmoTH2-7B missing); go on with: {command}"


def test_run_without_a_model_is_refused(capsys: pytest.CaptureFixture[str], built_zoo: Path, tmp_path: Path) -> None:
    assert "holds no model" in error_of(capsys, "evaluate", tmp_path, "--zoo", built_zoo)
    (tmp_path / "model").mkdir()
    assert f"{tmp_path / 'model'} holds no model" in error_of(capsys, "evaluate", tmp_path, "--zoo", built_zoo)
    assert "is not a folder" in error_of(capsys, "evaluate", tmp_path / "absent", "--zoo", built_zoo)
