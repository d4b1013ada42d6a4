"""Names of tensors that stand in containers are read, for base and experts, whatever holds them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expert_merging.checkpoints.naming import DECODER, Container, find_container, published_names
from expert_merging.learned.coefficients import load_coefficients
from expert_merging.methods.linear import task_arithmetic
from tests.checkpoints import BASE, EXPERTS, perturb, save_model, tensors_of, write_checkpoint
from tests.command import COMMAND, assert_same_bytes, flags, merge, merge_plainly, merged, refused

LEARNING = ("--method", "expert_merging", "--seed", 3, "--log_with", "none", "--max_new_tokens", 4)


def in_layers(name: str) -> str:
    """As torch.compile and activation checkpointing of single layers put it."""
    return name.replace("self_attn.", "_orig_mod.self_attn.").replace("mlp.", "_checkpoint_wrapped_module.mlp.")


# How a container changes names, and how the plan says that they are read.
CONTAINERS: dict[str, tuple[Callable[[str], str], str]] = {
    "data parallel": (lambda name: f"module.{name}", "without 'module.'"),
    "twice": (lambda name: f"module.module.{name}", "without 'module.module.'"),
    "compiled": (lambda name: f"_orig_mod.{name}", "without '_orig_mod.'"),
    "adapted": (lambda name: f"base_model.model.{name}", "without 'base_model.model.'"),
    "compiled layers": (in_layers, "without '_checkpoint_wrapped_module.' and '_orig_mod.'"),
    "held": (lambda name: f"model.{name}", "without 'model.'"),
    "in a larger model": (lambda name: f"language_model.{name}", "without 'language_model.'"),
    "some trainer's": (lambda name: f"actor.policy.{name}", "without 'actor.policy.'"),
    "several": (lambda name: f"_forward_module._orig_mod.{name}", "without '_orig_mod.' and '_forward_module.'"),
    "without its holder": (lambda name: name.removeprefix("model."), "with 'model.' before them"),
}  # fmt: skip


def renamed(source: Path, target: Path, rename: Callable[[str], str]) -> Path:
    """A copy of a checkpoint whose tensors have other names."""
    shutil.copytree(source, target)
    for file in target.glob("*.safetensors"):
        save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two experts without a head of their own, since that is lost without its holder."""
    folder = tmp_path_factory.mktemp("zoo")
    save_model(folder / "base", 0, tie_word_embeddings=True)
    for seed, name in enumerate("ab"):
        perturb(folder / "base", folder / name, 1 + seed)
    return folder


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("who", ["the base", "expert A"])
def test_a_container_is_taken_off_and_told(kind, who, zoo, tmp_path, capsys):
    rename, words = CONTAINERS[kind]
    folders = {"the base": zoo / "base", "expert A": zoo / "a", "expert B": zoo / "b"}
    expected = merge_plainly(*[zoo / "base"], [zoo / "a", zoo / "b"], task_arithmetic)
    folders[who] = renamed(folders[who], tmp_path / "contained", rename)
    given = flags(folders["the base"], A=folders["expert A"], B=folders["expert B"])
    assert merge(*COMMAND, *given, "--dry_run") == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "names of tensors" in line]
    assert told == [f"{who}: names of tensors are read {words}"]
    run = merged(tmp_path / "out", *COMMAND, *given)
    if who == "the base":
        expected = {rename(name): tensor for name, tensor in expected.items()}
    assert_same_bytes(tensors_of(run.model), expected)


def test_base_and_experts_may_each_have_a_container(zoo, tmp_path, capsys):
    base = renamed(zoo / "base", tmp_path / "base", CONTAINERS["data parallel"][0])
    same = renamed(zoo / "a", tmp_path / "same", CONTAINERS["data parallel"][0])
    other = renamed(zoo / "b", tmp_path / "other", CONTAINERS["compiled layers"][0])
    run = merged(tmp_path / "out", *COMMAND, *flags(base, A=same, B=other))
    expected = merge_plainly(zoo / "base", [zoo / "a", zoo / "b"], task_arithmetic)
    assert_same_bytes(tensors_of(run.model), {f"module.{name}": tensor for name, tensor in expected.items()})
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if "names of tensors" in line] == [
        "the base",
        "expert B",
    ], "an expert that is called like the base needs no word"


@pytest.mark.parametrize("pattern", [r"model\.layers\.0\.", r"module\.model\.layers\.0\."])
def test_patterns_speak_of_published_names_and_of_those_in_the_files(pattern, zoo, tmp_path, capsys):
    base = renamed(zoo / "base", tmp_path / "base", CONTAINERS["data parallel"][0])
    run = merged(tmp_path / "out", *COMMAND, *flags(base, A=zoo / "a"), "--exclude_params", pattern, ".*norm.*")
    expected = merge_plainly(zoo / "base", [zoo / "a"], task_arithmetic, [r"model\.layers\.0\.", ".*norm.*"])
    assert_same_bytes(tensors_of(run.model), {f"module.{name}": tensor for name, tensor in expected.items()})
    assert "matches no parameter" not in capsys.readouterr().out


@pytest.mark.parametrize("who", ["the base", "expert Math"])
def test_models_whose_names_stand_in_a_container_are_not_learned_with(who, tiny_zoo, tmp_path, capsys):
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in (BASE, *EXPERTS.values()):
        if name == (BASE if who == "the base" else EXPERTS["Math"]):
            renamed(tiny_zoo / name, cache / name, CONTAINERS["data parallel"][0])
        else:
            (cache / name).symlink_to(tiny_zoo / name)
    given = (*LEARNING, "--cache_dir", cache, "--data_dir", tiny_zoo / "dataset", "--output_path", tmp_path / "out")
    sentence = (
        f"{who} cannot be loaded as a model: transformers knows its tensors by names without 'module.'; save it under "
        "those, or use a method that runs no model (closed forms find the tensors)"
    )
    assert refused(capsys, *given) == refused(capsys, *given, "--dry_run") == [sentence]
    asked = [*COMMAND, "--cache_dir", cache, "--output_path", tmp_path / "asked", "--run_tests", "--dry_run"]
    if who == "the base":
        assert refused(capsys, *asked) == [sentence]
    else:
        assert merge(*asked) == 0, "what is asked is the merged model, which has the base's names"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_learned_coefficients_serve_a_base_in_a_container(tiny_zoo, tmp_path):
    given = ("--cache_dir", tiny_zoo, "--data_dir", tiny_zoo / "dataset")
    learned = merged(tmp_path / "learned", *LEARNING, *given)
    base = renamed(tiny_zoo / BASE, tmp_path / "base", CONTAINERS["data parallel"][0])
    given = ("--cache_dir", tiny_zoo, "--base_model_path", base, "--coefficients", learned.folder)
    run = merged(tmp_path / "out", "--method", "coefficients", *given)
    expected = {f"module.{name}": tensor for name, tensor in tensors_of(learned.model).items()}
    assert_same_bytes(tensors_of(run.model), expected)
    assert load_coefficients(learned.folder).values


def test_what_an_expert_has_beyond_the_base_is_excluded_by_its_published_name(tmp_path):
    base = write_checkpoint(tmp_path / "base", {"model.layers.0.weight": torch.ones(4)})
    expert = {"model.layers.0.weight": torch.zeros(4), "visual.merger.weight": torch.ones(2)}
    folder = write_checkpoint(tmp_path / "expert", {f"module.{name}": tensor for name, tensor in expert.items()})
    run = merged(tmp_path / "out", *COMMAND, *flags(base, A=folder), "--exclude_params", "visual.*")
    assert torch.equal(tensors_of(run.model)["model.layers.0.weight"], torch.full((4,), 0.7))


def test_an_unrelated_expert_is_no_container(tmp_path, capsys):
    base = write_checkpoint(tmp_path / "base", {"model.layers.0.weight": torch.ones(4)})
    folder = write_checkpoint(tmp_path / "expert", {"encoder.block.0.weight": torch.ones(4)})
    first, second = refused(capsys, *COMMAND, *flags(base, A=folder))
    assert first.endswith("lacks the tensor model.layers.0.weight")
    assert second.endswith(
        "has the tensor encoder.block.0.weight, which the base lacks; is it an expert of this base? (or exclude it)"
    )


@pytest.mark.parametrize(
    ("names", "known", "expected"),
    [
        (["a.b", "a.c"], {"a.b"}, Container()),
        (["x.a.b", "x.a.c"], {"a.b", "a.c"}, Container("x.")),
        (["x.y.a.b", "x.y.a.c"], {"a.b"}, Container("x.y.")),
        (["a.b"], {"model.a.b"}, Container("", "model.")),
        (["x.a.b"], {"language_model.model.a.b"}, Container("x.", "language_model.model.")),
        (["a.b"], {"z.a.b", "z.c"}, Container("", "z.")),
        (["a.b"], {"c.d"}, Container()),
        ([], {"c.d"}, Container()),
    ],
)
def test_the_plainest_container_that_explains_most_is_found(names, known, expected):
    assert find_container(names, known.__contains__, known) == expected


@pytest.mark.parametrize("names", [["model.layers.0.w", "model.embed_tokens.weight"], ["transformer.h.0.w"], []])
def test_published_names_stay_what_they_are(names):
    assert published_names(names, str, DECODER) == (Container(), {name: name for name in names})
