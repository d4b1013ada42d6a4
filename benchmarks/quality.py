"""Quality of merges on small real experts: accuracy on held-out questions, and the score without labels.

``python -m benchmarks.quality`` builds the Mistral zoo with several seeds, merges each with every method, with the
ablations of the paper's Table 4 and with settings to choose among, and measures each result in two ways: exact match on
the zoo's test questions, and distance from the experts on calibration questions that were not used for learning
(`expert_merging.comparing.align`). Choices are made by the second alone. Everything is kept under ``benchmarks/work``,
so the same command goes on where it was stopped; the figures go to ``benchmarks/quality.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ranking import choose, report, rounded
from benchmarks.recipes import ABLATION, CHOICE, COEFFICIENTS, FIRST_STAGE, METHOD, Variant, variants
from expert_merging.catalogue import find_method
from expert_merging.progress import no_progress
from expert_merging.provenance import provenance
from expert_merging.run import Run
from expert_merging.signals import environment_of_child
from expert_merging.writing import write_atomically
from zoo.family import default_folder
from zoo.report import with_mean

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "benchmarks" / "work" / "quality"
RESULT = ROOT / "benchmarks" / "quality.json"
CONFIG = ROOT / "zoo" / "mistral.yaml"
SHARDS = 3


def runs_folder(seed: int) -> Path:
    """Where everything is that was made of the zoo of a seed."""
    return WORK / f"seed{seed}"


def scores_folder(seed: int) -> Path:
    """Where the figures are of everything that was made of the zoo of a seed."""
    return runs_folder(seed) / "scores"


@dataclass(frozen=True)
class Case:
    """A variant on the zoo of one seed."""

    variant: Variant
    seed: int

    @property
    def zoo(self) -> Path:
        """Folder of the zoo."""
        return default_folder("mistral", self.seed)

    @property
    def first_stage(self) -> Case:
        """The run whose coefficients a second stage starts from."""
        return Case(Variant(FIRST_STAGE, FIRST_STAGE), self.seed)

    @property
    def run(self) -> Run:
        """The run, whose name holds all that decides it."""
        options = find_method(self.variant.method).options
        configured = {name: value for name, value in configuration().items() if name in options}
        decisive = [{**configured, **self.variant.flags}, (self.zoo / "zoo.json").read_text(encoding="utf-8")]
        decisive += [self.first_stage.run.name] if self.variant.second_stage else []
        slug = re.sub(r"[^a-z0-9.]+", "-", self.variant.label.lower()).strip("-")
        name = f"{slug}-{hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:6]}"
        return Run.named(runs_folder(self.seed), self.variant.method, name)

    @property
    def score(self) -> Path:
        """File of its figures."""
        return scores_folder(self.seed) / self.variant.method / f"{self.run.name}.json"

    def merge(self) -> None:
        """Merge as the command does, in this process."""
        from expert_merging.cli import main
        from Mistral.backbone import BACKBONE

        arguments = ["--method", self.variant.method, "--cache_dir", str(self.zoo), "--config", str(CONFIG)]
        arguments += ["--data_dir", str(self.zoo / "dataset"), "--seed", str(self.seed), "--device", "cpu"]
        arguments += ["--output_path", str(runs_folder(self.seed)), "--run_name", self.run.name, "--log_with", "none"]
        arguments += [word for name, value in self.variant.flags.items() for word in (f"--{name}", str(value))]
        if self.variant.second_stage:
            arguments += ["--coefficients", str(self.first_stage.run.folder)]
        errors = io.StringIO()
        with redirect_stdout(io.StringIO()), redirect_stderr(errors):
            code = main(BACKBONE, arguments)
        if code:
            raise SystemExit(f"{self.variant.label}, seed {self.seed}: {errors.getvalue()}")


def start_worker() -> None:
    """One thread per process: the models are so small that more would wait for each other."""
    import torch

    torch.set_num_threads(1)


def merge(case: Case) -> None:
    """Merge one case; where it is finished already, nothing is done."""
    if not case.run.is_complete:
        case.merge()


def build(seed: int) -> None:
    """Build the zoo of a seed, in processes of its own."""
    command = [sys.executable, "-m", "zoo", "build", "mistral", "--seed", str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment_of_child())
    if done.returncode:
        raise SystemExit(done.stderr)


@dataclass(frozen=True)
class Measured:
    """A model to measure.

    Args:
        folder: where it is.
        file: where its figures go.
        questions: it answers the test questions as well.
    """

    folder: Path
    file: Path
    questions: bool


def score(seed: int, models: Mapping[str, Measured], held_out: int) -> None:
    """Measure models of one zoo and keep the figures.

    Args:
        seed: seed of the zoo.
        models: by any name.
        held_out: calibration questions per task that the distances are measured on.
    """
    from expert_merging.comparing import align
    from Mistral.backbone import BACKBONE
    from zoo.evaluate import exact_match

    zoo = default_folder("mistral", seed)
    with tempfile.TemporaryDirectory() as folder:
        maker, samples = held_out_questions(zoo, held_out, Run(Path(folder)).responses)
        folders = {name: model.folder for name, model in models.items()}
        distances = align.relative(align.measure(maker, samples, folders))
    for name, model in models.items():
        figures = {
            kind: {task: numbers[kind] for task, numbers in distances[name].items()}
            for kind in ("divergence", "hidden")
        }
        if model.questions:
            figures["accuracy"] = with_mean(exact_match(BACKBONE, model.folder, zoo / "test"))
        model.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(model.file, json.dumps(figures).encode())


def held_out_questions(zoo: Path, count: int, responses: Path) -> tuple[Any, Any]:
    """What asks the zoo's experts, and its calibration questions after those that are used for learning."""
    import torch

    from expert_merging.comparing.align import held_out, middle_layer
    from expert_merging.plan import make_plan
    from expert_merging.questions.calibration import load_samples
    from expert_merging.running.targets import TargetMaker
    from Mistral.backbone import BACKBONE

    config = configuration()
    used = config["samples_per_task"]
    experts = {name: zoo / folder for name, folder in BACKBONE.expert_folders.items()}
    plan = make_plan(zoo / BACKBONE.base_folder, experts, list(BACKBONE.exclude_params))
    samples = load_samples(zoo / "dataset", tuple(experts), default_count=used + count, counts={}, task_expert={})
    samples = held_out(samples, dict.fromkeys({sample.task for sample in samples}, used))
    maker = TargetMaker(
        backbone=BACKBONE,
        plan=plan,
        layers=middle_layer(plan),
        response_only=config["loss_tokens"] == "response",
        max_new_tokens=config["max_new_tokens"],
        prompt_template=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
        responses=responses,
        progress=no_progress,
    )
    return maker, samples


def configuration() -> dict[str, Any]:
    """The zoo's configuration of the merge command."""
    import yaml

    content: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    return content


def own_models(seed: int) -> dict[str, Path]:
    """Base and experts of a zoo by the label of their row."""
    from Mistral.backbone import BACKBONE

    zoo = default_folder("mistral", seed)
    experts = {f"{task} expert": zoo / folder for task, folder in BACKBONE.expert_folders.items()}
    return {"base": zoo / BACKBONE.base_folder, **experts}


def measure_all(seeds: Sequence[int], chosen: Sequence[Variant], workers: int, held_out: int) -> None:
    """Build, merge and measure what is missing, several processes side by side."""
    cases = [Case(variant, seed) for seed in seeds for variant in chosen]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=start_worker) as pool:
        work("building", pool, [(build, seed) for seed in seeds])
        missing = [case for case in cases if not case.score.exists()]
        for second in (False, True):
            work("merging", pool, [(merge, case) for case in missing if case.variant.second_stage == second])
        work("measuring", pool, list(_scoring(seeds, missing, held_out)))


def _scoring(seeds: Sequence[int], missing: Sequence[Case], held_out: int) -> Iterator[tuple[Any, ...]]:
    """Calls of `score`, a few for each seed."""
    for seed in seeds:
        scores = scores_folder(seed)
        found = {
            label: Measured(folder, scores / f"{label}.json", questions=True)
            for label, folder in own_models(seed).items()
            if not (scores / f"{label}.json").exists()
        }
        found |= {
            case.variant.label: Measured(case.run.model, case.score, case.variant.group != CHOICE)
            for case in missing
            if case.seed == seed
        }
        names = list(found)
        for shard in range(SHARDS):
            if names[shard::SHARDS]:
                yield score, seed, {name: found[name] for name in names[shard::SHARDS]}, held_out


def work(title: str, pool: ProcessPoolExecutor, calls: Sequence[tuple[Any, ...]]) -> None:
    """Make all calls and say how it goes."""
    start = time.monotonic()
    futures = [pool.submit(*call) for call in calls]
    for count, future in enumerate(as_completed(futures), 1):
        future.result()
        if count % 20 == 0 or count == len(futures):
            sys.stderr.write(f"{title}: {count} of {len(futures)}, {time.monotonic() - start:.0f} s\n")


def collect(seeds: Sequence[int], chosen: Sequence[Variant]) -> dict[str, Any]:
    """All figures by row, each with its mean over seeds."""
    rows: dict[str, Any] = {}
    for label in own_models(seeds[0]):
        rows[label] = _row("zoo", "", {}, {seed: scores_folder(seed) / f"{label}.json" for seed in seeds})
    for variant in chosen:
        files = {seed: Case(variant, seed).score for seed in seeds}
        rows[variant.label] = _row(variant.group, variant.method, variant.flags, files)
    return rows


def _row(group: str, method: str, flags: Mapping[str, Any], files: Mapping[int, Path]) -> dict[str, Any]:
    found: dict[int, Any] = {seed: json.loads(file.read_text(encoding="utf-8")) for seed, file in files.items()}
    row: dict[str, Any] = {"group": group, "method": method, "flags": dict(flags)}
    for kind in next(iter(found.values())):
        means = [figures[kind]["mean"] for figures in found.values()]
        row[kind] = rounded(statistics.mean(means))
        row[f"{kind} spread"] = rounded(statistics.stdev(means)) if len(means) > 1 else 0.0
    row["seeds"] = {
        seed: {kind: {task: rounded(value) for task, value in by_task.items()} for kind, by_task in figures.items()}
        for seed, figures in found.items()
    }
    return row


def tuned(rows: Mapping[str, Any]) -> list[Variant]:
    """The closed forms with the coefficient that was chosen without labels, where it is not the default."""
    found = []
    for method, label in choose(rows).items():
        if rows[label]["group"] == CHOICE and method in COEFFICIENTS:
            found.append(Variant(f"{method}, coefficient chosen", method, rows[label]["flags"]))
    return found


def save(file: Path, rows: Mapping[str, Any], summary: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Write settings, summary and rows, a line for each row."""
    settings = {
        "seeds": options.seeds,
        "held_out": options.held_out,
        "configuration": CONFIG.read_text(encoding="utf-8"),
        **provenance(),
    }
    lines = ",\n".join(f"  {json.dumps(label)}: {json.dumps(row)}" for label, row in rows.items())
    head = json.dumps({"settings": settings, **summary}, indent=1).removesuffix("\n}")
    write_atomically(file, f'{head},\n "rows": {{\n{lines}\n }}\n}}\n'.encode())


def main() -> None:
    """Measure what is missing, print the tables and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)), help="seeds of the zoos (default: 0-4)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per CPU)")
    parser.add_argument(
        "--groups",
        nargs="+",
        choices=(METHOD, ABLATION, CHOICE),
        default=[METHOD, ABLATION, CHOICE],
        help="what to measure (default: everything)",
    )
    parser.add_argument("--held_out", type=int, default=64, help="questions per task for the score (default: 64)")
    parser.add_argument("--json", type=Path, default=RESULT, help="file for the figures (default: %(default)s)")
    options = parser.parse_args()
    chosen = [variant for variant in variants() if variant.group in options.groups]
    if not any(variant.label == FIRST_STAGE for variant in chosen):
        chosen.insert(0, Variant(FIRST_STAGE, FIRST_STAGE))
    measure_all(options.seeds, chosen, options.workers, options.held_out)
    chosen = [*tuned(collect(options.seeds, chosen)), *chosen]
    measure_all(options.seeds, chosen, options.workers, options.held_out)
    rows = collect(options.seeds, chosen)
    save(options.json, rows, report(rows, options.seeds), options)


if __name__ == "__main__":
    main()
