"""Train one model of a zoo: AdamW, a linear rise and fall of the learning rate, the model's own loss on answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from expert_merging.writing import partial_name
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


@dataclass(frozen=True)
class Saved:
    """The state of an unfinished training on disk.

    Args:
        file: Where it is.
        every: Steps between two states.
    """

    file: Path
    every: int = 10

    def save(self, step: int, *parts: Any) -> None:
        """Keep the number of steps done and the states of all that changes with them, instead of the former ones."""
        unfinished = partial_name(self.file)
        torch.save([step, *(part.state_dict() for part in parts)], unfinished)
        unfinished.replace(self.file)

    def load(self, *parts: Any) -> int:
        """Go back to the state on disk if there is one; the number of steps done."""
        if not self.file.exists():
            return 0
        step, *states = torch.load(self.file, weights_only=True)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
        return int(step)


def train(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    schedule: Schedule,
    report: Callable[[int], object],
    *,
    file_name: Callable[[str], str] = str,
    large: bool = False,
    saved: Saved | None = None,
) -> None:
    """Train ``model`` in place.

    Args:
        model: Any model that returns a loss for a batch with ``labels``.
        batches: At least ``schedule.steps`` batches.
        schedule: How long and how fast.
        report: Called with the steps that are done already, then with 1 after every step.
        file_name: Name in the files of a parameter's name in memory.
        large: Multiply matrices in bfloat16, weights staying as they are, and update weights in one go.
        saved: Where to go on, and to keep the state on the way.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(re.match(pattern, file_name(name)) for pattern in schedule.frozen))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=schedule.learning_rate, weight_decay=0.01, fused=large)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(schedule, step))
    changing = (torch.nn.ParameterList(trained), optimizer, scheduler)
    done = saved.load(*changing) if saved else 0
    report(done)
    model.train()
    for step, batch in enumerate(islice(batches, done, schedule.steps), done + 1):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=large):
            loss = model(**{name: value.to(model.device) for name, value in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if saved and step % saved.every == 0:
            saved.save(step, *changing)
        report(1)
    model.eval()
