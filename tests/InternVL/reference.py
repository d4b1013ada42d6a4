"""InternVL2.5 in plain torch on tensors under their published names: what the native classes must compute.

Written from the published semantics for clarity alone; nothing of InternVL/ or transformers is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from tests.internvl import TOKENS

Weights = Mapping[str, Tensor]

SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001


def closest_grid(width: int, height: int, most: int, size: int) -> tuple[int, int]:
    """Columns and rows; a set of candidates in the order of their area, as published."""
    candidates = {
        (i, j) for n in range(1, most + 1) for i in range(1, n + 1) for j in range(1, n + 1) if 1 <= i * j <= most
    }
    best, difference = (1, 1), math.inf
    for candidate in sorted(candidates, key=lambda shape: shape[0] * shape[1]):
        own = abs(width / height - candidate[0] / candidate[1])
        if own < difference:
            best, difference = candidate, own
        elif own == difference and width * height > 0.5 * size * size * candidate[0] * candidate[1]:
            best = candidate
    return best


def pixel_values(image: Image.Image, config: Mapping[str, Any], most: int) -> Tensor:
    """Tiles and thumbnail of an RGB picture, each pixel by its formula."""
    size = config["force_image_size"]
    columns, rows = closest_grid(*image.size, most, size) if config["dynamic_image_size"] else (1, 1)
    resized = image.resize((size * columns, size * rows), Image.Resampling.BICUBIC)
    pictures = []
    for block in range(columns * rows):
        left, top = block % columns * size, block // columns * size
        pictures.append(resized.crop((left, top, left + size, top + size)))
    if config["use_thumbnail"] and columns * rows != 1:
        pictures.append(image.resize((size, size), Image.Resampling.BICUBIC))
    result = torch.empty(len(pictures), 3, size, size)
    for number, picture in enumerate(pictures):
        stored = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size, size, 3)
        for channel, (mean, deviation) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
            result[number, channel] = (stored[..., channel] / 255.0 - mean) / deviation
    return result


def tokens_of(text: str) -> list[int]:
    """Ids of the test tokenizer: special tokens as themselves, everything else byte by byte."""
    pieces = re.split("(" + "|".join(map(re.escape, TOKENS)) + ")", text)
    return [token for piece in pieces for token in ([TOKENS[piece]] if piece in TOKENS else piece.encode())]


def encode(question: str, files: Sequence[Path], config: Mapping[str, Any], most: int) -> tuple[Tensor, Tensor | None]:
    """Prompt tokens ``(1, tokens)`` and pixels of all pictures' tiles."""
    pixels = [pixel_values(Image.open(file).convert("RGB"), config, most) for file in files]
    if files and "<image>" not in question:
        question = "<image>\n" * len(files) + question
    patches = config["force_image_size"] // config["vision_config"]["patch_size"]
    per_tile = int(patches**2 * config["downsample_ratio"] ** 2)
    for picture in pixels:
        places = "<IMG_CONTEXT>" * per_tile * len(picture)
        question = question.replace("<image>", f"<img>{places}</img>", 1)
    text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return torch.tensor([tokens_of(text)]), torch.cat(pixels) if pixels else None


def linear(weights: Weights, name: str, values: Tensor) -> Tensor:
    return functional.linear(values, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def rms_norm(weight: Tensor, values: Tensor, epsilon: float) -> Tensor:
    return weight * values / torch.sqrt((values**2).mean(-1, keepdim=True) + epsilon)


def vision_norm(weights: Weights, name: str, values: Tensor, vision: Mapping[str, Any]) -> Tensor:
    weight, epsilon = weights[f"{name}.weight"], vision["layer_norm_eps"]
    if vision["norm_type"] == "rms_norm":
        return rms_norm(weight, values, epsilon)
    return functional.layer_norm(values, (len(weight),), weight, weights[f"{name}.bias"], epsilon)


def attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """``(batch, heads, tokens, width)`` each."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    return scores.softmax(-1) @ value


def vision_states(weights: Weights, vision: Mapping[str, Any], pixels: Tensor) -> list[Tensor]:
    """Output of the embeddings and of every layer, class token first."""
    prefix = "vision_model.embeddings"
    patches = functional.conv2d(
        pixels,
        weights[f"{prefix}.patch_embedding.weight"],
        weights[f"{prefix}.patch_embedding.bias"],
        stride=vision["patch_size"],
    )
    states = patches.flatten(2).transpose(1, 2)
    first = weights[f"{prefix}.class_embedding"].expand(len(states), 1, -1)
    places = weights[f"{prefix}.position_embedding"]
    side = vision["image_size"] // vision["patch_size"]
    grid = places[:, 1:].transpose(1, 2).unflatten(-1, (side, side))
    grid = functional.interpolate(grid, patches.shape[-2:], mode="bicubic", align_corners=False)
    states = torch.cat([first, states], dim=1) + torch.cat([places[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    found, heads = [states], vision["num_attention_heads"]
    for layer in range(vision["num_hidden_layers"]):
        name = f"vision_model.encoder.layers.{layer}"
        normed = vision_norm(weights, f"{name}.norm1", states, vision)
        query, key, value = linear(weights, f"{name}.attn.qkv", normed).chunk(3, dim=-1)
        if vision["qk_normalization"]:
            query = rms_norm(weights[f"{name}.attn.q_norm.weight"], query, vision["layer_norm_eps"])
            key = rms_norm(weights[f"{name}.attn.k_norm.weight"], key, vision["layer_norm_eps"])
        split = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value)]
        mixed = attention(*split, causal=False).transpose(1, 2).flatten(2)
        states = states + weights[f"{name}.ls1"] * linear(weights, f"{name}.attn.proj", mixed)
        normed = vision_norm(weights, f"{name}.norm2", states, vision)
        inner = functional.gelu(linear(weights, f"{name}.mlp.fc1", normed))
        states = states + weights[f"{name}.ls2"] * linear(weights, f"{name}.mlp.fc2", inner)
        found.append(states)
    return found


def picture_features(weights: Weights, config: Mapping[str, Any], pixels: Tensor) -> Tensor:
    """``(tiles * tokens of a tile, hidden)``: 2 x 2 neighbours joined, then the projector."""
    patches = vision_states(weights, config["vision_config"], pixels)[config["select_layer"]][:, 1:]
    side = math.isqrt(patches.shape[1])
    square = patches.view(len(patches), side, side, -1)
    joined = [
        torch.cat([square[:, row + down, column + right] for down in (0, 1) for right in (0, 1)], dim=-1)
        for row in range(0, side, 2)
        for column in range(0, side, 2)
    ]
    features = torch.stack(joined, dim=1).flatten(0, 1)
    features = functional.layer_norm(
        features, features.shape[-1:], weights["mlp1.0.weight"], weights["mlp1.0.bias"], 1e-5
    )
    return linear(weights, "mlp1.3", functional.gelu(linear(weights, "mlp1.1", features)))


def rotate(values: Tensor, language: Mapping[str, Any]) -> Tensor:
    """Rotary positions on ``(batch, heads, tokens, width)``, stretched where the configuration says so."""
    half = values.shape[-1] // 2
    frequency = language["rope_theta"] ** (-torch.arange(half) / half)
    if language["rope_scaling"]:
        frequency = frequency / language["rope_scaling"]["factor"]
    angle = torch.arange(values.shape[-2])[:, None] * frequency
    first, second = values[..., :half], values[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def forward(
    weights: Weights, config: Mapping[str, Any], tokens: Tensor, pixels: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Logits ``(1, tokens, vocabulary)``, and hidden states: embeddings, every layer, the last one normalised."""
    language = config["llm_config"]
    prefix, heads = "language_model.model", language["num_attention_heads"]
    states = weights[f"{prefix}.embed_tokens.weight"][tokens]
    if pixels is not None:
        places = (tokens == TOKENS["<IMG_CONTEXT>"])[..., None].expand_as(states)
        states = states.masked_scatter(places, picture_features(weights, config, pixels))
    found, repeats = [states], heads // language["num_key_value_heads"]
    for layer in range(language["num_hidden_layers"]):
        name = f"{prefix}.layers.{layer}"
        normed = rms_norm(weights[f"{name}.input_layernorm.weight"], states, language["rms_norm_eps"])
        query, key, value = (
            linear(weights, f"{name}.self_attn.{part}_proj", normed)
            .unflatten(-1, (-1, language["hidden_size"] // heads))
            .transpose(1, 2)
            for part in "qkv"
        )
        key, value = (part.repeat_interleave(repeats, dim=1) for part in (rotate(key, language), value))
        mixed = attention(rotate(query, language), key, value, causal=True).transpose(1, 2).flatten(2)
        states = states + linear(weights, f"{name}.self_attn.o_proj", mixed)
        normed = rms_norm(weights[f"{name}.post_attention_layernorm.weight"], states, language["rms_norm_eps"])
        gate = functional.silu(linear(weights, f"{name}.mlp.gate_proj", normed))
        states = states + linear(
            weights, f"{name}.mlp.down_proj", gate * linear(weights, f"{name}.mlp.up_proj", normed)
        )
        found.append(states)
    found[-1] = rms_norm(weights[f"{prefix}.norm.weight"], states, language["rms_norm_eps"])
    head = "language_model.lm_head" if "language_model.lm_head.weight" in weights else f"{prefix}.embed_tokens"
    return linear(weights, head, found[-1]), found
