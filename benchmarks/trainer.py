"""Time and memory of learning coefficients, beside the limit: running the model forwards and backwards.

``python -m benchmarks.trainer`` makes random checkpoints of well-known shapes under ``benchmarks/work`` and learns from
random samples, each variant in a process of its own: *limit*, forward and backward passes of the same model whose
merged parameters take gradients, added up over eight samples; *ours*, the trainer as it is; *twin*, the plain way,
which keeps all experts, merges again in every forward pass and makes logits whole. Loading is left out, and what the
experts say, which the twin asks while it learns, is counted apart. Memory leaves out Python, torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import make_checkpoints
from benchmarks.shapes import ROOT, SHAPES, Case, is_merged
from benchmarks.variants import Bench


def work(case: Case) -> dict[str, Any]:
    """Measure one case in this process."""
    import torch

    from expert_merging.libraries import import_transformers

    torch.manual_seed(0)
    import_transformers().AutoModelForCausalLM  # noqa: B018  (loads what belongs to the start of every variant)
    started = resident("VmRSS")
    bench = Bench(case)
    try:
        getattr(bench, case.variant)()
    except torch.cuda.OutOfMemoryError:
        return {"failed": "out of memory"}
    figures: dict[str, Any] = {**bench.figures, "start_bytes": started, "peak_bytes": resident("VmHWM")}
    if case.device != "cpu":
        figures["device_peak_bytes"] = max(bench.device_peak, torch.cuda.max_memory_allocated())
    samples = len(bench.owners())
    figures["seconds_per_sample"] = bench.figures["learning_seconds"] / samples
    figures["cpu_seconds_per_sample"] = bench.figures["learning_cpu_seconds"] / samples
    return {**figures, "gradient": bench.gradient, "coefficients": bench.coefficients}


def resident(kind: str) -> int:
    """Resident memory of this process in bytes: ``VmRSS`` now, ``VmHWM`` at most."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in status if line.startswith(kind)).split()[1])


def measure(case: Case) -> dict[str, Any]:
    """Measure a case in a process of its own; a failure leaves the others' figures."""
    command = [sys.executable, "-m", "benchmarks.trainer", "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr, flush=True)  # noqa: T201
        return {"failed": f"exit code {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ratios between the variants of one case, of those that there are."""
    ratios: dict[str, float] = {}
    limit, twin = (found.get(name, {}) for name in ("limit", "twin"))
    for name, ours in found.items():
        if not name.startswith("ours") or "failed" in ours:
            continue
        if "seconds_per_sample" in limit:
            for kind in ("seconds_per_sample", "cpu_seconds_per_sample"):
                ratios[f"{name} / limit, {kind}"] = ours[kind] / limit[kind]
        if "seconds_per_sample" not in twin:
            continue
        for kind in ("seconds", "cpu_seconds"):
            learning = ours[f"learning_{kind}"]
            with_experts = learning + ours[f"targets_{kind}"]  # which the twin runs while it learns
            ratios[f"twin / {name}, {kind}"] = twin[f"learning_{kind}"] / with_experts
            ratios[f"twin / {name}, {kind} without the experts' answers of the latter"] = (
                twin[f"learning_{kind}"] / learning
            )
        own = [figures["peak_bytes"] - figures["start_bytes"] for figures in (twin, ours)]
        ratios[f"twin / {name}, memory"] = own[0] / own[1]
        if "device_peak_bytes" in twin:
            ratios[f"twin / {name}, device memory"] = twin["device_peak_bytes"] / ours["device_peak_bytes"]
        difference = [a - b for a, b in zip(twin["gradient"], ours["gradient"], strict=True)]
        ratios[f"twin - {name}, first gradient, relative"] = math.hypot(*difference) / math.hypot(*twin["gradient"])
        pairs = zip(twin["coefficients"], ours["coefficients"], strict=True)
        ratios[f"twin - {name}, largest difference of a coefficient"] = max(abs(a - b) for a, b in pairs)
    return ratios


COLUMNS = ("variant", "s / sample", "CPU s / sample", "experts' answers, s", "memory, GB", "GPU memory, GB")


def show(title: str, found: dict[str, dict[str, Any]], ratios: dict[str, float]) -> None:
    """Print one case's table and ratios."""
    rows = [COLUMNS]
    for name, figures in found.items():
        if "failed" in figures:
            rows.append((name, figures["failed"], "", "", "", ""))
            continue
        numbers = [figures["seconds_per_sample"], figures["cpu_seconds_per_sample"], figures.get("targets_seconds")]
        sizes = [figures["peak_bytes"] - figures["start_bytes"], figures.get("device_peak_bytes")]
        cells = ["" if number is None else f"{number:.3f}" for number in numbers]
        cells += ["" if size is None else f"{size / 1e9:.2f}" for size in sizes]
        rows.append((name, cells[0], cells[1], cells[2], cells[3], cells[4]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += [f"{name}: {value:.3g}" for name, value in ratios.items()]
    print("\n".join([title, *lines, ""]), flush=True)  # noqa: T201


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer", description=__doc__.split("\n")[0])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["mistral-100m", "qwen2-0.5b"])
    parser.add_argument("--layers", type=int, default=0, help="layers instead of the shape's own")
    parser.add_argument("--experts", nargs="+", type=int, default=[3, 5])
    parser.add_argument("--distinct", type=int, default=99, help="experts that differ; the rest are links to them")
    parser.add_argument("--samples", type=int, default=25)
    parser.add_argument("--variants", nargs="+", choices=["limit", "ours", "twin"], default=["limit", "ours", "twin"])
    parser.add_argument(
        "--repeats", type=int, default=1, help="times that all variants are measured; the least time of each counts"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--task_vectors", nargs="+", choices=["auto", "device", "host", "disk"], default=["auto"])
    parser.add_argument("--weight_gradients", choices=["auto", "sample", "update"], default="auto")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument(
        "--batch_tokens", type=int, default=2048, help="tokens of a pass, limit and ours; 1: one sample"
    )
    parser.add_argument("--work", default=str(ROOT / "benchmarks" / "work"), help="folder of the random checkpoints")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    return parser.parse_args()


def measure_variants(case: Case, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure the variants that are asked for, ours with task vectors in each of the places."""
    make_checkpoints(case.folders, case.config, distinct=case.distinct, differs=is_merged)
    found: dict[str, dict[str, Any]] = {}
    for _ in range(options.repeats):
        for variant in options.variants:
            for place in options.task_vectors if variant == "ours" else ["auto"]:
                name = f"{variant} ({place})" if variant == "ours" else variant
                figures = measure(replace(case, variant=variant, task_vectors=place))
                found[name] = least(found.get(name), figures)
    return found


def least(earlier: dict[str, Any] | None, figures: dict[str, Any]) -> dict[str, Any]:
    """Of two measurements of a variant, the smaller times, since other programs only add to them."""
    if earlier is None or "failed" in earlier or "failed" in figures:
        return figures if earlier is None or "failed" in earlier else earlier
    times = [name for name in figures if "seconds" in name]
    return {**figures, **{name: min(earlier[name], figures[name]) for name in times}}


def main() -> None:
    """Measure every case and print its table."""
    options = read_arguments()
    if options.case:
        print(json.dumps(work(Case(**json.loads(options.case)))))  # noqa: T201  (what the parent process reads)
        return
    shared = {name: getattr(options, name) for name in ("layers", "distinct", "samples", "device", "dtype", "work")}
    shared |= {"weight_gradients": options.weight_gradients, "checkpointing": options.gradient_checkpointing}
    shared["batch_tokens"] = options.batch_tokens
    figures: dict[str, Any] = {}
    for shape in options.shape:
        for experts in options.experts:
            case = Case(variant="limit", shape=shape, experts=experts, task_vectors="auto", **shared)
            found = measure_variants(case, options)
            title = f"{shape}, {experts} experts, {options.dtype} on {options.device}"
            figures[title] = {**found, "ratios": compare(found)}
            show(title, found, figures[title]["ratios"])
            for entry in found.values():
                entry.pop("coefficients", None)
                entry.pop("gradient", None)
            if options.json:
                options.json.write_text(json.dumps(figures, indent=2) + "\n")
    differences = [value for entry in figures.values() for name, value in entry["ratios"].items() if "twin -" in name]
    if options.dtype == "float32" and any(difference > 1e-5 for difference in differences):
        raise SystemExit("the trainer and the twin differ by more than 1e-5")


if __name__ == "__main__":
    main()
