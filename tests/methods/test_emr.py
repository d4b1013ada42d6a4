"""EMR merging against its authors' code and a plain twin, and experts rebuilt from it by the command."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from expert_merging.commands.main import main
from expert_merging.methods.emr import emr, unify
from expert_merging.methods.tall import unpack
from tests.checkpoints import BASE, EXPERTS, tensors_of
from tests.command import merged
from tests.methods.elsewhere import assert_agrees, inputs, result

NAMES = ("a", "b", "c")
SHAPES = [(), (1,), (7,), (8,), (5, 3), (2, 3, 4), (0,), (0, 4)]


def plain_emr(given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Elected task vector and masks ``(experts, entries)`` of task vectors ``(experts, entries)``, and factors."""
    unified, masks = torch.zeros(given.shape[1]), torch.zeros(given.shape, dtype=torch.bool)
    for place in range(given.shape[1]):
        column = given[:, place].double()
        masks[:, place] = column * column.sum() > 0
        agreeing = column[masks[:, place]]
        unified[place] = agreeing[agreeing.abs().argmax()] if len(agreeing) else 0.0
    norms = [float((unified * mask).abs().double().sum()) for mask in masks]
    owns = [float(row.abs().double().sum()) for row in given]
    factors = [own / norm if norm else 1.0 for own, norm in zip(owns, norms, strict=True)]
    return unified, masks, factors


def test_the_authors_code_agrees():
    _, given = inputs()
    made = emr(given.clone(), NAMES)
    assert_agrees(made["merged"], "authors", "emr")
    masks = result("authors", "emr masks").view(3, -1).bool()
    for name, mask in zip(NAMES, masks, strict=True):
        assert unpack(made[f"mask of {name}"], mask.numel()).bool().equal(mask)
    factors = plain_emr(given.flatten(1))[2]
    torch.testing.assert_close(torch.tensor(factors), result("authors", "emr rescalers"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("experts", [1, 2, 5])
def test_the_elected_task_vector_is_the_plain_one(shape, experts):
    given = torch.randn(experts, *shape, generator=torch.Generator().manual_seed(0))
    made = emr(given.clone(), NAMES[:1] * experts)
    assert made["merged"].shape == shape
    torch.testing.assert_close(made["merged"].flatten(), plain_emr(given.reshape(experts, -1))[0] if 0 not in shape
                               else torch.zeros(0))  # fmt: skip
    if experts == 1:
        assert made["merged"].equal(given[0])


def test_what_cancels_is_nobody_s_and_what_nobody_changed_stays():
    assert unify(torch.tensor([[1.0, 0.0, 2.0], [-1.0, 0.0, -1.0]])).tolist() == [0.0, 0.0, 2.0]


def test_the_order_of_experts_does_not_matter():
    given = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(unify(given[[2, 0, 1]]), unify(given))


@pytest.fixture
def run(tiny_zoo, tmp_path):
    return merged(tmp_path / "runs", "--method", "emr", "--run_name", "r", "--cache_dir", tiny_zoo)


def test_rebuilt_experts_have_their_norms(run, tiny_zoo, tmp_path, capsys):
    base = tensors_of(tiny_zoo / BASE)
    names = [name for name in base if "proj" in name]
    experts = [tensors_of(tiny_zoo / folder) for folder in EXPERTS.values()]
    rows = torch.stack([torch.cat([(own[name] - base[name]).flatten() for name in names]) for own in experts])
    unified, masks, factors = plain_emr(rows)
    model = tensors_of(run.model)
    change = torch.cat([(model[name] - base[name]).flatten() for name in names])
    torch.testing.assert_close(change, unified, rtol=1e-5, atol=1e-6)
    stored = load_file(run.model / "masks" / "rescalers.safetensors")
    torch.testing.assert_close(torch.cat([stored[name] for name in EXPERTS]), torch.tensor(factors), rtol=1e-5, atol=0)
    for number, expert in enumerate(EXPERTS):
        assert main(["extract", str(run.folder), "--expert", expert, "--output", str(tmp_path / expert)]) == 0
        found = tensors_of(tmp_path / expert)
        change = torch.cat([(found[name] - base[name]).flatten() for name in names])
        torch.testing.assert_close(change, factors[number] * masks[number] * unified, rtol=1e-4, atol=1e-5)
        assert change.abs().sum().item() == pytest.approx(rows[number].abs().sum().item(), rel=1e-4)
        card = (tmp_path / expert / "README.md").read_text()
        assert "EMR merging, arXiv 2405.17461" in card
        assert f"What the merge changed is multiplied by {factors[number]:.3f}"[:-1] in card
    assert "extract" in (run.model / "README.md").read_text()


def test_factors_that_are_gone_are_noticed(run, tmp_path, capsys):
    file = run.model / "masks" / "rescalers.safetensors"
    message = f"error: {file} does not have the factor of 'Math'; was it changed or moved away?\n"
    for spoil in (lambda: save_file({"Chat": torch.ones(1)}, file), lambda: file.write_bytes(b"?"), file.unlink):
        spoil()
        capsys.readouterr()
        assert main(["extract", str(run.folder), "--expert", "Math", "--output", str(tmp_path / "out")]) == 1
        assert capsys.readouterr().err.replace("\n", " ").strip() == message.strip()
    assert not (tmp_path / "out").exists()
