"""What is merged: checkpoints that fit together, and the words that rules and drivers share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from expert_merging.backbone import language_setting
from expert_merging.checkpoint import Checkpoint, check_experts, check_other_files
from expert_merging.errors import Problems

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Which entries of which tensor a rule is given.

    Args:
        name: tensor name.
        shape: shape of the whole tensor.
        start: first entry of the flattened tensor.
        stop: end of the entries.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """Number of entries of the whole tensor."""
        return math.prod(self.shape)


class Rule(Protocol):
    """Turns task vectors ``(experts, entries)`` (whole tensors: ``(experts, *shape)``) into the merged task vector.

    The task vectors are working memory, which a rule may overwrite.
    """

    def __call__(self, task_vectors: Tensor, part: Part, /) -> Tensor:
        """Merge one part."""
        ...


Advance = Callable[..., None]


class Progress(Protocol):
    """Shows how far a piece of work is: ``with progress(title, total, unit) as advance: advance(count, note)``."""

    def __call__(self, title: str, total: float, unit: str) -> AbstractContextManager[Advance]:
        """Start a piece of work of ``total`` units."""
        ...


@dataclass(frozen=True)
class Plan:
    """What is merged, checked from headers alone.

    Args:
        base: the base model.
        experts: expert checkpoints by name, in order.
        merged: names of the tensors to merge, in the order of the base's files.
    """

    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    merged: tuple[str, ...]

    def split(self) -> dict[str, Plan]:
        """A plan for each expert alone, by its name."""
        return {name: Plan(self.base, {name: expert}, self.merged) for name, expert in self.experts.items()}

    @property
    def output_bytes(self) -> int:
        """Size of the merged weight files."""
        return sum(file.stat().st_size for file in self.base.files)

    @property
    def base_elements(self) -> int:
        """Number of entries of the base."""
        return sum(entry.elements for entry in self.base.entries.values())

    @property
    def merged_elements(self) -> int:
        """Number of entries that are merged."""
        return sum(self.base.entries[name].elements for name in self.merged)


def show_size(count: float) -> str:
    """Bytes of files in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def make_plan(
    base_folder: Path,
    expert_folders: Mapping[str, Path],
    excluded: list[str],
    file_name: Callable[[str], str] = str,
) -> Plan:
    """Open all checkpoints and check that they fit together.

    Args:
        base_folder: the base model.
        expert_folders: the experts by name.
        excluded: patterns of parameters that keep the base's value.
        file_name: published name of a parameter, whatever naming it was saved with.

    Raises:
        InputError: every problem found in any of them.
    """
    problems = Problems()
    opened: dict[str, Checkpoint] = {}
    for name, folder in {"": base_folder, **expert_folders}.items():
        with problems.collecting():
            opened[name] = Checkpoint(folder)
    if not expert_folders:
        problems.add("there is nothing to merge: give at least one --expert NAME=PATH")
    if len(opened) > 1 and "" in opened:
        base = opened.pop("")
        with problems.collecting():
            check_other_files(base.folder)
        with problems.collecting():
            merged = check_experts(base, opened, excluded, file_name)
    problems.check()
    return Plan(base, opened, tuple(merged))


# Settings of the language model that change what the same weights compute.
_COMPUTING = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "sliding_window",
    "tie_word_embeddings",
)


def differing_settings(plan: Plan) -> list[str]:
    """Where an expert's ``config.json`` makes it compute otherwise than the base, whose file the merged model gets."""
    of_base = _computing_settings(plan.base.config)
    return [
        f"expert {name} differs from the base in config.json: {key} {value}, base {of_base[key]}"
        for name, expert in plan.experts.items()
        for key, value in _computing_settings(expert.config).items()
        if key in of_base and value != of_base[key]
    ]


def _computing_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.json`` says about the computation, whether it nests the language model's settings or not."""
    rotary = {"rope_theta": language_setting(config, "rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):  # older and newer files
        table = _table(config, key)
        rotary |= {name if name.startswith("rope_") else f"rope_{name}": entry for name, entry in table.items()}
    kind = rotary.pop("rope_type", "default")
    settings = {name: language_setting(config, name) for name in _COMPUTING}
    settings |= {**rotary, "model_type": config.get("model_type"), "rope_type": "default" if kind == "mrope" else kind}
    return {name: value for name, value in settings.items() if value is not None}


def _table(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = language_setting(config, name)
    return value if isinstance(value, Mapping) else {}
