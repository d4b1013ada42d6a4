"""Build a zoo, merge its experts with several methods, and compare them with the base and the experts."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from expert_merging.catalogue import all_methods, find_method
from expert_merging.errors import InputError
from expert_merging.options import ROOT
from expert_merging.run import Run
from expert_merging.signals import environment_of_child
from zoo.build import build
from zoo.evaluate import Scores, exact_match
from zoo.family import Family, default_folder, load_family
from zoo.progress import progress
from zoo.report import evaluate, table, with_mean

# Task arithmetic is what Expert Merging starts from; it is shown at its best coefficient as well, chosen with the very
# questions that it is measured on, which no other row may do.
TUNED = "task_arithmetic"
RESULTS = ROOT / "results" / "logs"
COEFFICIENTS = tuple(round(0.1 * step, 1) for step in range(1, 11))


def demo(
    family_name: str, *, seed: int, methods: Sequence[str], console: Console, results: Path = RESULTS
) -> dict[str, Scores]:
    """Build, merge, evaluate; the numbers of the table that is printed.

    Args:
        family_name: model family.
        seed: decides the zoo and the merging.
        methods: registry names, or ``all``.
        console: shows the commands and the table.
        results: folder for the runs.

    Raises:
        InputError: an unknown family or method, or a merge that failed.
    """
    family = load_family(family_name)
    names = (
        [name for name, entry in all_methods().items() if entry.merges_any_experts]
        if "all" in methods
        else [find_method(name).name for name in methods]
    )
    zoo = default_folder(family_name, seed)
    with progress(console) as shown:
        build(family, zoo, seed=seed, progress=shown)
    merge = Merging(family, zoo, seed, results)
    runs = [merge.run(name, console=console) for name in names]
    console.print("answering the held-out questions ...")
    scores = evaluate(zoo, [run.folder for run in runs])
    note = ""
    if TUNED in names:
        best, scores[f"{TUNED}, best coefficient"] = merge.best_coefficient(console)
        note = f"best coefficient: {best:g}, the best of {len(COEFFICIENTS)} on these very questions"
    console.print(table(scores))
    console.print(note, highlight=False)
    for run in runs:
        console.print(f"merged model: {os.path.relpath(run.model)}", highlight=False, soft_wrap=True)
    return scores


@dataclass(frozen=True)
class Merging:
    """Runs the merge command on one zoo."""

    family: Family
    zoo: Path
    seed: int
    results: Path

    @property
    def config(self) -> Path:
        """The zoo's configuration of the merge command."""
        return ROOT / "zoo" / f"{self.family.name}.yaml"

    @property
    def configuration(self) -> dict[str, Any]:
        """What it says."""
        import yaml

        content: dict[str, Any] = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        return content

    def run(self, method: str, *more: str, console: Console | None = None) -> Run:
        """Merge in a process of its own, as a user would."""
        command, run = self.command(method, *more)
        start = time.monotonic()
        if console is not None:
            words = ["python", *(os.path.relpath(word) if Path(word).is_absolute() else word for word in command[1:])]
            console.print(f"$ {shlex.join(words)}", highlight=False, soft_wrap=True)
        done = subprocess.run(command, capture_output=True, text=True, env=environment_of_child())
        if done.returncode:
            raise InputError(f"merging with {method} failed: {done.stderr.strip()}")
        if console is not None:
            console.print(f"  {time.monotonic() - start:.0f} s", highlight=False)
        return run

    def command(self, method: str, *more: str) -> tuple[list[str], Run]:
        """The command, and its run.

        The run is named after all that decides it: the same demo finds its runs again, a changed one gets new ones.
        """
        decisive = [self.config.read_bytes(), (self.zoo / "zoo.json").read_bytes(), " ".join(more).encode()]
        name = f"zoo-{self.family.name}-seed{self.seed}-{hashlib.sha256(b''.join(decisive)).hexdigest()[:6]}"
        script = ROOT / self.family.backbone.name / "model_merging.py"
        arguments = ["--method", method, *self.family.places(self.zoo), "--data_dir", str(self.zoo / "dataset")]
        arguments += ["--config", str(self.config), "--seed", str(self.seed), *more]
        if self.results != RESULTS:
            arguments += ["--output_path", str(self.results)]
        return [sys.executable, str(script), *arguments, "--run_name", name], Run.named(self.results, method, name)

    def best_coefficient(self, console: Console) -> tuple[float, Scores]:
        """Task arithmetic's best coefficient on the test questions, and its scores."""
        console.print(f"looking for the best coefficient of {TUNED} ...", highlight=False)
        found = {}
        for coefficient in COEFFICIENTS:
            run = self.run(TUNED, "--scaling_coefficient", f"{coefficient:g}")
            scores = exact_match(self.family.backbone, run.model, self.zoo / "test")
            found[coefficient] = with_mean({task: scores[task] for task in self.family.backbone.expert_folders})
            console.print(f"  {coefficient:g}: {found[coefficient]['mean']:.1f}", highlight=False)
        best = max(found, key=lambda coefficient: found[coefficient]["mean"])
        return best, found[best]
