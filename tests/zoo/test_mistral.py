from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM

from Mistral.backbone import BACKBONE
from zoo import mistral, tasks
from zoo.mistral import FAMILY, TASKS, VOCABULARY


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, built_zoo: Path) -> object:
    return AutoTokenizer.from_pretrained(built_zoo / BACKBONE.base_folder)


@pytest.mark.parametrize("name", [None, *TASKS])
def test_text_survives_the_tokenizer(tokenizer: object, name: str | None) -> None:
    for example in itertools.islice(tasks.training_examples(TASKS, name, 0), 50):
        question = tokenizer(example.question)["input_ids"]
        answer = tokenizer(example.response, add_special_tokens=False)["input_ids"]
        assert question[0] == tokenizer.bos_token_id
        assert len(question) == 2 + len(re.sub("<...>", "", example.question))
        assert len(answer) == len(example.response)
        assert tokenizer.decode(answer) == example.response
        assert tokenizer.decode([*answer, tokenizer.eos_token_id], skip_special_tokens=True) == example.response
        assert tokenizer.decode(question, skip_special_tokens=True) == example.question
        assert tokenizer.unk_token_id not in question + answer


def test_questions_are_padded_on_the_left(tokenizer: object) -> None:
    batch = tokenizer(["<add>12+07=", "<uni>ab="], padding=True)
    assert batch["input_ids"][1][:4] == [tokenizer.pad_token_id] * 3 + [tokenizer.bos_token_id]
    assert batch["attention_mask"][1] == [0] * 3 + [1] * 5


def test_training_sees_the_tokens_that_the_user_will(tokenizer: object) -> None:
    examples = [tasks.Example("<add>12+07=", "19"), tasks.Example("<uni>abbac=", "abc")]
    batch = mistral.collate(mistral.new_tokenizer(), examples)
    for example, tokens, labels in zip(examples, batch["input_ids"], batch["labels"], strict=True):
        question = tokenizer(example.question)["input_ids"]
        answer = [*tokenizer(example.response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        length = len(question) + len(answer)
        assert tokens.tolist() == question + answer + [tokenizer.pad_token_id] * (len(tokens) - length)
        assert labels.tolist() == [-100] * len(question) + answer + [-100] * (len(tokens) - length)


def test_padding_does_not_change_the_loss() -> None:
    torch.manual_seed(0)
    model = mistral.new_model().eval()
    examples = [tasks.Example("<add>12+07=", "19"), tasks.Example("<idx>abcdefg:01234=", "abcde")]
    together = model(**mistral.collate(mistral.new_tokenizer(), examples)).loss
    alone = [model(**mistral.collate(mistral.new_tokenizer(), [example])).loss for example in examples]
    torch.testing.assert_close(together, (3 * alone[0] + 6 * alone[1]) / 9)


def test_model_is_a_small_untied_mistral(built_zoo: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(built_zoo / BACKBONE.base_folder)
    assert isinstance(model, MistralForCausalLM)
    assert model.dtype == torch.float32
    assert model.num_parameters() < 1_000_000
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert model.generation_config.eos_token_id == VOCABULARY["</s>"]


def test_experts_keep_what_the_merge_command_excludes() -> None:
    names = [name for name, _ in mistral.new_model().named_parameters()]
    for task in BACKBONE.expert_folders:
        frozen = FAMILY.expert_schedules[task].frozen
        kept = {name for name in names if any(re.match(pattern, name) for pattern in frozen)}
        assert kept == {name for name in names if "_proj" not in name}
