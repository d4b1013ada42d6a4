"""How well models predict texts, which shows whether a merge has cost what its base could.

The measure is that of lm-evaluation-harness: bits per byte, which models with other words share, over windows that
follow one another, each beginning with the last token of the one before; the last, with as many as fit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expert_merging.comparing.asked import Asked
from expert_merging.comparing.scores_file import SetScore, TaskScore
from expert_merging.documents import read_text
from expert_merging.errors import InputError, Problems, first_of
from expert_merging.running.answers import BATCH_TOKENS, Row, likelihoods
from expert_merging.running.prompts import tokenizer_of

METRIC = "bits_per_byte"
_SUFFIXES = (".txt", ".md")
# The longest window, whatever a model may take.
_LONGEST = BATCH_TOKENS


@dataclass(frozen=True)
class Text:
    """A text that models are to predict.

    Args:
        name: its file's, without the suffix.
        content: what it says.
    """

    name: str
    content: str

    @property
    def digest(self) -> str:
        """Tells texts with the same name apart."""
        return hashlib.sha256(self.content.encode()).hexdigest()[:16]


def load_texts(folder: Path) -> list[Text]:
    """The texts of a folder, each file one.

    Raises:
        InputError: there are none, or one cannot be read or is empty.
    """
    if not folder.is_dir():
        raise InputError(f"--texts {folder} is not a folder; give one with texts in it ({', '.join(_SUFFIXES)})")
    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in _SUFFIXES and file.is_file()]
    if not files:
        raise InputError(f"--texts {folder} has no texts in it; they are files called NAME{' or NAME'.join(_SUFFIXES)}")
    problems, found = Problems(), list[Text]()
    for file in files:
        with problems.collecting():
            found.append(Text(file.stem, read_text(file, advice="save it as UTF-8")))
            if not found[-1].content.strip():
                problems.add(f"{file} is empty; write a text into it, or remove it")
    twice = [text.name for text in found if sum(other.name == text.name for other in found) > 1]
    if twice:
        problems.add(f"--texts {folder} has {first_of(list(dict.fromkeys(twice)), 3)} twice; rename one of them")
    problems.check()
    return found


def windows(tokens: Sequence[int], before: int, longest: int) -> list[Row]:
    """Windows that predict each token once.

    Args:
        tokens: of a text.
        before: what stands before the first of them.
        longest: tokens that are predicted at a time, and that stand before the last at most.
    """
    all_tokens, rows = [before, *tokens], []
    for start in range(0, len(tokens), longest):
        stop = min(start + longest, len(tokens))
        prompt = all_tokens[max(0, stop - longest) : start + 1]
        rows.append(Row({"input_ids": torch.tensor([prompt])}, all_tokens[start + 1 : stop + 1]))
    return rows


def token_before(asked: Asked) -> int:
    """What stands before a text's first token: the one that begins texts, or else the one that ends them.

    Raises:
        InputError: the model's tokenizer has neither.
    """
    tokenizer = tokenizer_of(asked.processor)
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InputError(
        f"{asked.model.label}: its tokenizer has neither a first nor a last token; name one in tokenizer_config.json "
        "(bos_token)"
    )


def predict(asked: Asked, model: Any, texts: Sequence[Text], advance: Callable[[int], object]) -> SetScore:
    """A model's bits per byte of each text.

    Args:
        asked: the model, ready to be asked.
        model: the same, loaded.
        texts: what it is to predict.
        advance: told of every text.

    Raises:
        InputError: its tokenizer has no token that could begin a text.
    """
    tokenizer, before, tasks = tokenizer_of(asked.processor), token_before(asked), dict[str, TaskScore]()
    for text in texts:
        tokens = tokenizer(text.content, add_special_tokens=False)["input_ids"]
        rows = dict(enumerate(windows(tokens, before, min(asked.longest or _LONGEST, _LONGEST))))
        nats = -math.fsum(found for _, found in likelihoods(model, rows))
        tasks[text.name] = TaskScore(nats / math.log(2) / len(text.content.encode()), questions=text.digest)
        advance(1)
    return SetScore(tasks, METRIC, higher_is_better=False)
