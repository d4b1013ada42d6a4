"""What to do about memory that ran out: the flags that make this very run need less."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from expert_merging.backbone import Backbone
from expert_merging.errors import InputError
from expert_merging.machine import gib
from expert_merging.options import Resolved
from expert_merging.processes import count, launched_precision, local_count
from expert_merging.shortage import Shortage

# Tokens whose logits take little memory with any vocabulary.
_FEW_TOKENS = 64


def out_of_memory(shortage: Shortage, doing: str, advice: str) -> InputError:
    """The one line about memory that ran out.

    Args:
        shortage: what was asked for.
        doing: when it was, in words; may be empty.
        advice: what to do.
    """
    where = f" {doing}" if doing else ""
    asked = "" if shortage.asked is None else f", asking for {gib(shortage.asked)} more"
    return InputError(f"{'GPU' if shortage.on_gpu else 'host'} memory ran out{where}{asked}; {advice}")


def advice(shortage: Shortage, resolved: Resolved, backbone: Backbone, *, on_gpu: bool, doing: str) -> str:
    """What makes a run need less memory.

    Args:
        shortage: where there was too little.
        resolved: the run's options.
        backbone: the model family.
        on_gpu: the run computes on a GPU.
        doing: when it was, in words that name the step.
    """
    if "'merging'" in doing or not resolved.reads_samples:
        same = ["fewer processes"] if local_count() > 1 else []
        other = [*(["--device cpu"] if shortage.on_gpu else []), "--exclude_params with the largest tensors"]
    else:
        trained = "in the step 'asking the experts'" not in doing
        alone = resolved.options.get("batch_tokens", 1) != 1 and (shortage.on_gpu or not on_gpu)
        same = ["--batch_tokens 1"] if alone else []
        same += [*(_saving(resolved.options, shortage.on_gpu, on_gpu) if trained else ())]
        same += _splitting(resolved.options, shortage.on_gpu)
        other = [*_shortening(resolved.options, backbone, on_gpu)]
    begun = f"{_any_of(same)}, with which the same command continues; or " if same else ""
    return f"give {begun}{_any_of(other)}, which is another run; --dry_run tells what is needed"


def _saving(options: Mapping[str, Any], short_on_gpu: bool, on_gpu: bool) -> Iterator[str]:
    """Flags that trade memory for time and do not change a result, those that cost least first."""
    of_models = short_on_gpu or not on_gpu  # the memory that models run in
    if options.get("logits_chunk_tokens", 0) is None and of_models:
        yield f"--logits_chunk_tokens {_FEW_TOKENS}"
    if options.get("weight_gradients", "sample") != "sample" and of_models:
        yield "--weight_gradients sample"
    if short_on_gpu and options.get("task_vectors") in ("auto", "device"):
        yield "--task_vectors host"
    if not short_on_gpu and options.get("task_vectors", "disk") != "disk":
        yield "--task_vectors disk"
    if options.get("gradient_checkpointing") is False and of_models:
        yield "--gradient_checkpointing"


def _splitting(options: Mapping[str, Any], short_on_gpu: bool) -> Iterator[str]:
    if options.get("shard") is False and short_on_gpu:
        yield "--shard" if count() > 1 else "--shard in several processes"


def _shortening(options: Mapping[str, Any], backbone: Backbone, on_gpu: bool) -> Iterator[str]:
    """Flags that change what models compute."""
    asked = options.get("mixed_precision", "auto")
    if asked == "no" or (asked == "auto" and not on_gpu and launched_precision() is None):
        yield "--mixed_precision bf16"
    for name in backbone.picture_bounds:
        yield f"a smaller --{name}"
    yield f"a smaller --max_new_tokens than {options['max_new_tokens']}"
    yield "shorter samples"


def _any_of(flags: list[str]) -> str:
    *others, last = flags
    return f"{', '.join(others)} or {last}" if others else last
