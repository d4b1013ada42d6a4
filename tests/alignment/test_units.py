"""Models compute the same, whatever order their units have."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import InternVL.backbone
import Mistral.backbone
import Qwen2VL.backbone
from expert_merging.alignment.units import BlockOrder, Layout, check_expert, find_layout, tensor_orders
from expert_merging.backbone import Backbone
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.checkpoints.orders import Order
from expert_merging.errors import InputError
from expert_merging.questions.calibration import Sample
from expert_merging.running.sharding import load_on
from tests import internvl, qwen2vl
from tests.alignment.shuffling import random_orders, shuffle_tensors
from tests.checkpoints import SIZES, save_tokenizer, tensors_of, write_checkpoint

CPU = torch.device("cpu")
LANGUAGE = {
    "Mistral": MistralConfig(**SIZES, head_dim=12),
    "Llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "Llama, a key for each query": LlamaConfig(**{**SIZES, "num_key_value_heads": 4}),
    "Qwen2": Qwen2Config(**{**SIZES, "num_attention_heads": 6, "hidden_size": 48}),
    "Qwen3": Qwen3Config(**SIZES, head_dim=8),
}
PICTURES = {"Qwen2-VL": Qwen2VL.backbone.BACKBONE, "InternVL": InternVL.backbone.BACKBONE}


def save_language_model(config, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that each counts
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def layout_of(checkpoint: Checkpoint, file_name: Callable[[str], str] = str) -> Layout:
    return find_layout(checkpoint, file_name)


def logits_of(backbone: Backbone, checkpoint: Checkpoint, inputs) -> torch.Tensor:
    model = load_on(CPU, backbone, checkpoint, torch.float32, sharded=False)
    with torch.no_grad():
        return model(**inputs).logits


def assert_computes_the_same(backbone: Backbone, folder: Path, before: str, inputs) -> None:
    plain, shuffled = Checkpoint(folder), Checkpoint(folder)
    layout = layout_of(plain, backbone.file_name)
    assert layout.moves_stream
    blocks, stream = random_orders(layout, 7)
    shuffled.orders = tensor_orders(layout, blocks, stream, shuffled)
    expected = shuffle_tensors(tensors_of(folder), layout, blocks, stream, before)
    for name, tensor in expected.items():
        assert shuffled.read(name).view(tensor.shape).equal(tensor), name
        middle = shuffled.read(name, tensor.numel() // 3, tensor.numel() // 3 + 5)
        assert middle.equal(tensor.flatten()[tensor.numel() // 3 :][:5]), name
    found, wanted = logits_of(backbone, shuffled, inputs), logits_of(backbone, plain, inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert wanted.std() > 0.1


@pytest.mark.parametrize("kind", LANGUAGE)
def test_language_models_compute_the_same_with_units_in_another_order(kind, tmp_path):
    folder = save_language_model(LANGUAGE[kind], tmp_path)
    tokens = {"input_ids": torch.tensor([[0, 9, 8, 30, 12, 5, 41, 7]])}
    assert_computes_the_same(Mistral.backbone.BACKBONE, folder, "model.", tokens)


@pytest.mark.parametrize("kind", PICTURES)
def test_models_with_pictures_compute_the_same_with_units_in_another_order(kind, tmp_path):
    backbone, folder = PICTURES[kind], tmp_path / "model"
    if kind == "Qwen2-VL":
        qwen2vl.save_model(folder, 3, shard="5GB")
        picture = tmp_path / "picture.png"
        qwen2vl.save_picture(picture, 60, 30)
    else:
        internvl.save_model(folder, 3)
        picture = internvl.make_picture(tmp_path / "picture.png")
    sample = Sample("GQA", "VQA", "What is it?", None, "0", images=(picture,), file=Path("GQA.json"), number=0)
    inputs = backbone.encode_prompt(backbone.load_processor(folder), sample, None)
    before = "model." if kind == "Qwen2-VL" else "language_model.model."
    assert_computes_the_same(backbone, folder, before, inputs)


def tensors(**changes) -> dict[str, torch.Tensor]:
    """A block of two heads in one group, with tables and a norm."""
    layer = "model.layers.0."
    shapes = {
        **{f"{layer}self_attn.{part}_proj.weight": (4 if part == "q" else 2, 6) for part in "qkv"},
        f"{layer}self_attn.o_proj.weight": (6, 4),
        **{f"{layer}mlp.{part}_proj.weight": (5, 6) for part in ("gate", "up")},
        f"{layer}mlp.down_proj.weight": (6, 5),
        **{f"{layer}{norm}_layernorm.weight": (6,) for norm in ("input", "post_attention")},
        "model.embed_tokens.weight": (7, 6),
        "model.norm.weight": (6,),
        **changes,
    }
    return {name: torch.randn(shape) for name, shape in shapes.items() if shape}


def write(folder: Path, heads: int | None = 2, **changes) -> Checkpoint:
    config = {"model_type": "mistral", **({"num_attention_heads": heads} if heads else {})}
    return Checkpoint(write_checkpoint(folder, tensors(**changes), config=config))


def test_the_stream_keeps_its_order_where_something_unknown_touches_it(tmp_path):
    layout = layout_of(write(tmp_path, **{"model.adapter.weight": (6, 6)}))
    assert not layout.moves_stream
    assert layout.unknown == ("model.adapter.weight",)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.layers.0.mlp.router.weight": (2, 6)}, "they have model.layers.0.mlp.router.weight"),
        ({"model.layers.0.self_attn.v_proj.weight": None}, "they lack v.weight in layer 0"),
        ({"model.layers.0.self_attn.sinks": (2,)}, "they have model.layers.0.self_attn.sinks"),
        ({"model.layers.0.self_attn.o_proj.weight": (6, 6)}, "o_proj.weight is [6, 6]"),
        ({"model.layers.0.self_attn.k_norm.weight": (4,)}, "k_norm.weight is [4]"),
        ({"model.norm.weight": (5,)}, "model.norm.weight is [5]"),
        ({"heads": None}, "config.json says 0 heads (num_attention_heads)"),
        ({"heads": 3}, "config.json says 3 heads (num_attention_heads)"),
    ],
)
def test_other_blocks_are_refused(changes, said, tmp_path):
    base = write(tmp_path, **changes)
    with pytest.raises(InputError, match="knows units of blocks as Llama, Mistral and Qwen2 have them") as refusal:
        layout_of(base)
    assert said in str(refusal.value)
    assert str(refusal.value).endswith("; leave it out")


def test_models_without_blocks_are_refused(tmp_path):
    base = Checkpoint(write_checkpoint(tmp_path, {"a.weight": torch.ones(2, 2)}))
    with pytest.raises(InputError, match="they lack"):
        layout_of(base)


def test_experts_with_other_units_are_refused(tmp_path):
    base = write(tmp_path / "base")
    other = {"model.layers.0.mlp.up_proj.weight": (5, 7), "model.layers.0.mlp.down_proj.weight": None}
    expert = write(tmp_path / "expert", heads=4, **other)
    with pytest.raises(InputError) as refusal:
        check_expert(layout_of(base), base, expert)
    assert list(refusal.value.problems) == [
        "its config.json says 4 heads (num_attention_heads), and the base's 2",
        "it lacks model.layers.0.mlp.down_proj.weight",
        "model.layers.0.mlp.up_proj.weight has another shape, or is no floating-point tensor",
    ]
    check_expert(layout_of(base), base, write(tmp_path / "words", **{"model.embed_tokens.weight": (9, 6)}))


def test_units_in_their_places_leave_no_order(tmp_path):
    base = write(tmp_path)
    layout = layout_of(base)
    assert tensor_orders(layout, [BlockOrder.as_stored(layout, 0)], torch.arange(6), base) == {}
    moved = dataclasses.replace(BlockOrder.as_stored(layout, 0), feed=torch.tensor([1, 0, 2, 3, 4]))
    found = tensor_orders(layout, [moved], None, base)
    assert sorted(name.split(".")[-2] for name in found) == ["down_proj", "gate_proj", "up_proj"]
    assert found["model.layers.0.mlp.down_proj.weight"].rows is None


def test_orders_have_digests_of_their_own(tmp_path):
    model = write(tmp_path)
    digests = {model.order_digest}
    for order in (Order(torch.tensor([1, 0])), Order(None, torch.tensor([1, 0])), Order(torch.tensor([0, 1]))):
        model.orders = {"model.norm.weight": order}
        digests.add(model.order_digest)
    assert len(digests) == 4
    assert "" in digests


def test_what_an_expert_has_of_the_base_keeps_the_base_s_order(tmp_path):
    """A language model alone as an expert of a base with pictures: the projector writes in the base's order."""
    base = write(tmp_path / "base", **{"mlp1.3.weight": (6, 6)})
    expert = write(tmp_path / "expert")
    expert.entries["mlp1.3.weight"] = base.entries["mlp1.3.weight"]
    layout = layout_of(base)
    blocks, stream = random_orders(layout, 1)
    assert "mlp1.3.weight" in tensor_orders(layout, blocks, stream, base)
    assert "mlp1.3.weight" not in tensor_orders(layout, blocks, stream, expert)
