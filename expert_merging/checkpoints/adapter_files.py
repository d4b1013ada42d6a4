"""What the files of a LoRA adapter say: ``adapter_config.json``, and the names in ``adapter_model.safetensors``.

Both are as peft writes them. What is not known here is refused by its name: an adapter that is read otherwise than it
was trained would be merged wrongly without a word.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expert_merging.checkpoints.checkpoint import Entry
from expert_merging.checkpoints.folders import ADAPTER, INDEX, SINGLE, pickled, required_object
from expert_merging.checkpoints.other_files import check_kinds
from expert_merging.errors import InputError, Problems

CONFIG = "adapter_config.json"
_PICKLE = "adapter_model.bin"
# What a full model has in its place.
_FULL = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")

# Variants of LoRA that compute something else than ``weight + scale * B A``.
_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
)
_KNOWN_USES = ("use_dora", "use_rslora")
# Ways to begin that take something away from the base, which training then goes on from.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

TOKENS = "token_adapter.trainable_tokens_delta"

_PREFIX = "base_model.model."
_ROLE = re.compile(
    r"(?P<module>.+)\.(?P<role>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta)(?:\.(?P<kind>weight|bias))?"
)
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")


@dataclass(frozen=True)
class Settings:
    """What ``adapter_config.json`` says about the computation.

    Args:
        alpha: numerator of the scale.
        alphas: the same for modules whose name ends like one of these patterns (`re.match`).
        rslora: the scale is ``alpha / sqrt(rank)`` and not ``alpha / rank``.
        dora: every changed tensor has norms of its own.
        fan_in_fan_out: files have weights as ``(inputs, outputs)``.
        tokens: rows of embeddings that were trained: for all of them, or by module.
        base: name or path of the model that the adapter was trained on, empty where it is not said.
    """

    alpha: float
    alphas: Mapping[str, float]
    rslora: bool
    dora: bool
    fan_in_fan_out: bool
    tokens: Sequence[int] | Mapping[str, Sequence[int]]
    base: str

    def scale(self, module: str, rank: int) -> float:
        """Factor on ``B A`` of a module, as peft chooses it."""
        pattern = next((key for key in self.alphas if re.match(rf"(.*\.)?({key})$", module)), None)
        alpha = self.alpha if pattern is None else self.alphas[pattern]
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def tokens_of(self, module: str) -> Sequence[int]:
        """Rows that were trained of a module."""
        if not isinstance(self.tokens, Mapping):
            return self.tokens
        return next((rows for key, rows in self.tokens.items() if f".{module}".endswith(f".{key}")), ())


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter."""
    return (folder / CONFIG).is_file()


def read_settings(folder: Path) -> Settings:
    """The settings of an adapter.

    Raises:
        InputError: the file cannot be read, the adapter is of a kind that is not known here, or something in the
            folder is no file.
    """
    check_kinds(folder)
    file = folder / CONFIG
    config = required_object(file)
    _check_kind(file, config)
    try:
        return Settings(
            alpha=float(config["lora_alpha"]),
            alphas={_checked(key): float(alpha) for key, alpha in (config.get("alpha_pattern") or {}).items()},
            rslora=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
            tokens=_tokens(config.get("trainable_token_indices") or ()),
            base=str(config.get("base_model_name_or_path") or ""),
        )
    except (KeyError, ValueError, TypeError, AttributeError, re.error) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be understood ({error})"
        raise InputError(f"{file} {reason}; download it again") from None


def _checked(pattern: str) -> str:
    """The regular expression itself."""
    re.compile(pattern)
    return pattern


def _tokens(given: Any) -> Sequence[int] | Mapping[str, Sequence[int]]:
    if isinstance(given, Mapping):
        return {str(key): [int(row) for row in rows] for key, rows in given.items()}
    return [int(row) for row in given]


def _check_kind(file: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"{file} has the peft_type {json.dumps(kind)}, and adapters of the type LORA can be experts; "
            "others can if peft can merge them (merge_and_unload) and the result is saved as a full model"
        )
    problems = Problems()
    unknown = [name for name in config if name.startswith("use_") and name not in (*_VARIANTS, *_KNOWN_USES)]
    for name in (*_VARIANTS, *unknown):
        if config.get(name):
            problems.add(
                f"{file} sets {name}, a variant of LoRA that is not known here; merge the adapter with peft "
                "(merge_and_unload) and give the full model"
            )
    begun = str(config.get("init_lora_weights")).lower()
    if begun.startswith(_CHANGES_BASE):
        problems.add(
            f"{file} has init_lora_weights {begun!r}, which changes the base's weights before training: the adapter is "
            "of that base and not of the published one; save it again with path_initial_model_for_weight_conversion"
        )
    problems.check()


def weights_file(folder: Path) -> Path:
    """The file with the adapter's tensors.

    Raises:
        InputError: there is none, or there is a full model too.
    """
    full = next((name for name in _FULL if (folder / name).is_file()), None)
    if full:
        raise InputError(
            f"{folder} holds both an adapter ({CONFIG}) and a full model ({full}); which one is the expert? Move the "
            "other's files to a folder of their own"
        )
    if (folder / ADAPTER).is_file():
        return folder / ADAPTER
    if (folder / _PICKLE).is_file():
        raise InputError(pickled(str(folder), _PICKLE))
    raise InputError(f"{folder} has {CONFIG} and no {ADAPTER}; download it")


@dataclass
class Contents:
    """An adapter's tensors by what they are for.

    Args:
        roles: by module and role (``lora_A``, ``lora_B.bias``, ...).
        whole: tensors in the place of the base's, by the base's names in memory.
    """

    roles: dict[str, dict[str, Entry]] = field(default_factory=dict)
    whole: dict[str, Entry] = field(default_factory=dict)


def sort_contents(folder: Path, entries: Mapping[str, Entry]) -> Contents:
    """An adapter's tensors by what they are for.

    Raises:
        InputError: what some are for is not known, or they cannot be computed with.
    """
    contents, problems = Contents(), Problems()
    for stored, entry in entries.items():
        name = stored.removeprefix(_PREFIX)
        found = _ROLE.fullmatch(name)
        if not entry.is_float:
            problems.add(f"{folder}: {stored} is stored as {entry.dtype}, and floating-point numbers are needed")
        elif found:
            role = found["role"] + (".bias" if found["kind"] == "bias" else "")
            contents.roles.setdefault(found["module"], {})[role] = entry
        elif "lora_" in name or "token_adapter" in name:
            problems.add(
                f"{folder} has the tensor {stored}, which plain LoRA and DoRA do not have; merge the adapter with peft "
                "(merge_and_unload) and give the full model"
            )
        elif ".original_module." not in name:  # what a module was before it was trained
            contents.whole[_WRAPPED.sub("", name)] = entry
    problems.check()
    return contents
