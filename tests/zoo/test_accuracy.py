"""The accuracy benchmark on hardly trained experts: what is merged, kept and resumed."""

from __future__ import annotations

import io
import json
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest

from benchmarks import accuracy
from benchmarks.accuracy import Variant
from expert_merging.catalogue import all_methods
from expert_merging.cli import main
from Mistral.backbone import BACKBONE
from tests.zoo.conftest import brief_family
from zoo import demo

CONFIG = "samples_per_task: 2\nloss_tokens: response\nmax_new_tokens: 4\n"


def run_here(command, **_options):
    """Instead of a process of its own, whose start takes longer than the merge."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
        code = main(BACKBONE, [*command[2:], "--device", "cpu", "--log_with", "none"])
    return subprocess.CompletedProcess(command, code, stderr=errors.getvalue())


@pytest.fixture
def small(own_zoo, tmp_path, monkeypatch):
    """The benchmark on a hardly trained zoo, in this process, with two variants."""
    config = tmp_path / "mistral.yaml"
    config.write_text(CONFIG)
    monkeypatch.setattr(accuracy, "WORK", tmp_path / "work")
    monkeypatch.setattr(accuracy, "load_family", lambda name: brief_family())
    monkeypatch.setattr(accuracy, "default_folder", lambda name, seed: own_zoo)
    monkeypatch.setattr(demo.Merging, "config", config)
    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(run=run_here))
    few = [Variant("task_arithmetic", {"scaling_coefficient": 0.5}), Variant("expert_merging")]
    monkeypatch.setattr(accuracy, "variants", lambda: few)

    def run(*more):
        file = tmp_path / "accuracy.json"
        arguments = ["mistral", "--draws", "2", "--questions", "3", "--json", str(file), *more]
        monkeypatch.setattr("sys.argv", ["accuracy", *arguments])
        accuracy.main()
        return json.loads(file.read_text())

    return run


def test_every_method_is_measured_once_and_what_learns_comes_with_its_variants():
    labels = [variant.label for variant in accuracy.variants()]
    assert len(set(labels)) == len(labels)
    merging = {name for name, method in all_methods().items() if method.merges_any_experts}
    assert {variant.method for variant in accuracy.variants()} == merging
    assert "expert_merging --directions aswudi --learning_rate 0.02" in labels
    assert {variant.method for variant in accuracy.variants() if variant.draws} >= {"expert_merging", "regmean", "evo"}
    assert not Variant("ties").draws


@pytest.mark.slow
def test_every_result_is_kept_and_nothing_is_measured_twice(small, tmp_path, monkeypatch):
    (own,) = [small("--only", "task_arithmetic")]
    assert "expert_merging" not in own["rows"]
    found = small()
    rows = found["rows"]
    assert list(rows) == [
        *("base", "Chat expert", "Math expert", "Code expert"),
        *("task_arithmetic --scaling_coefficient 0.5", "expert_merging"),
    ]
    assert set(rows["expert_merging"]["scores"]) == {"Chat", "Math", "Code", "mean"}
    assert [len(row["draws"]) for row in list(rows.values())[4:]] == [1, 2]
    assert found["settings"]["questions"] == 3
    work = tmp_path / "work" / "zoo"
    assert not list(work.glob("runs/*/*/model")), "models are gone once they are measured"
    first, second = (json.loads((work / f"dataset{draw}" / "Math.json").read_text()) for draw in (0, 1))
    assert len(first) == len(second) == 2
    assert not {entry["question"] for entry in first} & {entry["question"] for entry in second}
    configs = [json.loads(file.read_text()) for file in work.glob("runs/expert_merging/*/config.json")]
    assert sorted(config["options"]["data_dir"] for config in configs) == [
        str(work / f"dataset{draw}") for draw in (0, 1)
    ]
    monkeypatch.setattr(accuracy.Bench, "measure", None)
    assert small()["rows"] == rows
