"""Activation matching finds the order that units were shuffled from, by what they say about samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from expert_merging.alignment import activations
from expert_merging.alignment.activations import correlation, standardised
from expert_merging.alignment.units import find_layout
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.errors import InputError
from Mistral.backbone import BACKBONE
from Qwen2VL.backbone import BACKBONE as QWEN
from tests import qwen2vl
from tests.alignment.shuffling import save_shuffled
from tests.checkpoints import BASE, perturb, tensors_of, write_tasks
from tests.command import flags, merge, merged, refusal, refused

ALIGNED = ("--align_experts", "activation_matching")


def test_correlations_are_numpy_s():
    torch.manual_seed(0)
    first, second = torch.randn(30, 4, dtype=torch.float64) * 3 + 2, torch.randn(30, 4)
    expected = numpy.corrcoef(first.numpy().T, second.numpy().T)[:4, 4:]
    found = correlation(standardised(first), standardised(second))
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), atol=1e-6, rtol=0)


def test_units_that_never_change_are_like_no_other():
    constant = torch.cat([torch.full((10, 1), 0.3), torch.zeros(10, 1), torch.arange(10.0)[:, None]], 1)
    found = standardised(constant)
    assert found[:, :2].abs().max() == 0
    assert found[:, 2].square().mean() == pytest.approx(1)


@pytest.fixture(scope="module")
def experts(tiny_zoo, tmp_path_factory) -> dict[str, Path]:
    """Two fine-tunes with their units in another order, and as they were before."""
    folder = tmp_path_factory.mktemp("said")
    layout = find_layout(Checkpoint(tiny_zoo / BASE), str)
    found = {}
    for seed, name in enumerate(("Chat", "Math"), start=1):
        perturb(tiny_zoo / BASE, folder / f"{name} plain", seed, change=0.003)
        found[name] = save_shuffled(folder / f"{name} plain", folder / name, layout, seed)
    write_tasks(folder / "dataset", count=3, responses={"Chat": "Certainly", "Math": "42"})
    return found


def command(tiny_zoo: Path, experts: dict[str, Path]) -> list[object]:
    data = experts["Chat"].parent / "dataset"
    return ["--method", "weight_average", *flags(tiny_zoo / BASE, **experts), "--data_dir", data]


@pytest.mark.slow
def test_shuffled_experts_are_merged_as_they_were_before(tiny_zoo, experts, tmp_path, capsys):
    run = merged(tmp_path / "a", *command(tiny_zoo, experts), *ALIGNED)
    plain = {name: folder.with_name(f"{name} plain") for name, folder in experts.items()}
    expected = merged(tmp_path / "b", "--method", "weight_average", *flags(tiny_zoo / BASE, **plain))
    found, wanted = tensors_of(run.model), tensors_of(expected.model)
    assert all(found[name].equal(tensor) for name, tensor in wanted.items())
    record = json.loads((run.alignment / "alignment.json").read_text())
    assert record["method"] == "activation_matching"
    assert {"calibration", "precision", "formats"} <= json.loads(run.config.read_text())["inputs"].keys()
    assert "units in the base's order by activation_matching: Chat, Math" in run.log.read_text()


@pytest.mark.slow
def test_models_with_pictures_are_matched(tmp_path, capsys):
    """The whole base with its units in another order: its merge with the base is the base."""
    qwen2vl.save_model(tmp_path / "base", 3, shard="5GB")
    layout = find_layout(Checkpoint(tmp_path / "base"), str)
    shuffled = save_shuffled(tmp_path / "base", tmp_path / "OCR", layout, 5)
    qwen2vl.write_tasks(tmp_path / "dataset", count=1)
    given = ["--method", "weight_average", *flags(tmp_path / "base", OCR=shuffled), *ALIGNED]
    run = merged(tmp_path / "out", *given, "--data_dir", tmp_path / "dataset", family=QWEN)
    wanted = tensors_of(tmp_path / "base")
    assert all(tensor.equal(wanted[name]) for name, tensor in tensors_of(run.model).items())
    record = json.loads((run.alignment / "alignment.json").read_text())["experts"]["OCR"]
    assert record["moved"]["residual stream"] > 0.5


@pytest.mark.slow
def test_other_samples_make_another_run(tiny_zoo, experts, tmp_path, capsys):
    given = [*command(tiny_zoo, experts), *ALIGNED, "--output_path", tmp_path, "--run_name", "r"]
    assert merge(*given) == 0
    said = refusal(capsys, *given, "--samples_per_task", 1)
    assert "samples_per_task: 5 there, 1 now" in said
    assert "calibration: " in said


def test_samples_are_checked_first(tiny_zoo, experts, tmp_path, capsys):
    given = ["--method", "weight_average", *flags(tiny_zoo / BASE, **experts), *ALIGNED, "--output_path", tmp_path]
    assert str(tmp_path / "none") in refusal(capsys, *given, "--data_dir", tmp_path / "none")


def test_flags_of_samples_are_told_to_be_idle_by_weights(tiny_zoo, experts, tmp_path, capsys):
    given = [*command(tiny_zoo, experts), "--align_experts", "weight_matching", "--dry_run"]
    assert merge(*given, "--output_path", tmp_path) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "ignored, since weight_average has no such option: --data_dir" in told
    assert merge(*command(tiny_zoo, experts), *ALIGNED, "--dry_run", "--output_path", tmp_path) == 0
    assert "ignored" not in capsys.readouterr().out


def test_experts_with_fewer_words_are_refused(tiny_zoo, experts, tmp_path, capsys):
    perturb(experts["Chat"], tmp_path / "few", 1)
    (file,) = (tmp_path / "few").glob("*.safetensors")
    tensors = load_file(file)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:-3].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "few" / "config.json").read_text())
    config["vocab_size"] -= 3
    (tmp_path / "few" / "config.json").write_text(json.dumps(config))
    given = command(tiny_zoo, {**experts, "Chat": tmp_path / "few"})[:-1]
    (said,) = refused(capsys, *given, experts["Chat"].parent / "dataset", *ALIGNED, "--output_path", tmp_path / "out")
    assert said.endswith("it knows fewer words than the base, and activation_matching runs both on the same tokens")


def test_experts_that_compute_nan_are_refused(tiny_zoo, experts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(activations, "standardised", lambda values: values.float() * torch.nan)
    given = [*command(tiny_zoo, experts), *ALIGNED, "--output_path", tmp_path]
    said = refusal(capsys, *given)
    assert said == "the base computes NaN or infinite values on the samples; give --mixed_precision no"


def test_models_with_other_layers_in_memory_are_refused(tiny_zoo):
    checkpoint = Checkpoint(tiny_zoo / BASE)
    layout = find_layout(checkpoint, str)
    model = BACKBONE.load_model(tiny_zoo / BASE, torch.float32)
    with pytest.raises(InputError, match="has 3 layers in memory, and 2 in its files; use --align_experts weight"):
        activations._Watch(model, replace(layout, blocks=layout.blocks[:2]), str, 4)


def test_tokens_are_spread_over_a_sample(tiny_zoo):
    from expert_merging.running.targets import Asked

    layout = find_layout(Checkpoint(tiny_zoo / BASE), str)
    watch = activations._Watch(BACKBONE.load_model(tiny_zoo / BASE, torch.float32), layout, str, quota=3)
    inputs = {"input_ids": torch.arange(9)[None], "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    with torch.no_grad():
        watch.run(Asked(0, None, inputs, torch.tensor([2, 3, 4, 5, 8])))  # type: ignore[arg-type]
    watch.close()
    assert watch.positions.tolist() == [2, 4, 8]
    found = watch.result()
    assert [tuple(values.shape) for values in (found.outputs[0], found.feed[0], found.stream[0])] == [
        (3, 32),
        (3, 48),
        (3, 32),
    ]
    assert (len(found.outputs), len(found.feed), len(found.stream)) == (3, 3, 4)
