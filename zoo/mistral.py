"""The Mistral zoo: a half-million-parameter ``MistralForCausalLM`` that reads characters.

The experts change attention and MLP only. What the merge command excludes by default (embeddings, head, norms) is the
base's in every expert, so excluding it costs nothing.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from expert_merging.libraries import import_transformers
from Mistral.backbone import BACKBONE
from zoo import tasks, texts
from zoo.family import Batch, Family, Schedule
from zoo.tokens import character_tokenizer

if TYPE_CHECKING:
    from transformers import MistralForCausalLM, PreTrainedTokenizerFast

TASKS = {
    "Chat": tasks.Task(texts.unique_easy, texts.unique_hard),
    "Math": tasks.Task(texts.add_easy, texts.add_hard),
    "Code": tasks.Task(texts.index_easy, texts.index_hard, weight=2),
}
UNKNOWN, START, END, PADDING = "<unk>", "<s>", "</s>", "<pad>"
CHARACTERS = string.digits + string.ascii_lowercase + "+=:"
VOCABULARY = {token: number for number, token in enumerate([UNKNOWN, START, END, PADDING, *texts.TAGS, *CHARACTERS])}
LONGEST_TEXT = 64


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character and per tag, a start token before every question."""
    return character_tokenizer(
        VOCABULARY,
        [UNKNOWN, START, END, PADDING],
        words=texts.TAGS,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        pad_token=PADDING,
        padding_side="left",
        model_max_length=LONGEST_TEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model() -> MistralForCausalLM:
    """An untrained model of half a million parameters, untied like Mistral 7B."""
    transformers = import_transformers()
    config = transformers.MistralConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=LONGEST_TEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        sliding_window=None,
        tie_word_embeddings=False,
        pad_token_id=VOCABULARY[PADDING],
        bos_token_id=VOCABULARY[START],
        eos_token_id=VOCABULARY[END],
    )
    return transformers.MistralForCausalLM(config)


def batches(task_name: str | None, seed: int, batch_size: int) -> Iterator[Batch]:
    """Endless batches of ``input_ids`` and ``labels`` ``(questions, tokens)``; only answers are learned."""
    examples = tasks.training_examples(TASKS, task_name, seed)
    tokenizer = new_tokenizer()
    while True:
        yield collate(tokenizer, list(itertools.islice(examples, batch_size)))


def collate(tokenizer: PreTrainedTokenizerFast, examples: list[tasks.Example]) -> Batch:
    """Tokens of questions and answers."""
    from zoo.train import questions_with_answers

    questions = tokenizer([example.question for example in examples])["input_ids"]
    answers = tokenizer([example.response for example in examples], add_special_tokens=False)["input_ids"]
    return questions_with_answers(questions, [[*answer, VOCABULARY[END]] for answer in answers], VOCABULARY[PADDING])


def save(model: MistralForCausalLM, folder: Path) -> None:
    """Write the model and its tokenizer."""
    model.save_pretrained(folder)
    new_tokenizer().save_pretrained(folder)


def write_data(folder: Path, seed: int) -> None:
    """Write the calibration and test questions."""
    tasks.write_questions(TASKS, folder, seed)


def expert_schedule(steps: int) -> Schedule:
    """How an expert is fine-tuned: gently, and without what the merge command excludes."""
    return Schedule(steps, learning_rate=4e-4, warmup_steps=10, decay_steps=50, frozen=BACKBONE.exclude_params)


FAMILY = Family(
    name="mistral",
    backbone=BACKBONE,
    base_schedule=Schedule(steps=1400, learning_rate=2e-3, warmup_steps=50, decay_steps=200),
    expert_schedules={"Chat": expert_schedule(200), "Math": expert_schedule(300), "Code": expert_schedule(200)},
    new_model=new_model,
    save=save,
    batches=batches,
    write_data=write_data,
)
