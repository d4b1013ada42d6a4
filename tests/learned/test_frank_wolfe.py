"""Frank-Wolfe merging against a plain loop over whole models, whose weights themselves make the steps."""

from __future__ import annotations

import pytest
import torch

from expert_merging.learned.frank_wolfe import FrankWolfe, FrankWolfeTrainer, corner, lengths
from expert_merging.learned.options import FrankWolfeOptions
from expert_merging.learned.parametrisations import CoefficientVector, Layout
from tests.checkpoints import BASE, EXPERTS, tensors_of, write_tasks
from tests.command import flags, merge, merged, refusal
from tests.learned.training import make_trainer, make_twin


def made(trainer):
    return FrankWolfeTrainer(trainer.context, trainer.settings)


@pytest.mark.slow
@pytest.mark.parametrize(("granularity", "rate"), [("layer", 1.0), ("layer", 0.4), ("task", 0.4)])
def test_coefficients_are_the_steps_that_weights_make(granularity, rate, answered_zoo, tmp_path):
    given = {"granularity": granularity, "learning_rate": rate, "num_epochs": 5}
    trainer = made(make_trainer(answered_zoo, tmp_path, kind=FrankWolfeOptions, **given))
    coefficients = trainer.train()
    twin, examples = make_twin(trainer, likelihood=True, response_only=True, free=True)
    task_vectors = twin.task_vectors
    weights = {name: twin.base_weights[name] + 0.3 * sum(own) for name, own in task_vectors.items()}
    back = 0
    for step in range(5):
        leaves = {name: value.detach().clone().requires_grad_(True) for name, value in weights.items()}
        twin.merged_weights = lambda leaves=leaves: {**twin.base_weights, **leaves}
        sum(twin.losses(example)[0] for example in examples).backward()
        gradients = {name: leaf.grad for name, leaf in leaves.items()}
        share = rate * 2 / (step + 2)
        together = [sum((gradients[name] * own[k]).sum() for name, own in task_vectors.items()) for k in range(3)]
        for name, own in task_vectors.items():
            if granularity == "layer":
                slopes = [(gradients[name] * vector).sum() / vector.norm() for vector in own]
            else:
                slopes = together
            best = min(range(3), key=slopes.__getitem__)
            target = own[best] if slopes[best] < 0 else torch.zeros_like(own[best])
            back += bool(slopes[best] >= 0)
            weights[name] = weights[name] + share * (twin.base_weights[name] + target - weights[name])
    for name, values in coefficients.values.items():
        found = twin.base_weights[name] + sum(c * own for c, own in zip(values[:, 0], task_vectors[name], strict=True))
        torch.testing.assert_close(found, weights[name], rtol=1e-4, atol=1e-5)
        assert values.min() >= 0
    chosen = torch.cat([values.argmax(0) for values in coefficients.values.values()])
    assert (len(set(chosen.tolist())) > 1) == (granularity == "layer")
    assert back or granularity == "task", "the base is never chosen, so the test says nothing of it"


def test_the_corner_is_the_steepest_descent():
    assert corner(torch.tensor([0.2, -0.5, -0.4])).tolist() == [0.0, 1.0, 0.0]
    assert corner(torch.tensor([0.2, 0.5, 0.0])).tolist() == [0.0, 0.0, 0.0], "no expert makes the loss smaller"


def test_lengths_are_those_of_task_vectors_and_divide_slopes(answered_zoo, tmp_path):
    """An expert with half of the task vector has half of the slope, and is chosen as easily; one with none, never."""
    given = {"task_vector_coeffs_dict": {"Chat": 0.5}}
    trainer = made(make_trainer(answered_zoo, tmp_path, kind=FrankWolfeOptions, **given))
    base, chat = tensors_of(answered_zoo / BASE), tensors_of(answered_zoo / EXPERTS["Chat"])
    for name, found in lengths(trainer.gather().task_vectors).items():
        assert float(found[0]) == pytest.approx(0.5 * float((chat[name] - base[name]).norm()), rel=1e-5)
    vector = CoefficientVector(Layout({"a": 1}, [0.5, 0.5, 0.5], bounded=False))
    steps = FrankWolfe(vector, {"a": torch.tensor([10.0, 1.0, 0.0], dtype=torch.float64)}, 0.5)
    vector.raw.grad = torch.tensor([-5.0, -1.0, 0.0])
    steps.step()
    assert vector.raw.tolist() == [0.25, 0.75, 0.25]


@pytest.mark.slow
def test_an_expert_that_has_changed_nothing_is_never_chosen(answered_zoo, tmp_path):
    write_tasks(tmp_path / "tasks", count=1, responses=dict.fromkeys(EXPERTS, "42"))
    given = [*flags(answered_zoo / BASE, Chat=answered_zoo / BASE, Math=answered_zoo / EXPERTS["Math"])]
    run = merged(tmp_path / "out", "--method", "fw_hard", *given, "--data_dir", tmp_path / "tasks", "--num_epochs", 1)
    base, math, result = (
        tensors_of(place) for place in (answered_zoo / BASE, answered_zoo / EXPERTS["Math"], run.model)
    )
    ends = [any(result[name].equal(one[name]) for one in (base, math)) for name in result if "proj" in name]
    assert all(ends), "after one whole step each tensor is the base's or an expert's"


def test_the_first_point_may_be_a_corner_and_no_point_is_outside(answered_zoo, tmp_path, capsys):
    given = ["--cache_dir", answered_zoo, "--data_dir", answered_zoo / "dataset", "--output_path", tmp_path]
    given += ["--method", "fw_hard", "--dry_run", "--scaling_coefficient"]
    for corner_point, told in ((0, "0"), (1, "1"), ("[0, 1, 0]", "0, 1")):
        assert merge(*given, corner_point) == 0
        assert f"coefficients start at {told} and multiply task vectors" in capsys.readouterr().out
    problem = refusal(capsys, *given, -0.1)
    assert problem.startswith("--scaling_coefficient must be a number in [0, 1]")
    assert problem.endswith("got -0.1")
