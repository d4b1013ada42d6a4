"""What `make fuzz` has found, each with its small input: tracebacks and long loops before, refusals or results now."""

from __future__ import annotations

import json

import pytest

from tests.fuzz.readers import READERS, exchanged, outcome

DEEP = "[" * 3000 + "]" * 3000
BY_NAME = {reader.name: reader for reader in READERS}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "change", "expected"),
    [
        # transformers' checks of types raise an error of huggingface_hub's own.
        ("config Mistral", "config.json", {"attention_dropout": ""}, "refused"),
        ("config Mistral", "config.json", {"rms_norm_eps": []}, "refused"),
        ("config InternVL", "config.json", {"llm_config": {"hidden_act": 3}}, "refused"),
        # Settings were compared and divided before anybody had looked at their types.
        ("config Mistral", "config.json", {"sliding_window": {"a": 1}}, "refused"),
        ("config Qwen2-VL", "config.json", {"num_attention_heads": "x"}, "refused"),
        ("config Qwen2-VL", "config.json", {"vision_config": {"num_heads": 0}}, "refused"),
        ("config InternVL", "config.json", {"force_image_size": "[/red]"}, "refused"),
        ("config InternVL", "config.json", {"downsample_ratio": "x"}, "refused"),
        ("config Qwen2-VL", "config.json", {"hidden_size": -4}, "refused"),
        # transformers makes a list with an entry for every layer before it makes any.
        ("processor InternVL", "config.json", {"llm_config": {"num_hidden_layers": 10**9}}, "refused"),
        # transformers reads its files by itself, without a bound of their depth.
        ("config Mistral", "generation_config.json", {"pad_token_id": "@deep@"}, "refused"),
        ("processor Qwen2-VL", "preprocessor_config.json", {"size": "@deep@"}, "refused"),
        # The index may name what no file can be called.
        ("index", "model.safetensors.index.json", {"weight_map": {"a": "x" * 300}}, "refused"),
        # Some tokenizers fail at the first text only.
        ("tokenizer", "tokenizer_config.json", {"model_max_length": ""}, "refused"),
        # A name with the end of a line in it made two lines of an error.
        ("index", "model.safetensors.index.json", {"weight_map": {"a\nb": "c\nd"}}, "refused"),
    ],
)
def test_damaged_settings(name, file, change, expected, tmp_path):
    reader, folder = BY_NAME[name], tmp_path / "files"
    reader.make(folder)
    given = json.loads((folder / file).read_text())
    for key, value in change.items():
        given[key] = {**given[key], **value} if isinstance(value, dict) and isinstance(given.get(key), dict) else value
    with exchanged(folder / file, json.dumps(given).replace('"@deep@"', DEEP).encode()):
        assert outcome(reader, folder) == expected


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        # Time grew with the square of the depth.
        ("options", "options.yaml", b"[" * 3000),
        ("options", "options.yaml", b"- " * 100_000),
        ("calibration", "Chat.json", b'[{"instruction": "a", "history": true}]'),
        ("calibration", "Chat.json", b'[{"question": "a", "image_path": "\\u0096\\n\\u2028"}]'),
    ],
)
def test_damaged_texts(name, file, content, tmp_path):
    reader, folder = BY_NAME[name], tmp_path / "files"
    reader.make(folder)
    with exchanged(folder / file, content):
        assert outcome(reader, folder) == "refused"
