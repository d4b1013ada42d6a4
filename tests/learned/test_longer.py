"""A finished run that learns longer: it becomes what it would have been with as many epochs from the start."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from expert_merging.comparing.scores_file import Scores, add_scores
from expert_merging.run import Run
from expert_merging.verify import verify
from tests.command import merge

# What tells of time and of the machine, or keeps on what there was before.
APART = (
    "merge.log",
    "config.json",
    "outcome.json",
    ".lock",
    "state/",
    "stage1/state/",
    "stage1/digests.json",
    "board/",
)
METHODS = {
    "expert_merging": [],
    "expert_merging held out": ["--held_out", 0.4, "--patience", 9],
    "expert_merging++": ["--sparsity_reg_weight", 0],
    "align_merge": ["--synthesize", 0, "--directions", "svd,weight_average"],
    "adamerging_task": [],
}


@pytest.fixture
def learn(answered_zoo, tmp_path):
    """Runs the command with a run of one name; the run."""

    def run(*arguments, output="out", method="expert_merging", code=0):
        given = ["--cache_dir", answered_zoo, "--data_dir", answered_zoo / "dataset", "--run_name", "r"]
        given += ["--samples_per_task", 3, "--log_with", "none", "--output_path", tmp_path / output]
        assert merge(*given, "--method", method, *arguments) == code
        return Run(tmp_path / output / method / "r")

    return run


def results(run):
    """Everything that a run leaves but what tells of time and of the machine."""
    found = contents_of(run)
    digests = json.loads(found.pop("digests.json"))["files"]
    return found, {name: entry["sections"] for name, entry in digests.items()}


def contents_of(run):
    files = {path: run.folder / path for path in sorted(str(p.relative_to(run.folder)) for p in run.folder.rglob("*"))}
    return {name: file.read_bytes() for name, file in files.items() if file.is_file() and not name.startswith(APART)}


@pytest.mark.parametrize(
    "name", [name if name == "expert_merging" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_a_longer_run_is_one_that_was_as_long_from_the_start(name, learn):
    method, options = name.split()[0], METHODS[name]
    short = learn("--num_epochs", 2, *options, method=method)
    before = short.coefficients.read_bytes()
    add_scores(short.scores, Scores(divergence={"Math": 0.5}))
    longer = learn("--num_epochs", 4, *options, method=method)
    whole = learn("--num_epochs", 4, *options, method=method, output="whole")
    assert results(longer) == results(whole)
    assert longer.coefficients.read_bytes() != before
    assert longer.record["options"] == whole.record["options"]
    assert json.loads(longer.outcome.read_text())["continued"]
    log = longer.log.read_text()
    assert "goes on with the finished run after its epoch 2" in log
    assert "epoch 3 of 4" in log.split("goes on with")[1]
    verify(longer.folder, Console(quiet=True))
    assert not longer.longer.work.exists()
