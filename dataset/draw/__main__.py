"""Write every ``<Task>.json`` and its pictures into ``dataset/``, or into the folder that is given."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dataset.draw import charts, figures, scenes, texts
from dataset.draw.entry import Draw, Entry, png
from expert_merging.writing import write_atomically

TASKS: Mapping[str, Sequence[Entry]] = {
    "Chart": charts.ENTRIES,
    "Geometry": figures.ENTRIES,
    "Grounding": scenes.GROUNDING,
    "OCR": texts.ENTRIES,
    "VQA": scenes.QUESTIONS,
}


def main(folder: Path) -> None:
    """Write all files below ``folder``; tasks that ask about the same picture share its file."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names: dict[Draw, str] = {}
    for task, entries in TASKS.items():
        described = []
        for number, entry in enumerate(entries):
            name = names.setdefault(entry.draw, f"images/{task.lower()}-{number}.png")
            described.append({"question": entry.question, "question_id": number, "task_name": task, "image_path": name})
        text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / f"{task}.json", text.encode())
    for draw, name in names.items():
        write_atomically(folder / name, png(draw()))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent)
