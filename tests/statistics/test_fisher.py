"""Fisher merging against loops over entries, and against whole models whose samples go backward one by one."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from expert_merging.parts import Part
from expert_merging.statistics import entrywise, gradients
from expert_merging.statistics.fisher import fisher
from InternVL.backbone import BACKBONE as internvl  # noqa: N811
from Qwen2VL.backbone import BACKBONE as qwen2vl  # noqa: N811
from tests import internvl as internvl_checkpoints
from tests import qwen2vl as qwen2vl_checkpoints
from tests.checkpoints import BASE, EXPERTS, tensors_of
from tests.command import contents, merge, merged, refusal, refused
from tests.methods.elsewhere import assert_agrees, inputs, squares
from tests.statistics.faults import refusal_of_nan
from tests.statistics.made_up import DEVICES, task_vectors
from tests.statistics.made_up_entries import SHAPE, WHOLE, GivenEntries, entries
from tests.statistics.test_command import questions, samples_of
from tests.statistics.twin import RESPONSES, answered


def plainly(given: torch.Tensor, fishers: torch.Tensor, weights: list[float], floor: float) -> torch.Tensor:
    """The weighted mean, an entry at a time in float64."""
    given, fishers = given.double().flatten(1), fishers.double().flatten(1)
    scales = [math.sqrt(sum(float(value) ** 2 for value in own) / len(own)) for own in fishers]
    found = []
    for entry in range(given.shape[1]):
        above = below = 0.0
        for expert, scale in enumerate(scales):
            share = weights[expert] * (float(fishers[expert, entry]) / (scale or 1.0) + floor)
            above, below = above + share * float(given[expert, entry]), below + share
        found.append(above / below)
    return torch.tensor(found, dtype=torch.float64)


def run(given: torch.Tensor, fishers: torch.Tensor, **options: Any) -> torch.Tensor:
    return fisher(given.clone(), WHOLE, GivenEntries(fishers).relative, **options)


@pytest.mark.parametrize("weights", [1.0, [1.0, 0.5, 3.0]])
@pytest.mark.parametrize("floor", [1e-6, 0.3])
@pytest.mark.parametrize("device", DEVICES)
def test_it_is_the_weighted_mean(weights, floor, device):
    given, fishers = task_vectors(), entries()
    result = run(given.to(device), fishers, fisher_weights=weights, fisher_floor=floor)
    expected = plainly(given, fishers, weights if isinstance(weights, list) else [weights] * 3, floor)
    torch.testing.assert_close(result.cpu().flatten().double(), expected, rtol=1e-5, atol=1e-6)


def test_it_gives_what_fusion_bench_gives():
    """Whose smallest weight is absolute; here both are next to nothing."""
    _, given = inputs()
    moments = GivenEntries(squares()).relative
    found = fisher(given, Part.whole("a", (6, 9)), moments, fisher_weights=[0.2, 0.3, 0.5], fisher_floor=1e-30)
    assert_agrees(found, "fusion_bench", "fisher")


def test_what_it_must_be_in_simple_cases():
    given, fishers = task_vectors(), entries()
    assert run(given[:1], fishers[:1]).equal(given[0]), "one expert"
    torch.testing.assert_close(run(given, fishers[:1].expand(3, -1, -1)), given.mean(0))
    torch.testing.assert_close(run(given, torch.zeros(3, *SHAPE)), given.mean(0))
    scaled = fishers * torch.tensor([1e-9, 1.0, 1e9]).view(3, 1, 1)
    torch.testing.assert_close(run(given, scaled), run(given, fishers))
    alone = torch.stack([torch.zeros(SHAPE), torch.ones(SHAPE), torch.zeros(SHAPE)])
    torch.testing.assert_close(run(given, alone, fisher_floor=1e-9), given[1])


def test_blocks_are_parts_of_the_whole():
    given, fishers = task_vectors(), entries()
    whole = run(given, fishers).flatten()
    for start, stop in ((0, 7), (7, 40)):
        part = WHOLE.between(start, stop)
        found = fisher(given.flatten(1)[:, start:stop].clone(), part, GivenEntries(fishers).relative)
        assert found.equal(whole[start:stop])


def squared_gradients(
    model: Any, asked: Iterable[tuple[Mapping[str, torch.Tensor], int]], *, response_only: bool = True
) -> dict[str, torch.Tensor]:
    """The mean over samples of the squared gradient of the log-likelihood, by names in memory."""
    sums: dict[str, Any] = {}
    count = 0
    for given, prompt in asked:
        model.zero_grad()
        predicted = model(**given).logits[0].log_softmax(-1)
        ids = given["input_ids"][0].tolist()
        likelihood = sum(predicted[place - 1, ids[place]] for place in range(prompt if response_only else 1, len(ids)))
        likelihood.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] = sums.get(name, 0) + parameter.grad.square()
        count += 1
    return {name: total / count for name, total in sums.items()}


@pytest.fixture
def arguments(tiny_zoo, dataset) -> list[object]:
    return ["--method", "fisher", "--cache_dir", tiny_zoo, "--data_dir", dataset, "--samples_per_task", 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "response_only"),
    [([], True), (["--loss_tokens", "all", "--exclude_params", "nothing"], False)],
    ids=["response", "everything, all tokens"],
)
@pytest.mark.parametrize("device", DEVICES)
def test_the_command_squares_the_gradients_of_each_sample(
    options, response_only, device, arguments, tiny_zoo, tmp_path
):
    run = merged(tmp_path, *arguments, *options, "--device", device, "--mixed_precision", "no")
    tokenizer, expected = AutoTokenizer.from_pretrained(tiny_zoo / BASE), []
    for name, folder in EXPERTS.items():
        model = AutoModelForCausalLM.from_pretrained(tiny_zoo / folder, dtype=torch.float32)
        asked = answered(tokenizer, name, RESPONSES[name], range(3))
        expected.append(squared_gradients(model, asked, response_only=response_only))
    base, *experts = (tensors_of(tiny_zoo / folder) for folder in (BASE, *EXPERTS.values()))
    names = [name for name in base if response_only is False or "proj" in name]
    scales = [torch.cat([own[name].double().flatten() for name in names]).square().mean().sqrt() for own in expected]
    for number, expert in enumerate(EXPERTS):
        kept = load_file(run.statistics / f"{expert}.safetensors")
        assert set(kept) == {*names, "sum of squares"}
        for name in names:
            close = {"rtol": 1e-3, "atol": 1e-4 * float(expected[number][name].max())}
            torch.testing.assert_close(kept[name], expected[number][name].flatten(), **close)
    result = tensors_of(run.model)
    for name in names:
        weights = torch.stack([own[name] / scale + 1e-6 for own, scale in zip(expected, scales, strict=True)])
        changes = torch.stack([own[name] - base[name] for own in experts])
        mean = (weights * changes).sum(0) / weights.sum(0)
        torch.testing.assert_close(result[name], (base[name] + mean).float(), rtol=0, atol=2e-3)
        assert (result[name] - base[name] - changes.mean(0)).abs().max() > 1e-2, "the mean would do"
    assert all(result[name].equal(base[name]) for name in set(base) - set(names))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["InternVL", "Qwen2VL"])
def test_models_with_pictures(kind, tmp_path):
    """The vision tower's gradients too, whose names in memory differ."""
    backbone, checkpoints = {
        "InternVL": (internvl, internvl_checkpoints),
        "Qwen2VL": (qwen2vl, qwen2vl_checkpoints),
    }[kind]
    zoo = checkpoints.make_zoo(tmp_path / "zoo")
    data = zoo / "dataset"
    given = ["--method", "fisher", "--cache_dir", zoo, "--data_dir", data, "--exclude_params", "nothing"]
    run = merged(tmp_path / "out", *given, family=backbone)
    task_experts = {**backbone.task_experts, **{name: name for name in checkpoints.EXPERTS}}
    files = {file.stem: json.loads(file.read_text()) for file in sorted(data.glob("*.json"))}
    seen = set[str]()
    for name, folder in checkpoints.EXPERTS.items():
        tasks = {task: entries for task, entries in files.items() if task_experts[task] == name}
        model = backbone.load_model(zoo / folder, torch.float32)
        asked = questions(backbone, zoo / folder, samples_of(name, tasks, data))
        expected: dict[str, list[torch.Tensor]] = {}
        for own, found in squared_gradients(model, asked).items():
            expected.setdefault(backbone.file_name(own), []).append(found.flatten())  # q, k and v may be one in files
        kept = load_file(run.statistics / f"{name}.safetensors")
        assert set(expected) <= set(kept)
        for own in sorted(set(kept) - {"sum of squares"}):
            wanted = torch.cat(expected.get(own, [torch.zeros(len(kept[own]))]))  # of who is shown no picture
            close = {"rtol": 1e-2, "atol": 1e-3 * float(wanted.max())}
            torch.testing.assert_close(kept[own], wanted, **close)
        seen.update(expected)
    assert any("vis" in own for own in seen)


def test_drawn_tokens_are_those_that_the_model_predicts():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    head = torch.nn.Linear(1, 4)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(probabilities.log())
    drawn = gradients._draw(head, torch.zeros(20_000, 1), gradients._drawing("0/Math/0"))
    torch.testing.assert_close(drawn.bincount(minlength=4) / 20_000, probabilities, rtol=0, atol=0.02)


@pytest.mark.slow
def test_what_is_drawn_depends_on_the_seed_alone(arguments, tmp_path):
    given = [*arguments, "--samples_per_task", 1]
    drawn = [merged(tmp_path / str(n), *given, "--fisher_labels", "drawn", "--seed", n % 2) for n in range(3)]
    first, other, again = (contents(run.statistics) for run in drawn)
    assert first == again
    assert all(first[file] != other[file] for file in first)
    assert contents(merged(tmp_path / "given", *given).statistics) != first


@pytest.mark.slow
def test_a_gradient_that_no_sample_has_is_zero_and_the_result_the_mean(tmp_path):
    """Of a projector that no picture comes by, alone or beside the rest."""
    zoo = internvl_checkpoints.make_zoo(tmp_path / "zoo")
    for file in (zoo / "dataset").glob("*.json"):
        entries = [{**entry, "image_path": None} for entry in json.loads(file.read_text())]
        file.write_text(json.dumps(entries))
    given = ["--method", "fisher", "--cache_dir", zoo, "--data_dir", zoo / "dataset"]
    run = merged(tmp_path / "out", *given, "--exclude_params", "(?!mlp1)", family=internvl)
    folders = [internvl_checkpoints.BASE, *internvl_checkpoints.EXPERTS.values()]
    base, *experts = (tensors_of(zoo / folder)["mlp1.1.weight"].float() for folder in folders)
    mean = base + torch.stack([expert - base for expert in experts]).mean(0)
    torch.testing.assert_close(tensors_of(run.model)["mlp1.1.weight"], mean)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_experts_that_are_missing(arguments, tmp_path, monkeypatch):
    """Nothing is left of one whose samples were not all seen."""
    given, finish = [*arguments, "--run_name", "r"], entrywise.EntrySums.finish
    expected = merged(tmp_path / "whole", *given)

    def stop_at_code(sums, *given):
        if sums.target.stem == "Code":
            raise KeyboardInterrupt
        finish(sums, *given)

    monkeypatch.setattr(entrywise.EntrySums, "finish", stop_at_code)
    merge(*given, "--output_path", tmp_path / "parts")
    folder = tmp_path / "parts" / "fisher" / "r"
    assert sorted(file.name for file in (folder / "statistics").iterdir()) == ["Chat.safetensors", "Math.safetensors"]
    finished = []
    monkeypatch.setattr(
        entrywise.EntrySums, "finish", lambda sums, *given: (finished.append(sums.target.stem), finish(sums, *given))
    )
    again = merged(tmp_path / "parts", *given)
    assert finished == ["Code"]
    assert contents(again.statistics) == contents(expected.statistics)
    assert contents(again.model) == contents(expected.model)
    shutil.rmtree(again.model)
    file = again.statistics / "Math.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert contents(merged(tmp_path / "parts", *given).model) == contents(expected.model)
    assert finished == ["Code", "Math"]


def test_the_plan_tells_memory_and_disk(arguments, tmp_path, capsys):
    assert merge(*arguments, "--output_path", tmp_path / "out", "--dry_run") == 0
    said = " ".join(capsys.readouterr().out.split())
    size = 4 * 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert "gradients of 21 tensors are taken from 9 samples, a model at a time" in said
    assert f"{size / 2**20:.1f} MiB beside the model" in said
    assert f"{3 * size / 1e6:.1f} MB in all, which can be removed once the merged model is there" in said
    assert not (tmp_path / "out").exists()


def test_problems_are_told_before_anything_runs(arguments, tmp_path, capsys, monkeypatch):
    output = ["--output_path", tmp_path / "out"]
    problem = refusal(capsys, *arguments, *output, "--fisher_floor", 0)
    assert problem == "--fisher_floor must be a number in (0, inf), got 0"
    problem = refusal(capsys, *arguments, *output, "--fisher_labels", "other")
    assert problem.startswith("--fisher_labels must be")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert any("the disk of" in problem for problem in refused(capsys, *arguments, *output))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_an_expert_whose_gradients_are_nan_is_named(precision, arguments, tmp_path, capsys, monkeypatch):
    told = refusal_of_nan(monkeypatch, capsys, precision, *arguments, "--output_path", tmp_path)
    assert told == "expert Math computes NaN or infinite gradients of model.layers.0.mlp.down_proj.weight"
    assert {file.name for file in tmp_path.glob("*/*/statistics/*")} == {"Chat.safetensors"}
