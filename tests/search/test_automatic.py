"""A coefficient that is chosen by divergence: its result, its record, and what has none."""

from __future__ import annotations

import inspect
import json
import math
from types import SimpleNamespace

import pytest

from expert_merging.catalogue import all_methods
from expert_merging.checks import check
from expert_merging.console import Terminal
from expert_merging.errors import InputError
from expert_merging.learned.directions import TABLE
from expert_merging.machine import show_size
from expert_merging.options import resolve
from expert_merging.running.candidates import Candidates
from expert_merging.search import automatic as module
from expert_merging.search.automatic import COEFFICIENT, automatic
from Mistral.backbone import BACKBONE
from tests.checkpoints import BASE, tensors_of
from tests.command import assert_same_bytes, merge, merged, refusal
from tests.search.searching import score_plainly

AUTO = ("--scaling_coefficient", "auto")


@pytest.fixture(scope="session")
def common(tiny_zoo, answered):
    return ["--cache_dir", tiny_zoo, "--data_dir", answered, "--samples_per_task", 2]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["task_arithmetic", "iso", "dare_ties"])
def test_the_result_is_that_of_the_coefficient_chosen(common, tiny_zoo, answered, tmp_path, method):
    run = merged(tmp_path / "auto", "--method", method, *common, *AUTO)
    record = json.loads(run.coefficient.read_text())
    assert record["chosen"] == float(min(record["divergence"], key=record["divergence"].get))
    assert len(record["divergence"]) == 10
    plain = merged(tmp_path / "plain", "--method", method, *common[:2], "--scaling_coefficient", record["chosen"])
    assert_same_bytes(tensors_of(run.model), tensors_of(plain.model))
    lowest = min(record["divergence"].values())
    assert score_plainly(run.model, tiny_zoo, answered) == pytest.approx(lowest, rel=1e-4)


@pytest.mark.slow
def test_it_is_said_recorded_and_chosen_once(common, tmp_path, monkeypatch, capsys):
    run = merged(tmp_path, "--method", "task_arithmetic", *common, *AUTO)
    chosen = json.loads(run.coefficient.read_text())["chosen"]
    said = f"--scaling_coefficient auto: {chosen:g}, with"
    assert said in capsys.readouterr().out
    assert said in run.log.read_text()
    assert run.record["options"][COEFFICIENT] == "auto"
    assert run.record["options"]["samples_per_task"] == 2
    card = (run.model / "README.md").read_text()
    assert f"experts by `task_arithmetic`.\n\nIts coefficient, {chosen:g}, was chosen by divergence from the" in card
    before = tensors_of(run.model)
    run.model.rename(run.folder / "model.partial")
    for file in (run.folder / "model.partial").glob("*.safetensors"):
        file.unlink()
    monkeypatch.setattr(module, "_choose", None)
    assert_same_bytes(tensors_of(merged(tmp_path, "--method", "task_arithmetic", *common, *AUTO).model), before)


def test_a_damaged_record_is_no_choice(common, tmp_path):
    given = {"method": "task_arithmetic", "output_path": str(tmp_path), COEFFICIENT: "auto"}
    resolved = resolve({**given, "cache_dir": str(common[1]), "data_dir": str(common[3])}, {}, BACKBONE)
    terminal = Terminal(quiet=True)
    try:
        context = check(resolved, BACKBONE, terminal).context
    finally:
        terminal.close()
    assert module.remembered(context.run) is None
    context.run.folder.mkdir(parents=True)
    for text in ("{", '{"chosen": "0.3"}', '{"chosen": -1.0}', '{"chosen": Infinity}'):
        context.run.coefficient.write_text(text)
        assert module.remembered(context.run) is None
    context.run.coefficient.write_text('{"chosen": 0.5}')
    assert module.remembered(context.run) == 0.5


def test_merges_without_numbers_are_no_choice(common, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Candidates, "merge", lambda *_: None)
    monkeypatch.setattr(Candidates, "divergence", lambda _: {"Math": math.nan})
    given = ["--method", "task_arithmetic", *common, *AUTO, "--output_path", tmp_path]
    assert refusal(capsys, *given).startswith(
        "--scaling_coefficient auto: no merge's predictions are numbers, with coefficients from 0.0"
    )
    assert not list(tmp_path.glob("*/*/coefficient.json"))


def test_the_room_for_merged_tensors_is_told_and_checked(common, tmp_path, capsys, monkeypatch):
    given = [*common, *AUTO, "--output_path", tmp_path, "--run_name", "run", "--dry_run"]
    assert merge("--method", "svd", *given) == 0
    size = sum(4 * tensor.numel() for name, tensor in tensors_of(common[1] / BASE).items() if "proj" in name)
    place = tmp_path / "svd" / "run" / "multiples"
    told = f"until it is chosen, {show_size(size)} of merged tensors are in {place}"
    assert told in " ".join(capsys.readouterr().out.split())
    assert merge("--method", "task_arithmetic", *given) == 0
    assert "until it is chosen" not in capsys.readouterr().out
    room = sum(file.stat().st_size for file in (common[1] / BASE).iterdir()) + size // 2  # for the result, not for both
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=room))
    assert "make room or choose another --output_path" in refusal(capsys, "--method", "svd", *given)
    monkeypatch.setattr(module, "remembered", lambda _: 0.5)
    assert merge("--method", "svd", *given) == 0
    assert "until it is chosen" not in capsys.readouterr().out


def test_what_has_no_coefficient_or_runs_models_is_refused(common, tmp_path, capsys):
    given = [*common, *AUTO, "--output_path", tmp_path]
    reason = "--scaling_coefficient auto chooses the coefficient of a method of closed form by its distance from the"
    reason += " experts"
    assert refusal(capsys, "--method", "slerp", *given) == f"{reason}, and slerp has no coefficient"
    assert refusal(capsys, "--method", "evo", *given) == f"{reason}, and evo is none"


def test_every_closed_form_with_a_coefficient_can_choose_it():
    """What is prepared does not depend on the coefficient, so it is prepared once for all that are tried."""
    having = [method for method in all_methods().values() if COEFFICIENT in method.options and method.is_closed_form]
    assert len(having) > 15
    for method in having:
        assert automatic(method).reads_samples
        assert TABLE[method.name] is method
        if method.prepare is not None:
            assert COEFFICIENT not in inspect.signature(method.prepare.function).parameters, method.name
    for method in all_methods().values():
        if method in having:
            continue
        with pytest.raises(InputError, match="auto chooses the coefficient"):
            automatic(method)
