"""Random checkpoints with the shapes of published models, written as fast as the disk takes them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Entries of the noise that a checkpoint repeats, an odd number, so that rows of a matrix do not repeat.
_PERIOD = (1 << 24) + 43

Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder-only language model.

    Args:
        vocabulary: rows of the embedding.
        hidden: width of the residual stream.
        middle: width of the feed-forward layers.
        key_value: rows of the key and value projections.
        layers: number of layers.
        biases: the query, key and value projections have biases.
        tied: the embedding serves as output head too.
        family: transformers' name of the architecture.
        heads: number of attention heads.
        prefix: before all names.
        vision: layers of InternVL's vision model beside it.
    """

    vocabulary: int
    hidden: int
    middle: int
    key_value: int
    layers: int
    biases: bool
    tied: bool
    family: str
    heads: int
    prefix: str = ""
    vision: int = 0

    def config(self, layers: int) -> dict[str, Any]:
        """``config.json`` of the language model with that many layers."""
        return {
            "architectures": [f"{self.family.capitalize()}ForCausalLM"],
            "model_type": self.family,
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.middle,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value * self.heads // self.hidden,
            "tie_word_embeddings": self.tied,
        }


MODELS = {
    "qwen2-0.5b": Decoder(151936, 896, 4864, 128, 24, biases=True, tied=True, family="qwen2", heads=14),
    "internvl2_5-1b": Decoder(
        151674,
        896,
        4864,
        128,
        24,
        biases=True,
        tied=False,
        family="qwen2",
        heads=14,
        prefix="language_model.",
        vision=24,
    ),
    "mistral-7b": Decoder(32000, 4096, 14336, 1024, 32, biases=False, tied=False, family="mistral", heads=32),
}


def layer_shapes(model: Decoder) -> Shapes:
    """Names and shapes of one decoder layer."""
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{name}.weight", (model.hidden,)
    for name, rows in (("q_proj", model.hidden), ("k_proj", model.key_value), ("v_proj", model.key_value)):
        yield f"self_attn.{name}.weight", (rows, model.hidden)
        if model.biases:
            yield f"self_attn.{name}.bias", (rows,)
    yield "self_attn.o_proj.weight", (model.hidden, model.hidden)
    yield "mlp.gate_proj.weight", (model.middle, model.hidden)
    yield "mlp.up_proj.weight", (model.middle, model.hidden)
    yield "mlp.down_proj.weight", (model.hidden, model.middle)


def _vision_shapes(layers: int, width: int, output: int) -> Shapes:
    """Names and shapes of InternVL's vision model and of the projector to the language model."""
    yield "vision_model.embeddings.class_embedding", (1, 1, width)
    yield "vision_model.embeddings.position_embedding", (1, 1025, width)
    yield from _linear("vision_model.embeddings.patch_embedding", (width, 3, 14, 14))
    for layer in range(layers):
        prefix = f"vision_model.encoder.layers.{layer}"
        for name in ("ls1", "ls2"):
            yield f"{prefix}.{name}", (width,)
        for name, shape in (("attn.qkv", (3 * width, width)), ("attn.proj", (width, width))):
            yield from _linear(f"{prefix}.{name}", shape)
        for name, shape in (("mlp.fc1", (4 * width, width)), ("mlp.fc2", (width, 4 * width))):
            yield from _linear(f"{prefix}.{name}", shape)
        for name in ("norm1", "norm2"):
            yield from _linear(f"{prefix}.{name}", (width,))
    yield from _linear("mlp1.0", (4 * width,))
    yield from _linear("mlp1.1", (output, 4 * width))
    yield from _linear("mlp1.3", (output, output))


def _linear(name: str, shape: tuple[int, ...]) -> Shapes:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def parameter_shapes(model: Decoder, layers: int) -> Shapes:
    """Names and shapes of a whole model with that many of its layers."""
    if model.vision:
        yield from _vision_shapes(min(layers, model.vision), 1024, model.hidden)
    yield f"{model.prefix}model.embed_tokens.weight", (model.vocabulary, model.hidden)
    for layer in range(layers):
        for name, shape in layer_shapes(model):
            yield f"{model.prefix}model.layers.{layer}.{name}", shape
    yield f"{model.prefix}model.norm.weight", (model.hidden,)
    if not model.tied:
        yield f"{model.prefix}lm_head.weight", (model.vocabulary, model.hidden)


def make_checkpoints(work: Path, name: str, layers: int, experts: int) -> list[Path]:
    """A random base and its experts in bfloat16; kept for the next time.

    Args:
        work: folder for everything.
        name: one of `MODELS`.
        layers: number of layers that they have.
        experts: number of experts.

    Returns:
        The base's folder and each expert's.
    """
    parent = work / f"{name}-{layers}"
    folders = [parent / "base", *(parent / f"expert{number}" for number in range(experts))]
    missing = {number: folder for number, folder in enumerate(folders) if not (folder / "model.safetensors").exists()}
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(_write, folder, name, layers, number) for number, folder in missing.items()]
        for future in done:
            future.result()
    return folders


def _write(folder: Path, name: str, layers: int, number: int) -> None:
    """Write the base (number 0) or an expert, whose entries are the base's plus noise of its own."""
    import torch

    noise = _noise(0) * 0.02
    if number:
        noise += _noise(number) * 0.002
    data = memoryview(noise.bfloat16().view(torch.uint8).numpy())  # type: ignore[arg-type]
    header, end = _header(dict(parameter_shapes(MODELS[name], layers)))
    folder.mkdir(parents=True, exist_ok=True)
    config = MODELS[name].config(layers)
    if MODELS[name].vision:
        config = {"model_type": "internvl_chat", "llm_config": config}
    (folder / "config.json").write_text(json.dumps(config))
    partial = folder / "model.partial"
    with partial.open("wb") as stream:
        stream.write(header)
        for start in range(0, end, len(data)):
            stream.write(data[: min(len(data), end - start)])
    partial.rename(folder / "model.safetensors")


def _noise(seed: int) -> Tensor:
    import torch

    return torch.randn(_PERIOD, generator=torch.Generator().manual_seed(seed))


def _header(shapes: dict[str, tuple[int, ...]]) -> tuple[bytes, int]:
    """The header of a safetensors file of bfloat16 tensors, and the size of the data after it."""
    described, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        described[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, end
