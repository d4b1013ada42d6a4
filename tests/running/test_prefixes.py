"""States of texts that begin alike, against a pass over each text alone."""

from __future__ import annotations

import pytest
import torch
import transformers

from expert_merging.running.prefixes import hidden_states

SIZES = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LENGTHS = [(30, 34), (25, 40), (30, 31)]


def network(kind: str = "Mistral", **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **HEADS, **settings)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def texts(shared: int) -> list[dict[str, torch.Tensor]]:
    """Model inputs of texts that begin with so many tokens in common, and no more."""
    rows = torch.randint(4, 60, (len(LENGTHS), 60), generator=torch.Generator().manual_seed(1))
    rows[:, :shared] = rows[0, :shared]
    rows[:, shared] = torch.arange(1, 4)
    cut = [row[None, :length] for row, (_, length) in zip(rows, LENGTHS, strict=True)]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in cut]


@torch.no_grad()
def plain_states(model, samples):
    """The states of each text, alone and at once."""
    return [model.base_model(**one, use_cache=False).last_hidden_state[0] for one in samples]


def assert_states(model, samples, plain):
    found = hidden_states(model, samples, [start for start, _ in LENGTHS])
    for own, whole, (start, _) in zip(found, plain, LENGTHS, strict=True):
        torch.testing.assert_close(own, whole[start:], rtol=1e-4, atol=1e-5)


def watch(model, monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of what goes through the model."""
    shapes, forward = [], model.model.embed_tokens.forward

    def watched(tokens):
        shapes.append(tuple(tokens.shape))
        return forward(tokens)

    monkeypatch.setattr(model.model.embed_tokens, "forward", watched)
    return shapes


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Mistral", {"sliding_window": None}),
        ("Mistral", {"sliding_window": 26}),
        ("Qwen2", {}),
        ("Gemma2", {"head_dim": 4}),
    ],
)
@pytest.mark.parametrize("shared", [0, 7, 8, 20, 24, 25, 30])
def test_states_are_those_of_each_text_alone(kind, settings, shared, monkeypatch):
    model, samples = network(kind, **settings), texts(shared)
    plain = plain_states(model, samples)
    shapes = watch(model, monkeypatch)
    assert_states(model, samples, plain)
    once = min(shared, 25)
    assert shapes == ([(1, once), (3, 40 - once)] if once >= 8 else [(3, 40)])


def test_a_prefix_as_long_as_the_window_is_not_kept(monkeypatch):
    """Later tokens would see what a cache has left of it."""
    model = network(sliding_window=20)
    shapes = watch(model, monkeypatch)
    hidden_states(model, texts(20), [start for start, _ in LENGTHS])
    assert shapes == [(3, 40)]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Lfm2", {"layer_types": ["conv", "full_attention", "conv"]}),
        ("MiniMax", {"head_dim": 4, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
        ("FalconH1", {"mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 4}),
        ("Mamba", {"state_size": 4}),
    ],
)
def test_models_that_keep_more_than_keys_and_values_read_each_text_alone(kind, settings):
    model, samples = network(kind, **settings), texts(20)
    assert_states(model, samples, plain_states(model, samples))


@torch.no_grad()
def test_texts_after_one_with_a_picture_do_not_have_its_positions():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}
    text = {**SIZES, **HEADS, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2}
    tokens = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 4, "vision_end_token_id": 7}
    picture = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=picture, **tokens)
    model, samples = transformers.Qwen2VLForConditionalGeneration(config).eval(), texts(20)
    plain = plain_states(model, samples)
    ids = torch.tensor([[10, 4, *[5] * 16, 7, 11]])
    seen = {"pixel_values": torch.randn(64, 1176), "image_grid_thw": torch.tensor([[1, 8, 8]])}
    model.model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == 5).long(), **seen)
    assert_states(model, samples, plain)


def test_one_text_and_texts_with_pictures_go_through_as_they_are(monkeypatch):
    model = network()
    shapes = watch(model, monkeypatch)
    hidden_states(model, texts(20)[:1], [30])
    monkeypatch.setattr(model.model, "forward", lambda pixels, forward=model.model.forward, **own: forward(**own))
    hidden_states(model, [{**one, "pixels": torch.ones(1, 3)} for one in texts(20)], [30, 25, 30])
    assert shapes == [(1, 34), (3, 40)]
