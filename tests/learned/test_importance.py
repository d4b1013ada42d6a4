"""Importance and chunk counts held to cases worked out by hand; the table of layers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expert_merging.errors import InputError
from expert_merging.learned.chunks import chunk_length
from expert_merging.learned.coefficients import Coefficients
from expert_merging.learned.importance import (
    allocate_chunks,
    describe_layers,
    layer_importance,
    load_layers,
    mean_coefficients,
    save_layers,
)
from expert_merging.roles import find_places

SIZES = {"a": 100, "b": 300, "c": 600}


def test_importance_by_hand():
    """Magnitudes are shares of an expert's sum over layers: (1, 1, 2) / 4 and (3, 0, 1) / 4."""
    importance = layer_importance(
        {"a": [0.5, 1.0], "b": [0.5, 1.0], "c": [-0.25, 0.0]},
        {"a": [1.0, 3e-3], "b": [1.0, 0.0], "c": [2.0, 1e-3]},
        SIZES,
    )
    raw = {"a": 100 * (0.125 + 0.75), "b": 300 * 0.125, "c": 600 * 0.125}
    assert importance == pytest.approx({name: value / 200.0 for name, value in raw.items()})


def test_experts_that_equal_the_base_make_nothing_important():
    zeros = dict.fromkeys(SIZES, (0.0,))
    importance = layer_importance(dict.fromkeys(SIZES, (0.3,)), zeros, SIZES)
    assert importance == dict.fromkeys(SIZES, 0.0)
    with pytest.raises(InputError, match="gives none of them a chunk"):
        allocate_chunks(importance, SIZES, budget=3, kappa=1.2)


@pytest.mark.parametrize(
    ("budget", "kappa", "expected"),
    [
        (10, 1.0, {"a": 1, "b": 3, "c": 6}),  # in proportion
        (3, 1.0, {"a": 0, "b": 0, "c": 1}),  # 0.3, 0.9, 1.8
        (3, 0.0, {"a": 1, "b": 1, "c": 1}),  # evenly
        (7, 0.0, {"a": 2, "b": 2, "c": 2}),  # 2.33 each
        (14, 2.0, {"a": 0, "b": 2, "c": 10}),  # 14 / 46 times 1, 9, 36: 0.30, 2.74, 10.96
        (10, 0.5, {"a": 1, "b": 3, "c": 4}),  # 1, 1.732, 2.449 of 5.181: 1.93, 3.34, 4.73
    ],
)
def test_chunk_counts_by_hand(budget, kappa, expected):
    importance = {"a": 0.1, "b": 0.3, "c": 0.6}
    sizes = dict.fromkeys(SIZES, 27720)  # which all these counts divide
    assert allocate_chunks(importance, sizes, budget=budget, kappa=kappa) == expected


def test_a_parameter_without_entries_gets_no_coefficient():
    assert allocate_chunks({"a": 0.5, "b": 0.5}, {"a": 8, "b": 0}, budget=2, kappa=0) == {"a": 1, "b": 0}


@given(
    raw=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 50)), min_size=1, max_size=8),
    budget=st.floats(1, 200),
    kappa=st.floats(0, 4),
)
def test_chunks_stay_within_the_budget_and_none_is_empty(raw, budget, kappa):
    total = sum(value for value, _ in raw)
    importance = {str(place): value / total if total else 0.0 for place, (value, _) in enumerate(raw)}
    sizes = {str(place): size for place, (_, size) in enumerate(raw)}
    try:
        chunks = allocate_chunks(importance, sizes, budget=budget, kappa=kappa)
    except InputError:
        return
    assert sum(chunks.values()) <= budget * (1 + 1e-6)
    for name, count in chunks.items():
        assert count == 0 or math.ceil(sizes[name] / chunk_length(sizes[name], count)) == count
        assert count <= sizes[name]


def test_the_mean_of_chunks_weighs_the_shorter_last_one_less():
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert mean_coefficients(values, 5).tolist() == pytest.approx([0.6, 0.4])


def test_submodule_depth_and_stage_come_from_names_of_every_family():
    names = [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.5.mlp.down_proj.weight",
        "model.layers.2.input_layernorm.weight",
        "model.layers.3.self_attn.v_proj.bias",
        "model.embed_tokens.weight",
        "mlp1.1.weight",
        "vision_model.encoder.layers.4.attn.qkv.weight",
        "model.vision_tower.encoder.layers.11.attention.q_proj.weight",
        "visual.blocks.1.mlp.fc1.weight",
    ]
    assert list(find_places(names).values()) == [
        ("q", 0, "early"),
        ("down", 5, "late"),
        ("other", 2, "middle"),
        ("v", 3, "middle"),
        *[("other", None, "outside")] * 5,
    ]
    assert find_places(["language_model.model.layers.0.mlp.gate_proj.weight"]) == {
        "language_model.model.layers.0.mlp.gate_proj.weight": ("gate", 0, "early")
    }


@pytest.mark.parametrize(
    ("name", "submodule"),
    [
        ("model.layers.0.self_attn.qkv_proj.weight", "qkv"),  # Phi
        ("model.layers.0.mlp.gate_up_proj.weight", "gate_up"),
        ("language_model.model.layers.0.attention.wqkv.weight", "qkv"),  # InternLM
        ("language_model.model.layers.0.attention.wo.weight", "o"),
        ("language_model.model.layers.0.feed_forward.w1.weight", "gate"),
        ("language_model.model.layers.0.feed_forward.w3.weight", "up"),
        ("language_model.model.layers.0.feed_forward.w2.weight", "down"),
        ("model.layers.0.block_sparse_moe.experts.0.w2.weight", "down"),  # Mixtral
        ("model.layers.0.attention_norm.weight", "other"),
    ],
)
def test_fused_and_numbered_projections_have_their_own_names(name, submodule):
    assert find_places([name])[name].submodule == submodule


def make_layers():
    coefficients = Coefficients(
        experts=("x", "y"),
        values={
            "model.layers.0.self_attn.q_proj.weight": torch.tensor([[0.5, 0.25], [1.0, 0.0]]),
            "model.layers.1.mlp.up_proj.weight": torch.tensor([[0.125], [0.75]]),
            "mlp1.0.weight": torch.tensor([[0.5], [0.5]]),
        },
        task_vector_scale=(1.0, 1.0),
        fixed=("model.layers.1.mlp.up_proj.weight",),
    )
    sizes = dict(zip(coefficients.values, (4, 8, 2), strict=True))
    magnitudes = dict.fromkeys(coefficients.values, (0.1, 0.3))
    return describe_layers(coefficients, magnitudes, sizes)


def test_layers_have_means_chunks_and_importance():
    first, second, third = make_layers()
    assert first.coefficients == {"x": 0.375, "y": 0.5}
    assert [layer.chunks for layer in (first, second, third)] == [2, 0, 1]
    assert first.importance == pytest.approx(4 * 0.875 / (4 * 0.875 + 8 * 0.875 + 2 * 1.0))
    assert sum(layer.importance for layer in (first, second, third)) == pytest.approx(1)


def test_the_table_of_layers_keeps_everything(tmp_path):
    save_layers(make_layers(), tmp_path / "layers.csv")
    assert load_layers(tmp_path / "layers.csv") == make_layers()
    for content in ("", "name,depth\na,b\n", "\x00"):
        (tmp_path / "layers.csv").write_text(content)
        with pytest.raises(InputError, match=r"layers\.csv (is not the table|has no layers)"):
            load_layers(tmp_path / "layers.csv")
