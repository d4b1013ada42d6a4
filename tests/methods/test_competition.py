"""PCB merging against its authors' code and a plain twin."""

from __future__ import annotations

import math

import pytest
import torch

from expert_merging.catalogue import find_method
from tests.checkpoints import BASE, EXPERTS, tensors_of
from tests.command import merged
from tests.methods.elsewhere import inputs, result
from tests.methods.test_all import apply, task_vectors

PCB = find_method("pcb")


def plain_pcb(given: torch.Tensor, ratio: float) -> torch.Tensor:
    """Of task vectors ``(experts, entries)``, by sorting, in float64."""
    given = given.double()
    count = given.shape[1]
    weights, clamped = [], []
    total = given.sum(0)
    for row in given:
        ordered = row.abs().sort().values
        low, high = ordered[int(count * 1e-4)], ordered[int(count * (1 - 1e-4) - 1)]
        magnitudes = row.abs().clamp(low, high)
        score = torch.exp(len(given) * ((magnitudes - low) / (high - low)) ** 2) * torch.tanh(row * total)
        low, high = score.sort().values[[int(count * (1 - ratio)), -1]]
        weights.append((score.clamp(low, high) - low) / (high - low))
        clamped.append(row.sign() * magnitudes)
    weights, clamped = torch.stack(weights), torch.stack(clamped)
    return ((weights * clamped).sum(0) / weights.sum(0).clamp(min=1e-12)).float()


@pytest.mark.parametrize(
    ("shape", "scale", "ratio", "name", "step"),
    [
        ((6, 9), 1, 0.1, "pcb 0.1", 1),
        ((6, 9), 1, 0.3, "pcb 0.3", 1),
        ((40, 50), 8, 0.05, "pcb large 0.05", 37),
    ],
)
def test_the_authors_code_agrees(shape, scale, ratio, name, step):
    """But where the only weight is the threshold's own, which is nothing or rounding."""
    base, given = inputs(shape)
    found = apply(PCB, given * scale, base=base, pcb_ratio=ratio, scaling_coefficient=1.0).flatten()[::step]
    expected = result("authors", name)
    differs = (found - expected).abs() > 1e-5 * expected.abs().max()
    assert int(differs.sum()) == 0


@pytest.mark.parametrize("shape", [(300,), (30, 20), (4, 5, 6)], ids=str)
@pytest.mark.parametrize("ratio", [0.05, 0.5, 1.0])
def test_it_is_the_plain_twin(shape, ratio):
    given = task_vectors(shape) * torch.tensor([1.0, 4.0, 0.3]).view(-1, *[1] * len(shape))
    found = apply(PCB, given, pcb_ratio=ratio, scaling_coefficient=1.0)
    torch.testing.assert_close(found.flatten(), plain_pcb(given.flatten(1), ratio), rtol=1e-3, atol=1e-5)


def test_each_expert_may_have_a_coefficient_of_its_own():
    given = task_vectors((30, 20))
    apart = [apply(PCB, given, scaling_coefficient=[float(k == expert) for k in range(3)]) for expert in range(3)]
    together = apply(PCB, given, scaling_coefficient=[1.0, 2.0, 0.5])
    torch.testing.assert_close(together, apart[0] + 2 * apart[1] + 0.5 * apart[2])


def test_no_more_entries_change_than_the_ratio_of_each_expert():
    given = task_vectors((1000,))
    changed = int((apply(PCB, given, pcb_ratio=0.05) != 0).sum())
    assert 50 < changed <= 150
    assert math.isclose(int((apply(PCB, given[:1], pcb_ratio=0.05) != 0).sum()), 49, abs_tol=1)


def test_bounds_are_those_of_the_whole_model(tiny_zoo, tmp_path):
    run = merged(tmp_path, "--method", "pcb", "--exclude_params", "none", "--cache_dir", tiny_zoo)
    base, found = tensors_of(tiny_zoo / BASE), tensors_of(run.model)
    experts = [tensors_of(tiny_zoo / folder) for folder in EXPERTS.values()]
    rows = [torch.cat([(expert[name] - base[name]).flatten() for name in base]) for expert in experts]
    expected = 1.2 * plain_pcb(torch.stack(rows), 0.05)
    change = torch.cat([(found[name] - base[name]).flatten() for name in base])
    torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-5)
