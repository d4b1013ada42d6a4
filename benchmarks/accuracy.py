"""Accuracy of all methods on one zoo, by its name: exact match on held-out questions.

``python -m benchmarks.accuracy smollm2`` merges the zoo's experts with every method, with several coefficients and with
the variants of Expert Merging, the most telling ones first. Methods that learn from questions do so three times, each
time from others. Every result is kept under ``benchmarks/work`` as soon as it is there, so the same command goes on
where it was stopped; the figures go to ``benchmarks/accuracy-FAMILY.json``.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from expert_merging.catalogue import all_methods
from expert_merging.errors import InputError, tell
from expert_merging.options import ROOT
from expert_merging.provenance import provenance
from expert_merging.writing import write_atomically
from zoo.demo import Merging
from zoo.evaluate import exact_match
from zoo.family import default_folder, load_family
from zoo.report import evaluate, table, with_mean

WORK = ROOT / "benchmarks" / "work" / "accuracy"
# What experts add to closed forms keeps its size at 1, and wants small steps.
ON_PARTS = {"learning_rate": 0.02}


@dataclass(frozen=True)
class Variant:
    """One way to merge.

    Args:
        method: registry name.
        flags: values of options that differ from the zoo's configuration.
    """

    method: str
    flags: Mapping[str, str | float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Row of the table."""
        return " ".join([self.method, *(f"--{name} {value}" for name, value in self.flags.items())])

    @property
    def draws(self) -> bool:
        """Whether it depends on the questions that it is given."""
        return all_methods()[self.method].reads_samples


def variants() -> list[Variant]:
    """Everything that is measured, the most telling first."""
    first = [
        Variant("weight_average"),
        *_scaled("task_arithmetic", 0.3, 0.45, 0.6, 0.8, 1),
        Variant("expert_merging"),
        Variant("align_merge"),
        Variant("aswudi"),
        Variant("expert_merging", {"directions": "aswudi", **ON_PARTS}),
        Variant("svd"),
        Variant("expert_merging", {"directions": "svd", **ON_PARTS}),
        Variant("expert_merging", {"parametrisation": "row"}),
    ]
    more = [
        *(Variant(name) for name, method in all_methods().items() if method.merges_any_experts),
        *_scaled("svd", 0.7, 1.3),
        *_scaled("iso", 1.5, 2),
        *_scaled("ties", 0.6, 1.5, 2),
        *(variant for name in ("wudi", "wudi2", "iwudi", "swudi", "aswudi") for variant in _scaled(name, 0.6)),
    ]
    known = {variant.label for variant in first} | {"task_arithmetic"}  # whose default is 0.3
    return first + [variant for variant in more if variant.label not in known]


def _scaled(method: str, *coefficients: float) -> Iterator[Variant]:
    return (Variant(method, {"scaling_coefficient": coefficient}) for coefficient in coefficients)


@dataclass(frozen=True)
class Bench:
    """The measurements of one zoo.

    Args:
        merging: runs the merge command.
        work: folder for everything that is made.
        questions: how many test questions of each task are asked; None: all.
    """

    merging: Merging
    work: Path
    questions: int | None

    def result(self, variant: Variant, draw: int) -> Path:
        """File of the figures of a variant that has learned from the questions of a draw."""
        name = re.sub(r"[^a-z0-9.+]+", "-", variant.label.lower())
        return self.work / "results" / f"{name}-draw{draw}-{self.questions or 'all'}.json"

    def questions_of(self, draw: int) -> Path:
        """Folder with the questions of a draw: as many as are learned from, and for every draw others."""
        count = self.merging.configuration["samples_per_task"]
        folder = self.work / f"dataset{draw}"
        for file in sorted((self.merging.zoo / "dataset").glob("*.json")):
            entries = json.loads(file.read_text(encoding="utf-8"))[draw * count : (draw + 1) * count]
            for entry in entries:
                if "image_path" in entry:
                    entry["image_path"] = str(file.parent / entry["image_path"])
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / file.name, json.dumps(entries).encode())
        return folder

    def measure(self, variant: Variant, draw: int) -> None:
        """Merge, ask, and keep the figures instead of the model."""
        flags = [word for name, value in variant.flags.items() for word in (f"--{name}", str(value))]
        if variant.draws:
            flags += ["--data_dir", str(self.questions_of(draw))]
        start = time.monotonic()
        run = self.merging.run(variant.method, *flags)
        seconds = time.monotonic() - start
        scores = exact_match(
            self.merging.family.backbone, run.model, self.merging.zoo / "test", questions=self.questions
        )
        file = self.result(variant, draw)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({"seconds": round(seconds), "scores": with_mean(scores)}).encode())
        shutil.rmtree(run.model)

    def rows(self, measured: Sequence[Variant], draws: int) -> dict[str, Any]:
        """What is known of every variant by label, with means over draws."""
        rows = {}
        for variant in measured:
            files = [self.result(variant, draw) for draw in range(draws)]
            found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
            if found:
                means = [draw["scores"]["mean"] for draw in found]
                tasks = {name: statistics.mean(draw["scores"][name] for draw in found) for name in found[0]["scores"]}
                rows[variant.label] = {
                    "scores": {name: round(value, 2) for name, value in tasks.items()},
                    "draws": means,
                    "seconds": [draw["seconds"] for draw in found],
                }
        return rows


def main() -> None:
    """Measure what is missing, write the figures after each, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.split("\n")[0])
    parser.add_argument("family", metavar="FAMILY", help="the zoo, which python -m zoo build FAMILY has built")
    parser.add_argument("--seed", type=int, default=0, help="seed of the zoo (default: 0)")
    parser.add_argument("--draws", type=int, default=3, help="times that methods learn, from other questions each time")
    parser.add_argument("--questions", type=int, metavar="N", help="ask the first N of each task (default: all)")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="methods to measure (default: all)")
    parser.add_argument("--json", type=Path, help="file for the figures (default: benchmarks/accuracy-FAMILY.json)")
    options = parser.parse_args()
    zoo = default_folder(options.family, options.seed)
    work = WORK / zoo.name
    bench = Bench(Merging(load_family(options.family), zoo, options.seed, work / "runs"), work, options.questions)
    console = Console()
    own = evaluate(zoo, [], questions=options.questions)
    file = options.json or ROOT / "benchmarks" / f"accuracy-{options.family}.json"
    asked = [variant for variant in variants() if not options.only or variant.method in options.only]
    for draw in range(options.draws):
        for variant in asked:
            if (draw == 0 or variant.draws) and not bench.result(variant, draw).exists():
                console.print(f"{variant.label}, draw {draw}", highlight=False)
                bench.measure(variant, draw)
                save(file, bench, own, options.draws)
    rows = bench.rows(variants(), options.draws)
    save(file, bench, own, options.draws)
    console.print(table(own | {label: row["scores"] for label, row in rows.items()}))


def save(file: Path, bench: Bench, own: Mapping[str, Any], draws: int) -> None:
    """Write settings and rows, a line for each row."""
    settings = {
        "zoo": json.loads((bench.merging.zoo / "zoo.json").read_text(encoding="utf-8")),
        "questions": bench.questions,
        "configuration": bench.merging.configuration,
        **provenance(),
    }
    rows = {label: {"scores": scores} for label, scores in own.items()} | bench.rows(variants(), draws)
    lines = ",\n".join(f"  {json.dumps(label)}: {json.dumps(row)}" for label, row in rows.items())
    head = json.dumps({"settings": settings}, indent=1).removesuffix("\n}")
    write_atomically(file, f'{head},\n "rows": {{\n{lines}\n }}\n}}\n'.encode())


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        tell(error)
        sys.exit(1)
