"""What the zoos of picture models share: words, schedules, batches.

Both families have a Qwen2 tokenizer, which cuts text into bytes and joins them. The ones here have joined what
questions, answers and prompts are made of: a word is a token.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from expert_merging.backbone import Backbone
from expert_merging.libraries import import_transformers
from zoo import tasks
from zoo.family import Batch, Family, Schedule
from zoo.pictures import TASKS
from zoo.tokens import save_slow_tokenizer

END, PADDING = "<|im_end|>", "<|endoftext|>"
LONGEST_TEXT = 512
# Sizes of the language model that both families have.
LANGUAGE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST_TEXT,
    "initializer_range": 0.04,
}
EXPERT_STEPS = 200
# Experts see a little of everything while they learn their own task, and forget less of it.
REHEARSAL = 0.1
# More of the hard versions, and the base would know them so well that there is little left to learn.
HARD_SHARE = 0.03


@cache
def new_tokenizer(special: tuple[str, ...], template: str) -> Any:
    """A Qwen2 tokenizer with a token for every word of the tasks and of the prompt template.

    Args:
        special: further special tokens, such as those of pictures.
        template: what prompts are made of.
    """
    from tokenizers import pre_tokenizers, trainers

    kind = import_transformers().Qwen2Tokenizer
    backend = kind().backend_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=5000, min_frequency=0, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*_texts(), template], trainer)
    learned = json.loads(backend.to_str())["model"]
    return kind(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token=END,
        pad_token=PADDING,
        unk_token=PADDING,
        extra_special_tokens=list(special),
        model_max_length=LONGEST_TEXT,
    )


def _texts() -> list[str]:
    """Questions and answers with every word that the tasks have."""
    draw = random.Random("words")
    versions = [version for task in TASKS.values() for version in (task.easy, task.hard)]
    examples = [version(draw) for version in versions for _ in range(300)]
    return sorted({text for example in examples for text in (example.question, example.response)})


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a Qwen2 tokenizer as published folders have it."""
    learned = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    special = {token.content: number for number, token in added.items()}
    settings = {"eos_token": END, "pad_token": PADDING, "model_max_length": LONGEST_TEXT}
    save_slow_tokenizer(folder, learned["vocab"], learned["merges"], special, settings)


def questions_with_answers(tokenizer: Any, prompt: str, examples: Sequence[tasks.Example]) -> Batch:
    """Tokens of prompts and answers.

    Args:
        tokenizer: the tokenizer.
        prompt: text with ``{question}`` in it and tokens for a picture.
        examples: questions and answers.
    """
    from zoo import train

    questions = tokenizer([prompt.replace("{question}", example.question) for example in examples])["input_ids"]
    answers = tokenizer([example.response + END for example in examples])["input_ids"]
    return train.questions_with_answers(questions, answers, tokenizer.pad_token_id)


def batches(
    new_collate: Callable[[], Callable[[list[tasks.Example]], Batch]], task: str | None, seed: int, batch_size: int
) -> Iterator[Batch]:
    """Endless batches, see `zoo.family.Family`."""
    collate = new_collate()
    rehearsal = REHEARSAL if task else 0
    examples = tasks.training_examples(TASKS, task, seed, rehearsal=rehearsal, hard_share=HARD_SHARE)
    while True:
        yield collate(list(itertools.islice(examples, batch_size)))


def expert_schedule(steps: int, excluded: tuple[str, ...]) -> Schedule:
    """How an expert is fine-tuned: gently, and without what the merge command excludes.

    What is left are attention and MLP of the language model, and the bridge to it from the pictures.
    """
    return Schedule(steps, learning_rate=3e-4, warmup_steps=20, decay_steps=steps // 2, batch_size=32, frozen=excluded)


def picture_family(
    name: str,
    backbone: Backbone,
    *,
    new_model: Callable[[], Any],
    save: Callable[[Any, Path], None],
    new_collate: Callable[[], Callable[[list[tasks.Example]], Batch]],
    expert_steps: Mapping[str, int],
) -> Family:
    """A zoo on the picture tasks.

    Args:
        name: name on the command line.
        backbone: the family as the merge command knows it.
        new_model: makes an untrained model.
        save: writes a model with its tokenizer.
        new_collate: makes what turns examples into a batch.
        expert_steps: how long the experts are trained that take longer than the others.
    """
    return Family(
        name=name,
        backbone=backbone,
        base_schedule=Schedule(steps=2400, learning_rate=1e-3, warmup_steps=50, decay_steps=800, batch_size=32),
        expert_schedules={
            task: expert_schedule(expert_steps.get(task, EXPERT_STEPS), backbone.exclude_params) for task in TASKS
        },
        new_model=new_model,
        save=save,
        batches=partial(batches, new_collate),
        write_data=partial(tasks.write_questions, TASKS),
    )
