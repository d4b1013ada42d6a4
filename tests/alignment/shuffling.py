"""Models with their units in another order, made plainly: one index for each tensor."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from expert_merging.alignment.units import BlockOrder, Layout

Tensors = dict[str, torch.Tensor]


def random_orders(layout: Layout, seed: int) -> tuple[list[BlockOrder], torch.Tensor]:
    """Any order that units can have: of each block, and of the residual stream."""
    generator = torch.Generator().manual_seed(seed)

    def shuffle(size: int) -> torch.Tensor:
        return torch.randperm(size, generator=generator)

    repeats, blocks = layout.heads // layout.groups, []
    for feed in layout.feed:
        groups = shuffle(layout.groups)
        heads = torch.cat([group * repeats + shuffle(repeats) for group in groups])
        values = torch.cat([group * layout.width + shuffle(layout.width) for group in groups])
        blocks.append(BlockOrder(heads, values, shuffle(feed)))
    return blocks, shuffle(layout.hidden)


def shuffle_tensors(
    tensors: Mapping[str, torch.Tensor], layout: Layout, blocks: list[BlockOrder], stream: torch.Tensor, before: str
) -> Tensors:
    """The tensors with all units in another order, by their names as Llama has them after ``before``."""
    found, width, repeats = dict(tensors), layout.width, layout.heads // layout.groups
    for number, block in enumerate(blocks):
        queries = [head * width + unit for head in block.heads.tolist() for unit in range(width)]
        keys = [
            int(block.heads[place * repeats]) // repeats * width + unit
            for place in range(layout.groups)
            for unit in range(width)
        ]
        outputs = [
            head * width + int(block.values[place // repeats * width + unit]) % width
            for place, head in enumerate(block.heads.tolist())
            for unit in range(width)
        ]
        rows: dict[str, Any] = {
            "self_attn.q_proj": queries,
            "self_attn.k_proj": keys,
            "self_attn.v_proj": block.values,
            "mlp.gate_proj": block.feed,
            "mlp.up_proj": block.feed,
        }
        layer = f"{before}layers.{number}."
        for name in [name for name in found if name.startswith(layer)]:
            module, _, kind = name.removeprefix(layer).rpartition(".")
            if module in rows:
                found[name] = found[name][rows[module]]
                found[name] = found[name][:, stream] if kind == "weight" else found[name]
            elif module in ("self_attn.o_proj", "mlp.down_proj"):
                found[name] = found[name][stream]
                columns = outputs if module == "self_attn.o_proj" else block.feed
                found[name] = found[name][:, columns] if kind == "weight" else found[name]
            elif module.endswith("layernorm"):
                found[name] = found[name][stream]
    for name, tensor in found.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            found[name] = tensor[:, stream]
        elif name == f"{before}norm.weight" or name.startswith(("visual.merger.mlp.2.", "mlp1.3.")):
            found[name] = tensor[stream]
    return found


def save_shuffled(source: Path, target: Path, layout: Layout, seed: int, before: str = "model.") -> Path:
    """A copy of a checkpoint of one file that computes the same with all units in another order."""
    shutil.copytree(source, target)
    blocks, stream = random_orders(layout, seed)
    (file,) = target.glob("*.safetensors")
    tensors = shuffle_tensors(load_file(file), layout, blocks, stream, before)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    return target
