"""What a run warns of and does all the same."""

from __future__ import annotations

import pytest
import torch

from expert_merging.idle import idle_flags
from expert_merging.options import resolve
from expert_merging.parser import parse
from Mistral.backbone import BACKBONE
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
    warnings = [line for line in run.log.read_text().splitlines() if " warning: " in line]
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
    ignored = "warning: ignored, since task_arithmetic has no such option: --num_epochs, --loss_alphas\n"
    assert ignored in run.log.read_text()
    capsys.readouterr()
    assert merge(*command, "--num_epochs", "3", "--dry_run") == 0
    assert "ignored, since task_arithmetic has no such option: --num_epochs" in capsys.readouterr().out


def idle(*arguments):
    return idle_flags(resolve(parse([str(argument) for argument in arguments], BACKBONE), {}, BACKBONE))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--temperature", "2", "--logits_weight", "0"], ["ignored with --logits_weight 0.0: --temperature"]),
        (["--temperature", "2", "--logits_weight", "0.5"], []),
        (["--confident", "--logits_weight", "0"], ["ignored with --logits_weight 0.0: --confident"]),
        (
            ["--hidden_states_layers", "0,1", "--hidden_states_weight", "0"],
            ["ignored with --hidden_states_weight 0.0: --hidden_states_layers"],
        ),
        (
            ["--hidden_states_layers", "none", "--hidden_states_weight", "0.5"],
            ["ignored with --hidden_states_layers none: --hidden_states_weight"],
        ),
        (
            ["--method", "expert_merging++", "--chunking", "all", "--budget", "2", "--kappa", "1"],
            ["ignored with --chunking all: --budget", "ignored with --chunking all: --kappa"],
        ),
        (["--method", "expert_merging++", "--force"], ["ignored without --coefficients: --force"]),
        (["--method", "expert_merging++", "--force", "--coefficients", "run"], []),
        (["--method", "wudi", "--solver", "exact", "--steps", "3"], ["ignored with --solver exact: --steps"]),
        (
            ["--method", "aswudi", "--cumulative_share", "0.5"],
            ["ignored with --rank_rule participation_sqrt: --cumulative_share"],
        ),
        (["--method", "aswudi", "--cumulative_share", "0.5", "--rank_rule", "cumulative"], []),
        (
            ["--method", "adarank", "--parametrisation", "column", "--initial_rank_ratio", "0.5"],
            ["ignored with --parametrisation column: --initial_rank_ratio"],
        ),
        (["--method", "adarank", "--initial_rank_ratio", "0.5"], []),
        (["--method", "ties", "--log_with", "none"], ["ignored, since ties learns nothing: --log_with"]),
        (["--method", "regmean", "--log_with", "none"], ["ignored, since regmean learns nothing: --log_with"]),
        (["--method", "adamerging", "--log_with", "none"], []),
        (
            ["--method", "divmerge", "--logits_weight", "0", "--logits_divergence", "kl"],
            ["ignored with --logits_weight 0.0: --logits_divergence"],
        ),
        (
            ["--method", "prodistill", "--loss_tokens", "response"],
            ["ignored, since distil compares all tokens: --loss_tokens"],
        ),
        (["--method", "prodistill", "--loss_tokens", "response", "--align_experts", "activation_matching"], []),
        (["--method", "svd", "--post", "featcal", "distil", "--loss_tokens", "response"], []),
        (
            ["--cache_dir", "/c", "--base_model_path", "/b", "--expert", "A=/a"],
            ["ignored, since --base_model_path and --expert name every checkpoint: --cache_dir"],
        ),
        (["--cache_dir", "/c", "--expert", "A=/a"], []),
    ],
)
def test_no_flag_is_in_vain_silently(arguments, told):
    assert idle(*arguments) == told


def test_only_flags_are_told_to_be_in_vain(tmp_path):
    """A configuration file may serve several methods."""
    (tmp_path / "file").write_text("temperature: 2\nlogits_weight: 0\nlog_with: none\n")
    assert idle("--config", tmp_path / "file") == []
    assert idle("--config", tmp_path / "file", "--temperature", "3") == [
        "ignored with --logits_weight 0.0: --temperature"
    ]


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
