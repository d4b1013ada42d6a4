"""Speed and memory of merging, as ratios to the machine's limit: reading every input and writing the output.

``python -m benchmarks.speed`` makes a random base and five experts of the shape of Qwen2-0.5B (494M parameters, bf16,
1 GB each) under ``benchmarks/work``, warms the page cache, and times each method in a process of its own. Wall times
leave out the start of the interpreter, of torch and of a GPU; memory is the largest resident set of the process and of
those that it forks, torch included, in which pages that they share count once, and what torch allocated on a GPU.

Element-wise methods merge everything; methods on matrices leave out embeddings, head, norms and biases, as by default.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from benchmarks.checkpoints import make_checkpoints
from benchmarks.matrices import PLAIN, measure_matrices
from benchmarks.shapes import ROOT, SHAPES, config_of, folders_of
from expert_merging.catalogue import find_method

METHODS = ["weight_average", "task_arithmetic", "dare_ta", "ties", "dare_ties"]
# Peer's name of each method that both have, and the settings that make the results comparable.
PEER_METHODS = {
    "task_arithmetic": ("task_arithmetic", {"weight": 0.3}),
    "ties": ("ties", {"weight": 1.0, "density": 0.2}),
    "dare_ties": ("dare_ties", {"weight": 1.0, "density": 0.8}),
}

_LIMIT = """
import os, sys, time
inputs, output = sys.argv[2:], sys.argv[1]
start = time.perf_counter()
buffer = bytearray(1 << 22)
target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
for number, path in enumerate(inputs):
    source = os.open(path, os.O_RDONLY)
    while count := os.readv(source, [buffer]):
        if number == 0:
            os.write(target, memoryview(buffer)[:count])
os.fsync(target)
print(time.perf_counter() - start, sum(os.times()[:2]), 0)
"""

METHOD_PROGRAM = """
import os, sys, time
sys.path.insert(0, {root!r})
import torch
from expert_merging.cli import main
from Mistral.backbone import BACKBONE
device = {device!r}
if device != "cpu":
    torch.linalg.eigh(torch.eye(2, device=device))
start, before = time.perf_counter(), sum(os.times()[:4])
code = main(BACKBONE, {arguments!r})
seconds, cpu_seconds = time.perf_counter() - start, sum(os.times()[:4]) - before
print(seconds, cpu_seconds, torch.cuda.max_memory_allocated() if device != "cpu" else 0)
sys.exit(code)
"""


@dataclass(frozen=True)
class Bench:
    """What is merged, and where.

    Args:
        work: folder for everything that is written.
        folders: the base's and each expert's.
        device: where the arithmetic is done.
        repeats: runs of which the fastest counts.
    """

    work: Path
    folders: list[Path]
    device: str
    repeats: int

    def arguments(self, method: str, output: Path) -> list[str]:
        """Flags of a merge."""
        arguments = ["--method", method, "--base_model_path", str(self.folders[0]), "--output_path", str(output)]
        arguments += ["--device", self.device, "--run_name", "bench"]
        if find_method(method).unit == "entries":
            arguments += ["--exclude_params", "none"]
        for folder in self.folders[1:]:
            arguments += ["--expert", f"{folder.name}={folder}"]
        return arguments

    def fresh_folder(self, name: str) -> Path:
        """A folder in the working place that does not exist yet."""
        shutil.rmtree(self.work / name, ignore_errors=True)
        return self.work / name

    def limit(self) -> dict[str, float]:
        """Reading all inputs and writing a file of the base's size."""
        target = self.work / "limit"
        files = [str(folder / "model.safetensors") for folder in self.folders]
        result = best([measure(_LIMIT, str(target), *files) for _ in range(self.repeats + 1)])
        target.unlink()
        return result

    def method(self, method: str) -> dict[str, float]:
        """A merge by one method; start-up left out."""
        results = []
        for _ in range(self.repeats):
            output = self.fresh_folder("runs")
            arguments = self.arguments(method, output)
            results.append(measure(METHOD_PROGRAM.format(root=str(ROOT), arguments=arguments, device=self.device)))
        shutil.rmtree(output)
        return best(results)


def measure(code: str, *arguments: str) -> dict[str, float]:
    """Run Python code in a process of its own.

    Returns:
        The numbers that it prints last: seconds, processor seconds (which other processes on the machine disturb less)
        and the largest memory on the GPU; and the largest memory seen, in bytes.
    """
    command = [sys.executable, "-c", code, *arguments]
    with tempfile.TemporaryFile("w+") as output:
        peak = watched(command, output, "smaps_rollup", "Pss", pause=0.1)
        output.seek(0)
        numbers = (float(number) for number in output.read().split()[-3:])
    found = dict(zip(("seconds", "cpu_seconds", "gpu_peak_bytes"), numbers, strict=True))
    return {**found, "peak_bytes": peak}


def whole_process(command: list[str]) -> dict[str, float]:
    """Run a command from start to end; its (processor) seconds and the largest anonymous memory seen, in bytes.

    Anonymous memory is what processes allocated themselves, without pages of mapped input files. What forked processes
    share with their parent counts several times.
    """
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = watched(command, subprocess.DEVNULL, "status", "RssAnon", pause=0.02)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak}


def watched(command: list[str], output: IO[str] | int, file: str, field: str, pause: float) -> int:
    """Run a command; the largest sum over its processes of a field (in kB) of a file under ``/proc``, in bytes."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=output, stderr=errors) as process,
    ):
        peak = 0
        while process.poll() is None:
            peak = max(peak, sum(_kilobytes(number, file, field) for number in _family(process.pid)))
            time.sleep(pause)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.read()[-2000:]}")
    return 1024 * peak


def _family(process: int) -> list[int]:
    """A process and all that it has started, as far as they are still there."""
    family = [process]
    for member in family:
        with contextlib.suppress(OSError):
            for children in Path(f"/proc/{member}/task").glob("*/children"):
                family += map(int, children.read_text(encoding="ascii").split())
    return family


def _kilobytes(process: int, file: str, field: str) -> int:
    with contextlib.suppress(OSError, StopIteration):  # it may end at any time
        lines = Path(f"/proc/{process}/{file}").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])
    return 0


def peer_program(work: Path) -> Path:
    """mergekit, installed from the package index into an environment of its own."""
    program = work / "mergekit" / "bin" / "mergekit-yaml"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", str(work / "mergekit")], check=True)
        packages = ["torch>=2.6,<2.14", "mergekit"]
        subprocess.run([str(work / "mergekit" / "bin" / "pip"), "install", "--quiet", *packages], check=True)
    return program


def run_peer(bench: Bench, method: str) -> dict[str, float]:
    """The same merge by mergekit, in float32 with bfloat16 output and its flags for little memory."""
    import yaml

    name, parameters = PEER_METHODS[method]
    recipe = {
        "merge_method": name,
        "base_model": str(bench.folders[0]),
        "models": [{"model": str(folder), "parameters": parameters} for folder in bench.folders[1:]],
        "parameters": {"normalize": False},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    file = bench.work / f"{method}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    flags = ["--lazy-unpickle", "--low-cpu-memory", "--no-copy-tokenizer"]
    result = whole_process([str(peer_program(bench.work)), str(file), str(bench.fresh_folder("peer")), *flags])
    shutil.rmtree(bench.work / "peer")
    return result


def compare_with_peer(bench: Bench, methods: list[str]) -> dict[str, dict[str, float]]:
    """Whole processes side by side, for the methods that both have."""
    figures = {}
    for method in methods:
        output = bench.fresh_folder("runs")
        script = str(ROOT / "Mistral" / "model_merging.py")
        ours = whole_process([sys.executable, script, *bench.arguments(method, output)])
        shutil.rmtree(output)
        theirs = run_peer(bench, method)
        figures[method] = {
            "seconds": ours["seconds"],
            "peer_seconds": theirs["seconds"],
            "times_faster": theirs["seconds"] / ours["seconds"],
            "cpu_seconds": ours["cpu_seconds"],
            "peer_cpu_seconds": theirs["cpu_seconds"],
            "peak_bytes": ours["peak_bytes"],
            "peer_peak_bytes": theirs["peak_bytes"],
            "times_less_memory": theirs["peak_bytes"] / ours["peak_bytes"],
        }
    return figures


def best(results: list[dict[str, float]]) -> dict[str, float]:
    """The fastest time and the largest memory: on a shared machine, slower times measure the others."""
    peaks = {name: max(result[name] for result in results) for name in ("peak_bytes", "gpu_peak_bytes")}
    times = {name: min(result[name] for result in results) for name in ("seconds", "cpu_seconds")}
    return {**times, **peaks}


def show_methods(bench: Bench, methods: list[str]) -> dict[str, dict[str, float]]:
    """Measure merges and print them beside the limit."""
    limit = bench.limit()
    figures = {"limit": limit}
    table = Table("job", "seconds", "x limit", "processor", "peak memory", "on the GPU")
    table.add_row("limit", f"{limit['seconds']:.2f}", "1.0", f"{limit['cpu_seconds']:.2f}", "", "")
    for method in methods:
        result = bench.method(method)
        figures[method] = {**result, "ratio": result["seconds"] / limit["seconds"]}
        sizes = [f"{result[name] / 1e9:.2f} GB" if result[name] else "" for name in ("peak_bytes", "gpu_peak_bytes")]
        times = [f"{number:.2f}" for number in (result["seconds"], figures[method]["ratio"], result["cpu_seconds"])]
        table.add_row(method, *times, *sizes)
    Console().print(table)
    return figures


def show_matrices(model: str, experts: int, device: str, methods: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Measure the methods on matrices against the plain ways to their results."""
    figures = measure_matrices(model, experts, device, methods)
    table = Table("method", "matrices", "seconds", "plain way", "faster", "difference")
    for method, by_shape in figures.items():
        for shape, found in by_shape.items():
            seconds = (f"{found['seconds']:.3f}", f"{found['plain_seconds']:.3f}", f"{found['times_faster']:.1f}x")
            table.add_row(method, shape, *seconds, f"{found['difference']:.0e}")
    Console().print(table)
    return figures


def show_peer(bench: Bench, methods: list[str]) -> dict[str, dict[str, float]]:
    """Measure whole processes beside mergekit's."""
    figures = compare_with_peer(bench, methods)
    table = Table("whole process", "seconds", "mergekit", "faster", "memory", "mergekit", "less")
    for method, found in figures.items():
        table.add_row(
            method,
            f"{found['seconds']:.1f}",
            f"{found['peer_seconds']:.1f}",
            f"{found['times_faster']:.1f}x",
            f"{found['peak_bytes'] / 1e9:.2f} GB",
            f"{found['peer_peak_bytes'] / 1e9:.2f} GB",
            f"{found['times_less_memory']:.0f}x",
        )
    Console().print(table)
    return figures


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b", help="model to imitate (default: qwen2-0.5b)")
    parser.add_argument("--layers", type=int, default=0, help="number of its layers (default: all)")
    parser.add_argument("--experts", type=int, default=5, help="number of experts (default: 5)")
    parser.add_argument(
        "--methods", nargs="*", default=METHODS, help=f"merges to measure (default: {' '.join(METHODS)})"
    )
    parser.add_argument(
        "--matrices", nargs="*", choices=PLAIN, default=[], help="matrix methods to measure by themselves"
    )
    parser.add_argument("--peer", action="store_true", help="compare with mergekit as well, which takes many minutes")
    parser.add_argument("--device", default="cpu", help="where to compute, cpu or cuda (default: cpu)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the fastest counts (default: 3)")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "work", help="folder for checkpoints")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    options = parser.parse_args()
    settings = {name: value for name, value in vars(options).items() if name not in ("work", "json")}
    figures: dict[str, Any] = {"settings": settings}
    if options.methods:
        # Experts that differ from the base everywhere, unlike those that `benchmarks.trainer` learns from.
        folders = folders_of(options.work / f"{options.shape}-{options.layers or 'all'}-full", options.experts)
        make_checkpoints(folders, config_of(options.shape, options.layers))
        bench = Bench(options.work, folders, options.device, options.repeats)
        figures |= show_methods(bench, options.methods)
        if options.peer:
            figures["mergekit"] = show_peer(bench, [name for name in options.methods if name in PEER_METHODS])
    if options.matrices:
        figures["matrices"] = show_matrices(options.shape, options.experts, options.device, options.matrices)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
