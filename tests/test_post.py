"""``--post``: what improves the result of another method."""

from __future__ import annotations

import json
import re

import pytest
import torch

from expert_merging import options
from expert_merging.errors import InputError
from expert_merging.options import resolve
from expert_merging.parser import parse
from Mistral.backbone import BACKBONE
from tests.checkpoints import write_checkpoint
from tests.command import flags, merge, merged, refusal


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """A repository root without the developer's .env."""
    monkeypatch.setattr(options, "ROOT", tmp_path)
    return tmp_path


def resolved(*arguments):
    return resolve(parse([str(argument) for argument in arguments], BACKBONE), {}, BACKBONE)


def problems(*arguments):
    with pytest.raises(InputError) as caught:
        resolved(*arguments)
    return list(caught.value.problems)


def test_options_of_the_method_and_of_its_modifiers_are_known_and_kept_apart():
    found = resolved("--method", "ties", "--post", "consensus", "--consensus-k", 1, "--density", 0.5)
    assert [step.name for step in found.steps] == ["ties", "consensus"]
    assert found.general["post"] == ["consensus"]
    assert found.options["consensus_k"] == 1
    assert not found.ignored
    assert set(found.options_of(found.method)) == {
        "density",
        "ties_scope",
        "ties_weights",
        "ties_normalize",
        "scaling_coefficient",
    }
    assert found.options_of(found.modifiers[0]) == {"tall_lambda": 0.2, "consensus_k": 1}


def test_without_a_modifier_its_options_are_ignored():
    found = resolved("--method", "ties", "--consensus_k", 1)
    assert found.modifiers == ()
    assert found.general["post"] is None
    assert found.ignored == ("consensus_k",)


def test_modifiers_of_a_preset_come_first():
    found = resolved("--method", "prodistill", "--post", "consensus")
    assert [step.name for step in found.steps] == ["weight_average", "distil", "consensus"]
    assert (found.options["distil_epochs"], found.options["synthesize"]) == (100, 0)
    assert [step.name for step in resolved("--method", "prodistill").steps] == ["weight_average", "distil"]


def test_modifiers_of_a_preset_are_done_once_whatever_else_is_given(root):
    """Also with the settings that a run of it has left, which name the method beneath and the modifier."""
    (root / "run.yaml").write_text("method: weight_average\npost: [featcal, Distil]")
    (root / "none.yaml").write_text("post: []")
    for given, modifiers in (
        (["--post", "distil"], ["distil"]),
        (["--config", root / "run.yaml"], ["featcal", "distil"]),
        (["--config", root / "none.yaml"], ["distil"]),
    ):
        assert [step.name for step in resolved("--method", "prodistill", *given).modifiers] == modifiers


def test_modifiers_can_come_from_a_file_and_be_repeated(root):
    (root / "one.yaml").write_text("post: consensus")
    (root / "two.yaml").write_text("post: [consensus, Consensus]")
    assert resolved("--config", root / "one.yaml").general["post"] == ["consensus"]
    assert resolved("--config", root / "two.yaml").general["post"] == ["consensus"] * 2
    assert resolved("--post", "consensus", "consensus").general["post"] == ["consensus"] * 2
    assert resolved("--post", "consensus", "--post", "consensus").general["post"] == ["consensus"] * 2


def test_unknown_names_are_told_with_the_nearest():
    assert problems("--post", "consenus") == ["--post consenus: no such modifier. Did you mean 'consensus'?"]
    (problem,) = problems("--post", "nothing")
    assert (
        problem == "--post nothing: no such modifier. Known: aim, consensus, distil, featcal, harc, router_mean, svc."
    )


def test_a_method_of_its_own_is_no_modifier():
    (problem,) = problems("--post", "ties")
    assert problem.startswith("--post ties: that is a method of its own. Known: ")
    assert "consensus" in problem


def test_all_problems_are_told_at_once():
    assert len(problems("--post", "ties", "--post", "nothing", "--method", "ties", "--density", 7)) == 3


def test_a_modifier_is_no_method():
    assert problems("--method", "consensus") == [
        "consensus improves what another method has merged: --method METHOD --post consensus"
    ]


@pytest.mark.parametrize("method", ["tall", "svd_intermediate"])
def test_what_is_no_merged_model_cannot_be_improved(method):
    assert problems("--method", method, "--post", "consensus") == [
        f"--post consensus improves one model merged of task vectors, and {method} makes something else"
    ]


def test_a_run_is_recorded_with_its_modifiers(command, tiny, tmp_path, capsys):
    run = merged(tmp_path / "out", *tiny, "--post", "consensus", "--run_name", "r")
    record = json.loads(run.config.read_text())
    assert record["options"]["post"] == ["consensus"]
    assert record["options"]["consensus_k"] == 2
    card = (run.model / "README.md").read_text()
    assert '"consensus"' in card
    assert "by `task_arithmetic --post consensus`." in card
    assert f"method task_arithmetic --post consensus, run folder {run.folder}\n" in run.log.read_text()
    assert refusal(capsys, *command, "--run_name", "r").startswith(
        f'{run.folder} holds a different run (post: ["consensus"] there, null now; '
    )


def test_the_plan_names_modifiers(command, capsys):
    assert merge(*command, "--post", "consensus", "--dry_run") == 0
    shown = capsys.readouterr().out
    assert 'option post ["consensus"]' in shown
    assert "option consensus_k 2" in shown


def test_the_copies_that_modifiers_need_are_in_the_plan(tmp_path, capsys):
    folders = [write_checkpoint(tmp_path / name, {"a": torch.ones(300, 300)}) for name in ("base", "one", "two")]
    given = [*flags(folders[0], One=folders[1], Two=folders[2]), "--output_path", tmp_path / "out", "--dry_run"]

    def needed(*arguments):
        assert merge("--method", "svd", *given, *arguments) == 0
        return float(re.search(r"merging needs about ([\d.]+) MiB", capsys.readouterr().out)[1])

    copies = 2 * 4 * 300 * 300 / 2**20  # the task vectors of two experts
    assert needed("--post", "consensus") - needed() == pytest.approx(copies, abs=0.11)
