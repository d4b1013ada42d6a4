"""Boxes that a model has found in pictures: InternVL's own script for RefCOCO, as its authors measure it.

The script writes ``DATASET_DATE.json``: for each question the answer, the right box in pixels, and the picture's size.
A box is found where it overlaps the right one by half or more. Answers give thousandths of the picture's sides.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expert_merging.checkpoints.fingerprints import of_text
from expert_merging.comparing.columns import GROUNDING, Measured
from expert_merging.comparing.scoring import task_score
from expert_merging.documents import read_json
from expert_merging.errors import InputError, first_of

_FILE = re.compile(r"(refcoco[+g]?_(?:val|testA|testB|test))_\d{12}\.json")
_BOX = re.compile(r"\[([^\[\],]*),([^\[\],]*),([^\[\],]*),([^\[\],]*)\]")
_ADVICE = "let InternVL's script write it again"
_FOUND = 0.5


def read_grounding(folder: Path) -> Measured:
    """Scores by column; nothing where the folder holds none.

    Args:
        folder: that the script has written to (``--out-dir``), for one model.

    Raises:
        InputError: a file cannot be read or has another form, or a data set was measured more than once.
    """
    files = defaultdict[str, list[Path]](list)
    for file in sorted(folder.iterdir()):
        if match := _FILE.fullmatch(file.name):
            files[match[1]].append(file)
    found = Measured()
    for dataset, own in files.items():
        if len(own) > 1:
            names = first_of([file.name for file in own], 5)
            raise InputError(f"{folder} has {names}, which do not say whose they are; leave those of one model there")
        column = GROUNDING.get(dataset)
        if column is None:
            found.left_out.append(dataset)
            continue
        entries = read_json(own[0], advice=_ADVICE)
        try:
            points = [float(overlap(_answered(entry), entry["gt_bbox"]) >= _FOUND) for entry in entries]
            digest = of_text(json.dumps([[entry["gt_bbox"], entry["hw"]] for entry in entries]))
            found.tasks[column.name] = task_score(points, digest)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError):
            raise InputError(f"{own[0]} does not hold boxes as InternVL's script writes them; {_ADVICE}") from None
    return found


def _answered(entry: Mapping[str, Any]) -> list[float]:
    """The box of an answer in pixels; one of no size where it has none."""
    found = _BOX.search(entry["answer"])
    try:
        box = [float(number) for number in found.groups()] if found else [0.0] * 4
    except ValueError:
        box = [0.0] * 4
    scale = 1000 if sum(box) >= 4 else 1  # shares of the sides, otherwise
    height, width = entry["hw"]
    return [number / scale * side for number, side in zip(box, (width, height, width, height), strict=True)]


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes, each ``(left, top, right, bottom)``."""
    shared = [min(one[end + 2], other[end + 2]) - max(one[end], other[end]) for end in (0, 1)]
    common = max(0.0, shared[0]) * max(0.0, shared[1])
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - common
    return common / union if union else 0.0
