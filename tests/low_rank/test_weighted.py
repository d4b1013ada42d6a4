"""peft's ways to combine adapters are what the installed peft makes."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import peft.utils.merge_utils
import pytest
import torch
from peft import PeftModel
from transformers import MistralForCausalLM

from expert_merging.low_rank import weighted
from expert_merging.methods import drawing
from tests.adapters import save_adapter
from tests.checkpoints import BASE, tensors_of
from tests.command import flags, merged, refusal
from tests.low_rank.adapters import pairs_of, write_zoo

WEIGHTED = ("--method", "weighted_adapter")
WEIGHTS = [0.7, -0.4, 1.2]


@pytest.fixture(scope="module")
def zoo(tiny_zoo, tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    """A base and three adapters of one rank, one of which has another module as well."""
    folder, base = tmp_path_factory.mktemp("weighted"), tiny_zoo / BASE
    load = partial(MistralForCausalLM.from_pretrained, base)
    targets = {"A": ["q_proj", "down_proj"], "B": ["q_proj", "down_proj"], "C": ["q_proj", "o_proj"]}
    experts = {
        name: save_adapter(load, folder / name, seed=number, r=3, lora_alpha=number + 1, target_modules=own)
        for number, (name, own) in enumerate(targets.items())
    }
    return base, experts


def combined_by_peft(base: Path, experts: dict[str, Path], kind: str, **options: object) -> dict[str, torch.Tensor]:
    """The base's weights with what peft makes of the adapters."""
    model = MistralForCausalLM.from_pretrained(base)
    first, *others = experts.items()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(model, first[1], adapter_name=first[0])
        for name, folder in others:
            adapted.load_adapter(folder, adapter_name=name)
        adapted.add_weighted_adapter([*experts], WEIGHTS[: len(experts)], "merged", combination_type=kind, **options)
        adapted.set_adapter("merged")
        return dict(adapted.merge_and_unload().state_dict())


def by_value(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """A mask that follows from the numbers, so that both sides drop the same."""
    return ((tensor * 1e4).abs().floor() % 10 < 10 * density).to(tensor.dtype)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cat", {}),
        ("linear", {}),
        ("svd", {}),
        ("ties", {"density": 0.4}),
        ("ties", {"density": 0.6, "majority_sign_method": "frequency"}),
        ("magnitude_prune", {"density": 0.3}),
        ("dare_linear", {"density": 0.5}),
        ("dare_ties", {"density": 0.7}),
    ],
)
def test_adapters_are_combined_as_by_peft(kind, options, zoo, tmp_path, monkeypatch):
    base, experts = zoo

    def dropped(task_vectors, _part, _seed, _experts, rate):
        return task_vectors * by_value(task_vectors, 1 - rate)

    def pruned(tensor, density, rescale):
        assert rescale
        return tensor * by_value(tensor, density) / density

    monkeypatch.setattr(drawing, "drop", dropped)
    monkeypatch.setattr(peft.utils.merge_utils, "random_pruning", pruned)
    expected = combined_by_peft(base, experts, kind, **options)
    given = [piece for name, value in options.items() for piece in (f"--{name}", value)]
    run = merged(
        tmp_path, *WEIGHTED, "--combination_type", kind, "--adapter_weights", WEIGHTS, *given, *flags(base, **experts)
    )
    start = tensors_of(base)
    changed = {name for name, tensor in tensors_of(run.model).items() if not tensor.equal(start[name])}
    assert len(changed) == 9
    for name, tensor in tensors_of(run.model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_one_adapter_is_always_combined_by_linear(zoo, tmp_path):
    base, experts = zoo
    alone = {"A": experts["A"]}
    run = merged(
        tmp_path, *WEIGHTED, "--combination_type", "ties", "--adapter_weights", WEIGHTS[0], *flags(base, **alone)
    )
    expected = combined_by_peft(base, alone, "ties", density=0.2)
    for name, tensor in tensors_of(run.model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_what_is_dropped_follows_from_the_seed(tmp_path):
    zoo = write_zoo(tmp_path, pairs_of({"A": 3, "B": 3}))
    given = (*WEIGHTED, "--combination_type", "dare_linear", "--density", 0.5)
    found = [zoo.change(tmp_path / f"{run}", *given, "--seed", seed) for run, seed in enumerate([1, 1, 2])]
    name = "layers.0.q_proj.weight"
    assert found[0][name].equal(found[1][name])
    assert not found[0][name].equal(found[2][name])


def test_cat_is_the_sum_of_adapters_of_any_ranks(tmp_path):
    zoo = write_zoo(tmp_path, pairs_of(), alpha=3)
    found = zoo.change(tmp_path / "out", *WEIGHTED, "--adapter_weights", WEIGHTS)
    expected = zoo.change(tmp_path / "sum", "--method", "task_arithmetic", "--scaling_coefficient", WEIGHTS)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_factors_of_several_ranks_are_refused(kind, tmp_path, capsys):
    zoo = write_zoo(tmp_path, pairs_of())
    line = refusal(capsys, *WEIGHTED, "--combination_type", kind, *zoo.flags)
    assert line.startswith(f"--combination_type {kind} merges factors of one rank, and those of layers.")


def test_entries_of_largest_magnitude_are_counted_exactly():
    """Also where several are alike."""
    kept = weighted.largest(torch.ones(2, 5, 2), 0.3)
    assert kept.flatten(1).sum(1).tolist() == [3, 3]
