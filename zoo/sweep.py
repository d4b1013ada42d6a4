"""Sweeps over a zoo: its models, options, questions to learn from and questions to be measured by.

``python -m zoo sweep FAMILY FILE.yaml`` is ``python -m expert_merging sweep FILE.yaml`` with the flags that say where
all these are. Methods that learn do so from ten questions a task; each draw has others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from expert_merging.errors import InputError
from expert_merging.options import ROOT
from expert_merging.writing import write_atomically
from zoo.family import Family, default_folder
from zoo.report import read_description

# Questions of a task in a draw.
DRAWN = 10


def sweep(family: Family, seed: int, draw: int, more: Sequence[str]) -> int:
    """Run the sweep and return its exit code.

    Args:
        family: the zoo's family.
        seed: its seed, and that of the merges.
        draw: which questions methods learn from, counted from 0.
        more: the sweep's own arguments.

    Raises:
        InputError: the zoo has not been built, or has no so many questions.
    """
    from expert_merging.commands.main import main

    zoo = default_folder(family.name, seed)
    read_description(zoo, family.name, seed)
    places = [*family.places(zoo), "--data_dir", str(questions_of(zoo, draw)), "--questions", str(zoo / "test")]
    config = ["--family", family.backbone.name, "--config", str(ROOT / "zoo" / f"{family.name}.yaml")]
    return main(["sweep", *more, *config, *places, "--seed", str(seed)])


def questions_of(zoo: Path, draw: int) -> Path:
    """Folder with the questions of a draw, made anew; of the first, it has those of the others too.

    Raises:
        InputError: there are not so many.
    """
    if draw == 0:
        return zoo / "dataset"
    folder = zoo / "draws" / str(draw)
    for file in sorted((zoo / "dataset").glob("*.json")):
        entries = json.loads(file.read_text(encoding="utf-8"))
        if len(entries) < (draw + 1) * DRAWN:
            most = max(0, len(entries) // DRAWN - 1)
            raise InputError(
                f"--draw {draw}: {file} has {len(entries)} questions, {DRAWN} for a draw; give --draw {most} at most"
            )
        entries = entries[draw * DRAWN : (draw + 1) * DRAWN]
        for entry in entries:
            if "image_path" in entry:
                entry["image_path"] = str((file.parent / entry["image_path"]).resolve())
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / file.name, json.dumps(entries).encode())
    return folder
