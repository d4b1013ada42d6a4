"""The command with RegMean: all families, against the plain twin; what is kept, continued, told and refused."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from expert_merging.backbone import Backbone
from expert_merging.cli import main
from expert_merging.questions.calibration import Sample
from expert_merging.running.prompts import end_tokens, tokenizer_of, with_response
from expert_merging.statistics import gram, inputs
from InternVL.backbone import BACKBONE as internvl  # noqa: N811
from Mistral.backbone import BACKBONE as mistral  # noqa: N811
from Qwen2VL.backbone import BACKBONE as qwen2vl  # noqa: N811
from tests import internvl as internvl_checkpoints
from tests import qwen2vl as qwen2vl_checkpoints
from tests.checkpoints import BASE, EXPERTS, perturb, tensors_of, write_tasks
from tests.command import contents, merge, merged, refusal, refused
from tests.launching import run_together
from tests.statistics.faults import refusal_of_nan
from tests.statistics.twin import RESPONSES, answered, inputs_of_layers, least_squares

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture
def arguments(tiny_zoo, dataset) -> list[object]:
    return ["--method", "regmean", "--cache_dir", tiny_zoo, "--data_dir", dataset, "--samples_per_task", 3]


def check_merged(
    base: dict[str, torch.Tensor],
    experts: list[dict[str, torch.Tensor]],
    seen: list[dict[str, torch.Tensor]],
    result: dict[str, torch.Tensor],
    ratio: float = 0.9,
    *,
    atol: float = 1e-5,
) -> int:
    """Check every merged tensor against the twin or the mean; the number of those that the twin has made.

    Args:
        base: tensors of the base.
        experts: of each expert.
        seen: each expert's inputs by the names of the files.
        result: what the command has made.
        ratio: factor on entries beside the diagonals.
        atol: largest difference allowed.
    """
    solved = 0
    for name, tensor in result.items():
        if tensor.equal(base[name]):
            continue
        task_vectors = torch.stack([expert[name].float() - base[name].float() for expert in experts])
        change = task_vectors.mean(0)
        if any(name in own for own in seen):
            nothing = torch.zeros(1, tensor.shape[-1])
            change = least_squares(task_vectors, [own.get(name, nothing) for own in seen], ratio)
            assert (change - task_vectors.mean(0)).abs().max() > 10 * atol, "the mean would do"
            solved += 1
        torch.testing.assert_close(tensor.float(), base[name].float() + change, rtol=0, atol=atol)
    return solved


def questions(backbone: Backbone, folder: Path, asked: list[Sample]):
    """Model inputs of prompt, response and the turn's end, and the number of the prompt's tokens."""
    end = {"Mistral": None, "InternVL": "<|im_end|>\n", "Qwen2VL": "<|im_end|>\n"}[backbone.name]
    processor = backbone.load_processor(folder)
    for sample in asked:
        prompt = backbone.encode_prompt(processor, sample, None)
        response = tokenizer_of(processor)(sample.response, add_special_tokens=False)["input_ids"]
        tokens = [*response, *end_tokens(processor, end)]
        yield with_response(prompt, tokens), prompt["input_ids"].shape[1]


def samples_of(expert: str, tasks: dict[str, list[dict[str, object]]], folder: Path) -> list[Sample]:
    """Samples from the contents of task files, without the loader of the command."""
    found = []
    for task, entries in tasks.items():
        for entry in entries:
            given = entry.get("image_path") or []
            images = tuple(folder / name for name in ([given] if isinstance(given, str) else given))
            found.append(Sample(task, expert, entry["question"], entry["response"], "0", images=images))
    return found


@pytest.mark.parametrize(
    ("options", "count", "ratio", "response_only"),
    [
        ([], 3, 0.9, False),
        (["--samples_per_task", 1, "--reduce_non_diagonal_ratio", 0.5], 1, 0.5, False),
        (["--loss_tokens", "response", "--reduce_non_diagonal_ratio", 0], 3, 0.0, True),
        (["--exclude_params", "nothing"], 3, 0.9, False),
    ],
    ids=["default", "one sample", "response", "everything"],
)
@pytest.mark.parametrize("device", DEVICES)
def test_it_merges_as_the_plain_twin(options, count, ratio, response_only, device, arguments, tiny_zoo, tmp_path):
    run = merged(tmp_path, *arguments, *options, "--device", device, "--mixed_precision", "no")
    tokenizer = AutoTokenizer.from_pretrained(tiny_zoo / BASE)
    seen = []
    for name, folder in EXPERTS.items():
        asked = answered(tokenizer, name, RESPONSES[name], range(count))
        model = AutoModelForCausalLM.from_pretrained(tiny_zoo / folder, dtype=torch.float32)
        found = inputs_of_layers(model, asked, response_only=response_only)
        del found["lm_head.weight"]
        seen.append(found)
    base, *experts = (tensors_of(tiny_zoo / folder) for folder in (BASE, *EXPERTS.values()))
    assert check_merged(base, experts, seen, tensors_of(run.model), ratio) == 3 * 7


def test_layers_with_the_same_input_share_a_matrix_in_the_file(arguments, tmp_path):
    run = merged(tmp_path, *arguments)
    files = sorted(run.statistics.iterdir())
    assert [file.name for file in files] == ["Chat.safetensors", "Code.safetensors", "Math.safetensors"]
    with safe_open(files[0], "pt") as file:
        layout = json.loads(file.metadata()["grams"])
    ends = [[name.split(".")[-2].removesuffix("_proj") for name in entry["tensors"]] for entry in layout.values()]
    assert ends == [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]] * 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["InternVL", "Qwen2VL"])
def test_models_with_pictures(kind, tmp_path):
    """Everything is merged, the vision tower too, whose attention InternVL's files have in one tensor."""
    backbone, checkpoints = {
        "InternVL": (internvl, internvl_checkpoints),
        "Qwen2VL": (qwen2vl, qwen2vl_checkpoints),
    }[kind]
    zoo = checkpoints.make_zoo(tmp_path / "zoo")
    data = zoo / "dataset"
    given = ["--method", "regmean", "--cache_dir", zoo, "--data_dir", data, "--exclude_params", "nothing"]
    run = merged(tmp_path / "out", *given, family=backbone)
    task_experts = {**backbone.task_experts, **{name: name for name in checkpoints.EXPERTS}}
    seen = []
    for name, folder in checkpoints.EXPERTS.items():
        files = {file.stem: json.loads(file.read_text()) for file in sorted(data.glob("*.json"))}
        tasks = {task: entries for task, entries in files.items() if task_experts[task] == name}
        model = backbone.load_model(zoo / folder, torch.float32)
        asked = questions(backbone, zoo / folder, samples_of(name, tasks, data))
        found = {backbone.file_name(layer): given for layer, given in inputs_of_layers(model, asked).items()}
        seen.append({layer: given for layer, given in found.items() if "lm_head" not in layer})
    base, *experts = (tensors_of(zoo / folder) for folder in (checkpoints.BASE, *checkpoints.EXPERTS.values()))
    solved = check_merged(base, experts, seen, tensors_of(run.model), atol=1e-4)
    assert solved == {"InternVL": 3 * 7 + 2 + 2 * 4, "Qwen2VL": 3 * 7 + 2 + 2 * 4}[kind]


def test_a_projector_that_no_sample_comes_by_gets_the_mean(tmp_path):
    zoo = internvl_checkpoints.make_zoo(tmp_path / "zoo")
    for file in (zoo / "dataset").glob("*.json"):
        entries = [{**entry, "image_path": None} for entry in json.loads(file.read_text())]
        file.write_text(json.dumps(entries))
    given = ["--method", "regmean", "--cache_dir", zoo, "--data_dir", zoo / "dataset"]
    run = merged(tmp_path / "out", *given, family=internvl)
    told = "no linear layer with mlp1.1.weight and 1 more ran on any sample: merged by the mean"
    assert told in run.log.read_text()
    folders = [internvl_checkpoints.BASE, *internvl_checkpoints.EXPERTS.values()]
    base, *experts = (tensors_of(zoo / folder)["mlp1.1.weight"].float() for folder in folders)
    mean = base + torch.stack([expert - base for expert in experts]).mean(0)
    torch.testing.assert_close(tensors_of(run.model)["mlp1.1.weight"], mean)


def test_one_expert_is_that_expert(tiny_zoo, dataset, tmp_path):
    expert = tiny_zoo / EXPERTS["Math"]
    given = ["--base_model_path", tiny_zoo / BASE, "--expert", f"Math={expert}", "--data_dir", dataset]
    run = merged(tmp_path, "--method", "regmean", *given, "--exclude_params", "nothing")
    for name, tensor in tensors_of(expert).items():
        torch.testing.assert_close(tensors_of(run.model)[name], tensor)


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_models_run_in_the_wanted_type(precision, tiny_zoo, dataset, tmp_path):
    """And their inputs are kept in it where there are few."""
    for folder in (BASE, *EXPERTS.values()):
        perturb(tiny_zoo / folder, tmp_path / folder, 0, change=0, dtype=torch.bfloat16)
    given = ["--method", "regmean", "--cache_dir", tmp_path, "--data_dir", dataset, "--samples_per_task", 1]
    run = merged(tmp_path / "out", *given, "--mixed_precision", precision)
    with safe_open(run.statistics / "Chat.safetensors", "pt") as file:
        kinds = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert kinds == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert {tensor.dtype for tensor in tensors_of(run.model).values()} == {torch.bfloat16}


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_experts_that_are_missing(tiny_zoo, tmp_path, monkeypatch):
    """Also between the answers of an expert and its matrices, which are written as a whole."""
    write = gram.write_grams
    given = ["--method", "regmean", "--cache_dir", tiny_zoo, "--data_dir", tiny_zoo / "dataset"]
    given += ["--samples_per_task", 2, "--max_new_tokens", 4, "--run_name", "r"]
    expected = merged(tmp_path / "whole", *given)

    def stop_at_code(target, *given):
        if target.stem == "Code":
            raise KeyboardInterrupt
        write(target, *given)

    monkeypatch.setattr(inputs, "write_grams", stop_at_code)
    merge(*given, "--output_path", tmp_path / "parts")
    folder = tmp_path / "parts" / "regmean" / "r"
    assert not (folder / "model").exists()
    assert sorted(file.name for file in (folder / "statistics").iterdir()) == ["Chat.safetensors", "Math.safetensors"]
    loaded = []

    def watched_load(place, dtype):
        loaded.append(place.name)
        return mistral.load_model(place, dtype)

    monkeypatch.setattr(inputs, "write_grams", write)
    run = merged(tmp_path / "parts", *given, family=replace(mistral, load_model=watched_load))
    assert loaded == [EXPERTS["Code"]]
    assert contents(run.statistics) == contents(expected.statistics)
    same = {file.name: file.read_bytes() for file in expected.model.glob("*.safetensors")}
    assert {file.name: file.read_bytes() for file in run.model.glob("*.safetensors")} == same


def test_the_plan_tells_memory_and_disk(arguments, tmp_path, capsys):
    assert merge(*arguments, "--output_path", tmp_path / "out", "--dry_run") == 0
    said = " ".join(capsys.readouterr().out.split())
    # The longest sample has 16 + 9 + 2 tokens, so 81 vectors at most, more than any layer has inputs.
    size = 4 * 3 * (6 * 32 * 32 + 48 * 48)
    memory, disk = f"{size / 2**20:.1f} MiB of memory", f"{3 * size / 1e6:.1f} MB"
    assert "inputs of 21 matrices are gathered from 9 samples, an expert at a time: at most" in said
    assert memory in said
    assert f"at most {disk} in all, which can be removed once the merged model is there" in said
    assert not (tmp_path / "out").exists()


def test_problems_are_told_before_anything_runs(arguments, tiny_zoo, tmp_path, capsys, monkeypatch):
    output = ["--output_path", tmp_path / "out"]
    problem = refusal(capsys, *arguments, *output, "--reduce_non_diagonal_ratio", 1.5)
    assert problem == "--reduce_non_diagonal_ratio must be a number in [0, 1], got 1.5"
    problem = refusal(capsys, *arguments, *output, "--data_dir", tmp_path / "none")
    assert "does not exist; give --data_dir" in problem
    problem = refusal(capsys, *arguments, *output, "--exclude_params", ".*proj.*")
    assert problem == "regmean merges matrices, and --exclude_params leaves none; use another method"
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert any("the disk of" in problem for problem in refused(capsys, *arguments, *output))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_an_expert_that_computes_nan_is_named(precision, arguments, tmp_path, capsys, monkeypatch):
    """As some do in half precision, though all their weights are finite."""
    told = refusal_of_nan(monkeypatch, capsys, precision, *arguments, "--output_path", tmp_path / "out")
    assert told == "expert Math computes NaN or infinite inputs of model.layers.1.self_attn.q_proj.weight"
    assert {file.stem for file in tmp_path.glob("out/*/*/statistics/*")} == {"Chat"}


@pytest.mark.slow
def test_two_processes_merge_as_one(arguments, tmp_path):
    expected = merged(tmp_path / "one", *arguments)
    given = [*map(str, arguments), "--device", "cpu", "--output_path", str(tmp_path / "two")]
    done = run_together(2, main, mistral, given, folder=tmp_path)
    assert done.codes == (0, 0), done.stderr
    assert done.stdout.count("merged model: ") == 1
    (model,) = (tmp_path / "two").glob("*/*/model")
    same = {file.name: file.read_bytes() for file in expected.model.glob("*.safetensors")}
    assert {file.name: file.read_bytes() for file in model.glob("*.safetensors")} == same


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["cut", "changed", "record gone", "expert changed"])
def test_statistics_that_are_not_what_was_gathered_are_gathered_again(fault, tiny_zoo, tmp_path):
    shutil.copytree(tiny_zoo, tmp_path / "zoo")
    write_tasks(tmp_path / "zoo" / "dataset", responses=dict.fromkeys(EXPERTS, "42"))
    given = ["--method", "regmean", "--cache_dir", tmp_path / "zoo", "--data_dir", tmp_path / "zoo" / "dataset"]
    given += ["--samples_per_task", 1, "--run_name", "r"]
    run = merged(tmp_path / "out", *given)
    whole = contents(run.model)
    shutil.rmtree(run.model)
    file = run.statistics / "Math.safetensors"
    gathered, times = file.read_bytes(), file.stat()
    if fault == "cut":
        os.truncate(file, len(gathered) - 4)
    elif fault == "changed":
        file.write_bytes(gathered[:-1] + bytes([gathered[-1] ^ 1]))
    elif fault == "record gone":
        run.kept.file.unlink()
    else:
        weights = tmp_path / "zoo" / EXPERTS["Math"] / "model.safetensors"
        weights.write_bytes(weights.read_bytes())
    others = {path: path.stat().st_mtime_ns for path in run.statistics.iterdir() if path != file}
    run = merged(tmp_path / "out", *given)
    assert contents(run.model) == whole
    assert file.read_bytes() == gathered
    assert file.stat().st_mtime_ns > times.st_mtime_ns
    is_kept = {path: path.stat().st_mtime_ns for path in run.statistics.iterdir() if path != file} == others
    assert is_kept == (fault != "record gone")
