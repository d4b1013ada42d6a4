"""What methods have in common that go through a merged model's layers."""

from __future__ import annotations

import pytest
import torch

from expert_merging import preparing
from expert_merging.errors import InputError
from expert_merging.method import modified
from expert_merging.running.targets import Asked
from expert_merging.statistics.layer_by_layer import streams_of
from tests.checkpoints import tensors_of
from tests.command import merged

# With which hardly anything is changed.
STILL = {"distil": ["--distil_rate", 1e-12, "--distil_epochs", 1], "featcal": ["--featcal_ridge", 1e12]}


@pytest.fixture
def arguments(tiny_zoo, dataset):
    return ["--cache_dir", tiny_zoo, "--data_dir", dataset, "--samples_per_task", 1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dare_ta", "svd"], ids=["in blocks", "whole"])
@pytest.mark.parametrize("modifier", STILL)
def test_weights_are_not_rounded_where_models_run_in_half_precision(method, modifier, arguments, tmp_path):
    """Checkpoints are in float32, so what the method before makes is finer than what runs."""
    given = [*arguments, "--method", method]
    before = tensors_of(merged(tmp_path / "plain", *given).model)
    run = merged(tmp_path / "out", *given, "--post", modifier, *STILL[modifier], "--mixed_precision", "bf16")
    found = tensors_of(run.model)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-7)
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in found.values())


@pytest.mark.parametrize("modifier", STILL)
def test_new_weights_are_written_without_the_method_before(modifier, arguments, tmp_path, monkeypatch):
    names = []

    def watched(rules, anew):
        names[:] = anew
        return modified(rules, anew)

    monkeypatch.setattr(preparing, "modified", watched)
    run = merged(tmp_path, *arguments, "--method", "task_arithmetic", "--post", modifier, *STILL[modifier])
    assert [set(own) for own in names] == [set(), {name for name in tensors_of(run.model) if "proj" in name}]


def test_a_model_that_is_no_plain_stack_is_refused():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))
            self.base_model = self

        def forward(self, hidden, **_):
            return self.layers[1](self.layers[0](hidden) + 1)

    model = Odd()
    with pytest.raises(InputError, match="Odd has no list of layers; use a method that does not"):
        streams_of(model, [], [])
    asked = Asked(0, None, {"hidden": torch.ones(1, 2)}, torch.tensor([0]))
    with pytest.raises(InputError, match="Odd changes hidden states between its layers"):
        streams_of(model, model.layers, [asked])
