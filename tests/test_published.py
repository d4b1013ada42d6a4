"""Every method on look-alikes of the published checkpoints, planned and run to the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open

from expert_merging.backbone import Backbone
from expert_merging.catalogue import all_methods
from expert_merging.method import AT_MOST_TWO
from InternVL.backbone import BACKBONE as INTERNVL
from Mistral.backbone import BACKBONE as MISTRAL
from Qwen2VL.backbone import BACKBONE as QWEN2VL
from tests import checkpoints, internvl, published, qwen2vl
from tests.command import merge, merged

FAMILIES = {
    "mistral": (MISTRAL, published.make_mistral, checkpoints.BASE),
    "internvl": (INTERNVL, published.make_internvl, internvl.BASE),
    "qwen2vl": (QWEN2VL, published.make_qwen2vl, qwen2vl.BASE),
}
# As few steps as show that a run goes to its end; a value that a method has no use for is not given to it.
QUICK = {
    "samples_per_task": 1,
    "max_new_tokens": 4,
    "num_epochs": 1,
    "evaluations": 4,
    "wudi_steps": 2,
    "density": 0.4,
    "log_with": "none",
}
METHODS = [method for method in all_methods().values() if not method.is_modifier and method.name != "coefficients"]


@pytest.fixture(scope="session", params=FAMILIES)
def look_alikes(request, tmp_path_factory) -> tuple[Backbone, Path, Path]:
    """A family, a cache folder with its checkpoints and questions, and the base among them."""
    backbone, make, base = FAMILIES[request.param]
    cache = make(tmp_path_factory.mktemp(request.param))
    return backbone, cache, cache / base


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps one state per process; each test starts its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


def headers(folder: Path) -> dict[str, dict[str, tuple[str, list[int]]]]:
    """Type and shape of every tensor, by file."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            found[file.name] = {name: (own.get_dtype(), own.get_shape()) for name, own in slices.items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_ends_with_the_base_s_files(method, look_alikes, tmp_path, capsys):
    backbone, cache, base = look_alikes
    if backbone is not MISTRAL and method.name == "moe":
        pytest.skip("there is no mixture of this family")
    arguments: list[object] = ["--method", method.name, "--cache_dir", cache]
    if method.reads_samples:
        arguments += ["--data_dir", cache / "dataset"]
    if AT_MOST_TWO in method.promises:
        arguments += ["--base_model_path", base]
        experts = list(backbone.expert_folders.items())[:2]
        arguments += [word for name, folder in experts for word in ("--expert", f"{name}={cache / folder}")]
    has_curves = method.reads_samples and "coefficients" in method.needs
    known = {**method.options, **({"log_with": None} if has_curves else {})}
    arguments += [word for name, value in QUICK.items() if name in known for word in (f"--{name}", value)]
    assert merge(*arguments, "--dry_run", "--output_path", tmp_path / "dry", family=backbone) == 0
    assert not (tmp_path / "dry").exists()
    assert "warning: " not in capsys.readouterr().out
    run = merged(tmp_path / "out", *arguments, family=backbone)
    for model in [run.model, *run.model.glob("*/")] if (run.model / "config.json").exists() else run.model.glob("*/"):
        check_result(model, base, is_mirror=method.name not in ("moe", "tall"))
    assert "warning: " not in run.log.read_text(encoding="utf-8"), "the published checkpoints are as they should be"


def check_result(model: Path, base: Path, *, is_mirror: bool) -> None:
    """The base's files but for weights in other formats, and finite weights of its names and types."""
    if is_mirror:
        assert headers(model) == headers(base)
        others = {file.name for file in base.iterdir() if ".bin" not in file.name}
        assert {file.name for file in model.iterdir()} >= others
    assert not list(model.glob("*.bin"))
    for name, tensor in checkpoints.tensors_of(model).items():
        assert tensor.is_floating_point() is False or torch.isfinite(tensor).all(), name
