"""Routers by the gradient of the base's loss: whose samples are whose, against plain autograd; what routers become."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from expert_merging.mixtures import making, report, similarity
from expert_merging.mixtures.similarity import similarities
from tests.checkpoints import BASE, EXPERTS, SIZES, tensors_of
from tests.command import assert_same_bytes, merge, merged, refusal
from tests.mixtures.conftest import ANSWERS, COUNT
from tests.mixtures.test_moe import routers
from tests.mixtures.test_routers import one_expert
from tests.statistics.twin import answered, inputs_of_layers

BY_GRADIENT = ["--router", "task_vectors"]
OWNERS = sorted(EXPERTS)  # in the order of their files


def samples(tiny_zoo):
    """All samples that are not held out, as model inputs with the number of tokens before the answer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_zoo / BASE)
    return [one for expert in OWNERS for one in answered(tokenizer, expert, ANSWERS[expert], range(1, COUNT))]


def plain(tiny_zoo, first):
    """``-<g, tau> / |tau|`` over feed-forward tensors in float64, the whole gradient at once.

    Args:
        tiny_zoo: the checkpoints.
        first: which token, from the number of the prompt's, is the first that is to be predicted.
    """
    base = AutoModelForCausalLM.from_pretrained(tiny_zoo / BASE, dtype=torch.float64)
    weights = {name: weight for name, weight in base.named_parameters() if ".mlp." in name}
    experts = [tensors_of(tiny_zoo / folder) for folder in EXPERTS.values()]
    changes = [torch.cat([(own[name].double() - weights[name].detach()).flatten() for name in weights]) for own in experts]  # fmt: skip  # noqa: E501
    rows = []
    for inputs, before in samples(tiny_zoo):
        base.zero_grad()
        labels = inputs["input_ids"].clone()
        labels[:, : first(before)] = -100
        base(**inputs, labels=labels).loss.backward()
        gradient = torch.cat([weight.grad.flatten() for weight in weights.values()])
        rows.append([float(-(gradient @ change) / change.norm()) for change in changes])
    return torch.tensor(rows)


@pytest.mark.slow
@pytest.mark.parametrize(("loss_tokens", "first"), [("all", lambda _: 0), ("response", lambda before: before)])
def test_samples_are_for_the_expert_whose_task_vector_their_gradient_asks_for(
    loss_tokens, first, arguments, tiny_zoo, tmp_path
):
    run = merged(tmp_path, *arguments, *BY_GRADIENT, "--loss_tokens", loss_tokens)
    kept = json.loads((run.statistics / similarity.FILE).read_text())
    expected = plain(tiny_zoo, first)
    torch.testing.assert_close(torch.tensor(kept["similarity"]), expected, rtol=1e-3, atol=1e-4)
    chosen = [[*EXPERTS][number] for number in expected.argmax(1).tolist()]
    assert kept["experts"] == chosen
    assert len({*chosen}) > 1
    told = json.loads((run.folder / report.FILE).read_text())["assigned"]
    owners = [name for name in OWNERS for _ in range(COUNT - 1)]
    for owner in EXPERTS:
        own = [name for name, one in zip(chosen, owners, strict=True) if one == owner]
        assert told[owner] == {name: own.count(name) for name in own}
        assert (
            f"by their gradients, samples of {owner} are for {own[0]} ({own.count(own[0])} of 4)" in run.log.read_text()
        )


@pytest.mark.slow
def test_routers_are_least_squares_to_the_experts_that_samples_are_for(arguments, tiny_zoo, tmp_path):
    run = merged(tmp_path, *arguments, *BY_GRADIENT)
    chosen = json.loads((run.statistics / similarity.FILE).read_text())["experts"]
    seen = {}
    for number, asked in enumerate(samples(tiny_zoo)):
        body = one_expert(tiny_zoo, run.model, [*EXPERTS].index(OWNERS[number // (COUNT - 1)]))
        for name, inputs in inputs_of_layers(body, [asked]).items():
            if name.endswith("gate_proj.weight"):
                seen.setdefault(name, []).append(inputs.double())
    written = routers(run.model)
    assert len(seen) == SIZES["num_hidden_layers"]
    for name, inputs in seen.items():
        pooled = {expert: torch.cat([one for one, own in zip(inputs, chosen, strict=True) if own == expert])
                  for expert in EXPERTS if expert in chosen}  # fmt: skip
        total = sum(own.T @ own / len(own) for own in pooled.values())
        total += 0.01 * total.diagonal().mean() * torch.eye(len(total))
        expected = torch.zeros(3, len(total)).double()
        for number, expert in enumerate(EXPERTS):
            if expert in pooled:
                expected[number] = torch.linalg.solve(total, pooled[expert].mean(0)) / 0.1
        router = written[name.replace("mlp.gate_proj", "block_sparse_moe.gate")]
        torch.testing.assert_close(router.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_where_gradients_agree_with_the_files_routers_are_those_of_ridge(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "chosen_experts", lambda _, found: [sample.expert for sample in found.samples])
    given = routers(merged(tmp_path / "gradient", *arguments, *BY_GRADIENT).model)
    assert_same_bytes(given, routers(merged(tmp_path / "ridge", *arguments).model))


@pytest.mark.slow
def test_an_expert_that_no_sample_is_for_is_rated_zero_and_warned_of(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "chosen_experts", lambda _, found: ["Chat", "Code"] * (len(found.samples) // 2))
    run = merged(tmp_path, *arguments, *BY_GRADIENT)
    for router in routers(run.model).values():
        assert [bool(row.any()) for row in router] == [True, False, True]
    assert (
        "no sample is for expert Math by its gradient, so routers rate it zero; --router ridge goes by whose samples "
        "they are" in run.log.read_text()
    )


@pytest.mark.slow
def test_what_an_earlier_part_has_found_is_taken(arguments, tmp_path, monkeypatch):
    given = [*arguments, *BY_GRADIENT, "--run_name", "x"]
    run = merged(tmp_path, *given)
    first = routers(run.model)
    run.model.rename(tmp_path / "earlier")
    found = similarity._similarities_of
    monkeypatch.setattr(similarity, "_similarities_of", None)
    assert_same_bytes(routers(merged(tmp_path, *given).model), first)

    asked = []
    monkeypatch.setattr(similarity, "_similarities_of", lambda *given: asked.append(1) or found(*given))
    run.model.rename(tmp_path / "second")
    file = run.statistics / similarity.FILE
    file.write_text(file.read_text().replace("Math", "Code", 1))
    assert_same_bytes(routers(merged(tmp_path, *given).model), first)
    assert asked == [1], "the file was changed by somebody else"


def test_the_plan_tells_what_it_takes(arguments, tmp_path, capsys):
    given = [*arguments, *BY_GRADIENT, "--negative_prompts", "none", "--output_path", tmp_path]
    assert merge(*given, "--dry_run") == 0
    shown = capsys.readouterr().out
    assert (
        "a backward pass of the base for each, with the gradient of one of its feed-forward tensors in memory" in shown
    )
    assert "ignored with --router task_vectors: --negative_prompts" in shown


def test_nan_of_the_base_is_told(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(similarity, "_similarities_of", lambda *_: torch.full((2, 3), torch.nan))
    given = [*arguments, *BY_GRADIENT, "--output_path", tmp_path]
    assert refusal(capsys, *given) == (
        "the base computes NaN, or its loss has such a gradient, on calibration samples; its weights are damaged"
    )


def test_similarity_is_that_of_a_step_down_the_loss():
    gradient = torch.tensor([1.0, 2.0, 0.0])
    changes = torch.tensor([[-1.0, -2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]])
    found = similarities((changes @ gradient)[None], changes.square().sum(1))
    length = 5**0.5
    torch.testing.assert_close(found, torch.tensor([[length, -length, 0.0, 0.0]], dtype=torch.float64))
