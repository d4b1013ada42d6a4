"""The benchmark's three variants on tiny shapes: they run, and the trainer equals the plain way."""

from __future__ import annotations

import math
from itertools import count

import pytest

from benchmarks import shapes, trainer, variants
from benchmarks.shapes import SHAPES, Case, make_checkpoints
from benchmarks.trainer import compare, work

TEXT = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TINY = {
    "mistral": {**SHAPES["mistral-100m"], **TEXT},
    "internvl": {
        **SHAPES["internvl2_5-1b"],
        "image_token_id": 79,
        "text_config": {**SHAPES["internvl2_5-1b"]["text_config"], **TEXT},
        "vision_config": {
            **SHAPES["internvl2_5-1b"]["vision_config"],
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": [56, 56],
        },
    },
}


@pytest.mark.parametrize("shape", TINY)
def test_variants_run_and_the_trainer_equals_the_twin(shape, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "SHAPES", TINY)
    for name, value in {"TEXT_TOKENS": (20, 40), "TILE_TOKENS": 4, "TILE_PIXELS": 56, "TOKENS": (5, 75)}.items():
        monkeypatch.setattr(variants, name, value)
    # What this process has taken at most was taken by other tests, perhaps.
    amounts = count(1)
    monkeypatch.setattr(trainer, "resident", lambda _: next(amounts))
    case = Case("limit", shape, 0, 3, 2, 9, "cpu", "float32", "host", "update", False, str(tmp_path))
    make_checkpoints(case)
    found = {}
    for variant in ("limit", "ours", "twin"):
        found[variant] = work(Case(**{**vars(case), "variant": variant}))
    ratios = compare(found)
    assert all(math.isfinite(value) for value in ratios.values())
    assert ratios["twin - ours, first gradient, relative"] < 1e-5
    assert ratios["twin - ours, largest difference of a coefficient"] < 1e-5
    assert found["ours"]["accumulates"] == 1
