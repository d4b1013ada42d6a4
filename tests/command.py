"""The command of a family as a function, of Mistral unless another one is given, for the tests."""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_merging.backbone import Backbone
from expert_merging.cli import main
from expert_merging.learned.figures import LAYERS
from expert_merging.learned.importance import Layer, save_layers
from expert_merging.questions.formats import Format
from expert_merging.run import Run
from Mistral.backbone import BACKBONE
from tests.checkpoints import tensors_of

# A base that no model class knows.
TENSORS = {
    "layers.0.weight": torch.arange(12.0).view(4, 3),
    "layers.1.weight": torch.ones(5),
    "norm.weight": torch.ones(3),
    "embed_tokens.weight": torch.ones(6, 3),
}
COMMAND = ("--method", "task_arithmetic")


def forget_accelerate() -> None:
    """accelerate keeps one state per process, once it is loaded."""
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


def merge(*arguments: object, family: Backbone = BACKBONE) -> int:
    """Exit code of the command, on the CPU unless a device is given: there, bytes and twins are the same everywhere."""
    return main(family, ["--device", "cpu", *map(str, arguments)])


def merged(output: Path, *arguments: object, family: Backbone = BACKBONE) -> Run:
    """Run the command with its results in ``output``; the run that it left, which must be the only one there."""
    assert merge(*arguments, "--output_path", output, family=family) == 0
    folders = [config.parent for config in output.glob("*/*/config.json")]
    assert len(folders) == 1, folders
    return Run(folders[0])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, family: Backbone = BACKBONE) -> list[str]:
    """The errors of a command that must end with exit code 1 and nothing but error lines on stderr."""
    capsys.readouterr()
    handlers = list(logging.getLogger("expert_merging").handlers)
    assert merge(*arguments, family=family) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("error: ") for line in lines), lines
    assert logging.getLogger("expert_merging").handlers == handlers
    return [line.removeprefix("error: ") for line in lines]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object, family: Backbone = BACKBONE) -> str:
    """The one error of a refused command."""
    (line,) = refused(capsys, *arguments, family=family)
    return line


def flags(base: Path, **experts: Path) -> list[object]:
    """Flags that name the base and the experts."""
    given: list[object] = ["--base_model_path", base]
    for name, folder in experts.items():
        given += ["--expert", f"{name}={folder}"]
    return given


def given(template: str) -> Format:
    """What ``--prompt_template`` asks for."""
    return Format.of_text("--prompt_template", template, None)


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and modification time of everything below the folder."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder",
            path.stat().st_mtime_ns,
        )
        for path in sorted([folder, *folder.rglob("*")])
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file below the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def merge_plainly(
    base: Path,
    experts: Iterable[Path],
    rule: Callable[[torch.Tensor], torch.Tensor],
    excluded: Iterable[str] = BACKBONE.exclude_params,
) -> dict[str, torch.Tensor]:
    """The plain twin of the streaming driver: everything is loaded, merged in float32 and rounded once."""
    tensors, tuned = tensors_of(base), [tensors_of(folder) for folder in experts]
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not any(re.match(pattern, name) for pattern in excluded):
            start = tensor.float()
            change = rule(torch.stack([expert[name].float() - start for expert in tuned]))
            tensors[name] = ((tensor if tensor.dtype == torch.float64 else start) + change).to(tensor.dtype)
    return tensors


def assert_same_bytes(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, types, shapes and bits."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        same = actual[name].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))
        assert same, name


def save_table(layers: Sequence[Layer], folder: Path, _run: str) -> dict[str, Any]:
    """Write what pictures are drawn from, and draw none."""
    folder.mkdir(parents=True, exist_ok=True)
    save_layers(layers, folder / LAYERS)
    return {}
