"""What ``config.json`` files say about a computation, and where that of an expert differs from the base's.

The merged model gets the base's file. Settings are compared by what they do: one that a file leaves out has its default
where that is known, a window that no text is longer than is none, and what only training or loading asks for
(``attention_dropout``, ``use_cache``, ``pad_token_id``, ...) is not compared at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Settings of the language model that change what the same weights compute.
_LANGUAGE = (
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "hidden_activation",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "attention_bias",
    "mlp_bias",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "num_experts_per_tok",
    "norm_topk_prob",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "tie_word_embeddings",
)
# Settings of pictures, projector and prompts, at the top of the file.
_OUTSIDE = (
    "model_type",
    "select_layer",
    "ps_version",
    "downsample_ratio",
    "template",
    "dynamic_image_size",
    "use_thumbnail",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "projector_hidden_act",
)
_VISION = (
    "depth",
    "fullatt_block_indexes",
    "hidden_act",
    "layer_norm_eps",
    "norm_type",
    "num_attention_heads",
    "num_heads",
    "num_hidden_layers",
    "patch_size",
    "qk_normalization",
    "qkv_bias",
    "spatial_merge_size",
    "temporal_patch_size",
    "tokens_per_second",
    "window_size",
)

# What files of a kind mean that leave a setting out; other kinds' defaults are not known here.
_USUAL = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False}
_QWEN_VL = {**_USUAL, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0, "num_key_value_heads": 8}
_LANGUAGE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_USUAL, "attention_bias": False, "mlp_bias": False, "num_key_value_heads": None},
    "mistral": {**_USUAL, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {**_USUAL, "num_key_value_heads": 32},
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
}
_OUTSIDE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "internvl_chat": {
        "select_layer": -1,
        "ps_version": "v1",
        "downsample_ratio": 0.5,
        "template": None,
        "dynamic_image_size": False,
        "use_thumbnail": False,
    }
}
_VISION_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "internvl_chat": {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "norm_type": "rms_norm",
        "num_attention_heads": 25,
        "num_hidden_layers": 48,
        "patch_size": 14,
        "qk_normalization": True,
        "qkv_bias": False,
    },
    "qwen2_vl": {
        "depth": 32,
        "hidden_act": "quick_gelu",
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "qwen2_5_vl": {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 4,
        "window_size": 112,
    },
}


def differing_settings(base: Mapping[str, Any], experts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each setting by which an expert computes otherwise than the base, whose file the merged model gets.

    Args:
        base: the base's ``config.json``.
        experts: the experts' by name.
    """
    return [
        f"expert {name} differs from the base in config.json: {key} {_shown(value)}, base {_shown(of_base)}"
        for name, expert in experts.items()
        for key, value, of_base in _differences(expert, base)
    ]


def _shown(value: object) -> str:
    return "none" if value is None else str(value)


def _differences(expert: Mapping[str, Any], base: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings that both files have and that differ, with both values."""
    lengths = [_language(config).find("max_position_embeddings") for config in (expert, base)]
    longest = min(filter(_is_count, lengths), default=None)
    own, of_base = (computing_settings(config, longest) for config in (expert, base))
    return [(key, value, of_base[key]) for key, value in own.items() if key in of_base and value != of_base[key]]


def computing_settings(config: Mapping[str, Any], longest: int | None = None) -> dict[str, Any]:
    """What a file says about the computation, wherever it says it; what it leaves open is left out.

    Args:
        config: ``config.json``.
        longest: tokens of the longest text that is of interest; none is known by default.
    """
    kind = str(config.get("model_type") or "")
    outside = _Part(kind, (config,), _OUTSIDE_DEFAULTS.get(kind, {}))
    language = _language(config)
    settings = outside.known(_OUTSIDE) | language.known(_LANGUAGE)
    settings |= _head_settings(language) | _rotary_settings(language) | _window_settings(language, longest)
    section = config.get("vision_config")
    if isinstance(section, Mapping):
        vision = _Part(kind, (section,), _VISION_DEFAULTS.get(kind, {}))
        settings |= {f"vision_config.{name}": value for name, value in vision.known(_VISION).items()}
        if config.get("force_image_size") or "image_size" in section:
            settings["force_image_size"] = config.get("force_image_size") or section["image_size"]
    return settings


@dataclass(frozen=True)
class _Part:
    """What a file says about one part of a model.

    Args:
        kind: the part's ``model_type``.
        sections: where it may be said, the first one first.
        defaults: what it means to leave a setting out.
    """

    kind: str
    sections: tuple[Mapping[str, Any], ...]
    defaults: Mapping[str, Any]

    def find(self, name: str, otherwise: Any = None) -> Any:
        """A setting; something else where it is left open."""
        return next((section[name] for section in (*self.sections, self.defaults) if name in section), otherwise)

    def known(self, names: tuple[str, ...]) -> dict[str, Any]:
        """The settings of these names that are not left open; none is a value."""
        found = {name: self.find(name, ...) for name in names}
        return {name: value for name, value in found.items() if value is not ...}


def _language(config: Mapping[str, Any]) -> _Part:
    """The language model, whose settings multimodal models nest."""
    nested = (config.get("text_config"), config.get("llm_config"))
    sections = (*(section for section in nested if isinstance(section, Mapping)), config)
    kind = next((str(section["model_type"]) for section in sections if section.get("model_type")), "")
    kind = kind.removesuffix("_text")
    return _Part(kind, sections, _LANGUAGE_DEFAULTS.get(kind, {}))


def _head_settings(language: _Part) -> dict[str, Any]:
    """Heads of keys and values, and entries of a head, which follow from other settings where a file says none."""
    heads, width = language.find("num_attention_heads"), language.find("hidden_size")
    settings = language.known(("num_key_value_heads", "head_dim"))
    if "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = settings["num_key_value_heads"] or heads
    if not settings.get("head_dim") and ("head_dim" in settings or language.kind in _LANGUAGE_DEFAULTS):
        settings["head_dim"] = width // heads if _is_count(heads) and _is_count(width) else None
    return settings


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _rotary_settings(language: _Part) -> dict[str, Any]:
    """Rotary positions, which older and newer files describe in tables of other names."""
    described = language.known(("rope_theta",))
    for name in ("rope_scaling", "rope_parameters"):
        table = language.find(name)
        described |= table if isinstance(table, Mapping) else {}
    older = described.pop("type", None)
    kind = described.pop("rope_type", None) or older or "default"
    settings = {name if "rope" in name else f"rope_{name}": value for name, value in described.items()}
    return {**settings, "rope_type": "default" if kind == "mrope" else kind}


def _window_settings(language: _Part, longest: int | None) -> dict[str, Any]:
    """The window of attention, and the layers that have it; none where no text is longer."""
    window = language.find("sliding_window", ...)
    uses = language.find("use_sliding_window", not language.kind.startswith("qwen"))
    if uses and window is ...:
        return {}
    if not uses or window is None or (longest is not None and _is_count(window) and window >= longest):
        return {"sliding_window": None}
    return {"sliding_window": window, **language.known(("max_window_layers", "layer_types"))}


def language_setting(config: Mapping[str, Any], name: str) -> Any:
    """A setting of the language model from ``config.json``, where multimodal models nest it; None if it is not said."""
    for part in (config.get("text_config"), config.get("llm_config"), config):
        if isinstance(part, Mapping) and part.get(name) is not None:
            return part[name]
    return None


def size_setting(config: Mapping[str, Any], name: str) -> int | None:
    """A size of the language model from ``config.json``; None if it is not said, or is no number above 0."""
    value = language_setting(config, name)
    return value if type(value) is int and value > 0 else None


def layer_count(config: Mapping[str, Any]) -> int | None:
    """Number of decoder layers of the language model, from ``config.json``; None where it does not say."""
    count = language_setting(config, "num_hidden_layers")
    return count if isinstance(count, int) else None
