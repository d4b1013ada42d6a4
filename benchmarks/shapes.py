"""Random checkpoints of well-known shapes, for measuring how fast coefficients are learned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
_QWEN = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
_MISTRAL = {"model_type": "mistral", "vocab_size": 32000, "max_position_embeddings": 4096, "sliding_window": None}
_PARTS = ("text_config", "vision_config")
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-0.5b": _QWEN,
    "mistral-100m": {
        **_MISTRAL,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "mistral-7b": {
        **_MISTRAL,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "internvl2_5-1b": {
        "model_type": "internvl",
        "image_token_id": 151667,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": [448, 448],
            "patch_size": [14, 14],
            "attention_bias": True,
        },
        "text_config": {**_QWEN, "vocab_size": 151674, "tie_word_embeddings": False},
    },
}


@dataclass(frozen=True)
class Case:
    """What one process measures.

    Args:
        variant: ``limit``, ``ours`` or ``twin``.
        shape: key of `SHAPES`.
        layers: number of layers of the decoder, and of the vision tower if there is one; 0 for the shape's own.
        experts: number of experts.
        distinct: number of different experts; the others are links to them, which saves disk.
        samples: number of calibration samples, rounded down to equally many for each expert.
        device: where to compute.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        task_vectors: option of that name.
        rank_batches: option of that name.
        checkpointing: whether activations are computed again.
        work: folder of the checkpoints.
    """

    variant: str
    shape: str
    layers: int
    experts: int
    distinct: int
    samples: int
    device: str
    dtype: str
    task_vectors: str
    rank_batches: str
    checkpointing: bool
    work: str

    @property
    def config(self) -> dict[str, Any]:
        """The shape's ``config.json``, with the number of layers that is asked for."""
        config = SHAPES[self.shape]
        if not self.layers:
            return config
        if "text_config" in config:
            return {**config, **{part: {**config[part], "num_hidden_layers": self.layers} for part in _PARTS}}
        return {**config, "num_hidden_layers": self.layers}

    @property
    def text_config(self) -> dict[str, Any]:
        """Settings of the language model."""
        return dict(self.config.get("text_config", self.config))

    @property
    def folders(self) -> list[Path]:
        """The base's folder and the experts'."""
        place = Path(self.work) / f"{self.shape}-{self.layers or 'all'}"
        return [place / name for name in ("base", *(f"expert{number}" for number in range(self.experts)))]


def make_model(case: Case, device: str, dtype: torch.dtype) -> Any:
    """A model of the shape, with arbitrary weights, in evaluation mode."""
    import torch

    from expert_merging.backbone import import_transformers

    transformers = import_transformers()
    config = dict(case.config)
    config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    kind = (
        transformers.AutoModelForImageTextToText if "text_config" in case.config else transformers.AutoModelForCausalLM
    )
    with torch.device(device):
        return kind.from_config(config, dtype=dtype).eval().requires_grad_(False)


def is_merged(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is merged: matrices of the language model's layers and of the projector between the two."""
    return len(shape) == 2 and not any(part in name for part in ("embed_tokens", "lm_head", "vision"))


def make_checkpoints(case: Case) -> None:
    """Random base and experts in bfloat16; kept for the next time."""
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pool = torch.randn(1 << 22)
    shapes = {name: value.shape for name, value in make_model(case, "meta", torch.bfloat16).named_parameters()}
    for number, folder in enumerate(case.folders):
        file = folder / "model.safetensors"
        if file.exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(case.config))
        if number > case.distinct:
            file.symlink_to(case.folders[1 + (number - 1) % case.distinct] / file.name)
            continue
        tensors = {}
        for index, (name, shape) in enumerate(shapes.items()):
            values = stretch(pool, 7919 * index, shape.numel()).mul(0.02)
            if len(shape) == 1 and name.endswith("weight"):
                values += 1  # a norm's
            if number and is_merged(name, shape):
                values += stretch(pool, 104729 * number + 31 * index, shape.numel()).mul(0.002)
            tensors[name] = values.to(torch.bfloat16).view(shape)
        save_file(tensors, file.with_suffix(".partial"), metadata={"format": "pt"})
        file.with_suffix(".partial").rename(file)


def stretch(pool: Tensor, start: int, elements: int) -> Tensor:
    """So many of the pool's numbers, repeated, from some place on; drawing billions would take longer than learning."""
    rolled = pool.roll(-(start % len(pool)))
    return rolled.repeat(-(-elements // len(pool)))[:elements]
