"""What the core asks of a model family: a frozen record of facts and functions."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from expert_merging.calibration import Sample


def _same_name(name: str) -> str:
    return name


@dataclass(frozen=True)
class Backbone:
    """One model family.

    Args:
        name: the family, as its folder is called.
        base_folder: the base's folder name under ``--cache_dir``.
        expert_folders: folder name of each expert by expert name, in order.
        exclude_params: patterns of parameters that keep the base's value (`re.match` on file names).
        defaults: option defaults that differ from the methods' own.
        load_model: ``(folder, dtype) -> model`` in evaluation mode, on the CPU.
        parameter_names: ``(folder) -> names`` of the model's parameters in memory, without loading weights.
        load_processor: ``(folder) -> tokenizer or processor``.
        encode_prompt: ``(processor, sample, prompt template or None) -> model inputs``, batch of one, ending where the
            response starts.
        takes_images: samples may have pictures.
        file_name: name in a checkpoint file of a parameter's name in memory.
        test_questions: what ``--run_tests`` asks the merged model.
        evaluation: command that evaluates a merged folder, with ``{model}`` in it.
    """

    name: str
    base_folder: str
    expert_folders: Mapping[str, str]
    exclude_params: tuple[str, ...]
    defaults: Mapping[str, Any]
    load_model: Callable[[Path, torch.dtype], Any]
    parameter_names: Callable[[Path], list[str]]
    load_processor: Callable[[Path], Any]
    encode_prompt: Callable[[Any, Sample, str | None], dict[str, Tensor]]
    takes_images: bool = False
    file_name: Callable[[str], str] = field(default=_same_name)
    test_questions: tuple[str, ...] = ()
    evaluation: str = ""


def import_transformers() -> Any:
    """Import transformers, hiding a torchvision that cannot be loaded.

    torchvision's package index wheel does not load beside a CPU-only torch, and transformers does not survive finding
    it. Without torchvision it uses its Pillow image processors.
    """
    if "torchvision" not in sys.modules:
        try:
            importlib.import_module("torchvision")
        except Exception:  # noqa: BLE001  (whatever keeps it from loading, it is of no use)
            sys.modules["torchvision"] = None  # type: ignore[assignment]
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    return transformers


def layer_count(config: Mapping[str, Any]) -> int | None:
    """Number of decoder layers of the language model, from ``config.json``; None where it does not say."""
    for part in (config, config.get("text_config"), config.get("llm_config")):
        if isinstance(part, Mapping) and isinstance(part.get("num_hidden_layers"), int):
            return int(part["num_hidden_layers"])
    return None
