"""Tokenizer files are read as data, with what transformers makes of them as the measure."""

from __future__ import annotations

import json

import pytest

from expert_merging.checkpoints.tokenizer_files import Vocabulary, read_vocabularies, read_vocabulary, tokenizer_files
from expert_merging.errors import InputError
from expert_merging.libraries import import_transformers
from tests import checkpoints, internvl


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        file = folder / name.replace("_json", ".json").replace("_txt", ".txt")
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def varint(number):
    low = [number >> shift & 0x7F for shift in range(0, max(1, number.bit_length()), 7)]
    return bytes([*(byte | 0x80 for byte in low[:-1]), low[-1]])


def field(number, value):
    """A field of a protocol buffer: bytes with their length, a whole number, or four bytes."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + b"\0\0\0\0"
    return varint(number << 3) + varint(value)


def sentence_pieces(*tokens):
    """A sentencepiece model with these pieces, each with a score and a kind, and its settings after them."""
    pieces = (field(1, token.encode()) + field(2, 0.5) + field(3, 1) for token in tokens)
    return b"".join(field(1, piece) for piece in pieces) + field(2, field(4, 300) + field(6, b"x" * 200))


@pytest.mark.parametrize("save", [checkpoints.save_tokenizer, internvl.save_tokenizer])
def test_numbers_are_those_of_transformers(tmp_path, save):
    tmp_path.joinpath("config.json").write_text('{"model_type": "qwen2"}')
    save(tmp_path)
    tokenizer = import_transformers().AutoTokenizer.from_pretrained(tmp_path)
    vocabulary = read_vocabulary(tmp_path)
    assert vocabulary.tokens == tokenizer.get_vocab()
    assert set(vocabulary.added) == set(tokenizer.get_added_vocab())
    assert vocabulary.end == tokenizer.eos_token


def test_a_folder_without_tokenizer_has_no_vocabulary(tmp_path):
    assert read_vocabulary(write(tmp_path, tokenizer_config_json={"eos_token": "</s>"})) is None


def test_pieces_with_scores_are_numbered_in_their_order(tmp_path):
    folder = write(tmp_path, tokenizer_json={"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.5]]}})
    assert read_vocabulary(folder).tokens == {"<unk>": 0, "a": 1}


def test_lines_are_numbered_in_their_order(tmp_path):
    assert read_vocabulary(write(tmp_path, vocab_txt="[PAD]\n\u2028\nthe\n")).tokens == {
        "[PAD]": 0,
        "\u2028": 1,
        "the": 2,
    }


def test_a_sentencepiece_model_is_read_without_its_library(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentence_pieces("<unk>", "<s>", "</s>", "▁the", "é" * 100))
    write(
        tmp_path, added_tokens_json={"<unk>": 0, "<pad>": 5}, tokenizer_config_json={"eos_token": {"content": "</s>"}}
    )
    assert read_vocabulary(tmp_path) == Vocabulary(
        {"<unk>": 0, "<s>": 1, "</s>": 2, "▁the": 3, "é" * 100: 4, "<pad>": 5}, {"<unk>": {}, "<pad>": {}}, "</s>"
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"IQ== 0\nIg== 1\n", b"\x0a\xff", sentence_pieces("a")[:-3], field(1, b""), field(1, field(1, b"\xff"))],
)
def test_a_tokenizer_model_of_another_kind_says_nothing(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert read_vocabulary(tmp_path) is None


def test_later_files_add_tokens(tmp_path):
    folder = write(
        tmp_path,
        vocab_json={"a": 0, "b": 1},
        added_tokens_json={"<x>": 2},
        tokenizer_config_json={"added_tokens_decoder": {"3": {"content": "<y>", "special": True}}},
    )
    vocabulary = read_vocabulary(folder)
    assert vocabulary.tokens == {"a": 0, "b": 1, "<x>": 2, "<y>": 3}
    assert vocabulary.added == {"<x>": {}, "<y>": {"content": "<y>", "special": True}}
    assert vocabulary.by_number(5) == ["a", "b", "<x>", "<y>", None]
    assert vocabulary.by_number(2) == ["a", "b"]


def test_the_same_files_are_read_once(tmp_path):
    folders = {name: tmp_path / name for name in "abc"}
    for folder in folders.values():
        folder.mkdir()
    checkpoints.save_tokenizer(folders["a"])
    checkpoints.save_tokenizer(folders["b"])
    found = read_vocabularies(folders)
    assert found["a"] is found["b"]
    assert found["c"] is None
    assert tokenizer_files(folders["a"]) == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (
            {"tokenizer_json": "{"},
            "{folder}/tokenizer.json is not valid JSON (Expecting property name enclosed in double quotes: line 1 "
            "column 2 (char 1)); download it again",
        ),
        ({"vocab_json": "[1]"}, "{folder}/vocab.json holds list, not a JSON object; download it again"),
        (
            {"tokenizer_json": {"model": 3}},
            "{folder}/tokenizer.json does not give tokens their numbers; download it again",
        ),
        (
            {"tokenizer_json": {"model": {"vocab": {"a": "b"}}}},
            "{folder}/tokenizer.json does not give tokens their numbers; download it again",
        ),
        ({"vocab_json": {"a": -1}}, "{folder}/vocab.json does not give tokens their numbers; download it again"),
        (
            {"vocab_json": {"a": 0}, "added_tokens_json": {"b": True}},
            "{folder}/added_tokens.json does not give tokens their numbers; download it again",
        ),
        *(
            (
                {"vocab_json": {"a": 0}, **broken},
                "{folder} has added tokens without text or number (tokenizer.json, tokenizer_config.json); download "
                "its tokenizer again",
            )
            for broken in (
                {"tokenizer_config_json": {"added_tokens_decoder": {"x": {"content": "b"}}}},
                {"tokenizer_config_json": {"added_tokens_decoder": {"1": "b"}}},
                {"tokenizer_config_json": {"added_tokens_decoder": ["b"]}},
                {"tokenizer_json": {"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "b"}]}},
            )
        ),
    ],
)
def test_files_that_are_none_are_named(tmp_path, files, problem):
    with pytest.raises(InputError) as error:
        read_vocabulary(write(tmp_path, **files))
    assert error.value.problems == (problem.format(folder=tmp_path),)
