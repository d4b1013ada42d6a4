"""Flags that were given on the command line and change nothing: no flag is without effect silently."""

from __future__ import annotations

from typing import get_args

from expert_merging.flags import read_options
from expert_merging.learned.options import Fineness
from expert_merging.methods.wudi import RankRule
from expert_merging.mixtures.options import FITTED, router_of
from expert_merging.options import Resolved
from expert_merging.running.options import SampleOptions

# A flag, the option that may leave it without effect, and the values with which that option does.
_LEFT_OUT = (
    ("temperature", "logits_weight", (0,)),
    ("confident", "logits_weight", (0,)),
    ("logits_divergence", "logits_weight", (0,)),
    ("logits_chunk_tokens", "logits_weight", (0,)),
    ("hidden_states_layers", "hidden_states_weight", (0,)),
    ("hidden_states_weight", "hidden_states_layers", ("none",)),
    ("budget", "chunking", ("all", "none")),
    ("kappa", "chunking", ("all", "none")),
    ("force", "coefficients", (None,)),
    ("steps", "solver", ("exact",)),
    ("step_size", "solver", ("exact",)),
    *((name, "router", ("random", "zeros")) for name in (*read_options(SampleOptions), "router_temperature")),
    ("held_out", "router", ("embedding", "random", "zeros")),
    *((f"router_{name}", "train_router", (False,)) for name in ("epochs", "learning_rate", "balance")),
    ("negative_prompts", "router", (*FITTED, "random", "zeros")),
    ("ridge", "router", ("prompts", "embedding", "random", "zeros")),
    ("highest_coefficient", "algorithm", ("cma",)),
    ("initial_rank_ratio", "parametrisation", tuple(kind for kind in get_args(Fineness) if kind != "rank")),
    ("question_samples", "questions", (None,)),
    ("cumulative_share", "rank_rule", tuple(rule for rule in get_args(RankRule) if rule != "cumulative")),
)

# What says which samples are read, and what counts of them.
_OF_SAMPLES = ("data_dir", "samples_per_task", "samples_per_task_dict", "loss_tokens", "synthesize")


def idle_flags(resolved: Resolved) -> list[str]:
    """A line for each reason for which flags change nothing.

    A configuration file may serve several methods, so what it has in vain is not told.
    """
    return [
        *_unknown(resolved),
        *_named_already(resolved),
        *_untracked(resolved),
        *_of_all_tokens(resolved),
        *_of_questions(resolved),
        *_left_out(resolved),
    ]


def _unknown(resolved: Resolved) -> list[str]:
    """Flags of other methods."""
    flags = ", ".join(f"--{name}" for name in resolved.ignored)
    return [f"ignored, since {resolved.method.name} has no such option: {flags}"] if flags else []


def _named_already(resolved: Resolved) -> list[str]:
    """A cache folder from which nothing is taken."""
    if {"cache_dir", "base_model_path", "expert"} <= set(resolved.given):
        return ["ignored, since --base_model_path and --expert name every checkpoint: --cache_dir"]
    return []


def _untracked(resolved: Resolved) -> list[str]:
    """A tracker for a method that has no curves."""
    has_curves = any(step.reads_samples and "coefficients" in step.needs for step in resolved.steps)
    if "log_with" in resolved.given and not has_curves:
        return [f"ignored, since {resolved.method.name} learns nothing: --log_with"]
    return []


def _of_all_tokens(resolved: Resolved) -> list[str]:
    """A choice of tokens where nothing reads samples but what compares all of them."""
    readers = [step.name for step in resolved.steps if step.reads_samples_with(resolved.options)]
    if "loss_tokens" in resolved.given and readers == ["distil"] and not resolved.aligns_on_samples:
        return ["ignored, since distil compares all tokens: --loss_tokens"]
    return []


def _of_questions(resolved: Resolved) -> list[str]:
    """What says which samples are read where labelled questions stand in their place."""
    without = resolved.options.get("questions") is None or len(resolved.steps) > 1 or resolved.aligns_on_samples
    flags = [] if without else [f"--{name}" for name in _OF_SAMPLES if name in resolved.given]
    return [f"ignored with --questions: {', '.join(flags)}"] if flags else []


def _left_out(resolved: Resolved) -> list[str]:
    """Flags of something that another option has left out."""
    options = dict(resolved.options)
    if "router" in options:
        options["router"] = router_of(options)  # not auto
    of_training = {*read_options(SampleOptions), "held_out"} if options.get("train_router") else set[str]()
    return [
        f"ignored {f'without --{other}' if options[other] is None else f'with --{other} {options[other]}'}: --{name}"
        for name, other, values in _LEFT_OUT
        if name in resolved.given and name in options and options.get(other) in values and name not in of_training
    ]
