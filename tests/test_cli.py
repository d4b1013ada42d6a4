"""The command line: dry runs, lists, help, and mistakes that are found before any work."""

from __future__ import annotations

import errno
import json
import re
import time

import pytest
import torch

from expert_merging import options
from expert_merging.catalogue import all_methods
from expert_merging.parser import GENERAL
from tests.checkpoints import tensors_of, write_checkpoint
from tests.command import (
    COMMAND,
    TENSORS,
    flags,
    merge,
    merged,
    refusal,
    refused,
    snapshot,
)


def test_a_dry_run_checks_and_tells_and_writes_nothing(command, tmp_path, capsys):
    before = snapshot(tmp_path)
    assert merge(*command, "--dry_run") == 0
    assert snapshot(tmp_path) == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        f"method task_arithmetic, run folder {tmp_path / 'out' / 'task_arithmetic' / 'Mistral-'}"
    )
    assert lines[1] == f"base {tmp_path / 'base'}"
    assert "2 of 4 tensors are merged" in lines[7]
    assert "writes" in lines[8]
    assert lines[-1] == "dry run: all checks passed, nothing was written"


def test_a_dry_run_of_a_method_that_learns_writes_nothing(tiny_zoo, tmp_path, capsys):
    before = snapshot(tiny_zoo)
    arguments = ["--cache_dir", tiny_zoo, "--data_dir", tiny_zoo / "dataset", "--output_path", tmp_path / "out"]
    assert merge(*arguments, "--method", "expert_merging", "--dry_run") == 0
    assert snapshot(tiny_zoo) == before
    assert not list(tmp_path.iterdir())
    assert "learning needs at least " in capsys.readouterr().out


def test_a_dry_run_finds_problems_too(command, tmp_path, capsys):
    (tmp_path / "a" / "config.json").unlink()
    assert "has no config.json" in refusal(capsys, *command, "--dry_run")


def test_methods_are_listed_with_options_and_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert merge("--list-methods") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for method in all_methods().values():
        assert method.name in shown
        assert method.summary in shown
        assert all(f"--{name} " in shown for name in method.options)
    assert "--scaling_coefficient 1.0" in shown
    assert "--scaling_coefficient 0.3" in shown
    for option in ("rank_ratio 1/experts", "solver by variant", "step_size by solver", "data_dir dataset/"):
        assert f"--{option}" in shown
    for option in ("shared_expert", "hidden_states_layers"):  # whose value it is
        shown = shown.replace(f"--{option} none ", "")
    assert " none " not in shown


def test_the_list_fits_80_columns_and_has_what_methods_share_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert merge("--list_methods") == 0
    shown = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    assert max(map(len, shown.splitlines())) == 80
    for line in (
        "--num_epochs 1",
        "--gradient_accumulation_steps 8",
        "--loss_alphas",
        "--samples_per_task 5",
    ):
        assert shown.count(f" {line} ") == 1, line
    reading = [method for method in all_methods().values() if method.reads_samples]
    learning = [method for method in reading if "num_epochs" in method.options]
    assert shown.count("the sample options below") == len(reading) > len(learning)
    assert shown.count("the learning options below") == len(learning)
    assert shown.count("--density 0.2") == sum(
        method.defaults({}).get("density") == 0.2 for method in all_methods().values()
    )


def test_help_tells_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_:
        merge("--help")
    assert exit_.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    every = {*GENERAL, *(name for method in all_methods().values() for name in method.options)}
    for name in {*every, "config", "list_methods"}:
        assert f"--{name} " in shown
    assert "Default: 0.8." in shown


@pytest.mark.parametrize("number", [0, 1])
def test_a_mistake_is_told_by_the_main_process_and_by_others_that_nobody_ends(number, command, monkeypatch, capsys):
    monkeypatch.setenv("RANK", str(number))
    monkeypatch.setenv("WORLD_SIZE", "2")
    waited = []
    monkeypatch.setattr(time, "sleep", lambda seconds: waited.append((seconds, capsys.readouterr().err)))
    assert merge(*command, "--sede", "1") == 1
    assert waited == ([(10, "")] if number else [])
    assert capsys.readouterr().err == "error: no flag --sede. Did you mean '--seed'?\n"


@pytest.mark.parametrize("place", ["there", "gone"])
def test_a_launcher_with_a_report_of_its_own_is_told_instead(place, command, monkeypatch, capsys, tmp_path):
    file = tmp_path / place / "error.json"
    (tmp_path / "there").mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    before = time.time()
    assert merge(*command, "--sede", "1", "--seet", "2") == 1
    lines = "error: no flag --sede. Did you mean '--seed'?\nerror: no flag --seet. Did you mean '--seed'?"
    if place == "gone":
        assert capsys.readouterr().err == lines + "\n"
        return
    message = json.loads(file.read_text())["message"]
    assert message["message"] == lines
    assert int(before) <= int(message["extraInfo"]["timestamp"]) <= time.time()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EMFILE, "Too many open files", "a/b.json"), "a/b.json: Too many open files"),
        (OSError(errno.EIO, "Input/output error"), "a file or a connection cannot be used (Input/output error); {}"),
        (OSError("Cannot reach it:\nmore"), "a file or a connection cannot be used (Cannot reach it); {}"),
        (OSError(), "a file or a connection cannot be used (OSError); {}"),
        (ConnectionResetError(), "a file or a connection cannot be used (ConnectionResetError); {}"),
    ],
    ids=str,
)
def test_what_the_system_refuses_is_one_line(error, told, command, capsys, monkeypatch):
    def fail(*_arguments, **_keywords):
        raise error

    monkeypatch.setattr("expert_merging.job.write_output", fail)
    assert refusal(capsys, *command) == told.format("the same command continues where it stopped")


@pytest.mark.parametrize("number", [0, 1])
def test_an_interrupted_run_says_so_once(number, command, capsys, monkeypatch):
    def interrupt(*_arguments, **_keywords):
        raise KeyboardInterrupt

    monkeypatch.setenv("RANK", str(number))
    monkeypatch.setattr("expert_merging.cli.resolve", interrupt)
    assert merge(*command) == 130
    told = "\ninterrupted; the same command continues where this one stopped\n"
    assert capsys.readouterr().err == ("" if number else told)


def test_everything_wrong_with_the_checkpoints_is_said_at_once(tmp_path, capsys):
    base = write_checkpoint(tmp_path / "base", TENSORS)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    cut = write_checkpoint(tmp_path / "cut", TENSORS)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1])
    experts = {
        "Gone": tmp_path / "gone",
        "Pickled": tmp_path / "pickled",
        "Lora": tmp_path / "lora",
        "Quantized": write_checkpoint(tmp_path / "quantized", TENSORS, config={"quantization_config": {"bits": 4}}),
        "Cut": cut,
        "Other": write_checkpoint(tmp_path / "other", {**TENSORS, "layers.1.weight": torch.ones(7)}),
    }
    lines = refused(capsys, *COMMAND, *flags(base, **experts), "--output_path", tmp_path / "out", "--device", "cuda:99")
    assert [re.sub(r"^\S+/|[;:(,].*", "", line).strip() for line in lines] == [
        "checkpoint folder " + str(tmp_path / "gone") + " does not exist",
        "pickled has its weights in pickle files",
        "adapter_config.json has the peft_type null",
        "config.json has a quantization_config",
        "model.safetensors is truncated or not a safetensors file",
        "expert Other",
        "--device cuda",
    ]
    assert not (tmp_path / "out").exists()


def test_no_checkpoints_given(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "ROOT", tmp_path)
    assert refusal(capsys, *COMMAND).startswith("where are the checkpoints? Give --cache_dir DIR")


def test_more_vocabulary_rows_are_fine_while_embeddings_keep_the_base_s(command, tmp_path, capsys):
    more = {**TENSORS, "embed_tokens.weight": torch.ones(8, 3)}
    write_checkpoint(tmp_path / "b", {name: tensor + 1 for name, tensor in more.items()})
    assert refusal(capsys, *command, "--exclude_params", "none") == (
        f"expert B ({tmp_path / 'b'}): embed_tokens.weight has shape [8, 3], the base's has [6, 3]; "
        "--embeddings mean, or base, matches rows by token"
    )
    run = merged(tmp_path / "out", *command)
    assert tensors_of(run.model)["embed_tokens.weight"].equal(TENSORS["embed_tokens.weight"])


def test_patterns_given_replace_the_family_s(command, tmp_path):
    run = merged(tmp_path / "out", *command, "--exclude_params", "layers.0", "embed.*")
    tensors = tensors_of(run.model)
    assert {name for name in TENSORS if tensors[name].equal(TENSORS[name])} == {
        "layers.0.weight",
        "embed_tokens.weight",
    }


def test_coefficients_are_needed_for_the_method_of_that_name(command, capsys):
    assert refusal(capsys, *command, "--method", "coefficients") == (
        "--method coefficients needs --coefficients RUN_OR_FILE: a finished run, its coefficients.safetensors, or the "
        "published implementation's weight_coeffs.json"
    )


def test_a_coefficient_for_each_expert_is_needed(command, capsys):
    assert refusal(capsys, *command, "--scaling_coefficient", "[0.1, 0.2, 0.3]") == (
        "--scaling_coefficient has 3 values for 2 experts (A, B)"
    )
