"""InternVL checkpoints in their published layout as transformers' own InternVL model, and back.

The published checkpoints bring code of their own (``modeling_internvl_chat.py``), which is not needed and not executed:
transformers has the same model under other parameter names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_merging import backbone
from expert_merging.backbone import empty_model
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.checkpoints.folders import SINGLE
from expert_merging.checkpoints.reading import reading
from expert_merging.checkpoints.tying import is_tied
from expert_merging.errors import InputError
from expert_merging.plan import misfits
from expert_merging.roles import is_rotary_table
from expert_merging.writing import write_atomically
from InternVL.layout import check_supported, native_config, published_config, published_name, read_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CLASS = "AutoModelForImageTextToText"
_HEAD = "language_model.lm_head.weight"


def file_parameters(model: Any) -> dict[str, list[str]]:
    """Names in memory by name in the file; several are consecutive row blocks of the file's tensor."""
    groups: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        groups.setdefault(published_name(name), []).append(name)
    return groups


def open_published(folder: Path) -> tuple[Checkpoint, dict[str, Any], bool]:
    """A published checkpoint that the native classes cover, its configuration, and whether its head is the embedding.

    Raises:
        InputError: it cannot be opened, or transformers does not cover the variant.
    """
    checkpoint, config = Checkpoint(folder), read_config(folder)
    with reading(folder, "configuration"):
        check_supported(folder, config)
    says_tied = bool(config["llm_config"].get("tie_word_embeddings", False))
    return checkpoint, config, says_tied and (_HEAD not in checkpoint.entries or is_tied(checkpoint))


def load_published(folder: Path, dtype: torch.dtype, image_token: int) -> Any:
    """The native model with a published checkpoint's weights, in evaluation mode.

    Args:
        folder: the checkpoint.
        dtype: type of the weights in memory.
        image_token: id of the token that stands for picture features.

    Raises:
        InputError: transformers does not cover the variant, or tensors are missing, left over or of another shape.
    """
    import torch

    checkpoint, config, tied = open_published(folder)
    with reading(folder, "configuration"):
        model = empty_model(CLASS, native_config(config, image_token=image_token, tied=tied))
    parameters, groups = dict(model.named_parameters()), file_parameters(model)
    rows = {name: [parameters[part].shape[0] for part in parts] for name, parts in groups.items()}
    shapes = {name: (sum(rows[name]), *parameters[parts[0]].shape[1:]) for name, parts in groups.items()}
    found = misfits(
        checkpoint.entries,
        shapes,
        is_known=lambda name: is_rotary_table(name) or (tied and name == _HEAD),
        of="its configuration",
    )
    if found:
        raise InputError(*(f"{folder}: {problem}" for problem in found))
    state: dict[str, Tensor] = {}
    for name, parts in groups.items():
        tensor = checkpoint.mapped(name).view(shapes[name]).to(dtype)
        state |= dict(zip(parts, torch.split(tensor, rows[name]), strict=True))
    checkpoint.close()
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    language = model.model.language_model
    language.rotary_emb = type(language.rotary_emb)(config=model.config.text_config)  # tables that no file holds
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a published checkpoint.

    Raises:
        InputError: transformers does not cover the variant, or cannot read the tokenizer's files.
    """
    config = read_config(folder)
    with reading(folder, "configuration"):
        check_supported(folder, config)
        # The language model's configuration says which class where the tokenizer's own files do not.
        text_config = native_config(config).text_config
    return backbone.load_tokenizer(folder, config=text_config)


def save_published(model: Any, folder: Path) -> None:
    """Write a native model as a published checkpoint: ``config.json`` and ``model.safetensors``, without tokenizer."""
    import torch
    from safetensors.torch import save

    state = model.state_dict()
    tensors = {
        name: torch.cat([state[part].detach() for part in parts]).cpu().contiguous()
        for name, parts in file_parameters(model).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.json", (json.dumps(published_config(model), indent=2) + "\n").encode())
    write_atomically(folder / SINGLE, save(tensors, metadata={"format": "pt"}))
