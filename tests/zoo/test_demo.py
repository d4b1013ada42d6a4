"""The demo merges as a user would and shows what came of it."""

from __future__ import annotations

import io
import json
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest
from rich.console import Console

from expert_merging.cli import main
from expert_merging.errors import InputError
from expert_merging.run import Run
from Mistral.backbone import BACKBONE
from tests.zoo.conftest import brief_family
from zoo import demo as module
from zoo.demo import demo


def run_here(command, **_options):
    """Instead of a process of its own, whose start takes longer than the merge."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
        code = main(BACKBONE, [*command[2:], "--device", "cpu"])
    return subprocess.CompletedProcess(command, code, stderr=errors.getvalue())


def exact_match(_backbone, model, _questions):
    """Better with smaller coefficients: models that are hardly trained answer nothing right, whatever it is."""
    coefficient = Run(model.parent).record["options"]["scaling_coefficient"]
    return dict.fromkeys(BACKBONE.expert_folders, 100 * (1 - coefficient))


@pytest.fixture
def run_demo(own_zoo, tmp_path, monkeypatch):
    """The demo on a hardly trained zoo; its numbers and what it shows."""
    monkeypatch.setattr(module, "load_family", lambda name: brief_family())
    monkeypatch.setattr(module, "default_folder", lambda name, seed: own_zoo)
    monkeypatch.setattr(module, "COEFFICIENTS", (0.2, 0.5))

    def run(*methods):
        shown = io.StringIO()
        console = Console(file=shown, width=200)
        return demo("mistral", seed=0, methods=methods, console=console, results=tmp_path / "logs"), shown.getvalue()

    return run


def test_the_table_has_base_experts_methods_and_the_best_task_arithmetic(run_demo, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=run_here))
    monkeypatch.setattr(module, "exact_match", exact_match)
    scores, shown = run_demo("task-arithmetic")
    assert list(scores) == [
        "base", "Chat expert", "Math expert", "Code expert", "task_arithmetic", "task_arithmetic, best coefficient",
    ]  # fmt: skip
    assert all(set(found) == {"Chat", "Math", "Code", "mean"} for found in scores.values())
    assert "coefficient of task_arithmetic ...\n  0.2: 80.0\n  0.5: 50.0\n" in shown
    assert scores["task_arithmetic, best coefficient"]["mean"] == 80
    assert "best coefficient: 0.2, " in shown
    assert "the best of 2 on these very questions" in shown
    assert "Mistral/model_merging.py --method task_arithmetic" in shown
    configs = [json.loads(file.read_text()) for file in tmp_path.glob("logs/task_arithmetic/*/config.json")]
    assert sorted(config["options"]["scaling_coefficient"] for config in configs) == [0.2, 0.3, 0.5]


def test_runs_are_found_again_unless_their_options_change(own_zoo, tmp_path):
    merging = module.Merging(brief_family(), own_zoo, 0, tmp_path)
    first, again, other = (
        merging.command("weight_average", *more)[1].folder for more in ((), (), ("--exclude_params", "none"))
    )
    assert first == again != other


def test_a_failed_merge_says_why(run_demo, own_zoo):
    (own_zoo / "MAmmoTH2-7B" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(
        InputError, match=r"merging with weight_average failed: error: .*model\.safetensors is truncated"
    ):
        run_demo("weight_average")


def test_an_unknown_method_is_answered_before_anything_is_built(run_demo):
    with pytest.raises(InputError, match="Did you mean 'weight_average'"):
        run_demo("weight_averge")


def test_all_means_every_method_that_makes_one_model_of_its_own(own_zoo, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "load_family", lambda name: brief_family())
    monkeypatch.setattr(module, "default_folder", lambda name, seed: own_zoo)
    monkeypatch.setattr(module.Merging, "run", lambda self, method, **_: asked.append(method) or Run(own_zoo))
    monkeypatch.setattr(module.Merging, "best_coefficient", lambda self, console: (0.3, {"mean": 1.0}))
    monkeypatch.setattr(module, "evaluate", lambda zoo, runs: {"base": {"mean": 0.0}})
    demo("mistral", seed=0, methods=["all"], console=Console(file=io.StringIO()))
    assert {"weight_average", "ties", "svd", "wudi", "expert_merging"} <= set(asked)
    assert not {"coefficients", "svd_intermediate"} & set(asked)
