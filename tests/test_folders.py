"""What a folder holds is recognised by its names, and what holds no model is told apart in words."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from expert_merging import backbone
from expert_merging.backbone import load_tokenizer, load_whole
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.checkpoints.folders import weights_in_other_formats
from expert_merging.checkpoints.other_files import other_files
from expert_merging.checkpoints.reading import damaged_files
from expert_merging.checkpoints.tokenizer_files import read_vocabulary
from expert_merging.errors import InputError
from expert_merging.questions.templates import read_template
from Qwen2VL.backbone import load_processor
from tests.checkpoints import BASE, EXPERTS, INDEX, make_zoo, save_model, tensors_of, write_checkpoint
from tests.command import flags, merged, refusal

TENSORS = {"a": torch.ones(3), "b": torch.ones(2, 2)}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 135\n"
# What trainers leave beside a model.
OF_TRAINERS = (
    "training_args.bin",
    "trainer_state.json",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_0.pth",
    "random_states_0.pkl",
    "latest",
    "zero_to_fp32.py",
    "global_step500/mp_rank_00_model_states.pt",
    "global_step500/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "global_step500/notes.txt",
    "pytorch_model_fsdp_0/__0_0.distcp",
    "pytorch_model_fsdp_0/.metadata",
    "optimizer_0/__0_0.distcp",
    "checkpoint-500/config.json",
    "checkpoint-500/tokenizer.json",
    "runs/Nov27/events.out.tfevents.1",
)


def put(folder, *names, content=""):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def problem(folder):
    with pytest.raises(InputError) as caught:
        Checkpoint(folder)
    (found,) = caught.value.problems
    return found


@pytest.fixture(params=[True, False], ids=["config", "no config"])
def folder(tmp_path, request):
    """A folder without weights, with ``config.json`` or, as many trainers leave it, without."""
    if request.param:
        put(tmp_path, "config.json", content="{}")
    return tmp_path


def test_what_a_trainer_keeps_is_neither_weights_nor_copied(tmp_path):
    base = write_checkpoint(tmp_path / "base", TENSORS)
    put(base, *OF_TRAINERS, "tokenizer.json", "docs/latest.md", "schedulers.txt")
    assert [str(file) for file in other_files(base)] == [
        "config.json",
        "schedulers.txt",
        "tokenizer.json",
        "docs/latest.md",
    ]
    assert weights_in_other_formats(base, Checkpoint(base).headers) == []


def test_a_merge_of_trainers_folders_has_nothing_of_theirs(command, tmp_path):
    for name in ("base", "a"):
        put(tmp_path / name, *OF_TRAINERS)
    run = merged(tmp_path / "out", *command[:-2])
    assert sorted(file.name for file in run.model.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert "not copied" not in run.log.read_text()


def test_only_what_a_trainer_keeps(folder):
    put(folder, "training_args.bin", "optimizer.pt", "rng_state_0.pth", "scheduler.pt")
    assert problem(folder) == (
        f"{folder} has no weights: optimizer.pt, rng_state_0.pth, scheduler.pt are what a trainer keeps for itself; "
        "give the folder that it saved the model to"
    )


def test_the_parent_of_a_trainer_s_checkpoints_names_the_newest(folder):
    put(folder, "checkpoint-500/config.json", "checkpoint-1500/config.json", "checkpoint-1000/config.json")
    put(folder, "training_args.bin", "runs/events.out.tfevents.1")
    newest = folder / "checkpoint-1500"
    assert problem(folder) == f"{folder} has no weights of its own; its newest checkpoint is {newest}"


def test_parts_that_deepspeed_saved(folder):
    put(folder, "global_step500/mp_rank_00_model_states.pt", "zero_to_fp32.py", "latest", "rng_state_0.pth")
    assert problem(folder) == (
        f"{folder} holds the parts of a model that DeepSpeed saved (global_step500), not the model; put them together: "
        f"python {folder}/zero_to_fp32.py {folder} NEW_FOLDER --safe_serialization, and copy config.json and the "
        "tokenizer there"
    )


@pytest.mark.parametrize("place", ["", "pytorch_model_fsdp_0"])
def test_parts_that_fsdp_saved(folder, place):
    put(folder / place, "__0_0.distcp", "__1_0.distcp", ".metadata")
    put(folder, "optimizer_0/__0_0.distcp")
    assert problem(folder) == (
        f"{folder / place} holds the parts of a model that FSDP saved (*.distcp), not the model; put them together: "
        f"accelerate merge-weights {folder / place} NEW_FOLDER, and copy config.json and the tokenizer there"
    )


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "consolidated.00.pth"]
)
def test_the_maker_s_own_format_alone(folder, name):
    put(folder, name, "params.json")
    assert problem(folder) == (
        f"{folder} has its weights in the maker's own format ({name}), with names of its own; download the same "
        "repository's files for transformers (model*.safetensors)"
    )


@pytest.mark.parametrize("name", ["consolidated.safetensors", "consolidated.00.pth"])
def test_the_maker_s_own_format_beside_numbered_files_is_left_alone(tmp_path, name):
    base = write_checkpoint(tmp_path, {"a": TENSORS["a"]}, {"b": TENSORS["b"]})
    put(base, name)
    assert Checkpoint(base).entries.keys() == TENSORS.keys()
    assert weights_in_other_formats(base, Checkpoint(base).headers) == [name]


def test_pickles_beside_parts_of_training_can_be_converted(tmp_path):
    put(tmp_path, "config.json", content="{}")
    put(
        tmp_path,
        "pytorch_model.bin",
        "global_step500/x_model_states.pt",
        "checkpoint-500/config.json",
        "training_args.bin",
    )
    assert "has its weights in pickle files (pytorch_model.bin)" in problem(tmp_path)


# Numbered files without their index.


@pytest.fixture
def unindexed(tmp_path):
    folder = write_checkpoint(tmp_path / "unindexed", {"a": torch.ones(3)}, {"b": torch.ones(2)}, {"c": torch.ones(1)})
    (folder / INDEX).unlink()
    return folder


def test_numbered_files_are_read_without_an_index(unindexed):
    assert list(Checkpoint(unindexed).entries) == ["a", "b", "c"]


def test_missing_ones_of_numbered_files_are_named(unindexed):
    for number in (1, 3):
        (unindexed / f"model-0000{number}-of-00003.safetensors").unlink()
    assert problem(unindexed) == (
        f"{unindexed} has 1 of 3 weight files and no model.safetensors.index.json; missing: "
        "model-00001-of-00003.safetensors, model-00003-of-00003.safetensors; download the rest"
    )


def test_numbered_files_of_several_sets_need_an_index(unindexed):
    save_file({"a": torch.ones(3)}, unindexed / "model-00001-of-00002.safetensors")
    assert problem(unindexed) == (
        f"{unindexed} has files of several sets (*-of-00002.safetensors, *-of-00003.safetensors) and no "
        "model.safetensors.index.json, which says what belongs together; download it, or remove the files that do not "
        "belong there"
    )


def test_the_merge_of_a_base_without_index_has_one(tmp_path):
    base = write_checkpoint(tmp_path / "base", {"a": torch.zeros(3)}, {"b": torch.zeros(2)})
    (base / INDEX).unlink()
    expert = write_checkpoint(tmp_path / "expert", {"a": torch.ones(3), "b": torch.ones(2)})
    run = merged(tmp_path / "out", "--method", "weight_average", *flags(base, A=expert))
    assert json.loads((run.model / INDEX).read_text())["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }
    assert tensors_of(run.model)["b"].tolist() == [1, 1]


def test_a_model_is_loaded_without_an_index(tmp_path):
    save_model(tmp_path, 0, max_shard_size="20KB")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    (tmp_path / INDEX).unlink()
    loaded = load_whole("AutoModelForCausalLM", tmp_path, torch.float32)
    assert all(tensor.equal(expected[name]) for name, tensor in loaded.state_dict().items())
    assert not (tmp_path / INDEX).exists()


def test_files_that_were_cut_off_since_they_were_checked_are_named(tmp_path, monkeypatch):
    save_model(tmp_path, 0, max_shard_size="20KB")
    file = max(tmp_path.glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(InputError, match=f"^{re.escape(str(file))} is truncated or not a safetensors file"):
        load_whole("AutoModelForCausalLM", tmp_path, torch.float32)
    monkeypatch.setattr(backbone, "Checkpoint", lambda _: file.write_bytes(content))  # whole again
    with pytest.raises(InputError, match=r"written while they were read \(.*\); wait until they are complete$"):
        load_whole("AutoModelForCausalLM", tmp_path, torch.float32)


@pytest.mark.slow
def test_learning_from_folders_without_index(tmp_path):
    zoo = make_zoo(tmp_path / "zoo", max_shard_size="20KB")
    for folder in (BASE, *EXPERTS.values()):
        (zoo / folder / INDEX).unlink()
    arguments = ("--cache_dir", zoo, "--data_dir", zoo / "dataset", "--samples_per_task", 1, "--max_new_tokens", 2)
    run = merged(tmp_path / "out", "--method", "expert_merging", "--log_with", "none", *arguments)
    assert AutoModelForCausalLM.from_pretrained(run.model)


# Files of which only Git LFS's pointer is there.


def test_weights_that_are_pointers(tmp_path):
    write_checkpoint(tmp_path, {"a": TENSORS["a"]}, {"b": TENSORS["b"]})
    file = tmp_path / "model-00002-of-00002.safetensors"
    file.write_text(POINTER)
    assert problem(tmp_path) == f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in {tmp_path}"


def test_a_config_that_is_a_pointer(tmp_path):
    put(tmp_path, "config.json", content=POINTER)
    assert problem(tmp_path).startswith(f"{tmp_path / 'config.json'} is a Git LFS pointer")


def test_other_files_of_a_base_that_are_pointers(command, tmp_path, capsys):
    put(tmp_path / "base", "tokenizer.model", content=POINTER)
    assert refusal(capsys, *command) == (
        f"{tmp_path / 'base' / 'tokenizer.model'} is a Git LFS pointer, not the file itself; run `git lfs pull` in "
        f"{tmp_path / 'base'}"
    )


@pytest.mark.parametrize("load", [load_tokenizer, load_processor])
def test_a_tokenizer_that_is_a_pointer(tmp_path, load):
    put(tmp_path, "tokenizer.model", content=POINTER)
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'tokenizer.model'} is a Git LFS pointer")):
        load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "tokenizer.model", "added_tokens.json"])
def test_a_vocabulary_that_is_a_pointer(tmp_path, name):
    put(tmp_path, name, content=POINTER)
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / name} is a Git LFS pointer")):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_chat_template_that_is_a_pointer(tmp_path, name):
    put(tmp_path, name, content=POINTER)
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / name} is a Git LFS pointer")):
        read_template(tmp_path)


def test_files_of_a_processor_that_are_pointers(tmp_path):
    put(tmp_path, "preprocessor_config.json", content=POINTER)
    assert damaged_files(tmp_path) == [
        f"{tmp_path / 'preprocessor_config.json'} is a Git LFS pointer, not the file itself; run `git lfs pull` in "
        f"{tmp_path}"
    ]


def test_a_short_file_is_no_pointer(tmp_path):
    base = write_checkpoint(tmp_path, TENSORS)
    put(base, "empty.txt", "version.txt", content="version 1")
    assert Checkpoint(base).entries
    assert len(load_file(base / "model.safetensors")) == 2
