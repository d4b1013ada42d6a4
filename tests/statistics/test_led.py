"""LED-Merging against sets of places, and against whole models whose samples go backward one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from expert_merging.statistics import entrywise
from expert_merging.statistics.led import led
from Mistral.backbone import BACKBONE as mistral  # noqa: N811
from tests.checkpoints import BASE, EXPERTS, tensors_of
from tests.command import contents, merge, merged, refusal
from tests.statistics.faults import spoiled
from tests.statistics.made_up import DEVICES, task_vectors
from tests.statistics.made_up_entries import SHAPE, WHOLE, GivenEntries, entries
from tests.statistics.twin import RESPONSES, answered


def places(scores: torch.Tensor, ratio: float) -> set[int]:
    """Numbers of the entries with the highest scores."""
    ranked = sorted(range(scores.numel()), key=lambda entry: -float(scores.flatten()[entry]))
    return set(ranked[: max(1, int(ratio * scores.numel() + 1e-9))])


def plainly(
    given: torch.Tensor, own: torch.Tensor, base: torch.Tensor, ratios: list[float], factors: list[float]
) -> torch.Tensor:
    """With sets, as the paper writes it."""
    elected = [places(*pair) & places(*other) for pair, other in zip(
        zip(own, ratios, strict=True), zip(base, ratios, strict=True), strict=True)]  # fmt: skip
    found = torch.zeros(given[0].numel())
    for number, chosen in enumerate(elected):
        others = set().union(*(other for place, other in enumerate(elected) if place != number))
        for entry in chosen - others:
            found[entry] += factors[number] * float(given[number].flatten()[entry])
    return found.view(given.shape[1:])


def run(given: torch.Tensor, own: torch.Tensor, base: torch.Tensor, **options: Any) -> torch.Tensor:
    return led(given.clone(), WHOLE, GivenEntries(own), GivenEntries(base), **options)


@pytest.mark.parametrize("ratio", [0.001, 0.3, [0.2, 0.6, 1.0]])
@pytest.mark.parametrize("factor", [1.0, [0.5, 1.0, 2.0]])
@pytest.mark.parametrize("device", DEVICES)
def test_it_keeps_what_one_expert_and_the_base_need_alone(ratio, factor, device):
    given, own, base = task_vectors(), entries(), entries(seed=3)
    result = run(given.to(device), own, base, led_ratio=ratio, scaling_coefficient=factor).cpu()
    expected = plainly(given, own, base, *(one if isinstance(one, list) else [one] * 3 for one in (ratio, factor)))
    torch.testing.assert_close(result, expected)
    assert ratio == 0.001 or 0 < int((expected != 0).sum()) < expected.numel()


def test_what_it_must_be_in_simple_cases():
    given, own, base = task_vectors(), entries(), entries(seed=3)
    assert run(given[:1], own[:1], base[:1], led_ratio=1.0).equal(given[0]), "one expert"
    assert not run(given, own[:1].expand(3, -1, -1), base[:1].expand(3, -1, -1)).any(), "the same entries"
    assert not run(given, torch.zeros(3, *SHAPE), torch.zeros(3, *SHAPE)).any(), "no scores"
    torch.testing.assert_close(run(given, own * 1e-9, base * 1e9), run(given, own, base))
    order = [2, 0, 1]
    torch.testing.assert_close(run(given[order], own[order], base[order]), run(given, own, base))


def scores_of(model: Any, asked: list[tuple[Mapping[str, torch.Tensor], int]]) -> dict[str, torch.Tensor]:
    """The mean over samples of weight times gradient of the loss that transformers computes, by name."""
    sums: dict[str, Any] = {}
    for given, prompt in asked:
        model.zero_grad()
        labels = given["input_ids"].clone()
        labels[:, :prompt] = -100
        model(**given, labels=labels).loss.backward()
        for name, parameter in model.named_parameters():
            sums[name] = sums.get(name, 0) + (parameter.detach() * parameter.grad).abs()
    return {name: total / len(asked) for name, total in sums.items()}


@pytest.fixture
def arguments(tiny_zoo, dataset) -> list[object]:
    given = ["--method", "led", "--cache_dir", tiny_zoo, "--data_dir", dataset]
    return [*given, "--samples_per_task", 2, "--mixed_precision", "no"]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_the_command_scores_experts_and_base_on_the_same_samples(device, arguments, tiny_zoo, tmp_path):
    run = merged(tmp_path, *arguments, "--device", device)
    tokenizer = AutoTokenizer.from_pretrained(tiny_zoo / BASE)
    for name, folder in EXPERTS.items():
        asked = answered(tokenizer, name, RESPONSES[name], range(2))
        for own, file in ((folder, run.statistics), (BASE, run.statistics / "base")):
            expected = scores_of(AutoModelForCausalLM.from_pretrained(tiny_zoo / own, dtype=torch.float32), asked)
            kept = load_file(file / f"{name}.safetensors")
            for tensor in set(kept) - {"sum of squares"}:
                close = {"rtol": 1e-3, "atol": 1e-4 * float(expected[tensor].max())}
                torch.testing.assert_close(kept[tensor], expected[tensor].flatten(), **close)
    base, *experts = (tensors_of(tiny_zoo / folder) for folder in (BASE, *EXPERTS.values()))
    result = tensors_of(run.model)
    files = [[load_file(folder / f"{name}.safetensors") for name in EXPERTS]
             for folder in (run.statistics, run.statistics / "base")]  # fmt: skip
    for tensor in ("model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.k_proj.weight"):
        changes = torch.stack([own[tensor] - base[tensor] for own in experts])
        scores = (torch.stack([file[tensor] for file in kind]) for kind in files)
        expected = plainly(changes, *scores, [0.4] * 3, [1.0] * 3)
        torch.testing.assert_close(result[tensor] - base[tensor], expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_what_is_missing(arguments, tmp_path, monkeypatch):
    given, finish = [*arguments, "--run_name", "r"], entrywise.EntrySums.finish
    expected = merged(tmp_path / "whole", *given)

    def stop_at_math(sums, *given):
        if sums.target.parts[-2:] == ("base", "Math.safetensors"):
            raise KeyboardInterrupt
        finish(sums, *given)

    monkeypatch.setattr(entrywise.EntrySums, "finish", stop_at_math)
    merge(*given, "--output_path", tmp_path / "parts")
    statistics = tmp_path / "parts" / "led" / "r" / "statistics"
    assert sorted(file.relative_to(statistics).as_posix() for file in statistics.rglob("*.*")) == [
        *("Chat.safetensors", "Code.safetensors", "Math.safetensors"),
        "base/Chat.safetensors",
    ]
    finished, loaded = [], []

    def load(place, dtype):
        loaded.append(place.name)
        return mistral.load_model(place, dtype)

    def count(sums, *given):
        finished.append(sums.target.stem)
        finish(sums, *given)

    monkeypatch.setattr(entrywise.EntrySums, "finish", count)
    again = merged(tmp_path / "parts", *given, family=replace(mistral, load_model=load))
    assert loaded == [BASE]
    assert finished == ["Math", "Code"]
    assert contents(again.statistics) == contents(expected.statistics)
    assert contents(again.model) == contents(expected.model)


def test_the_plan_tells_of_the_bases_gradients(arguments, tmp_path, capsys):
    assert merge(*arguments, "--output_path", tmp_path / "out", "--dry_run") == 0
    said = " ".join(capsys.readouterr().out.split())
    size = 4 * 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert "gradients of 21 tensors are taken from 6 samples, and the base's from all of them again" in said
    assert f"{6 * size / 1e6:.1f} MB in all" in said


def test_a_base_that_computes_nan_is_named(arguments, tmp_path, capsys):
    family = spoiled(BASE, "model.norm", math.nan)
    problem = refusal(capsys, *arguments, "--output_path", tmp_path, family=family)
    assert problem == "the base computes NaN or infinite gradients of model.layers.0.mlp.down_proj.weight"
    assert not [*tmp_path.glob("*/*/statistics/base/*")]
