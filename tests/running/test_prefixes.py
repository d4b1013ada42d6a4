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
    with torch.no_grad():
        plain = [model.model(**one, use_cache=False).last_hidden_state[0] for one in samples]
    shapes = watch(model, monkeypatch)
    found = hidden_states(model, samples, [start for start, _ in LENGTHS])
    for own, whole, (start, _) in zip(found, plain, LENGTHS, strict=True):
        torch.testing.assert_close(own, whole[start:], rtol=1e-4, atol=1e-5)
    once = min(shared, 25)
    assert shapes == ([(1, once), (3, 40 - once)] if once >= 8 else [(3, 40)])


def test_a_prefix_as_long_as_the_window_is_not_kept(monkeypatch):
    """Later tokens would see what a cache has left of it."""
    model = network(sliding_window=20)
    shapes = watch(model, monkeypatch)
    hidden_states(model, texts(20), [start for start, _ in LENGTHS])
    assert shapes == [(3, 40)]


def test_one_text_and_texts_with_pictures_go_through_as_they_are(monkeypatch):
    model = network()
    shapes = watch(model, monkeypatch)
    hidden_states(model, texts(20)[:1], [30])
    monkeypatch.setattr(model.model, "forward", lambda pixels, forward=model.model.forward, **own: forward(**own))
    hidden_states(model, [{**one, "pixels": torch.ones(1, 3)} for one in texts(20)], [30, 25, 30])
    assert shapes == [(1, 34), (3, 40)]
