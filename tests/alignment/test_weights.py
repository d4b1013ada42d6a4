"""Weight matching finds the order that units were shuffled from, and never makes weights less alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expert_merging.alignment import weights
from expert_merging.alignment.matching import total
from expert_merging.alignment.units import (
    FEED,
    HEADS,
    KEYS,
    OUTPUTS,
    STREAM,
    VALUES,
    BlockOrder,
    Layout,
    find_layout,
    tensor_orders,
)
from expert_merging.alignment.weights import Pair, cosine, match_by_weights
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.errors import InputError
from expert_merging.progress import no_advance
from tests.alignment.shuffling import random_orders, save_shuffled, shuffle_tensors
from tests.checkpoints import perturb, save_model, tensors_of

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}


def pair_of(base: Path, expert: Path) -> tuple[Pair, Layout]:
    first, second = Checkpoint(base), Checkpoint(expert)
    return Pair(first, second, torch.device("cpu")), find_layout(first, str)


@pytest.fixture
def base(tmp_path) -> Path:
    save_model(tmp_path / "base", 0, **SIZES)
    return tmp_path / "base"


def align(pair: Pair, layout: Layout) -> tuple[list[BlockOrder], torch.Tensor | None]:
    found = match_by_weights(pair, layout, no_advance)
    pair.expert.orders = tensor_orders(layout, *found, pair.expert)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_a_shuffled_fine_tune_is_put_back(seed, base, tmp_path):
    perturb(base, tmp_path / "tuned", 1)
    layout = find_layout(Checkpoint(base), str)
    shuffled = save_shuffled(tmp_path / "tuned", tmp_path / "shuffled", layout, seed)
    pair, _ = pair_of(base, shuffled)
    before = cosine(pair, layout)
    align(pair, layout)
    for name, tensor in tensors_of(tmp_path / "tuned").items():
        assert pair.expert.read(name).view(tensor.shape).equal(tensor), name
    assert before < 0.1
    assert cosine(pair, layout) > 0.7


def test_similarities_sum_up_to_products_of_all_weights(base, tmp_path):
    """Each kind of units in each order: the sum of similarities is what the shuffled tensors' products add up to."""
    save_model(tmp_path / "other", 5, **SIZES)
    pair, layout = pair_of(base, tmp_path / "other")
    blocks, stream = random_orders(layout, 3)
    ours, theirs = tensors_of(base), shuffle_tensors(tensors_of(tmp_path / "other"), layout, blocks, stream, "model.")
    products = {name: float((ours[name].double() * theirs[name].double()).sum()) for name in ours}
    similarity = weights._outside_similarity(pair, layout)
    for number, names in enumerate(layout.blocks):
        rows = blocks[number].rows(layout)
        similarity = similarity + weights.block_similarity(pair, names, STREAM, rows)
        for units, own in {**OF_UNITS, STREAM: [*names]}.items():
            found = total(
                weights.block_similarity(pair, names, units, {**rows, STREAM: stream}), rows.get(units, stream)
            )
            assert found == pytest.approx(sum(products[names[kind]] for kind in own), rel=1e-4), units
    assert total(similarity, stream) == pytest.approx(sum(products.values()), rel=1e-4)


OF_UNITS = {
    HEADS: ["q.weight"],
    KEYS: ["k.weight"],
    VALUES: ["v.weight"],
    OUTPUTS: ["o.weight"],
    FEED: ["gate.weight", "up.weight", "down.weight"],
}


def test_blocks_are_matched_where_the_stream_keeps_its_order(base, tmp_path, monkeypatch):
    layout = find_layout(Checkpoint(base), str)
    monkeypatch.setattr("tests.alignment.shuffling.random_orders", without_stream)
    shuffled = save_shuffled(base, tmp_path / "shuffled", layout, 4)
    pair, _ = pair_of(base, shuffled)
    kept = Layout(**{**vars(layout), "unknown": ("connector.weight",)})
    calls = []
    blocks, stream = match_by_weights(pair, kept, lambda count, note="": calls.append(count))
    assert stream is None
    assert calls == [1, 1]  # one round
    pair.expert.orders = tensor_orders(kept, blocks, None, pair.expert)
    assert cosine(pair, layout) == pytest.approx(1)


def without_stream(layout: Layout, seed: int):
    blocks, _ = random_orders(layout, seed)
    return blocks, torch.arange(layout.hidden)


def test_a_fine_tune_keeps_its_order(base, tmp_path):
    perturb(base, tmp_path / "tuned", 1)
    pair, layout = pair_of(base, tmp_path / "tuned")
    align(pair, layout)
    assert not pair.expert.orders


def test_models_of_different_origin_become_more_alike(base, tmp_path):
    save_model(tmp_path / "other", 5, **SIZES)
    pair, layout = pair_of(base, tmp_path / "other")
    before = cosine(pair, layout)
    align(pair, layout)
    assert cosine(pair, layout) > before + 0.1


def test_the_cosine_is_of_all_matrices_with_units(base, tmp_path):
    save_model(tmp_path / "other", 5, **SIZES)
    pair, layout = pair_of(base, tmp_path / "other")
    first, second = (
        torch.cat([tensor.double().flatten() for _, tensor in sorted(tensors_of(folder).items()) if tensor.dim() > 1])
        for folder in (base, tmp_path / "other")
    )
    assert cosine(pair, layout) == pytest.approx(float(first @ second / (first.norm() * second.norm())), abs=1e-6)


def test_tables_of_other_words_are_compared_in_the_rows_that_both_have(base, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_BLOCK", 100)  # in blocks of three rows
    layout = find_layout(Checkpoint(base), str)
    shuffled = save_shuffled(base, tmp_path / "shuffled", layout, 2)
    (file,) = shuffled.glob("*.safetensors")
    tensors = load_file(file)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.randn(3, layout.hidden)])
    save_file(tensors, file)
    pair, _ = pair_of(base, shuffled)
    align(pair, layout)
    assert cosine(pair, layout) == pytest.approx(1)


@pytest.mark.parametrize("which", ["base", "shuffled"])
def test_weights_that_are_not_finite_are_refused(which, base, tmp_path):
    layout = find_layout(Checkpoint(base), str)
    shuffled = save_shuffled(base, tmp_path / "shuffled", layout, 2)
    name = "model.layers.1.mlp.up_proj.weight"
    (file,) = (tmp_path / which).glob("*.safetensors")
    tensors = load_file(file)
    tensors[name][3, 4] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    pair, _ = pair_of(base, shuffled)
    who = "the base" if which == "base" else "the expert"
    with pytest.raises(InputError) as refusal:
        match_by_weights(pair, layout, no_advance)
    assert str(refusal.value) == f"{who} ({tmp_path / which}) has NaN or infinite values in {name}"
