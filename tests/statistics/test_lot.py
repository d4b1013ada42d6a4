"""LOT Merging against least squares on all inputs at once, and against whole models."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from expert_merging.parts import Part
from expert_merging.statistics.gram import Gram
from expert_merging.statistics.lot import lot
from expert_merging.statistics.norms import scaled_by
from tests.checkpoints import BASE, EXPERTS, tensors_of
from tests.command import merged
from tests.statistics.made_up import DEVICES, FEW, INPUTS, MANY, PART, Given, inputs_of, kept, summed, task_vectors
from tests.statistics.twin import RESPONSES, RIDGE, answered, inputs_of_layers

NORM = Part.whole(PART.name, (INPUTS,))


def run(given: torch.Tensor, grams, part: Part = PART, **options: float) -> torch.Tensor:
    return lot(given.clone(), part, Given(tuple(grams)), **options)


def plainly(given: torch.Tensor, inputs: list[torch.Tensor]) -> torch.Tensor:
    """One system for what the task vector should do: each expert's features on its inputs, and else little."""
    rows = [vectors.double() / len(vectors) ** 0.5 for vectors in inputs]
    wanted = [own @ weight.T for own, weight in zip(rows, given.double(), strict=True)]
    anchor = RIDGE**0.5 * torch.diag(torch.cat(rows).square().sum(0).sqrt())
    outputs = torch.cat([*wanted, torch.zeros(len(anchor), given.shape[1])])
    return torch.linalg.lstsq(torch.cat([*rows, anchor]), outputs, driver="gelsd").solution.T.float()


def norms_plainly(given: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    found = []
    for entry in range(given.shape[1]):
        above = sum(float(squares[k, entry]) * float(given[k, entry]) for k in range(len(given)))
        found.append(above / sum(float(own[entry]) for own in squares))
    return torch.tensor(found)


@pytest.mark.parametrize("counts", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("form", [kept, summed])
@pytest.mark.parametrize("device", DEVICES)
def test_it_is_least_squares_of_features(counts, form, device):
    given, inputs = task_vectors(), inputs_of(counts)
    result = run(given.to(device), map(form, inputs), scaling_coefficient=0.5)
    assert result.dtype == torch.float32
    assert result.device.type == device
    # Sums in float32 have errors in directions without inputs.
    atol = 1e-2 if form is summed else 1e-5
    torch.testing.assert_close(result.cpu(), 0.5 * plainly(given, inputs), rtol=1e-4, atol=atol)


def test_it_is_the_papers_pseudo_inverse_where_inputs_determine_the_result():
    given, inputs = task_vectors(), inputs_of((300, 400, 500))
    grams = [vectors.T.double() @ vectors.double() / len(vectors) for vectors in inputs]
    products = sum(weight @ gram for weight, gram in zip(given.double(), grams, strict=True))
    expected = products @ torch.linalg.pinv(sum(grams))
    torch.testing.assert_close(run(given, map(summed, inputs)).double(), expected, rtol=0, atol=5e-3)


def test_directions_without_inputs_stay_the_bases():
    given, (own, *_) = task_vectors(1), inputs_of((1,))
    result = run(given, [kept(own)])
    torch.testing.assert_close(result @ own.T, given[0] @ own.T, rtol=1e-3, atol=1e-2)
    assert torch.linalg.matrix_rank(result, atol=1e-3) == 1


def test_what_it_must_be_in_simple_cases():
    given, inputs = task_vectors(), inputs_of(MANY)
    grams = [*map(kept, inputs)]
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=5e-3)  # the pull to the base
    close(run(given[:1].expand(3, -1, -1), grams), given[0])
    close(run(given, [grams[1]] * 3), given.mean(0))
    close(run(given, [None] * 3), given.mean(0))
    close(run(given, [kept(own * 1024) for own in inputs]), run(given, grams))
    order = [2, 0, 1]
    close(run(given[order], [grams[index] for index in order]), run(given, grams))
    close(run(given, [None, *grams[1:]]), run(given[1:], grams[1:]))


def test_norms_are_means_weighted_by_what_they_scale():
    given, squares = task_vectors()[:, 0], torch.rand(3, INPUTS, generator=torch.Generator().manual_seed(3))
    grams = [Gram.of_squares(own) for own in squares]
    torch.testing.assert_close(run(given, grams, NORM), norms_plainly(given, squares))
    torch.testing.assert_close(run(given, grams, NORM, scaling_coefficient=2.0), 2 * norms_plainly(given, squares))
    torch.testing.assert_close(run(given, [None, *grams[1:]], NORM), norms_plainly(given[1:], squares[1:]))
    zeros = [Gram.of_squares(torch.zeros(INPUTS))] * 3
    torch.testing.assert_close(run(given, zeros, NORM), given.mean(0))


@pytest.mark.parametrize("kind", ["mistral", "gemma", "layer norm"])
def test_what_a_norm_scales_is_its_normalised_input(kind):
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(2, 3, 8, generator=generator)
    norm = {
        "mistral": lambda: MistralRMSNorm(8, eps=1e-6),
        "gemma": lambda: GemmaRMSNorm(8, eps=1e-6),
        "layer norm": lambda: torch.nn.LayerNorm(8, eps=1e-6),
    }[kind]()
    for parameter in norm.parameters():
        parameter.data = torch.randn(8, generator=generator)
    weights = norm.weight.data.clone()
    centred = inputs - inputs.mean(-1, keepdim=True) if kind == "layer norm" else inputs
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(scaled_by(norm, inputs), expected)
    assert norm.weight.data.equal(weights)


@pytest.mark.slow
@pytest.mark.parametrize("response_only", [False, True])
def test_the_command_merges_norms_and_matrices(response_only, tiny_zoo, dataset, tmp_path):
    given = ["--method", "lot", "--cache_dir", tiny_zoo, "--data_dir", dataset, "--samples_per_task", 3]
    given += ["--exclude_params", "nothing", "--mixed_precision", "no"]
    result = tensors_of(merged(tmp_path, *given, "--loss_tokens", "response" if response_only else "all").model)
    tokenizer, seen, scaled = AutoTokenizer.from_pretrained(tiny_zoo / BASE), [], []
    for name, folder in EXPERTS.items():
        asked = answered(tokenizer, name, RESPONSES[name], range(3))
        model = AutoModelForCausalLM.from_pretrained(tiny_zoo / folder, dtype=torch.float32)
        seen.append(inputs_of_layers(model, asked, response_only=response_only))
        scaled.append(norms_of(model, asked, response_only=response_only))
    base, *experts = (tensors_of(tiny_zoo / folder) for folder in (BASE, *EXPERTS.values()))
    for name, tensor in result.items():
        changes = torch.stack([expert[name] - base[name] for expert in experts])
        if "proj" in name:
            expected = plainly(changes, [own[name] for own in seen])
        elif "norm" in name:
            expected = norms_plainly(changes, torch.stack([own[name] for own in scaled]))
        else:
            expected = changes.mean(0)
        torch.testing.assert_close(tensor - base[name], expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def norms_of(model, asked, *, response_only: bool) -> dict[str, torch.Tensor]:
    """Mean squares of what each norm's weights are multiplied with, by the name of the weight."""
    found: dict[str, list[torch.Tensor]] = {}
    for inputs, prompt in asked:
        chosen = slice(prompt - 1, -1) if response_only else slice(None)

        def see(name, chosen=chosen):
            return lambda layer, _given, made: found.setdefault(name, []).append((made / layer.weight)[0, chosen])

        norms = [(name, part) for name, part in model.named_modules() if isinstance(part, MistralRMSNorm)]
        hooks = [part.register_forward_hook(see(f"{name}.weight")) for name, part in norms]
        model(**inputs)
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts).square().mean(0) for name, parts in found.items()}
