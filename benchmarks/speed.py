"""Speed and memory of merging, as ratios to the machine's limit: reading every input and writing the output.

``python -m benchmarks.speed`` makes a random base and five experts of the shape of Qwen2-0.5B (494M parameters, bf16,
1 GB each) under ``benchmarks/work``, warms the page cache, and times each method in a process of its own. Wall times
leave out the start of the interpreter and of torch; memory is the process's largest resident set, torch included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "benchmarks" / "work"
EXPERTS = 5
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
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
print(time.perf_counter() - start, 0)
"""

_METHOD = """
import sys, time
sys.path.insert(0, {root!r})
import torch
from expert_merging.cli import main
from Mistral.backbone import BACKBONE
start = time.perf_counter()
code = main(BACKBONE, {arguments!r})
seconds = time.perf_counter() - start
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, 1024 * int(peak.split()[1]))
sys.exit(code)
"""


def parameter_shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Qwen2-0.5B with that many of its 24 layers."""
    hidden, middle, key_value = 896, 4864, 128
    yield "model.embed_tokens.weight", (151936, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        for name, rows in (("q_proj", hidden), ("k_proj", key_value), ("v_proj", key_value)):
            yield f"{prefix}.self_attn.{name}.weight", (rows, hidden)
            yield f"{prefix}.self_attn.{name}.bias", (rows,)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.mlp.gate_proj.weight", (middle, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (middle, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, middle)
    yield "model.norm.weight", (hidden,)


def make_checkpoints(layers: int) -> list[Path]:
    """A random base and its experts; kept for the next time."""
    import torch
    from safetensors.torch import load_file, save_file

    folders = [WORK / f"qwen2-{layers}" / name for name in ("base", *(f"expert{k}" for k in range(EXPERTS)))]
    for number, folder in enumerate(folders):
        file = folder / "model.safetensors"
        if file.exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(number)
        base = load_file(folders[0] / file.name) if number else {}
        tensors = {}
        for name, shape in parameter_shapes(layers):
            noise = torch.randn(shape, generator=generator).mul_(0.002 if number else 0.02)
            tensors[name] = (noise + base[name] if number else noise).to(torch.bfloat16)
        (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
        save_file(tensors, file.with_suffix(".partial"), metadata={"format": "pt"})
        file.with_suffix(".partial").rename(file)
    return folders


def measure(code: str, *arguments: str) -> dict[str, float]:
    """Run Python code in a process of its own.

    Returns:
        The two numbers that it prints last: seconds, and its largest resident set in bytes.
    """
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the measured process failed:\n{done.stderr}")
    seconds, peak = done.stdout.split()[-2:]
    return {"seconds": float(seconds), "peak_bytes": float(peak)}


def method_arguments(method: str, folders: list[Path], output: Path) -> list[str]:
    """Flags of a merge of everything, the embeddings included, on the CPU."""
    arguments = ["--method", method, "--base_model_path", str(folders[0]), "--output_path", str(output)]
    arguments += ["--exclude_params", "none", "--device", "cpu", "--run_name", "bench"]
    for folder in folders[1:]:
        arguments += ["--expert", f"{folder.name}={folder}"]
    return arguments


def run_method(method: str, folders: list[Path], repeats: int) -> dict[str, float]:
    """Best of several merges by one method; start-up left out."""
    results = []
    for _ in range(repeats):
        output = fresh_folder("runs")
        arguments = method_arguments(method, folders, output)
        results.append(measure(_METHOD.format(root=str(ROOT), arguments=arguments)))
    shutil.rmtree(output)
    return best(results)


def fresh_folder(name: str) -> Path:
    """A folder in the working place that does not exist yet."""
    shutil.rmtree(WORK / name, ignore_errors=True)
    return WORK / name


def whole_process(command: list[str]) -> dict[str, float]:
    """Run a command from start to end; its seconds and the largest anonymous memory seen, in bytes.

    Anonymous memory is what the process allocated itself, without pages of mapped input files.
    """
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        peak = 0
        while process.poll() is None:
            with contextlib.suppress(OSError, StopIteration):
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines()
                peak = max(peak, 1024 * int(next(line for line in status if line.startswith("RssAnon")).split()[1]))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        if process.returncode:
            errors = process.stderr.read().decode()[-2000:] if process.stderr else ""
            raise SystemExit(f"{' '.join(command)} failed:\n{errors}")
    return {"seconds": seconds, "peak_bytes": peak}


def peer_program() -> Path:
    """mergekit, installed from the package index into an environment of its own."""
    program = WORK / "mergekit" / "bin" / "mergekit-yaml"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", str(WORK / "mergekit")], check=True)
        packages = ["torch>=2.6,<2.14", "mergekit"]
        subprocess.run([str(WORK / "mergekit" / "bin" / "pip"), "install", "--quiet", *packages], check=True)
    return program


def run_peer(method: str, folders: list[Path]) -> dict[str, float]:
    """The same merge by mergekit, in float32 with bfloat16 output and its flags for little memory."""
    import yaml

    name, parameters = PEER_METHODS[method]
    recipe = {
        "merge_method": name,
        "base_model": str(folders[0]),
        "models": [{"model": str(folder), "parameters": parameters} for folder in folders[1:]],
        "parameters": {"normalize": False},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    file = WORK / f"{method}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    flags = ["--lazy-unpickle", "--low-cpu-memory", "--no-copy-tokenizer"]
    result = whole_process([str(peer_program()), str(file), str(fresh_folder("peer")), *flags])
    shutil.rmtree(WORK / "peer")
    return result


def compare_with_peer(folders: list[Path], methods: list[str]) -> dict[str, dict[str, float]]:
    """Whole processes side by side, for the methods that both have."""
    figures = {}
    for method in methods:
        output = fresh_folder("runs")
        script = str(ROOT / "Mistral" / "model_merging.py")
        ours = whole_process([sys.executable, script, *method_arguments(method, folders, output)])
        shutil.rmtree(output)
        theirs = run_peer(method, folders)
        figures[method] = {
            "seconds": ours["seconds"],
            "peer_seconds": theirs["seconds"],
            "times_faster": theirs["seconds"] / ours["seconds"],
            "peak_bytes": ours["peak_bytes"],
            "peer_peak_bytes": theirs["peak_bytes"],
            "times_less_memory": theirs["peak_bytes"] / ours["peak_bytes"],
        }
    return figures


def best(results: list[dict[str, float]]) -> dict[str, float]:
    """The fastest time and the largest memory: on a shared machine, slower times measure the others."""
    return {
        "seconds": min(result["seconds"] for result in results),
        "peak_bytes": max(result["peak_bytes"] for result in results),
    }


def main() -> None:
    """Measure and print the table."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--methods", nargs="+", default=["weight_average", "task_arithmetic", "dare_ta", "ties", "dare_ties"]
    )
    parser.add_argument("--layers", type=int, default=24, help="layers of the base, 24 in a Qwen2-0.5B (default: 24)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the fastest counts (default: 3)")
    parser.add_argument("--peer", action="store_true", help="compare with mergekit as well, which takes many minutes")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    options = parser.parse_args()
    folders = make_checkpoints(options.layers)
    files = [str(folder / "model.safetensors") for folder in folders]
    target = str(WORK / "limit")
    limit = best([measure(_LIMIT, target, *files) for _ in range(options.repeats + 1)])
    Path(target).unlink()
    figures: dict[str, Any] = {"limit": limit}
    table = Table("job", "seconds", "x limit", "peak memory")
    table.add_row("limit: read all inputs, write one", f"{limit['seconds']:.2f}", "1.0", "")
    for method in options.methods:
        result = run_method(method, folders, options.repeats)
        figures[method] = {**result, "ratio": result["seconds"] / limit["seconds"]}
        size = f"{result['peak_bytes'] / 1e9:.2f} GB"
        table.add_row(method, f"{result['seconds']:.2f}", f"{figures[method]['ratio']:.2f}", size)
    Console().print(table)
    if options.peer:
        shared = [method for method in options.methods if method in PEER_METHODS]
        figures["mergekit"] = compare_with_peer(folders, shared)
        table = Table("whole process", "seconds", "mergekit", "faster", "peak memory", "mergekit", "less")
        for method, found in figures["mergekit"].items():
            ours, theirs = found["peak_bytes"] / 1e9, found["peer_peak_bytes"] / 1e9
            table.add_row(
                method,
                f"{found['seconds']:.1f}",
                f"{found['peer_seconds']:.1f}",
                f"{found['times_faster']:.1f}x",
                f"{ours:.2f} GB",
                f"{theirs:.2f} GB",
                f"{found['times_less_memory']:.0f}x",
            )
        Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
