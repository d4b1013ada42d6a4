"""Whole runs with adapters are those with the full models that peft makes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from expert_merging.checkpoints.adapter import Adapter
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.cli import main
from expert_merging.commands.main import main as tools
from expert_merging.learned.coefficients import load_coefficients
from expert_merging.methods.linear import task_arithmetic
from expert_merging.run import Run
from expert_merging.running.sharding import load_on
from Mistral.backbone import BACKBONE
from Qwen2VL.backbone import BACKBONE as QWEN
from tests import qwen2vl
from tests.adapters import Load, merged_by_peft, save_adapter
from tests.checkpoints import BASE, EXPERTS, SIZES, perturb, save_model, save_tokenizer, tensors_of, write_tasks
from tests.command import contents, flags, merge, merge_plainly, merged, refusal, refused
from tests.launching import run_together

KEPT = {"modules_to_save": ["lm_head"]}
SETTINGS: dict[str, dict[str, Any]] = {
    "Chat": {"r": 2, "target_modules": ["q_proj", "down_proj"], **KEPT},
    "Math": {"r": 5, "target_modules": "all-linear", "use_dora": True, "use_rslora": True, "seed": 2},
}


@dataclass(frozen=True)
class Zoo:
    """A base and three experts, two of which are adapters and full models as well."""

    base: Path
    adapters: dict[str, Path]
    full: dict[str, Path]
    data: Path

    def flags(self, experts: dict[str, Path]) -> list[object]:
        return [*flags(self.base, **experts), "--data_dir", self.data, "--max_new_tokens", 6]


def make_full(load: Load, adapter: Path, folder: Path) -> Path:
    merged_by_peft(load, adapter).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def zoo(tiny_zoo, tmp_path_factory) -> Zoo:
    folder = tmp_path_factory.mktemp("adapters")
    load = partial(MistralForCausalLM.from_pretrained, tiny_zoo / BASE)
    adapters = {
        name: save_adapter(load, folder / name.lower(), change=0.05, **settings) for name, settings in SETTINGS.items()
    }
    full = {name: make_full(load, adapter, folder / f"full {name}") for name, adapter in adapters.items()}
    code = {"Code": tiny_zoo / EXPERTS["Code"]}
    write_tasks(folder / "dataset", count=3, responses={"Chat": "Certainly", "Math": "42"})
    return Zoo(tiny_zoo / BASE, {**adapters, **code}, {**full, **code}, folder / "dataset")


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, atol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=atol, msg=name)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("task_arithmetic", ["--scaling_coefficient", "[0.5, -0.75, 1.5]"]),
        ("dare_ta", ["--scaling_coefficient", "[0.5, -0.75, 1.5]", "--seed", 3]),
        ("weight_average", ["--exclude_params", "nothing"]),
        ("ties", []),
        ("task_arithmetic", ["--post", "consensus"]),
        ("svd", ["--scaling_coefficient", -0.5]),
        ("iso", []),
        ("moe", ["--router", "zeros", "--experts_per_token", 3]),
    ],
)
def test_closed_forms_do_with_adapters_what_they_do_with_full_models(method, options, zoo, tmp_path):
    found, expected = (
        merged(tmp_path / name, "--method", method, *options, *zoo.flags(experts))
        for name, experts in (("adapters", zoo.adapters), ("full", zoo.full))
    )
    assert_close(tensors_of(found.model), tensors_of(expected.model))
    assert not any("adapter" in name for name in contents(found.model))


def test_coefficients_of_adapters_may_be_negative(zoo, tmp_path):
    """Adapters of different rank with their own weights: one is added, one is taken away."""
    weights = [0.5, -0.75]
    experts = {name: zoo.adapters[name] for name in SETTINGS}
    given = ["--method", "task_arithmetic", "--scaling_coefficient", json.dumps(weights)]
    run = merged(tmp_path, *given, *flags(zoo.base, **experts))
    rule = partial(task_arithmetic, scaling_coefficient=weights)
    expected = merge_plainly(zoo.base, [zoo.full[name] for name in SETTINGS], rule)
    assert_close(tensors_of(run.model), expected)
    assert not tensors_of(run.model)["model.layers.0.mlp.up_proj.weight"].equal(
        tensors_of(zoo.base)["model.layers.0.mlp.up_proj.weight"]
    )


def test_runs_say_which_experts_are_adapters(zoo, tmp_path, capsys):
    run = merged(tmp_path / "out", "--method", "task_arithmetic", *flags(zoo.base, **zoo.adapters))
    assert json.loads(run.config.read_text())["adapters"] == ["Chat", "Math"]
    log, card = run.log.read_text(), (run.model / "README.md").read_text()
    assert f"expert Chat {zoo.adapters['Chat']} (LoRA adapter)\n" in log
    assert f"expert Code {zoo.adapters['Code']}\n" in log
    assert " warning: " not in log
    assert "| Chat | `chat` (LoRA adapter) |" in card
    assert f"| Code | `{EXPERTS['Code']}` |" in card
    full = merged(tmp_path / "full", "--method", "task_arithmetic", *flags(zoo.base, **zoo.full))
    assert "adapters" not in json.loads(full.config.read_text())
    assert "adapter" not in (full.model / "README.md").read_text()


def test_a_run_does_not_go_on_with_another_adapter(zoo, tiny_zoo, tmp_path, capsys):
    load = partial(MistralForCausalLM.from_pretrained, tiny_zoo / BASE)
    save_adapter(load, tmp_path / "a")
    command = ("--method", "weight_average", "--run_name", "r", "--output_path", tmp_path / "out")
    assert merge(*command, *flags(zoo.base, A=tmp_path / "a")) == 0
    assert merge(*command, *flags(zoo.base, A=tmp_path / "a")) == 0
    save_adapter(load, tmp_path / "a", seed=5)
    assert "holds a different run" in refusal(capsys, *command, *flags(zoo.base, A=tmp_path / "a"))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "language_model."])
def test_adapters_fit_a_base_whose_names_stand_in_a_container(prefix, zoo, tmp_path):
    shutil.copytree(zoo.base, tmp_path / "base")
    stored = {prefix + name: tensor for name, tensor in tensors_of(zoo.base).items()}
    save_file(stored, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    command = ("--method", "task_arithmetic")
    found = merged(tmp_path / "a", *command, *flags(tmp_path / "base", **zoo.adapters))
    expected = merged(tmp_path / "b", *command, *flags(zoo.base, **zoo.full))
    assert_close(
        {name.removeprefix(prefix): one for name, one in tensors_of(found.model).items()}, tensors_of(expected.model)
    )


TIED_TABLES: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"trainable_token_indices": {"embed_tokens": [3, 5]}},
]
TIED = ("--method", "task_arithmetic", "--scaling_coefficient", 1, "--exclude_params", "nothing.*")


@pytest.fixture(params=[("embed_tokens",), ("embed_tokens", "lm_head"), ("lm_head",)], ids="+".join)
def tied_base(request, tmp_path) -> Path:
    """A base with one matrix for embedding and head, under one of their names or under both."""
    base = tmp_path / "base"
    save_model(base, 3, tie_word_embeddings=True)
    tensors = tensors_of(base)
    table = tensors.pop("model.embed_tokens.weight")
    names = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
    tensors |= {names[name]: table.clone() for name in request.param}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base


@pytest.mark.parametrize("settings", TIED_TABLES, ids=str)
def test_what_an_adapter_adds_to_a_tied_head_is_added_to_the_embedding(settings, tied_base, tmp_path):
    load = partial(MistralForCausalLM.from_pretrained, tied_base)
    adapter = save_adapter(load, tmp_path / "a", **settings)
    run = merged(tmp_path / "out", *TIED, *flags(tied_base, A=adapter))
    expected, tokens = merged_by_peft(load, adapter), torch.arange(10)[None]
    with torch.no_grad():
        found = MistralForCausalLM.from_pretrained(run.model)(tokens).logits
        torch.testing.assert_close(found, expected(tokens).logits)
    assert tensors_of(run.model).keys() == tensors_of(tied_base).keys()
    model = load_on(
        torch.device("cpu"), BACKBONE, Adapter(adapter, Checkpoint(tied_base)), torch.float32, sharded=False
    )
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, found)


@pytest.mark.parametrize("trained", ["embed_tokens", "lm_head"])
def test_an_adapter_with_one_of_two_tied_tables_has_a_head_of_its_own(trained, tied_base, tmp_path, capsys):
    """As peft has it: the other stays as it was, for which the base's one matrix has no room."""
    load = partial(MistralForCausalLM.from_pretrained, tied_base)
    adapter = save_adapter(load, tmp_path / "a", modules_to_save=[trained])
    lines = refused(capsys, *TIED, *flags(tied_base, A=adapter))
    assert lines[0].startswith("expert A has an output head apart from its embedding, and in the base the two are one")


def test_a_base_that_is_an_adapter_is_refused(zoo, capsys):
    assert refusal(capsys, "--method", "ties", *flags(zoo.adapters["Chat"], A=zoo.full["Math"])) == (
        f"{zoo.adapters['Chat']} holds an adapter (adapter_config.json), and a full model is needed here; adapters can "
        "be experts (--expert), and the base is the model that they were trained on"
    )


def test_an_adapter_of_a_base_that_is_gone_adds_no_message(zoo, tmp_path, capsys):
    line = refusal(capsys, "--method", "ties", *flags(tmp_path / "gone", A=zoo.adapters["Chat"]))
    assert line == f"checkpoint folder {tmp_path / 'gone'} does not exist"


def test_adapters_of_another_base_are_warned_of_once(zoo, tmp_path, capsys):
    base, other = tmp_path / "Mistral-7B-v0.1", tmp_path / "Llama-2-7b-hf"
    for folder in (base, other):
        perturb(zoo.base, folder, 0, change=0)
    load = partial(MistralForCausalLM.from_pretrained, other)
    experts = {name: save_adapter(load, tmp_path / name, r=rank) for name, rank in {"A": 3, "B": 4}.items()}
    assert merge("--method", "ties", "--dry_run", *flags(base, **experts)) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: adapters say that they were trained on another model than the base Mistral-7B-v0.1: A "
        "(Llama-2-7b-hf), B (Llama-2-7b-hf); an adapter makes sense on its own base alone"
    ]
    assert merge("--method", "ties", "--dry_run", *flags(other, **experts)) == 0
    assert "warning" not in capsys.readouterr().out


def test_resized_embeddings_are_compared_where_they_are_merged(zoo, tmp_path, capsys):
    load = partial(MistralForCausalLM.from_pretrained, zoo.base)
    adapter = save_adapter(load, tmp_path / "a", resized=90)
    given = ("--method", "weight_average", *flags(zoo.base, A=adapter), "--output_path", tmp_path / "out")
    assert merge(*given, "--dry_run") == 0
    capsys.readouterr()
    assert merge(*given, "--exclude_params", "lm_head.*") == 1
    assert capsys.readouterr().err == (
        f"error: expert A ({adapter}): model.embed_tokens.weight has shape [90, 32], the base's has [80, 32]; "
        "--embeddings mean, or base, matches rows by token\n"
    )


def coefficients(run: Run) -> dict[str, torch.Tensor]:
    return load_coefficients(run.folder).values


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("expert_merging", ["--task_vector_coeffs_dict", '{"Math": -0.7}']),
        ("expert_merging", ["--task_vectors", "disk", "--directions", "svd"]),
        ("expert_merging++", []),
    ],
)
def test_learning_does_with_adapters_what_it_does_with_full_models(method, options, zoo, tmp_path):
    """Adapters of two ranks and a full model; an adapter answers a question itself, with the head that it has."""
    given = ["--method", method, *options, "--samples_per_task", 2]
    found, expected = (
        merged(tmp_path / name, *given, *zoo.flags(experts))
        for name, experts in (("adapters", zoo.adapters), ("full", zoo.full))
    )
    learned = coefficients(expected)
    for name, value in coefficients(found).items():
        torch.testing.assert_close(value, learned[name], rtol=0, atol=2e-5)
    assert_close(tensors_of(found.model), tensors_of(expected.model), atol=1e-5)


@pytest.mark.slow
def test_statistics_and_searches_take_adapters(zoo, tmp_path):
    for method, options in (("regmean", []), ("evo", ["--evaluations", 4, "--population", 2])):
        found, expected = (
            merged(tmp_path / method / name, "--method", method, *options, "--samples_per_task", 1, *zoo.flags(experts))
            for name, experts in (("adapters", zoo.adapters), ("full", zoo.full))
        )
        assert_close(tensors_of(found.model), tensors_of(expected.model), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--shard"]], ids=str)
def test_several_processes_take_adapters(options, zoo, tmp_path):
    given = [*zoo.flags(zoo.adapters), "--samples_per_task", 2, "--device", "cpu", "--run_name", "r", "--output_path"]
    given = [str(argument) for argument in given]
    assert main(BACKBONE, [*given, str(tmp_path / "one")]) == 0
    done = run_together(2, main, BACKBONE, [*given, str(tmp_path / "two"), *options], folder=tmp_path)
    assert done.codes == (0, 0), done.stdout + done.stderr
    one, two = (load_coefficients(tmp_path / name / "expert_merging" / "r").values for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_models_are_compared_with_adapters(zoo, tmp_path):
    """The run's experts are adapters, and one of the models is: it is its own expert."""
    run = merged(tmp_path / "out", "--method", "task_arithmetic", *flags(zoo.base, **zoo.adapters))
    numbers = tmp_path / "numbers.json"
    models = [run.folder, zoo.adapters["Math"], zoo.full["Math"]]
    given = ["--device", "cpu", "--data_dir", zoo.data, "--samples", 2, "--max_new_tokens", 6, "--json", numbers]
    assert tools(["align", *map(str, [*models, *given])]) == 0
    found = json.loads(numbers.read_text())["models"]
    for label in ("math", "full Math"):
        assert found[label]["relative"]["Math"]["divergence"] == pytest.approx(0, abs=1e-6)
        assert found[label]["relative"]["Chat"]["divergence"] > 0.01


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Iterator[Path]:
    cache = tmp_path_factory.mktemp("qwen")
    qwen2vl.save_model(cache / qwen2vl.BASE, 0)
    qwen2vl.write_tasks(cache / "dataset", count=1)
    return cache


@pytest.mark.slow
def test_an_adapter_that_has_seen_pictures_is_learned_from(qwen, tmp_path):
    """It changes the vision tower too, which is not merged but runs."""
    base = qwen / qwen2vl.BASE
    load = partial(AutoModelForImageTextToText.from_pretrained, base)
    adapter = save_adapter(load, tmp_path / "adapter", target_modules=["q_proj", "qkv"], change=0.05)
    full = tmp_path / "full"
    merged_by_peft(load, adapter).save_pretrained(full)
    qwen2vl.save_processor(full)
    perturb(base, tmp_path / "VQA", 3)
    runs = []
    for name, folder in (("adapter", adapter), ("full", full)):
        given = [
            "--data_dir",
            qwen / "dataset",
            "--task_expert",
            '{"Chart": "OCR", "Grounding": "OCR", "MathVista": "VQA"}',
        ]
        experts = {"OCR": folder, "VQA": tmp_path / "VQA"}
        runs.append(merged(tmp_path / "out" / name, *flags(base, **experts), *given, family=QWEN))
    learned = coefficients(runs[1])
    for name, value in coefficients(runs[0]).items():
        torch.testing.assert_close(value, learned[name], rtol=0, atol=2e-5)
    assert_close(tensors_of(runs[0].model), tensors_of(runs[1].model), atol=1e-5)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    """A base whose experts are fused in memory: two parameters have what is six tensors of its files."""
    base = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2)).save_pretrained(base)
    save_tokenizer(base)
    return base


def adapt(base: Path, folder: Path, modules: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Let an adapter change more modules, as older ones that have the files' names do; by name, what it adds."""
    load = partial(MixtralForCausalLM.from_pretrained, base)
    file = save_adapter(load, folder, target_modules=["q_proj"], r=4, lora_alpha=4) / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, (outputs, inputs) in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = 0.3 * torch.randn(4, inputs)
        tensors[f"base_model.model.{name}.lora_B.weight"] = 0.3 * torch.randn(outputs, 4)
    save_file(tensors, file)
    modules_of = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    pairs = {name: [tensors[f"base_model.model.{name}.lora_{one}.weight"] for one in "BA"] for name in modules_of}
    return {f"{name}.weight": left @ right for name, (left, right) in pairs.items()}


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_weights_that_are_fused_in_memory_are_changed_where_they_are(kind, mixtral, tmp_path):
    wide, narrow = SIZES["intermediate_size"], SIZES["hidden_size"]
    experts = "model.layers.1.block_sparse_moe.experts"
    added = adapt(
        mixtral,
        tmp_path / "a",
        {f"{experts}.0.w1": (wide, narrow), f"{experts}.1.w2": (narrow, wide), f"{experts}.1.w3": (wide, narrow)},
    )
    shutil.copytree(mixtral, tmp_path / "full")
    tensors = {name: tensor + added.get(name, 0) for name, tensor in tensors_of(mixtral).items()}
    save_file(tensors, tmp_path / "full" / "model.safetensors", metadata={"format": "pt"})
    adapter = Adapter(tmp_path / "a", Checkpoint(mixtral))
    found, expected, base = (
        load_on(torch.device("cpu"), BACKBONE, checkpoint, kind, sharded=False).state_dict()
        for checkpoint in (adapter, Checkpoint(tmp_path / "full"), adapter.base)
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    fused = [name for name in found if "experts" in name and not found[name].equal(base[name])]
    assert len(fused) == 2


def test_changes_to_what_is_no_part_of_the_model_cannot_be_run(zoo, mixtral, tmp_path, capsys):
    base, name = tmp_path / "base", "model.layers.0.extra"
    shutil.copytree(mixtral, base)
    tensors = {**tensors_of(mixtral), f"{name}.weight": torch.ones(8, 6)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapt(base, tmp_path / "a", {name: (8, 6)})
    experts = dict.fromkeys(["Chat", "Math", "Code"], tmp_path / "a")
    assert merge("--method", "weight_average", "--dry_run", *flags(base, **experts)) == 0
    given = ("--method", "regmean", "--dry_run", "--data_dir", zoo.data, "--exclude_params", ".*extra.*")
    assert refusal(capsys, *given, *flags(base, **experts)) == (
        f"expert Chat changes {name}.weight, which is no parameter of the model in memory, so it cannot be run; "
        "methods that run no model can merge it"
    )
