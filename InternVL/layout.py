"""The published layout of InternVL checkpoints, and what transformers calls the same things.

Of names, only the vision tower's attention is not one to one: the file's ``attn.qkv`` is three parameters in memory,
its consecutive row blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from expert_merging.checkpoints.folders import required_object
from expert_merging.checkpoints.reading import reading
from expert_merging.errors import InputError, Problems
from expert_merging.libraries import import_transformers

IMAGE_TOKEN = "<IMG_CONTEXT>"  # noqa: S105  (a token of text)

# The language models that transformers has, by the architecture that llm_config names.
LANGUAGE_MODELS = {"Qwen2ForCausalLM": "Qwen2Config", "LlamaForCausalLM": "LlamaConfig"}

_REMOTE_ADVICE = (
    "--trust_remote_code runs the checkpoint's own code instead; methods that do not learn need no model class"
)

# In memory -> in files: beginnings of names, then parts of the vision tower's.
_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.multi_modal_projector.layer_norm.": "mlp1.0.",
    "model.multi_modal_projector.linear_1.": "mlp1.1.",
    "model.multi_modal_projector.linear_2.": "mlp1.3.",
    "model.vision_tower.": "vision_model.",
    # In files that transformers' own class has written.
    "multi_modal_projector.layer_norm.": "mlp1.0.",
    "multi_modal_projector.linear_1.": "mlp1.1.",
    "multi_modal_projector.linear_2.": "mlp1.3.",
    "vision_tower.": "vision_model.",
}
_VISION_PARTS = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection.": "embeddings.patch_embedding.",
    "encoder.layer.": "encoder.layers.",
    ".lambda_1": ".ls1",
    ".lambda_2": ".ls2",
    ".attention.projection_layer.": ".attn.proj.",
    ".attention.q_norm.": ".attn.q_norm.",
    ".attention.k_norm.": ".attn.k_norm.",
    ".attention.q_proj.": ".attn.qkv.",
    ".attention.k_proj.": ".attn.qkv.",
    ".attention.v_proj.": ".attn.qkv.",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
}

# vision_config in files -> in transformers.
_VISION_SETTINGS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "num_channels",
    "hidden_act": "hidden_act",
    "norm_type": "norm_type",
    "layer_norm_eps": "layer_norm_eps",
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
    "initializer_factor": "layer_scale_init_value",
}

# What the published configuration classes mean where config.json is silent: saving leaves out what equals a default.
_DEFAULTS = {
    "select_layer": -1,
    "force_image_size": None,
    "downsample_ratio": 0.5,
    "template": None,
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "ps_version": "v1",
}
_VISION_DEFAULTS = {
    "hidden_size": 3200,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "qkv_bias": False,
    "qk_normalization": True,
    "initializer_factor": 0.1,
}


def published_name(name: str) -> str:
    """Name in the published files of a parameter's name in memory; published names stay as they are."""
    for native, published in _PREFIXES.items():
        if name.startswith(native):
            name = published + name.removeprefix(native)
            break
    if name.startswith("vision_model."):
        for native, published in _VISION_PARTS.items():
            name = name.replace(native, published)
    return name


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json`` with the published defaults filled in.

    Raises:
        InputError: it is not one of InternVL in its published layout.
    """
    file = folder / "config.json"
    config = required_object(file)
    kind = config.get("model_type")
    if kind != "internvl_chat":
        raise InputError(
            f"{file} has the model_type {kind!r}; learning with the InternVL family takes the published layout, "
            "'internvl_chat'"
        )
    with reading(folder, "configuration"):
        config = {
            **_DEFAULTS,
            **config,
            "llm_config": dict(config.get("llm_config") or {}),
            "vision_config": {**_VISION_DEFAULTS, **(config.get("vision_config") or {})},
        }
        tile_tokens(config)
    return config


def tile_size(config: Mapping[str, Any]) -> int:
    """Side of a tile in pixels."""
    return int(config["force_image_size"] or config["vision_config"]["image_size"])


def tile_tokens(config: Mapping[str, Any]) -> int:
    """Tokens that stand for a tile: two by two patches join where ``downsample_ratio`` is 0.5."""
    side = tile_size(config) // config["vision_config"]["patch_size"]
    return int(side**2 * config["downsample_ratio"] ** 2)


def check_supported(folder: Path, config: Mapping[str, Any]) -> None:
    """Check that transformers' own classes compute what the published code computes for this configuration.

    Raises:
        InputError: everything in ``config.json`` that keeps them from it.
    """
    file, problems = folder / "config.json", Problems()
    vision, language = config["vision_config"], config["llm_config"]
    architecture = (language.get("architectures") or ["none"])[0]
    if architecture not in LANGUAGE_MODELS:
        problems.add(
            f"{file} has the language model {architecture}; transformers' own InternVL covers "
            f"{' and '.join(LANGUAGE_MODELS)}. {_REMOTE_ADVICE}"
        )
    if config["ps_version"] != "v2":
        problems.add(
            f"{file} has ps_version {config['ps_version']!r}, which transposes picture features; transformers' own "
            f"InternVL computes 'v2' only. {_REMOTE_ADVICE}"
        )
    if vision["qk_normalization"] and vision["layer_norm_eps"] != 1e-6:
        problems.add(
            f"{file} normalises queries and keys with layer_norm_eps {vision['layer_norm_eps']}; transformers' own "
            f"InternVL does it with 1e-06. {_REMOTE_ADVICE}"
        )
    for key in ("use_backbone_lora", "use_llm_lora"):
        if config.get(key):
            problems.add(f"{file} has {key} {config[key]}: merge the LoRA adapter into the weights first")
    problems.check()


def native_config(config: Mapping[str, Any], *, image_token: int = 0, tied: bool = False) -> Any:
    """The configuration in transformers' terms for a published one that `check_supported` accepts.

    Args:
        config: content of ``config.json``.
        image_token: id of the token that stands for picture features.
        tied: the output head is the embedding.

    Returns:
        An ``InternVLConfig``.
    """
    transformers = import_transformers()
    language = config["llm_config"]
    kind = getattr(transformers, LANGUAGE_MODELS[language["architectures"][0]])
    # Runtime settings (attention kernel, type, outputs) of whoever saved the file are none of the model's.
    known = {entry.name for entry in fields(kind)} - {entry.name for entry in fields(transformers.PreTrainedConfig)}
    known |= {"bos_token_id", "eos_token_id", "pad_token_id", "rope_theta", "rope_scaling"}
    text = {key: value for key, value in language.items() if key in known}
    vision = {native: config["vision_config"][published] for published, native in _VISION_SETTINGS.items()}
    return transformers.InternVLConfig(
        text_config=kind(**{**text, "tie_word_embeddings": tied}),
        vision_config=transformers.InternVLVisionConfig(**vision, use_mean_pooling=True, use_mask_token=False),
        image_token_id=image_token,
        image_seq_length=tile_tokens(config),
        downsample_ratio=config["downsample_ratio"],
        projector_hidden_act="gelu",
        vision_feature_layer=config["select_layer"],
        vision_feature_select_strategy="default",
        tie_word_embeddings=tied,
    )


def published_config(model: Any) -> dict[str, Any]:
    """Content of a published ``config.json`` for a native model."""
    config = model.config
    text, vision = config.text_config, config.vision_config
    (architecture,) = [name for name, kind in LANGUAGE_MODELS.items() if kind == type(text).__name__]
    language = {key: value for key, value in text.to_dict().items() if key != "rope_parameters"}
    rope = dict(text.rope_parameters)
    theta = rope.pop("rope_theta")
    settings = {published: getattr(vision, native) for published, native in _VISION_SETTINGS.items()}
    settings |= {key: settings[key][0] for key in ("image_size", "patch_size")}
    side = round(config.image_seq_length**0.5 / config.downsample_ratio)
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "llm_config": {
            **language,
            "architectures": [architecture],
            "rope_theta": theta,
            "rope_scaling": None if rope["rope_type"] == "default" else rope,
            "tie_word_embeddings": bool(config.tie_word_embeddings),
        },
        "vision_config": {"architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", **settings},
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": True,
        "force_image_size": side * settings["patch_size"],
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "ps_version": "v2",
        "select_layer": config.vision_feature_layer,
        "template": "internvl2_5",
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "use_thumbnail": True,
    }
