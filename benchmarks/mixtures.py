"""What it costs to keep experts apart, and what it brings: dense merges, mixtures, artefacts, experts that are routed.

``python -m benchmarks.mixtures`` merges the experts of the Mistral zoo in each way, under ``benchmarks/work``, and asks
each result the zoo's test questions. Tokens a second are of one thread's processor time, while questions are answered
in groups; what routing by perplexity reads of each question is in it, and so is loading. Stored is what has to be there
to answer all tasks; active, the parameters that a token goes through.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.cli import main as merge
from expert_merging.commands.main import main as command
from expert_merging.run import Run
from Mistral.backbone import BACKBONE
from zoo.family import default_folder

if TYPE_CHECKING:
    from expert_merging.questions.labelled import Question

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "benchmarks" / "work" / "mixtures"
_LONGEST = 16


@dataclass(frozen=True)
class Way:
    """A way to serve all tasks.

    Args:
        label: row of the table.
        models: folders that have to be there, in full.
        stored: their bytes, and those of what lies beside them.
        per_question: of several models, how many answer a question; 0 where each answers its own task.
    """

    label: str
    models: Mapping[str, Path]
    stored: int
    per_question: int = 1


def merged(zoo: Path, method: str, *flags: object) -> Path:
    """The folder of a run, which is made if it is not there."""
    name = "-".join([method, *map(str, flags)]).replace("--", "").replace(" ", "_").replace("=", "_")
    given = ["--config", ROOT / "zoo" / "mistral.yaml", "--cache_dir", zoo, "--data_dir", zoo / "dataset"]
    given += ["--method", method, "--loss_tokens", "all" if method == "moe" else "response", *flags]
    given += ["--output_path", WORK, "--run_name", name, "--device", "cpu", "--log_with", "none"]
    if merge(BACKBONE, [*map(str, given)]):
        raise SystemExit(1)
    (record,) = WORK.glob(f"*/{name}/config.json")
    return record.parent


def extracted(run: Path, expert: str) -> Path:
    """The folder of an expert that is rebuilt from a run."""
    target = WORK / "experts" / run.name / expert
    if not target.is_dir() and command(["extract", str(run), "--expert", expert, "--output", str(target)]):
        raise SystemExit(1)
    return target


def weights(*folders: Path) -> int:
    """Bytes of all safetensors files below folders."""
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*.safetensors"))


def active(folder: Path) -> int:
    """Parameters that a token goes through."""
    checkpoint = Checkpoint(folder)
    count = checkpoint.config.get("num_local_experts") or checkpoint.config.get("num_experts") or 1
    idle = count - (checkpoint.config.get("num_experts_per_tok") or 1)
    entries = checkpoint.entries.values()
    own = sum(entry.elements for entry in entries if ".experts." in entry.name)
    return sum(entry.elements for entry in entries) - own * idle // count


def ways(zoo: Path) -> Iterator[Way]:
    """Everything that is measured."""
    base = zoo / BACKBONE.base_folder
    experts = {name: zoo / folder for name, folder in BACKBONE.expert_folders.items()}

    def one(label: str, *given: object) -> Way:
        model = Run(merged(zoo, *given)).model  # type: ignore[arg-type]
        return Way(label, {"model": model}, weights(model))

    yield Way("base", {"model": base}, weights(base))
    for method in ("weight_average", "task_arithmetic", "ties", "expert_merging"):
        yield one(f"`{method}`", method)
    for router in ("ridge", "task_vectors", "prompts", "embedding", "random"):
        yield one(f"`moe --router {router}`", "moe", "--router", router)
    yield one("`moe --router zeros`, all experts a token", "moe", "--router", "zeros", "--experts_per_token", 3)
    yield one("`moe --router ridge`, one expert a token", "moe", "--router", "ridge", "--experts_per_token", 1)
    yield one("`moe --router ridge --include_base`", "moe", "--router", "ridge", "--include_base")
    for method in ("tall", "emr"):
        run = merged(zoo, method)
        own = {name: extracted(run, name) for name in experts}
        yield Way(f"`{method}`, each task by its own expert", own, weights(Run(run).model, base), per_question=0)
    for count in range(1, len(experts) + 1):
        yield Way(f"`route --experts_per_question {count}`", experts, weights(*experts.values()), count)
    yield Way("the experts, each task by its own", experts, weights(*experts.values()), per_question=0)


def answered(models: Mapping[str, Path], per_question: int, questions: Sequence[Question]) -> tuple[list[float], float]:
    """Points of each question, and tokens for each second of processor time."""
    import torch

    from expert_merging.routing.router import PerplexityRouter

    router = PerplexityRouter.of(
        models, questions, per_question=per_question, device="cpu", max_new_tokens=_LONGEST, family=BACKBONE.name
    )
    tokenizer = next(iter(router.experts.values())).processor
    points, tokens, start = [0.0] * len(questions), 0, time.process_time()
    shares = torch.ones(1, len(questions))
    if len(models) > 1:
        found: dict[str, list[float]] = {}
        for name in models:
            seen = {number: value for some in router.perplexities(name, questions) for number, value in some.items()}
            found[name] = [seen[number] for number in range(len(questions))]
        shares = router.weights(found)
    for numbers, made in router.answer(questions, shares):
        for number, one in zip(numbers, made, strict=True):
            points[number] = 100 * one.points
            tokens += 1 + len(tokenizer(one.text, add_special_tokens=False)["input_ids"])
    return points, tokens / (time.process_time() - start)


def measured(way: Way, questions: Sequence[Question]) -> tuple[dict[str, float], float]:
    """Accuracy by task in percent, and tokens a second."""
    by_task = {task: list(own) for task, own in itertools.groupby(questions, lambda question: question.task)}
    if way.per_question:
        points, speed = answered(way.models, way.per_question, questions)
        tasks = [question.task for question in questions]
        pairs = list(zip(tasks, points, strict=True))
        return {task: _mean([point for own, point in pairs if own == task]) for task in by_task}, speed
    found = {task: answered({"model": way.models[task]}, 1, own) for task, own in by_task.items()}
    return {task: _mean(points) for task, (points, _) in found.items()}, _mean([speed for _, speed in found.values()])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def row(way: Way, questions: Sequence[Question]) -> list[str]:
    """A row of the table."""
    scores, speed = measured(way, questions)
    together = max(way.per_question, 1) * max(map(active, way.models.values()))
    figures = [*scores.values(), _mean([*scores.values()])]
    sizes = [f"{way.stored / 1e6:.1f}", f"{together / 1e6:.2f}"]
    return [way.label, *sizes, f"{speed:.0f}", *(f"{figure:.1f}" for figure in figures)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every way and print the table."""
    from expert_merging.questions.labelled import load_questions

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zoo", type=Path, default=default_folder("mistral", 0))
    parser.add_argument("--samples", type=int, default=None, help="questions of each task; all by default")
    options: Any = parser.parse_args(arguments)
    questions = load_questions(options.zoo / "test", count=options.samples)
    tasks = list(dict.fromkeys(question.task for question in questions))
    table = Table("", "MB stored", "M active", "tokens/s", *tasks, "mean")
    answered({"model": options.zoo / BACKBONE.base_folder}, 1, questions[:1])  # what is loaded first takes its time
    for way in ways(options.zoo):
        table.add_row(*row(way, questions))
    Console(width=120).print(table)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
