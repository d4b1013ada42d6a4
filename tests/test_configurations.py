"""Configurations are compared by what they make a model compute."""

from __future__ import annotations

import pytest

from expert_merging.checkpoints.configurations import computing_settings, differing_settings
from expert_merging.libraries import import_transformers
from tests.internvl import make_config

MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}
QWEN = {**MISTRAL, "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 28}
QWEN_VL = {
    "model_type": "qwen2_vl",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {"hidden_size": 3584, "in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14},
}


def told(base, expert):
    """What is told of an expert, without the beginning of the lines."""
    start = "expert A differs from the base in config.json: "
    lines = differing_settings(base, {"A": expert})
    assert all(line.startswith(start) for line in lines)
    return [line.removeprefix(start) for line in lines]


def without(config, *names):
    return {name: value for name, value in config.items() if name not in names}


@pytest.mark.parametrize(
    "changes",
    [
        {"use_cache": False, "transformers_version": "4.39.0", "_name_or_path": "x", "pad_token_id": 0},
        {"pretraining_tp": 1, "attention_dropout": 0.1, "torch_dtype": "float16", "architectures": ["M"]},
        {"head_dim": 16},
        {"head_dim": None},
        {"rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"hidden_act": "silu", "tie_word_embeddings": False},
        {"vocab_size": 32002},
    ],
)
def test_what_does_not_matter_is_passed_over(changes):
    assert told(MISTRAL, {**MISTRAL, **changes}) == []
    assert told({**MISTRAL, **changes}, MISTRAL) == []


@pytest.mark.parametrize("name", ["rope_theta", "sliding_window"])
def test_a_setting_that_is_left_out_has_its_default(name):
    assert told(MISTRAL, without(MISTRAL, name)) == []
    assert told(without(MISTRAL, name), MISTRAL) == []
    assert told({**MISTRAL, "rope_theta": 1e6}, without(MISTRAL, "rope_theta")) == [
        "rope_theta 10000.0, base 1000000.0"
    ]
    assert told(MISTRAL, without(MISTRAL, "rms_norm_eps")) == ["rms_norm_eps 1e-06, base 1e-05"]


def test_what_an_unknown_kind_leaves_out_is_not_compared():
    config = {**MISTRAL, "model_type": "new"}
    assert told(config, without(config, "rope_theta", "sliding_window", "num_key_value_heads", "head_dim")) == []


def test_none_is_a_value():
    assert told(MISTRAL, {**MISTRAL, "sliding_window": None}) == ["sliding_window none, base 4096"]
    assert told({**MISTRAL, "sliding_window": None}, MISTRAL) == ["sliding_window 4096, base none"]
    assert told(MISTRAL, {**MISTRAL, "num_key_value_heads": None}) == ["num_key_value_heads 4, base 2"]


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": None},
        {"sliding_window": 4096, "max_window_layers": 21},
        {"use_sliding_window": True},
        {"use_sliding_window": True, "max_position_embeddings": 4096, "sliding_window": 4096},
    ],
)
def test_a_window_that_is_not_used_is_none(changes):
    assert told(QWEN, {**QWEN, **changes}) == []


def test_a_window_that_is_used_counts():
    used = {**QWEN, "use_sliding_window": True, "sliding_window": 1024}
    assert told(QWEN, used) == ["sliding_window 1024, base none"]
    assert told(used, {**used, "max_window_layers": 4}) == ["max_window_layers 4, base 28"]


def test_kinds_of_rotary_positions_have_two_names():
    section = QWEN_VL["rope_scaling"]
    assert told(QWEN_VL, {**QWEN_VL, "rope_scaling": {**section, "rope_type": "default"}}) == []
    assert told(QWEN_VL, {**QWEN_VL, "rope_scaling": {**section, "mrope_section": [8, 28, 28]}}) == [
        "mrope_section [8, 28, 28], base [16, 24, 24]"
    ]
    yarn = {"rope_type": "yarn", "type": "yarn", "factor": 4.0}
    assert told(MISTRAL, {**MISTRAL, "rope_scaling": yarn}) == ["rope_type yarn, base default"]


def test_a_vision_tower_that_says_more_is_the_same_tower():
    whole = {
        "depth": 32,
        "hidden_act": "quick_gelu",
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    assert told(QWEN_VL, {**QWEN_VL, "vision_config": whole}) == []
    other = {**whole, "patch_size": 16}
    assert told(QWEN_VL, {**QWEN_VL, "vision_config": other}) == ["vision_config.patch_size 16, base 14"]


@pytest.mark.parametrize(
    ("setting", "value", "line"),
    [
        ("select_layer", -2, "select_layer -2, base -1"),
        ("ps_version", "v1", "ps_version v1, base v2"),
        ("downsample_ratio", 1.0, "downsample_ratio 1.0, base 0.5"),
        ("template", "internlm2-chat", "template internlm2-chat, base internvl2_5"),
        ("template", None, "template none, base internvl2_5"),
        ("use_thumbnail", False, "use_thumbnail False, base True"),
        ("dynamic_image_size", False, "dynamic_image_size False, base True"),
        ("force_image_size", 56, "force_image_size 56, base 28"),
        ("vision_config.num_attention_heads", 4, "vision_config.num_attention_heads 4, base 2"),
        ("vision_config.norm_type", "rms_norm", "vision_config.norm_type rms_norm, base layer_norm"),
        ("llm_config.rms_norm_eps", 1e-5, "rms_norm_eps 1e-05, base 1e-06"),
        ("force_image_size", None, None),  # which vision_config says too
        ("llm_config.attention_dropout", 0.1, None),
        ("vision_config.drop_path_rate", 0.1, None),
        ("use_backbone_lora", 16, None),
    ],
)
def test_pictures_projector_and_prompts_are_compared_too(setting, value, line):
    assert told(make_config(), make_config({setting: value})) == ([line] if line else [])


def test_what_internvl_leaves_out_is_its_default():
    config = without(make_config(), "select_layer", "downsample_ratio")
    assert told(make_config(), config) == []
    assert told(make_config(), without(make_config(), "ps_version")) == ["ps_version v1, base v2"]


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen2VL", "Qwen2_5_VL"])
def test_known_defaults_are_transformers_own(kind):
    config = getattr(import_transformers(), f"{kind}Config")().to_dict()
    assert computing_settings(config), "it says everything"
    silent = {"model_type": config["model_type"]}
    sections = {name: {} for name in ("vision_config",) if name in config}
    sizes = ("num_attention_heads", "hidden_size")
    language = {name: config.get("text_config", config)[name] for name in sizes}
    meant = computing_settings({**silent, **sections, **language})
    whole = computing_settings(config)
    assert {name: whole[name] for name in meant} == meant
