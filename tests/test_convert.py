"""Pickle files of models become safetensors files, by the command; what is no model in pickle files is refused."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from expert_merging import convert as converting
from expert_merging import writing
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.commands.main import main, parser
from tests.checkpoints import INDEX, save_model, tensors_of, write_checkpoint
from tests.command import assert_same_bytes, contents, flags, merged, snapshot
from tests.command import refusal as merge_refusal
from tests.hub import serving

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}
FIRST, SECOND = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
TYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
]


@pytest.fixture
def folder(tmp_path):
    """An empty folder of a model, but for its configuration."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    return folder


@pytest.fixture
def target(tmp_path):
    return tmp_path / "new"


def convert(folder, target):
    return main(["convert", str(folder), str(target)])


def refused(capsys, folder, target):
    capsys.readouterr()
    assert convert(folder, target) == 1
    assert not target.exists()
    assert not writing.partial_name(target).exists()
    return [line.removeprefix("error: ") for line in capsys.readouterr().err.splitlines()]


def refusal(capsys, folder, target):
    (line,) = refused(capsys, folder, target)
    return line


def save_shards(folder, first, second):
    for name, tensors in ((FIRST, first), (SECOND, second)):
        torch.save(tensors, folder / name)
    weight_map = {**dict.fromkeys(first, FIRST), **dict.fromkeys(second, SECOND)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_single_file(folder, target, capsys):
    torch.save(TENSORS, folder / "pytorch_model.bin")
    before = snapshot(folder)
    assert convert(folder, target) == 0
    assert str(target) in capsys.readouterr().out
    assert sorted(contents(target)) == ["config.json", "model.safetensors"]
    assert_same_bytes(load_file(target / "model.safetensors"), TENSORS)
    with safe_open(target / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}, "without which transformers does not read it"
    assert snapshot(folder) == before


def test_files_stay_divided_and_get_an_index(folder, target):
    save_shards(folder, {"b": TENSORS["b"]}, {"a": TENSORS["a"]})
    assert convert(folder, target) == 0
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(contents(target)) == ["config.json", *names, INDEX]
    index = json.loads((target / INDEX).read_text())
    assert index == {"metadata": {"total_size": 24 + 10}, "weight_map": {"b": names[0], "a": names[1]}}
    assert_same_bytes(tensors_of(target), TENSORS)


def test_other_files_are_copied_as_merges_copy_them(folder, target):
    torch.save(TENSORS, folder / "pytorch_model.bin")
    for name in ("README.md", "tokenizer.model", "training_args.bin", "rng_state.pth", "tf_model.h5", "sub/notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    assert convert(folder, target) == 0
    assert sorted(contents(target)) == [
        *("README.md", "config.json", "model.safetensors", "sub/notes.txt", "tokenizer.model"),
    ]
    assert (target / "README.md").read_text() == "README.md"


def test_links_out_of_the_folder_are_not_copied(folder, target, tmp_path, capsys):
    torch.save(TENSORS, folder / "pytorch_model.bin")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "config.json").chmod(0o600)
    assert convert(folder, target) == 0
    assert sorted(contents(target)) == ["config.json", "model.safetensors"]
    assert (target / "config.json").stat().st_mode & 0o777 == 0o600
    assert capsys.readouterr().out.startswith(f"warning: not copied from {folder}, since they are links to what lies")


@pytest.mark.parametrize("length", [255, 256])
def test_a_long_name_is_used_or_refused_before_anything_is_read(length, folder, target, capsys):
    torch.save(TENSORS, folder / "pytorch_model.bin")
    target = target.with_name("n" * length)
    assert convert(folder, target) == (length > 255)
    assert (length > 255) == ("has a longer name than the disk of" in capsys.readouterr().err)
    assert length > 255 or sorted(contents(target)) == ["config.json", "model.safetensors"]


def test_an_adapter(folder, target):
    torch.save(TENSORS, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text("{}")
    assert convert(folder, target) == 0
    assert_same_bytes(load_file(target / "adapter_model.safetensors"), TENSORS)
    assert (target / "adapter_config.json").is_file()


@pytest.mark.parametrize("name", ["model.pt", "weights.pth", "model.ckpt"])
def test_a_file_of_another_name_if_there_is_only_one(folder, target, name):
    torch.save(TENSORS, folder / name)
    (folder / "optimizer.pt").touch()
    assert convert(folder, target) == 0
    assert_same_bytes(load_file(target / "model.safetensors"), TENSORS)


def test_every_type_and_shape(folder, target):
    tensors = {str(kind): torch.tensor([0, 1, 1]).to(kind) for kind in TYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "parameter": torch.nn.Parameter(torch.ones(2))}
    torch.save(tensors, folder / "pytorch_model.bin")
    assert convert(folder, target) == 0
    assert_same_bytes(
        load_file(target / "model.safetensors"), {name: tensor.detach() for name, tensor in tensors.items()}
    )


def test_tensors_that_share_memory_or_are_no_block_of_it(folder, target):
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"embedding": whole, "head": whole, "transposed": whole.T, "row": whole[1], "column": whole[:, 1]}
    torch.save(tensors, folder / "pytorch_model.bin")
    assert convert(folder, target) == 0
    assert_same_bytes(load_file(target / "model.safetensors"), {name: t.contiguous() for name, t in tensors.items()})


def test_files_of_old_versions_of_torch(folder, target):
    torch.save(TENSORS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert convert(folder, target) == 0
    assert_same_bytes(load_file(target / "model.safetensors"), TENSORS)


def test_a_converted_model_computes_the_same(tmp_path, target):
    save_model(tmp_path / "saved", 0, tie_word_embeddings=True)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    pickled = tmp_path / "pickled"
    shutil.copytree(tmp_path / "saved", pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(expected.state_dict(), pickled / "pytorch_model.bin")  # head and embedding in one memory
    assert convert(pickled, target) == 0
    tokens = torch.tensor([[5, 6, 7]])
    assert AutoModelForCausalLM.from_pretrained(target)(tokens).logits.equal(expected(tokens).logits)


def test_the_advice_for_pickle_files_leads_to_a_merge(folder, target, tmp_path, capsys):
    torch.save(TENSORS, folder / "pytorch_model.bin")
    base = write_checkpoint(tmp_path / "base", {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()})
    command = ("--method", "weight_average", "--output_path", tmp_path / "out")
    line = merge_refusal(capsys, *command, *flags(base, A=folder))
    arguments = re.fullmatch(r".*: python -m expert_merging (convert .*)", line)[1].split()
    assert main([str(target) if word == "NEW_FOLDER" else word for word in arguments]) == 0
    run = merged(tmp_path / "out", *command[:2], *flags(base, A=target))
    assert_same_bytes(tensors_of(run.model), TENSORS)


def test_files_are_mapped_and_tensors_are_written_from_their_pages(folder, target, monkeypatch):
    save_shards(folder, {"a": torch.ones(100)}, {"b": torch.ones(100)})
    mapped, pages, written = [], set(), []
    load, as_bytes = torch.load, converting.as_bytes

    def loaded(file, **options):
        mapped.append(options["mmap"])
        content = load(file, **options)
        pages.update(tensor.data_ptr() for tensor in content.values())
        return content

    monkeypatch.setattr(torch, "load", loaded)
    monkeypatch.setattr(converting, "as_bytes", lambda block: written.append(block.data_ptr()) or as_bytes(block))
    assert convert(folder, target) == 0
    assert all(mapped)
    assert len(written) == 2
    assert pages.issuperset(written)


def test_a_repository_of_pickle_files(folder, target, tmp_path, monkeypatch):
    torch.save(TENSORS, folder / "pytorch_model.bin")
    (folder / "optimizer.pt").touch()
    with serving(monkeypatch, tmp_path / "cache") as hub:
        hub.add("org/old", folder)
        assert main(["convert", "org/old", str(target)]) == 0
    assert sorted(hub.sent) == ["config.json", "pytorch_model.bin"]
    assert_same_bytes(load_file(target / "model.safetensors"), TENSORS)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_conversion_that_fails(folder, target, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    save_shards(folder, {"a": TENSORS["a"]}, {"b": TENSORS["b"]})
    monkeypatch.setattr(converting, "_complete", fail)
    if isinstance(error, OSError):
        assert refusal(capsys, folder, target) == "the disk is full; make room, then the same command begins again"
    else:
        with pytest.raises(KeyboardInterrupt):
            convert(folder, target)
    assert os.listdir(target.parent) == [folder.name]


# What can be wrong.


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_what_could_run_code_is_refused_and_not_run(folder, target, capsys):
    save_shards(folder, TENSORS, {"c": torch.ones(1)})
    torch.save({"x": Evil(folder / "ran")}, folder / SECOND)
    assert refusal(capsys, folder, target) == (
        f"{folder / SECOND} holds more than tensors (posix.system), which could run code when it is opened, or is no "
        "pickle file; ask its maker for safetensors files"
    )
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x02}q\x00.", b"PK\x03\x04 no archive"])
def test_damaged_files(folder, target, capsys, content):
    (folder / "pytorch_model.bin").write_bytes(content)
    assert refusal(capsys, folder, target).startswith(f"{folder / 'pytorch_model.bin'} ")


def test_a_file_that_is_cut_off(folder, target, capsys):
    torch.save(TENSORS, folder / "pytorch_model.bin")
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    line = refusal(capsys, folder, target)
    assert re.fullmatch(
        rf"{folder}/pytorch_model.bin is no pickle file of tensors, or is damaged \(.+\); download it again", line
    )


@pytest.mark.slow
@pytest.mark.parametrize("is_archive", [True, False])
def test_every_byte_of_a_file_may_be_damaged(folder, target, capsys, is_archive):
    file = folder / "pytorch_model.bin"
    torch.save(TENSORS, file, _use_new_zipfile_serialization=is_archive)
    content = file.read_bytes()
    refusals = 0
    for place in range(0, len(content), 1 + len(content) // 500):
        file.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        if convert(folder, target) == 0:
            shutil.rmtree(target)
        else:
            refusals += 1
            assert re.fullmatch(rf"error: {file} [^\n]+\n", capsys.readouterr().err), place
    assert refusals > 20


def test_what_is_no_table_of_tensors(folder, target, capsys):
    torch.save([torch.ones(1)], folder / "pytorch_model.bin")
    file = folder / "pytorch_model.bin"
    assert refusal(capsys, folder, target) == f"{file} holds list, not tensors by name as a model's file does"
    torch.save({"state_dict": TENSORS, "epoch": 3}, file)
    assert refusal(capsys, folder, target) == (
        f"{file} holds state_dict, epoch beside or instead of tensors; a model's file has none"
    )


def test_types_that_safetensors_files_cannot_hold(folder, target, capsys):
    file = folder / "pytorch_model.bin"
    for name, tensor in {
        "complex64": torch.ones(1, dtype=torch.complex64),
        "sparse_coo": torch.eye(2).to_sparse(),
    }.items():
        torch.save({"x": tensor}, file)
        assert refusal(capsys, folder, target) == f"{file}: x is stored as {name}, which safetensors files cannot hold"


def test_every_file_that_is_wrong_is_told(folder, target, capsys):
    save_shards(folder, {"a": torch.ones(1)}, {"b": torch.ones(1)})
    torch.save([], folder / FIRST)
    torch.save([], folder / SECOND)
    assert len(refused(capsys, folder, target)) == 2


def test_a_tensor_in_two_files(folder, target, capsys):
    save_shards(folder, {"a": torch.ones(1)}, {"a": torch.ones(1)})
    assert refusal(capsys, folder, target) == (
        f"{folder / SECOND}: tensor a is in {FIRST} already; download both again"
    )


def test_missing_files_are_named(folder, target, capsys):
    torch.save(TENSORS, folder / SECOND)
    assert refusal(capsys, folder, target) == (
        f"{folder} has 1 of 2 pickle files of its model; missing: {FIRST}; download the rest"
    )


def test_files_of_several_sets(folder, target, capsys):
    save_shards(folder, {"a": torch.ones(1)}, {"b": torch.ones(1)})
    torch.save(TENSORS, folder / "pytorch_model-00001-of-00001.bin")
    assert refusal(capsys, folder, target) == (
        f"{folder} has pickle files of several sets (*-of-00001.bin, *-of-00002.bin); remove those that do not belong "
        "there"
    )


def test_several_files_of_other_names(folder, target, capsys):
    for name in ("a.pt", "b.pth"):
        torch.save(TENSORS, folder / name)
    assert refusal(capsys, folder, target) == (
        f"{folder} has several pickle files (a.pt, b.pth), and none is called pytorch_model.bin or "
        "pytorch_model-00001-of-00002.bin, as those of a model are"
    )


def test_a_pointer(folder, target, capsys):
    file = folder / "pytorch_model.bin"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
    assert refusal(capsys, folder, target) == (
        f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in {folder}"
    )


def test_there_is_nothing_to_convert(folder, target, tmp_path, capsys):
    assert refusal(capsys, folder, target) == f"{folder} has no pickle files of a model"
    (folder / "optimizer.pt").touch()
    assert refusal(capsys, folder, target).startswith(f"{folder} has no weights: optimizer.pt are what a trainer keeps")
    write_checkpoint(folder, TENSORS)
    (folder / "pytorch_model.bin").touch()
    assert Checkpoint(folder).entries
    assert refusal(capsys, folder, target) == (
        f"{folder} has safetensors files already, which are read; there is nothing to convert"
    )
    assert refusal(capsys, tmp_path / "none", target) == f"checkpoint folder {tmp_path / 'none'} does not exist"


def test_where_it_goes(folder, target, capsys):
    torch.save(TENSORS, folder / "pytorch_model.bin")
    inside = folder / "new"
    assert refusal(capsys, folder, inside) == (
        f"{inside} would lie inside {folder}, which is never written to; choose another NEW_FOLDER"
    )
    target.mkdir()
    assert convert(folder, target) == 1
    assert capsys.readouterr().err == (f"error: {target} exists already; choose another NEW_FOLDER, or move it away\n")


def test_a_disk_that_is_too_small(folder, target, capsys, monkeypatch):
    torch.save(TENSORS, folder / "pytorch_model.bin")
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: usage._replace(free=10))
    assert refusal(capsys, folder, target).endswith("make room or choose another NEW_FOLDER")


def test_the_help_tells_what_it_does(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["convert", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "FOLDER NEW_FOLDER" in text
    assert "nothing in them is run" in text
