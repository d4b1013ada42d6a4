"""What a checkpoint can have in the place of weights: modules of an adapter, empty placeholders, other types."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from expert_merging.checkpoints.checkpoint import FLOATS, WHOLE, Checkpoint, Entry
from expert_merging.errors import Problems, first_of

# What PEFT puts beside weights, and around those that it adapts.
_ADAPTER = re.compile(r"(?:.*\.)?(?:base_layer|lora_\w+|ia3_l|modules_to_save|original_module)(?:\..*)?$")
_PARAMETER = re.compile(r"\b(weight|bias)$")
# With these settings InternVL's own code wraps its models in PEFT's.
_INTERNVL = ("use_llm_lora", "use_backbone_lora")


def check_leftovers(checkpoint: Checkpoint) -> None:
    """Check that weights are what the checkpoint holds.

    Raises:
        InputError: it has an adapter inside, or tensors that are empty.
    """
    problems, entries = Problems(), checkpoint.entries.values()
    adapter = [entry.name for entry in entries if _ADAPTER.match(entry.name)]
    empty = [entry.name for entry in entries if entry.shape == (0,) and _PARAMETER.search(entry.name)]
    if adapter:
        wrapped = any(checkpoint.config.get(name) for name in _INTERNVL)
        how = "tools/merge_lora.py of InternVL" if wrapped else "merge_and_unload() of peft, and save the model again"
        problems.add(
            f"{checkpoint.folder} is a model with an adapter still inside (LoRA): {first_of(adapter, 1)}; its weights "
            f"are not what it computes with until the two are merged: use {how}"
        )
    if empty:
        problems.add(
            f"{checkpoint.folder} has empty tensors: {first_of(empty, 1)}; that is what is left of a model saved under "
            "DeepSpeed ZeRO-3 without gathering its weights: rebuild them with zero_to_fp32.py, or save it again with "
            "save_16bit_model (stage3_gather_16bit_weights_on_model_save)"
        )
    problems.check()


def foreign_types(base: Checkpoint, experts: Collection[Checkpoint], wanted: Iterable[Entry]) -> list[str]:
    """Tensors that would silently keep the base's values, since no method works on their type.

    Whole numbers are no parameters (such as a table of positions), if they are that in all checkpoints.

    Args:
        base: the base model.
        experts: the experts.
        wanted: the base's tensors that are not excluded.
    """
    found = []
    for entry in wanted:
        types = {expert.entries[entry.name].dtype for expert in experts if entry.name in expert.entries}
        if not entry.is_float and not WHOLE.issuperset({entry.dtype, *types}):
            found.append(
                f"the base ({base.folder}) stores {entry.name} as {entry.dtype}, which cannot be merged; allowed: "
                f"{', '.join(FLOATS)}; give a base in one of them (or exclude it)"
            )
    return found
