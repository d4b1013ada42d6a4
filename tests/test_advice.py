"""What a run warns of and does all the same."""

from __future__ import annotations

import pytest
import torch

from tests.checkpoints import write_checkpoint
from tests.command import (
    TENSORS,
    flags,
    merge,
    merged,
)

TUNED = {name: tensor * 1.1 for name, tensor in TENSORS.items()}


def test_too_little_memory_is_told(tmp_path, capsys, monkeypatch):
    weights = {"base": torch.ones(300, 300), "expert": torch.full((300, 300), 1.1)}
    folders = [write_checkpoint(tmp_path / name, {"w": weight}) for name, weight in weights.items()]
    command = ("--method", "iso", *flags(folders[0], A=folders[1]), "--dry_run")
    assert merge(*command) == 0
    assert "warning" not in capsys.readouterr().out
    monkeypatch.setattr("expert_merging.machine.free_memory", lambda device: 1e6)
    assert merge(*command) == 0
    assert (
        "warning: merging needs about 6.5 MiB of memory, and 1.0 MiB are free on cpu; leave out the largest tensors "
        "(--exclude_params) or take a machine with more" in capsys.readouterr().out
    )


def test_an_expert_that_computes_otherwise_is_told(tmp_path):
    base = write_checkpoint(tmp_path / "base", TENSORS, config={"rope_theta": 1e4, "vocab_size": 6})
    expert = write_checkpoint(tmp_path / "expert", TUNED, config={"rope_theta": 1e6, "vocab_size": 10})
    run = merged(tmp_path / "out", "--method", "weight_average", *flags(base, A=expert))
    warnings = [line for line in run.log.read_text().splitlines() if " WARNING " in line]
    assert len(warnings) == 1
    assert "expert A differs from the base in config.json: rope_theta 1000000.0, base 10000.0" in warnings[0]


OLDER = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "num_hidden_layers": 2}
NEWER = {
    "text_config": {
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "mrope_section": [2, 3, 3]},
        "num_hidden_layers": 2,
        "model_type": "qwen2_vl_text",
    }
}


@pytest.mark.parametrize(
    ("base", "expert", "told"),
    [
        (OLDER, NEWER, None),
        (NEWER, OLDER, None),
        ({"llm_config": OLDER}, {"llm_config": {**OLDER, "rope_theta": 1e4}}, "rope_theta 10000.0, base 1000000.0"),
        (OLDER, {**OLDER, "rope_scaling": {"type": "yarn", "factor": 4}}, "rope_type yarn, base default"),
        ({"model_type": "a"}, {"model_type": "b"}, "model_type b, base a"),
    ],
)
def test_settings_are_compared_wherever_a_config_has_them(tmp_path, capsys, base, expert, told):
    base = write_checkpoint(tmp_path / "base", TENSORS, config={"model_type": "q", **base})
    expert = write_checkpoint(tmp_path / "expert", TUNED, config={"model_type": "q", **expert})
    assert merge("--method", "weight_average", *flags(base, A=expert), "--dry_run") == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == ([f"warning: expert A differs from the base in config.json: {told}"] if told else [])


def test_flags_of_other_methods_are_reported_and_not_fatal(command, tmp_path, capsys):
    run = merged(tmp_path / "out", *command, "--num_epochs", "none", "--loss_alphas", "Chat=much")
    ignored = "WARNING ignored, since task_arithmetic has no such option: --num_epochs, --loss_alphas\n"
    assert ignored in run.log.read_text()
    capsys.readouterr()
    assert merge(*command, "--num_epochs", "3", "--dry_run") == 0
    assert "ignored, since task_arithmetic has no such option: --num_epochs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "factor", "meant"),
    [("80", "80", "0.8"), ("[0.3, -30]", "-30", "-0.3"), ("10", None, None), ("[0.3, 2]", None, None)],
)
def test_a_factor_that_nobody_uses_is_told(command, capsys, given, factor, meant):
    assert merge(*command, "--scaling_coefficient", given, "--dry_run") == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    told = (
        f"warning: --scaling_coefficient {factor} is a factor on task vectors, which are hardly ever scaled by more "
        f"than 2; for {factor} % write {meant}"
    )
    assert warnings == ([told] if factor else [])


def test_a_pattern_that_matches_nothing_is_told(command, capsys):
    assert merge(*command, "--dry_run", "--exclude_params", "head", ".*bias.*", ".*norm") == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1, "'.*bias.*' is the family's own and may match nothing"
    assert "--exclude_params 'head' matches no parameter, from the start of its name (such as" in warnings[0]
