"""What is taken of the inputs of a model's layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from expert_merging.errors import InputError
from expert_merging.questions.calibration import Sample
from expert_merging.running.targets import Asked
from expert_merging.statistics.inputs import InputWatch

CPU = torch.device("cpu")
TOKENS, WIDTH = 5, 4


class Toy(nn.Module):
    """A decoder's layer and a projector, whose calls a test decides."""

    def __init__(self, compute) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in "qkv"})])
        self.mlp1 = nn.Linear(WIDTH, 3)
        self.table = nn.Parameter(torch.ones(3, WIDTH))
        self.compute = compute

    def base_model(self, inputs: torch.Tensor, input_ids: torch.Tensor, use_cache: bool):
        assert not use_cache
        assert not torch.is_grad_enabled()
        return self.compute(self, inputs, **self.layers[0])


NAMES = {f"layers.0.{name}.weight": f"layers.0.{name}.weight" for name in "qkv"} | {"mlp1.weight": "mlp1.weight"}


@torch.no_grad()
def watched(compute, *inputs: torch.Tensor, tokens: range = range(TOKENS), wanted=NAMES, file_name=str):
    """Gram matrices of samples, by the last parts of the names that share them."""
    model = Toy(compute)
    watch = InputWatch(model, wanted, file_name)
    try:
        for number, given in enumerate(inputs):
            asked = {"inputs": given, "input_ids": torch.zeros(1, TOKENS, dtype=torch.long)}
            watch.run(Asked(number, Sample("T", "E", "?", None, "0"), asked, torch.tensor(list(tokens))))
        found = watch.finish()
    finally:
        watch.close()
    assert not any(part._forward_pre_hooks for part in model.modules())
    return {
        ",".join(name.removesuffix(".weight").split(".")[-1] for name in names): gram for names, gram in found.items()
    }


def states(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def outer(*parts: torch.Tensor) -> torch.Tensor:
    rows = torch.cat([part.reshape(-1, WIDTH) for part in parts]).double()
    return rows.T @ rows / len(rows)


def close(gram, *parts: torch.Tensor) -> None:
    torch.testing.assert_close(gram.matrix(CPU), outer(*parts), rtol=1e-5, atol=1e-6)


def test_layers_with_the_same_input_share_a_matrix():
    first, second = states(0), states(1)
    found = watched(lambda model, x, q, k, v: (q(x), k(x), v(x + 1)), first, second)
    assert list(found) == ["q,k", "v"]
    close(found["q,k"], first, second)
    close(found["v"], first + 1, second + 1)


def test_equal_inputs_in_places_of_their_own_are_not_taken_for_the_same():
    x = states()
    assert list(watched(lambda model, x, q, k, v: (q(x), k(x.clone()), v(x)), x)) == ["q", "k", "v"]


def test_inputs_that_are_overwritten_meanwhile_are_taken_as_they_were():
    x = states()

    def compute(model, given, q, k, v):
        given = given.clone()
        q(given)
        given.mul_(2)
        k(given)
        given.mul_(2)
        model.mlp1(given)
        given.mul_(0)

    found = watched(compute, x)
    close(found["q"], x)
    close(found["k"], 2 * x)
    close(found["mlp1"], 4 * x)


def test_a_layer_that_runs_twice_has_both_inputs():
    x = states()
    close(watched(lambda model, x, q, k, v: (q(x), q(x), q(x + 1)), x)["q"], x, x, x + 1)


def test_a_layer_may_be_called_with_a_name():
    x = states()
    close(watched(lambda model, x, q, k, v: q(input=x), x)["q"], x)


def test_a_layer_that_shares_at_times_has_a_matrix_for_each_case():
    first, second = states(0), states(1)
    second[0, 0, 0] = 100

    def compute(model, x, q, k, v):
        q(x)
        k(x if x[0, 0, 0] < 50 else x + 1)

    found = watched(compute, first, second)
    assert list(found) == ["q,k", "q", "k"]
    close(found["q,k"], first)
    close(found["q"], second)
    close(found["k"], second + 1)


def test_response_tokens_are_those_of_the_language_model():
    """A projector's inputs are no tokens, even if there are as many."""
    x = states()
    found = watched(lambda model, x, q, k, v: (q(x), k(x[:, 1:]), model.mlp1(x)), x, tokens=range(2, 4))
    close(found["q"], x[:, 2:4])
    close(found["k"], x[:, 1:])
    close(found["mlp1"], x)


def test_rows_of_one_tensor_of_the_file_share_its_inputs():
    x = states()
    names = {"layers.0.qkv.weight": "layers.0.qkv.weight"}

    def file_name(name: str) -> str:
        return "layers.0.qkv.weight" if name.endswith(("q.weight", "k.weight", "v.weight")) else name

    found = watched(lambda model, x, q, k, v: (q(x), k(x), v(x)), x, wanted=names, file_name=file_name)
    assert list(found) == ["qkv"]
    assert found["qkv"].vectors == TOKENS
    with pytest.raises(
        InputError, match=r"^the rows of layers\.0\.qkv\.weight have different inputs in the model; exc"
    ):
        watched(lambda model, x, q, k, v: (q(x), k(x), v(x + 1)), x, wanted=names, file_name=file_name)


def test_what_is_no_linear_layer_has_no_matrix():
    x = states()
    wanted = {"table": "table", "layers.0.q.weight": "base.q"}
    assert list(watched(lambda model, x, q, k, v: q(x) @ model.table.T, x, wanted=wanted)) == ["q"]
    # Rows of one tensor of the file, of which some are a layer's and some are not.
    fused = {"fused": "fused", "layers.0.q.weight": "q"}

    def file_name(name: str) -> str:
        return "fused" if name in ("table", "mlp1.weight") else name

    found = watched(lambda model, x, q, k, v: (q(x), model.mlp1(x)), x, wanted=fused, file_name=file_name)
    assert list(found) == ["q"]
    with pytest.raises(InputError, match=r"^Toy has no linear layer \(torch\.nn\.Linear\) among what is merged; use a"):
        watched(lambda model, x, q, k, v: None, x, wanted={"table": "table"})
