"""Merging adapters by their factors, against the same methods on whole matrices.

``python -m benchmarks.adapters`` makes a random base of some layers of a shape and LoRA adapters of all its matrices
under ``benchmarks/work``. It merges them in processes of their own: dense, by `core_space` with that method inside, and
as an adapter. Processor seconds count, start-up left out. The difference is the distance of the two dense results, as a
share of what was added; both are rounded to bfloat16. For TIES it is large: what is trimmed there are coordinates.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.checkpoints import make_checkpoints
from benchmarks.shapes import ROOT, SHAPES, Shape, config_of, folders_of, is_merged, parameter_shapes
from benchmarks.speed import METHOD_PROGRAM, measure
from expert_merging.checkpoints.adapter_files import CONFIG
from expert_merging.checkpoints.folders import ADAPTER

INNER = ["svd", "iso", "ties"]


def make_adapter(folder: Path, shapes: Mapping[str, Shape], rank: int, seed: int) -> None:
    """An adapter with random factors of all these matrices, of a tenth of the base's size."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator, factors = torch.Generator().manual_seed(seed), {}
    for name, (rows, columns) in shapes.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        factors[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.002
    save_file(factors, folder / ADAPTER, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank**0.5}
    (folder / CONFIG).write_text(json.dumps(config))


def distance(found: Path, expected: Path, base: Path) -> float:
    """How far one model is from another, as a share of how far that is from the base."""
    from safetensors.torch import load_file

    ours, theirs, start = (load_file(folder / "model.safetensors") for folder in (found, expected, base))
    apart = sum(float((ours[name].double() - tensor.double()).square().sum()) for name, tensor in theirs.items())
    added = sum(float((start[name].double() - tensor.double()).square().sum()) for name, tensor in theirs.items())
    return math.sqrt(apart / added)


def main() -> None:
    """Measure every method and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--methods", nargs="+", default=INNER)
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "work" / "adapters")
    options = parser.parse_args()
    config = config_of(options.shape, options.layers)
    base, *adapters = folders_of(options.work / f"{options.shape}-{options.layers}", options.experts)
    make_checkpoints([base], config)
    shapes = {name: shape for name, shape in parameter_shapes(config).items() if is_merged(name, shape)}
    for number, folder in enumerate(adapters):
        make_adapter(folder, shapes, options.rank, number)
    runs = options.work / "runs"
    shutil.rmtree(runs, ignore_errors=True)

    def merge(name: str, *given: str) -> tuple[float, Path]:
        arguments = ["--base_model_path", str(base), "--device", "cpu", "--output_path", str(runs), "--run_name", name]
        for folder in adapters:
            arguments += ["--expert", f"{folder.name}={folder}"]
        program = METHOD_PROGRAM.format(root=str(ROOT), arguments=[*given, *arguments], device="cpu")
        found = measure(program)
        return found["cpu_seconds"], runs / given[1] / name / "model"

    table = Table("method", "dense", "core_space", "times faster", "difference", "as an adapter")
    for method in options.methods:
        dense, expected = merge(f"{method}-dense", "--method", method)
        ours, found = merge(f"{method}-core", "--method", "core_space", "--inner", method)
        written, _ = merge(f"{method}-adapter", "--method", "core_space", "--inner", method, "--output", "adapter")
        figures = f"{dense:.1f} s", f"{ours:.1f} s", f"{dense / ours:.1f}", f"{distance(found, expected, base):.2g}"
        table.add_row(method, *figures, f"{written:.1f} s")
    Console().print(table)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
