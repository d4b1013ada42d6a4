"""A task's weight moves the balance towards it, on questions that nothing was learned from."""

from __future__ import annotations

import json

import pytest

from expert_merging.commands.main import main as compare
from Mistral.backbone import BACKBONE
from tests.command import merge

FLAGS = ["--samples_per_task", "4", "--loss_tokens", "response", "--max_new_tokens", "4", "--num_epochs", "2"]
FLAGS += ["--learning_rate", "0.3", "--sparsity_reg_weight", "0", "--log_with", "none"]


@pytest.fixture(scope="module")
def divergences(built_zoo, tmp_path_factory):
    """Held-out divergence from each task's expert, with equal weights and with each task in turn weighing more."""
    output = tmp_path_factory.mktemp("runs")
    common = ["--cache_dir", str(built_zoo), "--data_dir", str(built_zoo / "dataset"), "--output_path", str(output)]
    for name in ("equal", *BACKBONE.expert_folders):
        weights = [] if name == "equal" else ["--loss_alphas", f"{name}=20"]
        assert merge(*common, *FLAGS, *weights, "--run_name", name) == 0
    runs = [str(run) for run in sorted((output / "expert_merging").iterdir())]
    file = output / "align.json"
    options = ["--samples", "6", "--max_new_tokens", "4", "--device", "cpu", "--json", str(file)]
    assert compare(["align", *runs, *options]) == 0
    models = json.loads(file.read_text())["models"]
    return {
        label.removeprefix("expert_merging/"): {task: found["divergence"] for task, found in model["relative"].items()}
        for label, model in models.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("task", BACKBONE.expert_folders)
def test_raising_a_tasks_weight_improves_its_alignment(task, divergences):
    assert divergences[task][task] < divergences["equal"][task]
