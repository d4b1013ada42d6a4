"""What a judge has preferred: the annotations that AlpacaEval writes.

``annotations.json`` has for each instruction a preference, from 1 where the reference's answer is better to 2 where the
model's is. 1.5 is a draw, as is 0 in older versions. The score is the win rate, not corrected for length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expert_merging.checkpoints.fingerprints import of_text
from expert_merging.comparing.columns import ALPACA, Measured
from expert_merging.comparing.scores_file import finite
from expert_merging.comparing.scoring import task_score
from expert_merging.documents import read_json
from expert_merging.errors import InputError, first_of

_ADVICE = "let alpaca_eval write it again"
_DRAW = 0.5


def read_preferences(folder: Path) -> Measured:
    """The win rate; nothing where the folder holds no annotations.

    Args:
        folder: with annotations of one model by one judge, also in a folder inside it.

    Raises:
        InputError: the file cannot be read or has another form, or there are several.
    """
    files = sorted(folder.rglob("annotations.json"))
    if not files:
        return Measured()
    if len(files) > 1:
        raise InputError(f"preferences of several judges or models: {first_of(files, 5)}; give the folder of one")
    entries = read_json(files[0], advice=_ADVICE)
    try:
        models = sorted({str(entry["generator_2"]) for entry in entries})
        judged = [entry for entry in entries if not _is_missing(entry["preference"])]
        points = [_points(entry) for entry in judged]
        digest = of_text(json.dumps([[entry["instruction"], entry["output_1"]] for entry in judged]))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{files[0]} does not hold preferences as alpaca_eval writes them; {_ADVICE}") from None
    if len(models) > 1:
        raise InputError(f"{files[0]} has preferences about several models: {first_of(models, 5)}; give those of one")
    return Measured({ALPACA: task_score(points, digest)}) if points else Measured()


def _is_missing(preference: Any) -> bool:
    """Whether the judge has not answered."""
    return preference is None or (isinstance(preference, float) and math.isnan(preference))


def _points(entry: Mapping[str, Any]) -> float:
    preference = finite(entry["preference"])
    if preference != 0 and not 1 <= preference <= 2:
        raise ValueError(preference)
    return preference - 1 if preference else _DRAW
