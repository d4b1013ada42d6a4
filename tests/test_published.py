"""Every method on look-alikes of the published checkpoints, planned and run to the end."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from expert_merging.asking import choose_formats
from expert_merging.backbone import Backbone
from expert_merging.catalogue import all_methods
from expert_merging.method import AT_MOST_TWO
from expert_merging.plan import make_plan
from InternVL.backbone import BACKBONE as INTERNVL
from Mistral.backbone import BACKBONE as MISTRAL
from Qwen2VL.backbone import BACKBONE as QWEN2VL
from tests import checkpoints, internvl, published, qwen2vl
from tests.adapters import merged_by_peft, save_adapter
from tests.command import flags, merge, merged

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
}
# As many as the quadratics of five experts' coefficients have terms, and trade-offs; the experts and a child.
ENOUGH = {"map": {"evaluations": 23, "trade_offs": 2}, "m2n2": {"evaluations": 7}}
# Of a run's coefficients there are tests elsewhere.
OWN = [method for method in all_methods().values() if not method.is_modifier and method.name != "coefficients"]
ON_FACTORS = [method.name for method in OWN if method.prepare and "low_rank" in method.prepare.gives]
METHODS = [method for method in OWN if method.name not in ON_FACTORS]
# What adapters of published models train, in language models alone.
TARGETS = r".*layers\.\d+\.(self_attn\.q_proj|mlp\.down_proj)"


@pytest.fixture(scope="session", params=FAMILIES)
def look_alikes(request, tmp_path_factory) -> tuple[Backbone, Path, Path]:
    """A family, a cache folder with its checkpoints and questions, and the base among them."""
    backbone, make, base = FAMILIES[request.param]
    cache = make(tmp_path_factory.mktemp(request.param))
    return backbone, cache, cache / base


@pytest.fixture(scope="session")
def adapters(look_alikes, tmp_path_factory) -> dict[str, Path]:
    """Adapters of one rank in the place of the experts."""
    backbone, _, base = look_alikes
    folder, load = tmp_path_factory.mktemp("adapters"), partial(backbone.load_model, base, torch.float32)
    return {
        name: save_adapter(load, folder / name, seed=number, change=0.02, r=3, target_modules=TARGETS)
        for number, name in enumerate(backbone.expert_folders)
    }


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
    arguments: list[object] = ["--method", method.name]
    if method.reads_samples:
        arguments += ["--data_dir", cache / "dataset"]
    if AT_MOST_TWO in method.promises:
        experts = list(backbone.expert_folders.items())[:2]
        arguments += flags(base, **{name: cache / folder for name, folder in experts})
    else:
        arguments += ["--cache_dir", cache]
    quick = {**QUICK, **ENOUGH.get(method.name, {})}
    arguments += [word for name, value in quick.items() if name in method.options for word in (f"--{name}", value)]
    if "coefficients" in method.needs:
        arguments += ["--log_with", "none"]
    assert merge(*arguments, "--dry_run", "--output_path", tmp_path / "dry", family=backbone) == 0
    assert not (tmp_path / "dry").exists()
    assert "warning: " not in capsys.readouterr().out
    run = merged(tmp_path / "out", *arguments, family=backbone)
    for model in [run.model, *run.model.glob("*/")] if (run.model / "config.json").exists() else run.model.glob("*/"):
        check_result(model, base, is_mirror=method.name not in ("moe", "tall", "emr"))
    assert "warning: " not in run.log.read_text(encoding="utf-8"), "the published checkpoints are as they should be"


@pytest.mark.slow
@pytest.mark.parametrize("method", ON_FACTORS)
def test_every_method_on_factors_writes_a_model_and_the_same_as_an_adapter(
    method, look_alikes, adapters, tmp_path, capsys
):
    backbone, _, base = look_alikes
    runs = {}
    for output in ("dense", "adapter"):
        arguments = ["--method", method, "--output", output, *flags(base, **adapters)]
        capsys.readouterr()
        assert merge(*arguments, "--dry_run", "--output_path", tmp_path / "dry", family=backbone) == 0
        assert not (tmp_path / "dry").exists()
        told = capsys.readouterr().out
        assert "6 tensors are merged by their factors; " in told
        assert ("hold the base's weights" in told) == (output == "dense" and backbone is MISTRAL)
        runs[output] = merged(tmp_path / output, *arguments, family=backbone).model
    check_result(runs["dense"], base, is_mirror=True)
    load = partial(backbone.load_model, dtype=torch.float32)
    found = merged_by_peft(partial(load, base), runs["adapter"]).state_dict()
    for name, tensor in load(runs["dense"]).state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=2**-8, atol=0, msg=name)
    start = load(base).state_dict()
    assert sum(not tensor.equal(found[name]) for name, tensor in start.items()) == 6


def test_every_expert_is_asked_in_its_own_words(look_alikes):
    backbone, cache, base = look_alikes
    experts = {name: cache / folder for name, folder in backbone.expert_folders.items()}
    plan = make_plan(base, experts, list(backbone.exclude_params), backbone.file_name, backbone.landmark)
    formats = choose_formats(backbone, plan)
    assert {name: found.origin for name, found in formats.experts.items()} == expected_words(backbone)
    assert formats.warnings == ()


def expected_words(backbone: Backbone) -> dict[str, str]:
    """In whose words the published experts are asked."""
    if backbone is MISTRAL:
        return {
            "Chat": "the chat template of Mistral-7B-Instruct-v0.1",
            "Math": "the format of MAmmoTH2-7B",
            "Code": "the format of Mistral-7B-codealpaca-lora (Alpaca)",
        }
    if backbone is INTERNVL:
        return dict.fromkeys(backbone.expert_folders, "the published conversation internvl2_5")
    return {name: f"the chat template of {folder}" for name, folder in backbone.expert_folders.items()}


def check_result(model: Path, base: Path, *, is_mirror: bool) -> None:
    """The base's files but for weights in other formats, and finite weights of its names and types."""
    if is_mirror:
        assert headers(model) == headers(base)
        others = {file.name for file in base.iterdir() if ".bin" not in file.name}
        assert {file.name for file in model.iterdir()} >= others
    assert not list(model.glob("*.bin"))
    for name, tensor in checkpoints.tensors_of(model).items():
        assert tensor.is_floating_point() is False or torch.isfinite(tensor).all(), name
