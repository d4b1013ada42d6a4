"""Shapes of published models, and the cases that are measured on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

ROOT = Path(__file__).resolve().parent.parent
_QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
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
_MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "sliding_window": None,
}
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


def config_of(shape: str, layers: int = 0) -> dict[str, Any]:
    """``config.json`` of a shape.

    Args:
        shape: key of `SHAPES`.
        layers: number of layers of the decoder, and of the vision tower if there is one; 0 for the shape's own.
    """
    config = SHAPES[shape]
    if not layers:
        return config
    parts = {part: {**config[part], "num_hidden_layers": layers} for part in _PARTS if part in config}
    return {**config, **parts} if parts else {**config, "num_hidden_layers": layers}


def folders_of(place: Path, experts: int) -> list[Path]:
    """The base's folder and the experts'."""
    return [place / name for name in ("base", *(f"expert{number}" for number in range(experts)))]


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
        weight_gradients: option of that name.
        checkpointing: whether activations are computed again.
        batch_tokens: option of that name, for the limit as well.
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
    weight_gradients: str
    checkpointing: bool
    batch_tokens: int
    work: str

    @property
    def config(self) -> dict[str, Any]:
        """``config.json`` of its models."""
        return config_of(self.shape, self.layers)

    @property
    def text_config(self) -> dict[str, Any]:
        """Settings of the language model."""
        return dict(self.config.get("text_config", self.config))

    @property
    def folders(self) -> list[Path]:
        """The base's folder and the experts'."""
        return folders_of(Path(self.work) / f"{self.shape}-{self.layers or 'all'}", self.experts)


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Shapes of all parameters of a model with that ``config.json``, by name."""
    import torch

    return {name: tuple(value.shape) for name, value in make_model(config, "meta", torch.bfloat16).named_parameters()}


def make_model(config: Mapping[str, Any], device: str, dtype: torch.dtype) -> Any:
    """A model with that ``config.json``, with arbitrary weights, in evaluation mode."""
    import torch

    from expert_merging.libraries import import_transformers

    transformers = import_transformers()
    settings = dict(config)
    kind = transformers.AutoModelForImageTextToText if "text_config" in config else transformers.AutoModelForCausalLM
    with torch.device(device):
        made = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        return kind.from_config(made, dtype=dtype).eval().requires_grad_(False)


def is_merged(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is merged: matrices of the language model's layers and of the projector between the two."""
    return len(shape) == 2 and not any(part in name for part in ("embed_tokens", "lm_head", "vision"))
