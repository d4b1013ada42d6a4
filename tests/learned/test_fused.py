"""Learning with tensors that transformers renames and fuses in memory: each has coefficients of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel, Qwen3MoeConfig

from expert_merging.learned.coefficients import load_coefficients
from expert_merging.learned.live import LiveModel
from expert_merging.learned.parametrisations import CoefficientVector, Layout
from expert_merging.stored import Run, parameter_names, stored_tensors
from tests.checkpoints import BASE, EXPERTS, SIZES, perturb, save_tokenizer, tensors_of, write_tasks
from tests.command import merged
from tests.learned.training import make_trainer

COUNT = 3
CONFIGS = {
    "Mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=COUNT, num_experts_per_tok=2),
    "Qwen3-MoE": lambda: Qwen3MoeConfig(
        **SIZES, num_experts=COUNT, num_experts_per_tok=2, moe_intermediate_size=20, head_dim=8
    ),
}
# An expert's gate, up and down projections in files, and the module that has them in memory.
NAMES = {
    "Mixtral": (("w1", "w3", "w2"), "block_sparse_moe"),
    "Qwen3-MoE": (("gate_proj", "up_proj", "down_proj"), "mlp"),
}
EXCLUDE = [".*lm_head.*", ".*norm.*", ".*embed_tokens.*"]


def save_zoo(cache: Path, kind: str) -> Path:
    """A base and three experts, with tasks that have responses."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[kind]()).save_pretrained(cache / BASE)
    save_tokenizer(cache / BASE)
    for number, folder in enumerate(EXPERTS.values()):
        perturb(cache / BASE, cache / folder, 1 + number)
    write_tasks(cache / "dataset", count=1, responses={task: f"{task}!" for task in EXPERTS})
    return cache


@pytest.fixture(scope="module")
def zoos(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def zoo(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_zoo(tmp_path_factory.mktemp("fused"), kind)
        return made[kind]

    return zoo


def in_memory(kind: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of files as the model's parameters, put together by hand."""
    (gate, up, down), module = NAMES[kind]
    found = {
        name.replace(f".{module}.", ".mlp."): tensor for name, tensor in tensors.items() if ".experts." not in name
    }
    for layer in range(SIZES["num_hidden_layers"]):
        stem = f"model.layers.{layer}.{module}.experts"
        parts = [
            {part: tensors[f"{stem}.{number}.{part}.weight"] for part in (gate, up, down)} for number in range(COUNT)
        ]
        place = f"model.layers.{layer}.mlp.experts"
        found[f"{place}.gate_up_proj"] = torch.stack([torch.cat([own[gate], own[up]]) for own in parts])
        found[f"{place}.down_proj"] = torch.stack([own[down] for own in parts])
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_tensor_of_the_files_has_its_place(kind, zoos):
    folder = zoos(kind) / BASE
    model, files = AutoModelForCausalLM.from_pretrained(folder), tensors_of(folder)
    found = stored_tensors(model)
    assert found.keys() == files.keys() == set(parameter_names("AutoModelForCausalLM", CONFIGS[kind]()))
    parameters = dict(model.named_parameters())
    for name, (run,) in found.items():
        assert torch.equal(parameters[run.parameter].flatten()[run.start : run.stop], files[name].flatten()), name
    expected = in_memory(kind, files)
    assert parameters.keys() == expected.keys()
    assert all(torch.equal(parameters[name], tensor) for name, tensor in expected.items())


class Turned(PreTrainedModel):
    """A model whose files have its matrix turned, its vectors in one, and one of them reversed."""

    config_class = MixtralConfig

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config)
        self.matrix = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
        self.first = torch.nn.Parameter(torch.arange(3.0))
        self.second = torch.nn.Parameter(torch.arange(2.0))


def test_what_is_turned_in_memory_has_no_place(monkeypatch):
    def undo(_model, numbers):
        vectors = {"vectors": torch.cat([numbers["second"], numbers["first"]]), "reversed": numbers["first"].flip(0)}
        return {"turned": numbers["matrix"].transpose(0, 1), **vectors}

    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", undo)
    assert stored_tensors(Turned(MixtralConfig(**SIZES))) == {"vectors": [Run("second", 0, 2), Run("first", 0, 3)]}


def test_parts_with_one_published_name_follow_each_other_as_in_the_model():
    model = torch.nn.Module()
    model.value, model.key = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4, 3))
    assert stored_tensors(model, lambda name: "both") == {"both": [Run("value", 0, 6), Run("key", 0, 12)]}


@pytest.mark.slow
@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("exclude", [EXCLUDE, [*EXCLUDE, r".*experts\.1\..*", ".*(w3|up_proj).*"]], ids=["all", "some"])
def test_gradients_are_those_of_merging_by_hand(kind, accumulates, exclude, zoos, tmp_path):
    trainer = make_trainer(zoos(kind), tmp_path, exclude=exclude)
    material = trainer.gather()
    material.task_vectors._block, material.task_vectors._step = 300, 100
    names, plan = list(trainer.plan.merged), trainer.plan
    assert any(".experts." in name for name in names)
    assert not any(re.match(pattern, name) for name in names for pattern in exclude)
    own = CoefficientVector(Layout(dict.fromkeys(names, 1), [0.3, 0.2, 0.5], bounded=False))
    with torch.no_grad():
        own.raw.add_(0.1 * torch.randn_like(own.raw))
    live = LiveModel(material.model, material.task_vectors, own, str)
    live.accumulates = accumulates
    target, losses = material.targets[0], trainer.settings.objective.losses
    for _ in range(2):  # of which the second knows what is fetched next
        live.rebuild()
        losses(live.model, [target]).sum().backward()
        live.finish()
    files = [tensors_of(plan.base.folder), *(tensors_of(expert.folder) for expert in plan.experts.values())]
    values = {name: row.clone().requires_grad_() for name, row in own.by_name().items()}
    weights = dict(files[0])
    for name, row in values.items():
        weights[name] = files[0][name] + sum(row[k, 0] * (files[k + 1][name] - files[0][name]) for k in range(3))
    held = in_memory(kind, weights)
    assert all(torch.allclose(live.model.get_parameter(name), tensor, atol=1e-6) for name, tensor in held.items())
    with torch.nn.utils.stateless._reparametrize_module(live.model, held):
        gradients = torch.autograd.grad(losses(live.model, [target]).sum(), list(values.values()), allow_unused=True)
    for name, gradient in zip(values, gradients, strict=True):
        expected = torch.zeros(3, 1) if gradient is None else gradient
        torch.testing.assert_close(own.view(live.gradient, name), expected, rtol=1e-4, atol=1e-8, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_mixture_is_learned_from_its_files_to_its_files(kind, zoos, tmp_path):
    cache = zoos(kind)
    given = ("--method", "expert_merging", "--seed", 3, "--log_with", "none", "--cache_dir", cache)
    run = merged(tmp_path, *given, "--data_dir", cache / "dataset")
    learned, before, after = load_coefficients(run.folder).values, tensors_of(cache / BASE), tensors_of(run.model)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == learned.keys() == {name for name in before if not re.match("|".join(EXCLUDE), name)}
    report = AutoModelForCausalLM.from_pretrained(run.model, output_loading_info=True)[1]
    assert not any(report.values()), report
