"""What experts have of tokens and the merged model has not is told before the work begins."""

from __future__ import annotations

import json

import pytest
import torch

from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.checkpoints.tokenizer_files import Vocabulary
from expert_merging.checkpoints.vocabulary import (
    check_size,
    row_count,
    vocabulary_warnings,
    with_identifiers,
    with_size,
)
from expert_merging.errors import InputError
from expert_merging.running.batches import kept_bytes
from tests.checkpoints import write_checkpoint
from tests.command import flags, merge, refused

TOKENS = {"<unk>": 0, "</s>": 1, **{letter: 2 + number for number, letter in enumerate("abcdefghijklmnopqrst")}}


def checkpoint(folder, added=(), *, rows=None, tokens=TOKENS, config=None, generation=None, end="</s>", shift=0.0):
    """A checkpoint with a tokenizer of letters, added tokens and a row for each."""
    numbers = {token: len(tokens) + number for number, token in enumerate(added)}
    rows = len(tokens) + len(added) if rows is None else rows
    write_checkpoint(
        folder,
        {
            "model.embed_tokens.weight": torch.ones(rows, 4),
            "model.layers.0.mlp.up_proj.weight": torch.ones(2, 4) + shift,
        },
        config={"model_type": "mistral", **(config or {})},
    )
    if tokens:
        described = {str(number): {"content": token, "special": True} for token, number in numbers.items()}
        (folder / "vocab.json").write_text(json.dumps(tokens))
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": described, "eos_token": end}))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return Checkpoint(folder)


@pytest.fixture
def base(tmp_path):
    return checkpoint(tmp_path / "base")


def told(base, **experts):
    return vocabulary_warnings(base, experts)


def test_the_same_vocabulary_is_nothing_to_tell(base, tmp_path):
    assert told(base, A=checkpoint(tmp_path / "a"), B=checkpoint(tmp_path / "b", tokens=None, rows=len(TOKENS))) == []


@pytest.mark.parametrize(
    ("added", "line"),
    [
        (["<x>"], "1 token that the base lacks (<x>): the merged model does not know it; --tokenizer union adds it"),
        (
            ["<x>", "<a>"],
            "2 tokens that the base lacks (<x>, <a>): the merged model does not know them; --tokenizer union",
        ),
    ],
)
def test_added_tokens_are_lost(base, tmp_path, added, line):
    (found,) = told(base, Code=checkpoint(tmp_path / "a", added))
    assert found.startswith(f"expert Code has {line}")


def test_of_many_tokens_the_first_are_named(tmp_path):
    many = {f"w{number}": number for number in range(100)}
    base = checkpoint(tmp_path / "base", tokens=many)
    (found,) = told(base, A=checkpoint(tmp_path / "a", [f"<{number}>" for number in range(5)], tokens=many))
    assert "5 tokens that the base lacks (<0>, <1>, <2> and 2 more)" in found


def test_a_token_of_the_vocabulary_proper_cannot_be_added(base, tmp_path):
    (found,) = told(base, A=checkpoint(tmp_path / "a", tokens={**TOKENS, "u": 22}))
    assert found == "expert A has 1 token that the base lacks (u): the merged model does not know it"


def test_another_tokenizer_is_told_as_that(base, tmp_path):
    other = {letter.upper(): number for letter, number in TOKENS.items()}
    assert told(base, A=checkpoint(tmp_path / "a", tokens=other)) == [
        "expert A has another tokenizer: the base lacks 22 of its 22 tokens, and the merged model does not know them"
    ]


def test_other_numbers_are_told(base, tmp_path):
    swapped = {**TOKENS, "a": TOKENS["b"], "b": TOKENS["a"]}
    assert told(base, A=checkpoint(tmp_path / "a", tokens=swapped)) == [
        "expert A numbers 2 tokens otherwise than the base (a is 3 there and 2 here): the merged model goes by the base"
    ]


def test_padding_loses_nothing(base, tmp_path):
    assert told(base, A=checkpoint(tmp_path / "a", rows=64)) == [
        "expert A has 64 rows of embeddings and the base 22, of which the others belong to no token (padding): nothing "
        "is lost"
    ]
    assert told(checkpoint(tmp_path / "padded", rows=64), A=base) == [
        "expert A has 22 rows of embeddings and the base 64, of which the others belong to no token (padding): nothing "
        "is lost"
    ]


def test_rows_that_no_tokenizer_explains_are_told(base, tmp_path):
    assert told(base, A=checkpoint(tmp_path / "a", rows=24, tokens=None)) == [
        "expert A has 24 rows of embeddings and the base 22, and no tokenizer that says what they are: what it has "
        "learned of more tokens is lost"
    ]


def test_tokens_without_a_row_are_told(base, tmp_path):
    assert told(base, A=checkpoint(tmp_path / "a", rows=20)) == [
        "expert A has 20 rows of embeddings and the base 22: one of them has no rows for 2 tokens"
    ]


@pytest.mark.parametrize(
    ("of_base", "of_expert", "line"),
    [
        ({"config": {"eos_token_id": 1}}, {"config": {"eos_token_id": [1]}}, None),
        ({"config": {"eos_token_id": 1}}, {"config": {"eos_token_id": 2}}, "a and the base with </s>"),
        ({"generation": {"eos_token_id": [1, 2]}}, {"config": {"eos_token_id": 2}}, None),
        (
            {"generation": {"eos_token_id": 1}},
            {"generation": {"eos_token_id": [1, 99]}},
            "token 99 and the base with </s>",
        ),
        ({"config": {"eos_token_id": 1}}, {"end": "b"}, "b and the base with </s>"),
        ({"config": {"llm_config": {"eos_token_id": 1}}}, {"end": {"content": "</s>"}}, None),
        ({}, {"end": "b"}, None),
    ],
)
def test_another_end_is_told(tmp_path, of_base, of_expert, line):
    base, expert = checkpoint(tmp_path / "base", **of_base), checkpoint(tmp_path / "a", **of_expert)
    rest = " (generation_config.json): the merged model stops where the base does"
    assert told(base, A=expert) == ([f"expert A ends its answers with {line}{rest}"] if line else [])


def test_an_expert_without_a_tokenizer_ends_with_the_bases_tokens(tmp_path):
    base, expert = (checkpoint(tmp_path / name, config={"eos_token_id": 1}) for name in ("base", "a"))
    for file in expert.folder.glob("tokenizer*"):
        file.unlink()
    assert told(base, A=Checkpoint(expert.folder)) == []


@pytest.mark.parametrize("without", ["base", "a"])
def test_ends_are_compared_where_one_has_no_tokenizer(tmp_path, without):
    """As adapters have none."""
    base, same, other = (
        checkpoint(
            tmp_path / name,
            rows=len(TOKENS),
            tokens=None if name[0] == without[0] else TOKENS,
            config={"eos_token_id": end},
        )
        for name, end in (("base", 1), ("a", 1), ("another", 2))
    )
    assert told(base, A=same) == []
    (line,) = told(base, A=other)
    assert line.startswith("expert A ends its answers with ")
    assert " and the base with </s> (" in line


def test_a_tokenizer_that_cannot_be_read_is_told(base, tmp_path):
    expert = checkpoint(tmp_path / "a")
    (tmp_path / "a" / "vocab.json").write_text("[]")
    assert told(base, A=expert) == [
        f"vocabularies are not compared: {tmp_path / 'a' / 'vocab.json'} holds list, not a JSON object; download it "
        "again"
    ]


def test_the_merged_tokenizer_is_the_measure_where_there_is_one(base, tmp_path):
    merged = Vocabulary({**TOKENS, "<x>": 22}, {"<x>": {}}, None)
    expert = checkpoint(tmp_path / "a", ["<y>", "<x>"])
    assert vocabulary_warnings(base, {"A": expert}, merged) == [
        "expert A has 1 token that the merged tokenizer lacks (<y>): the merged model does not know it",
    ]
    smaller = Vocabulary({token: number for token, number in TOKENS.items() if token != "t"}, {}, None)
    assert vocabulary_warnings(base, {}, smaller) == [
        "the base has 1 token that the merged tokenizer lacks (t): the merged model does not know it"
    ]


def test_another_end_is_told_while_the_merged_model_ends_as_the_base_does(tmp_path):
    base = checkpoint(tmp_path / "base", config={"eos_token_id": 1})
    experts, merged = {"A": checkpoint(tmp_path / "a", end="b")}, Vocabulary(TOKENS, {}, None)
    assert len(vocabulary_warnings(base, experts, merged)) == 1
    assert vocabulary_warnings(base, experts, merged, ends_as_base=False) == []


def test_plan_and_log_say_it(tmp_path, capsys):
    checkpoint(tmp_path / "base")
    checkpoint(tmp_path / "a", ["<x>"], shift=0.1)
    command = (
        "--method",
        "weight_average",
        *flags(tmp_path / "base", A=tmp_path / "a"),
        "--output_path",
        tmp_path / "o",
    )
    line = (
        "expert A has 1 token that the base lacks (<x>): the merged model does not know it; --tokenizer union adds it"
    )
    assert merge(*command, "--dry_run") == 0
    assert f"warning: {line}\n" in capsys.readouterr().out
    assert merge(*command) == 0
    (log,) = (tmp_path / "o").glob("*/*/merge.log")
    assert f" warning: {line}\n" in log.read_text()


# Sizes


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"vocab_size": 24},
        {"llm_config": {"vocab_size": 24}},
        {"vocab_size": 20, "embedding_size": 24},
        {"vocab_size": 20, "decoder": {"vocab_size": 24}},
    ],
)
def test_a_size_that_fits_its_rows(tmp_path, config):
    check_size("the base", checkpoint(tmp_path / "base", rows=24, config=config))


@pytest.mark.parametrize("config", [{"vocab_size": 22}, {"text_config": {"vocab_size": 22}, "vocab_size": 24}])
def test_a_size_that_does_not_fit_its_rows_is_refused(tmp_path, config):
    with pytest.raises(InputError) as error:
        check_size("expert A", checkpoint(tmp_path / "a", rows=24, config=config))
    assert error.value.problems == (
        f"expert A: {tmp_path / 'a' / 'config.json'} has vocab_size 22, and model.embed_tokens.weight has 24 rows; the "
        "model cannot be loaded before vocab_size says so too",
    )


def test_a_base_that_cannot_be_loaded_is_refused_before_work(tmp_path, capsys):
    checkpoint(tmp_path / "base", config={"vocab_size": 7})
    checkpoint(tmp_path / "a", config={"vocab_size": 8}, shift=0.1)
    command = flags(tmp_path / "base", A=tmp_path / "a")
    (line,) = refused(capsys, "--method", "weight_average", *command)
    assert line.startswith("the base: ")
    assert line.endswith(
        "vocab_size 7, and model.embed_tokens.weight has 22 rows; the model cannot be loaded before "
        "vocab_size says so too"
    )


def test_experts_are_loaded_by_methods_that_read_samples_alone(tmp_path, capsys):
    checkpoint(tmp_path / "base", config={"vocab_size": 22})
    checkpoint(tmp_path / "a", config={"vocab_size": 8}, shift=0.1)
    command = flags(tmp_path / "base", A=tmp_path / "a")
    assert merge("--method", "weight_average", *command, "--dry_run") == 0
    lines = refused(capsys, "--method", "expert_merging", *command)
    assert lines[0].startswith("expert A: ")
    checkpoint(tmp_path / "base", config={"vocab_size": 7})
    lines = refused(capsys, "--method", "expert_merging", *command)
    assert [line.split(": ")[0] for line in lines[:2]] == ["the base", "expert A"]


def test_rows_are_those_of_embeddings_or_else_of_a_head(tmp_path):
    tables = {"lm_head.weight": torch.ones(5, 2), "model.embed_tokens.weight": torch.ones(4, 2), "w": torch.ones(9, 2)}
    assert row_count(Checkpoint(write_checkpoint(tmp_path / "a", tables))) == 4
    assert row_count(Checkpoint(write_checkpoint(tmp_path / "b", {"lm_head.weight": torch.ones(5, 2)}))) == 5
    assert row_count(Checkpoint(write_checkpoint(tmp_path / "c", {"w": torch.ones(5, 2)}))) is None


def test_a_size_is_written_where_it_is_said():
    assert with_size({"a": 1}, 9) == {"a": 1, "vocab_size": 9}
    assert with_size({"llm_config": {"b": 2}}, 9) == {"llm_config": {"b": 2, "vocab_size": 9}}
    before = {"vocab_size": 3, "text_config": {"vocab_size": 3}}
    assert with_size(before, 9) == {"vocab_size": 9, "text_config": {"vocab_size": 9}}
    assert before == {"vocab_size": 3, "text_config": {"vocab_size": 3}}


def test_numbers_of_special_tokens_are_taken_over_where_both_have_them():
    config = {"eos_token_id": 1, "pad_token_id": 2, "hidden_size": 3, "text_config": {"bos_token_id": 4}}
    other = {"eos_token_id": [7, 8], "hidden_size": 9, "bos_token_id": 5, "text_config": {"bos_token_id": 6}}
    assert with_identifiers(config, other) == {
        "eos_token_id": [7, 8],
        "pad_token_id": 2,
        "hidden_size": 3,
        "text_config": {"bos_token_id": 6},
    }


@pytest.mark.parametrize("said", [[6], {}, "x", None, 1e400])
def test_settings_that_are_no_numbers_say_nothing(said, tmp_path):
    model = checkpoint(tmp_path / "model", config={"vocab_size": said, "hidden_size": said})
    check_size("the base", model)
    assert kept_bytes(model.config, 2) == 0
    odd = checkpoint(tmp_path / "odd", generation={"eos_token_id": said if isinstance(said, dict) else [said]})
    assert told(checkpoint(tmp_path / "base"), A=odd) is not None
