"""Experts that are mixtures themselves, small and random, for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig

from tests.checkpoints import BASE, EXPERTS, SIZES, perturb, save_tokenizer

COUNT, ACTIVE = 4, 2
_COUNTS: Mapping[str, Any] = {"num_experts_per_tok": ACTIVE}
CONFIGS: Mapping[str, Any] = {
    "mixtral": lambda: MixtralConfig(**SIZES, **_COUNTS, num_local_experts=COUNT),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, **_COUNTS, num_experts=COUNT, moe_intermediate_size=20, head_dim=8, norm_topk_prob=True
    ),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SIZES, **_COUNTS, num_experts=COUNT, moe_intermediate_size=20, shared_expert_intermediate_size=24
    ),
    "olmoe": lambda: OlmoeConfig(**SIZES, **_COUNTS, num_experts=COUNT),
}


def save_mixture(folder: Path, kind: str, *, scale: float = 20.0, **changes: object) -> Path:
    """A mixture whose routers are decided and whose experts differ.

    Args:
        folder: where it is written.
        kind: its ``model_type``.
        scale: factor on routers; transformers' own initial values are next to nothing.
        changes: overrides settings.
    """
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.copy_(scale * 0.02 * torch.randn_like(parameter))
            elif parameter.ndim > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_zoo(cache: Path, kind: str, *, change: float = 0.03, **changes: object) -> Path:
    """A mixture and three fine-tunes of it, under the published names; ``changes`` overrides settings."""
    save_mixture(cache / BASE, kind, **changes)
    for number, folder in enumerate(EXPERTS.values()):
        perturb(cache / BASE, cache / folder, 1 + number, change=change)
    return cache
