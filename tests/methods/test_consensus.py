"""Consensus masks against the plain formula, on the results of several methods."""

from __future__ import annotations

import pytest
import torch

from expert_merging.methods.consensus import consensus
from expert_merging.methods.linear import task_arithmetic
from expert_merging.methods.spectral import svd
from tests.checkpoints import BASE, EXPERTS, tensors_of
from tests.command import assert_same_bytes, merge_plainly, merged, refusal

POST = ("--post", "consensus")


def task_vectors(shape, experts=3, seed=0):
    return torch.randn(experts, *shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def plainly(given: torch.Tensor, merged: torch.Tensor, factor: float, least: int) -> torch.Tensor:
    """Entry by entry."""
    result = torch.zeros(given[0].numel())
    for place, (column, entry) in enumerate(zip(given.reshape(3, -1).T, merged.flatten(), strict=True)):
        total = column[0] + column[1] + column[2]
        agreeing = [own for own in column if abs(own) > factor * abs(total - own)]
        if len(agreeing) >= least:
            result[place] = entry
    return result.view(given.shape[1:])


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 3), (2, 3, 4), (0, 4)], ids=str)
@pytest.mark.parametrize("factor", [0.2, 0.4, 1.0])
@pytest.mark.parametrize("least", [0, 1, 2, 3])
def test_what_is_kept_is_the_plain_formula_s(shape, factor, least):
    given, merged_ = task_vectors(shape), task_vectors(shape, 1, seed=1)[0]
    expected = plainly(given, merged_, factor, least)
    assert consensus(given.clone(), merged_.clone(), tall_lambda=factor, consensus_k=least).equal(expected)


def test_each_expert_may_have_a_factor_of_its_own():
    given = torch.tensor([[1.0, 1.0], [0.5, 0.1]])
    # The second expert's 0.5 is beyond 0.4 of the other's 1, and its 0.1 is beyond 0.05 of it alone.
    assert consensus(given.clone(), torch.ones(2), tall_lambda=[0.05, 0.4]).tolist() == [1, 0]
    assert consensus(given.clone(), torch.ones(2), tall_lambda=[0.05, 0.05]).tolist() == [1, 1]


@pytest.mark.parametrize("least", [0, 1, 2, 3])
@pytest.mark.parametrize("method", ["task_arithmetic", "svd", "ties"])
def test_any_method_s_result_is_improved(method, least, tiny_zoo, tmp_path):
    """Of an entry-wise method, one of matrices, and one with a first pass of its own."""
    common = ["--method", method, "--cache_dir", tiny_zoo]
    alone = tensors_of(merged(tmp_path / "alone", *common).model)
    post = [*POST, "--consensus_k", least, "--tall_lambda", "0.8"]
    improved = tensors_of(merged(tmp_path / "improved", *common, *post).model)
    base = tensors_of(tiny_zoo / BASE)
    experts = [tensors_of(tiny_zoo / folder) for folder in EXPERTS.values()]
    for name, tensor in improved.items():
        vectors = torch.stack([expert[name] - base[name] for expert in experts])
        total = vectors[0] + vectors[1] + vectors[2]
        kept = sum((vector.abs() > 0.8 * (total - vector).abs()).int() for vector in vectors) >= least
        assert tensor.equal(torch.where(kept, alone[name], base[name])), name
    changed = sum(int((improved[name] != base[name]).sum()) for name in base)
    of_alone = sum(int((alone[name] != base[name]).sum()) for name in base)
    assert (changed == of_alone) if least == 0 else (0 < changed < of_alone)


@pytest.mark.parametrize(("method", "rule"), [("task_arithmetic", task_arithmetic), ("svd", svd)])
def test_the_command_is_the_functions_one_after_the_other(method, rule, tiny_zoo, tmp_path):
    run = merged(tmp_path, "--method", method, "--cache_dir", tiny_zoo, *POST)

    def plain(given):
        made = rule(given.clone()) if given.ndim == 2 or rule is task_arithmetic else given.mean(0)
        return consensus(given, made)

    folders = [tiny_zoo / folder for folder in EXPERTS.values()]
    found, expected = tensors_of(run.model), merge_plainly(tiny_zoo / BASE, folders, plain)
    if rule is task_arithmetic:
        assert_same_bytes(found, expected)
    assert found.keys() == expected.keys()


def test_more_agreement_than_experts_is_refused(tiny_zoo, tmp_path, capsys):
    common = ["--method", "ties", "--cache_dir", tiny_zoo, *POST, "--output_path", tmp_path / "out"]
    assert refusal(capsys, *common, "--consensus_k", "4") == (
        "--consensus_k is the number of experts that an entry has to serve, at most 3 here, got 4"
    )
    assert refusal(capsys, *common, "--consensus_k", "-1") == (
        "--consensus_k must be a whole number in [0, inf), got -1"
    )
    assert refusal(capsys, *common, "--tall_lambda", "0.2,0.4") == (
        "--tall_lambda has 2 values for 3 experts (Chat, Math, Code)"
    )
    assert not (tmp_path / "out").exists()
