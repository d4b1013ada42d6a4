"""Train one model of a zoo: AdamW, a linear rise and fall of the learning rate, the model's own loss on answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from expert_merging.backbone import same_name
from zoo.family import Batch, Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_GRADIENT_NORM = 1.0


def learning_rate_factor(schedule: Schedule, step: int) -> float:
    """The share of the highest learning rate at ``step`` (from 0), in (0, 1]."""
    rise = (step + 1) / (schedule.warmup_steps + 1)
    fall = (schedule.steps - step) / (schedule.decay_steps + 1)
    return min(1.0, rise, fall)


def questions_with_answers(questions: Sequence[list[int]], answers: Sequence[list[int]], padding: int) -> Batch:
    """``input_ids`` and ``labels`` ``(questions, tokens)``; only answers are learned.

    Padded on the right, where a causal model needs no attention mask.
    """
    pairs = list(zip(questions, answers, strict=True))
    input_ids = [torch.tensor(question + answer) for question, answer in pairs]
    labels = [torch.tensor([-100] * len(question) + answer) for question, answer in pairs]
    return {
        "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=padding),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def train(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    schedule: Schedule,
    report: Callable[[int], object],
    *,
    file_name: Callable[[str], str] = same_name,
) -> None:
    """Train ``model`` in place.

    Args:
        model: Any model that returns a loss for a batch with ``labels``.
        batches: At least ``schedule.steps`` batches.
        schedule: How long and how fast.
        report: Called with 1 after every step.
        file_name: Name in the files of a parameter's name in memory.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(re.match(pattern, file_name(name)) for pattern in schedule.frozen))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=schedule.learning_rate, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(schedule, step))
    model.train()
    for batch in islice(batches, schedule.steps):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        report(1)
    model.eval()
