"""Runs with odd names, folders and settings end with the right model or with one line, whatever the output can show."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zoo.commands
from expert_merging import options
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.commands.main import main
from tests.checkpoints import EXPERTS, make_zoo, tensors_of, write_checkpoint
from tests.command import COMMAND, TENSORS, flags, merge, merged, refusal, refused
from zoo.commands import main as zoo_main

ROOT = Path(__file__).resolve().parent.parent
NAMES = {**TENSORS, "[/red].weight": torch.ones(3), "a\nb\x1b[31m": torch.ones(3), "é\u2028.weight": torch.ones(3)}


@pytest.fixture
def odd(tmp_path):
    """Flags for checkpoints with tensors of odd names, and a file beside them whose name is no text."""
    folders = {
        name: write_checkpoint(tmp_path / name, {key: tensor + shift for key, tensor in NAMES.items()})
        for name, shift in {"base": 0.0, "A": 1.0, "B": 3.0}.items()
    }
    Path(os.fsdecode(os.fsencode(folders["base"]) + b"/\xff.txt")).write_text("x")
    base = folders.pop("base")
    return [*COMMAND, "--scaling_coefficient", "1", *flags(base, **folders)]


def test_tensors_and_files_of_any_name_are_merged_and_shown(odd, tmp_path, capsys):
    assert merge(*odd, "--output_path", tmp_path / "out", "--dry_run") == 0
    run = merged(tmp_path / "out", *odd)
    assert tensors_of(run.model)["[/red].weight"].tolist() == [5.0] * 3
    assert any(name.startswith(b"\xff") for name in os.listdir(os.fsencode(run.model)))
    assert "Traceback" not in capsys.readouterr().err


def test_an_odd_name_in_an_error_is_one_line(odd, tmp_path, capsys):
    write_checkpoint(tmp_path / "B", {**NAMES, "a\nb\x1b[31m": torch.ones(4), "[/red].weight": torch.ones(4)})
    lines = refused(capsys, *odd, "--output_path", tmp_path / "out")
    assert any(r"a\nb\x1b[31m" in line for line in lines)
    assert any("[/red].weight" in line for line in lines)
    assert "\x1b" not in "".join(lines)


@pytest.mark.slow
def test_output_that_has_no_place_for_a_name_shows_its_number(odd, tmp_path):
    command = [
        sys.executable,
        ROOT / "Mistral" / "model_merging.py",
        *odd,
        "--output_path",
        tmp_path / "out",
        "--dry_run",
    ]
    expert = write_checkpoint(tmp_path / "é", NAMES)
    command += ["--expert", f"C={expert}"]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\xe9" in done.stdout


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("a\0b", r"--base_model_path: the path 'a\x00b' has a NUL character in it, which no file's name has"),
        (
            "{place}/loop",
            "--base_model_path: the path {place}/loop has a link in it that leads to itself; remove the link",
        ),
        ("~nosuchuser/x", "checkpoint folder {here}/~nosuchuser/x does not exist"),
    ],
)
def test_paths_that_no_checkpoint_has(path, problem, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    expert = write_checkpoint(tmp_path / "A", TENSORS)
    given = {"base_model_path": path.format(place=tmp_path), "expert": {"A": str(expert)}, "output_path": "out"}
    (tmp_path / "options.json").write_text(json.dumps(given))
    found = refusal(capsys, *COMMAND, "--config", tmp_path / "options.json")
    assert found == problem.format(place=tmp_path, here=tmp_path.resolve())


def test_arguments_that_are_no_text(capsys):
    assert refusal(capsys, *COMMAND, "--run_name", os.fsdecode(b"\xff")) == (
        r"'\udcff' on the command line is no text in UTF-8; rename what it names"
    )
    assert main(["analyse", os.fsdecode(b"\xff")]) == 1
    assert capsys.readouterr().err == (
        "error: '\\udcff' on the command line is no text in UTF-8; rename what it names\n"
    )


@pytest.mark.parametrize("command", ["align {}", "verify {}", "convert base {}/x", "zoo evaluate {}"])
def test_a_link_that_leads_to_itself_is_no_model(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    torch.save({"a": torch.ones(3)}, write_checkpoint(tmp_path / "base", TENSORS) / "pytorch_model.bin")
    (tmp_path / "base" / "model.safetensors").unlink()
    place = tmp_path / "loop"
    program, words = (zoo_main, 1) if command.startswith("zoo") else (main, 0)
    assert program([word.format(place) for word in command.split()[words:]]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("has a link in it that leads to itself; remove the link")
    assert str(place) in line


def test_a_run_folder_that_leads_to_itself(odd, tmp_path, capsys):
    (tmp_path / "task_arithmetic").mkdir()
    (tmp_path / "task_arithmetic" / "loop").symlink_to("loop")
    assert refusal(capsys, *odd, "--output_path", tmp_path, "--run_name", "loop") == (
        f"the path {tmp_path / 'task_arithmetic' / 'loop'} has a link in it that leads to itself; remove the link"
    )


def test_a_name_with_nul_is_no_run(capsys):
    assert main(["verify", "a\0b"]) == 1
    assert capsys.readouterr().err.endswith("the path 'a\\x00b' has a NUL character in it, which no file's name has\n")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the current folder cannot be removed")
def test_a_current_folder_that_is_gone(tmp_path, capsys, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    line = "error: the current folder does not exist any more; change to another one\n"
    assert (main(["verify", "x"]), capsys.readouterr().err) == (1, line)
    assert (merge(*COMMAND), capsys.readouterr().err) == (1, line)
    assert (zoo_main(["evaluate", "x"]), capsys.readouterr().err) == (1, line)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["Mistral/model_merging.py", "--list_methods"],
        ["Mistral/model_merging.py", "{flags}", "--dry_run"],
        ["-m", "expert_merging", "verify", "{run}"],
    ],
    ids=" ".join,
)
def test_output_that_nobody_reads_is_one_line(arguments, tmp_path):
    base, expert = (write_checkpoint(tmp_path / name, TENSORS) for name in ("base", "A"))
    given = [*COMMAND, *map(str, flags(base, A=expert)), "--output_path", str(tmp_path)]
    run = merged(tmp_path, *given) if "verify" in arguments else None
    words = [
        word for text in arguments for word in (given if text == "{flags}" else [text.format(run=run and run.folder)])
    ]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert done.returncode == 1
    told = (
        rb"error: what reads the output of this program has ended before it; the same command (continues|begins) .*\n"
    )
    assert re.fullmatch(told, done.stderr), done.stderr


def test_a_zoo_whose_files_cannot_be_used_is_one_line(monkeypatch, capsys):
    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zoo.commands, "build_command", lambda *_, **__: fails())
    assert zoo_main(["build", "mistral"]) == 1
    assert capsys.readouterr().err == (
        "error: the disk is full; make room, then the same command continues where it stopped\n"
    )


def test_variables_that_are_no_text(tmp_path, monkeypatch, capsys):
    (tmp_path / ".env").write_bytes(b"CACHE_DIR=\xff\n")
    monkeypatch.setattr(options, "ROOT", tmp_path)
    assert refusal(capsys, *COMMAND) == f"{tmp_path / '.env'} is no text in UTF-8; save it as UTF-8"
    (tmp_path / ".env").write_text("CACHE_DIR=~nosuchuser/x\n")
    assert any("~nosuchuser/x" in line for line in refused(capsys, *COMMAND))


@pytest.mark.slow
def test_a_template_that_raises_is_no_reason_to_stop(tmp_path, capsys):
    folder = make_zoo(tmp_path / "zoo")
    for name in EXPERTS.values():
        (folder / name / "chat_template.jinja").write_text("{{ raise_exception('[/red]\\nno') }}")
    given = ["--method", "expert_merging", "--cache_dir", folder, "--data_dir", folder / "dataset", "--dry_run"]
    assert merge(*given, "--output_path", tmp_path / "out") == 0
    assert "raises an error ([/red] no)" in capsys.readouterr().out


def test_a_large_file_beside_the_weights_takes_no_memory(tmp_path):
    folder = write_checkpoint(tmp_path / "base", TENSORS)
    for name in ("notes.bin.txt", "tokenizer.json"):
        (folder / name).touch()
        os.truncate(folder / name, 3 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Checkpoint(folder).fingerprint(whole=True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
