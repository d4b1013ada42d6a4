"""Further questions out of a task's own: the beginning of one, the rest of another, and some pieces from elsewhere.

Questions of a task are built alike, so most of what comes out is a question of the task too, and what is not still
shows how its expert behaves near them. Experts answer anything, and nothing but their behaviour is learned. Pieces from
elsewhere, crossing and mutation of genetic algorithms, bring what a few questions have at one place to all others.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from expert_merging.questions.calibration import Sample
from expert_merging.questions.entries import MARK

logger = logging.getLogger(__name__)

# Drawings for each question that is wanted, after which there are no more.
_ATTEMPTS = 20
# Share of the pieces that differ between a task's questions for which others of them are put.
_MUTATED = 0.3


def crossed(samples: Sequence[Sample], count: int, pieces: Callable[[str], list[str]], seed: int) -> list[Sample]:
    """Questions that are crossed from those of each task; pictures are those of either question.

    A question that says where its pictures go stays whole and gets the pictures of another.

    Args:
        samples: of all tasks.
        count: further questions of each task; there may be fewer that differ.
        pieces: cuts a text where it may be cut.
        seed: decides which are crossed and where.

    """
    found: list[Sample] = []
    for task in dict.fromkeys(sample.task for sample in samples):
        own = [sample for sample in samples if sample.task == task]
        if len(own) == 1:
            logger.info("%s has one question alone, so no further ones are made of it", task)
            continue
        found += _of_task(own, count, pieces, random.Random(f"{seed}/{task}"))
    return found


def _of_task(
    own: Sequence[Sample], count: int, pieces: Callable[[str], list[str]], draw: random.Random
) -> list[Sample]:
    known = {(sample.question, sample.images) for sample in own}
    cut = {sample.question: pieces(sample.question) for sample in own}
    mutated = _mutation([*cut.values()], draw)
    made: list[Sample] = []
    for _ in range(_ATTEMPTS * count):
        if len(made) == count:
            break
        first, second = draw.sample(own, 2)
        question = "".join(mutated(_cross(cut[first.question], cut[second.question], draw)))
        pictures = draw.choice((first, second)).images
        if MARK in first.question + second.question:
            question, pictures = first.question, second.images
            if len(first.images) != len(second.images):
                continue
        if (question, pictures) not in known:
            known.add((question, pictures))
            identity = f"{first.identity}+{second.identity}#{len(made)}"
            made.append(replace(first, question=question, response=None, identity=identity, images=pictures, file=None))
    return made


def _cross(first: list[str], second: list[str], draw: random.Random) -> list[str]:
    shorter = min(len(first), len(second))
    cut = draw.randrange(1, shorter) if shorter > 1 else 0
    return [*first[:cut], *second[cut:]]


def _mutation(questions: Sequence[list[str]], draw: random.Random) -> Callable[[list[str]], list[str]]:
    """What changes some pieces of a question; what all questions of the task have at a place stays there."""
    at = [set(pieces) - {None} for pieces in itertools.zip_longest(*questions)]
    varied = {place for place, pieces in enumerate(at) if len(pieces) > 1}
    others = [pieces[place] for pieces in questions for place in sorted(varied) if place < len(pieces)]

    def mutate(pieces: list[str]) -> list[str]:
        return [
            draw.choice(others) if place in varied and draw.random() < _MUTATED else piece
            for place, piece in enumerate(pieces)
        ]

    return mutate


def token_pieces(tokenizer: Any) -> Callable[[str], list[str]]:
    """Cuts a text between a tokenizer's tokens, or between characters where the tokenizer does not say where those are.

    Args:
        tokenizer: the tokenizer.
    """

    def pieces(text: str) -> list[str]:
        if not tokenizer.is_fast:
            return list(text)
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        # Several tokens may make one character, and what lies between tokens goes with the one before.
        places = [*sorted({0, *(start for start, _ in offsets)}), len(text)]
        return [text[start:stop] for start, stop in itertools.pairwise(places) if start < stop]

    return pieces
