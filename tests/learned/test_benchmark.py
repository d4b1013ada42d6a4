"""The benchmark's three variants on tiny shapes: they run, and the trainer equals the plain way."""

from __future__ import annotations

import math
from itertools import count

import pytest

from benchmarks import shapes, trainer, variants
from benchmarks.checkpoints import make_checkpoints
from benchmarks.shapes import SHAPES, Case, config_of, is_merged, parameter_shapes
from benchmarks.trainer import compare, work
from expert_merging.checkpoints.checkpoint import Checkpoint
from tests.checkpoints import SIZES, tensors_of

TEXT = {**SIZES, "vocab_size": 80}
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


@pytest.mark.slow
@pytest.mark.parametrize("shape", TINY)
def test_variants_run_and_the_trainer_equals_the_twin(shape, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "SHAPES", TINY)
    for name, value in {"TEXT_TOKENS": (20, 40), "TILE_TOKENS": 4, "TILE_PIXELS": 56, "TOKENS": (5, 75)}.items():
        monkeypatch.setattr(variants, name, value)
    # What this process has taken at most was taken by other tests, perhaps.
    amounts = count(1)
    monkeypatch.setattr(trainer, "resident", lambda _: next(amounts))
    case = Case("limit", shape, 0, 3, 2, 9, "cpu", "float32", "host", "update", False, 64, str(tmp_path))
    make_checkpoints(case.folders, case.config, distinct=case.distinct, differs=is_merged)
    found = {}
    for variant in ("limit", "ours", "twin"):
        found[variant] = work(Case(**{**vars(case), "variant": variant}))
    ratios = compare(found)
    assert all(math.isfinite(value) for value in ratios.values())
    assert ratios["twin - ours, first gradient, relative"] < 1e-5
    assert ratios["twin - ours, largest difference of a coefficient"] < 1e-5
    assert found["ours"]["accumulates"] == 1


def test_experts_differ_from_the_base_where_they_are_said_to(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.checkpoints._PERIOD", 1001)
    config = TINY["mistral"]
    folders = [tmp_path / name for name in ("base", "one", "two", "link")]
    make_checkpoints(folders, config, distinct=2, differs=is_merged)
    base, one, two, link = map(tensors_of, folders)
    assert {name: tuple(tensor.shape) for name, tensor in base.items()} == parameter_shapes(config)
    for name, tensor in base.items():
        assert (tensor.mean().item() > 0.9) == ("norm" in name)
        assert one[name].equal(tensor) == two[name].equal(tensor) == one[name].equal(two[name])
        assert one[name].equal(tensor) != is_merged(name, tensor.shape)
        assert link[name].equal(one[name])
    assert (folders[3] / "model.safetensors").is_symlink()
    Checkpoint(folders[0])
    before = (folders[1] / "model.safetensors").stat()
    make_checkpoints(folders, config)
    assert (folders[1] / "model.safetensors").stat() == before, "what is there is kept"


def test_shapes_are_the_published_ones():
    elements = {shape: sum(math.prod(size) for size in parameter_shapes(config_of(shape)).values()) for shape in SHAPES}
    assert elements["qwen2-0.5b"] == 494_032_768
    assert elements["mistral-7b"] == 7_241_732_096
    assert 930e6 < elements["internvl2_5-1b"] < 940e6
