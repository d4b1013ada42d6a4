"""Experts rebuilt from a merge with masks, by the command."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from expert_merging import streaming
from expert_merging.commands.main import main
from expert_merging.merge import write_output
from expert_merging.workers import Workers
from tests.checkpoints import BASE, EXPERTS, make_zoo, tensors_of, write_checkpoint
from tests.command import assert_same_bytes, contents, flags, merged, snapshot


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A base in several files."""
    return make_zoo(tmp_path_factory.mktemp("zoo"), max_shard_size="20KB")


@pytest.fixture
def run(zoo, tmp_path):
    return merged(tmp_path / "runs", "--method", "tall", "--run_name", "r", "--cache_dir", zoo)


def extract(run, *more, expert="Math", **given):
    arguments = {"expert": expert, **given}
    return main(["extract", str(run.folder), *(f"--{name}={value}" for name, value in arguments.items()), *more])


def refusal(capsys, run, **given):
    capsys.readouterr()
    assert extract(run, **given) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


def rebuilt_plainly(base, experts, factor=0.4):
    """The base and the sum of all task vectors where an expert's mask is 1, rounded once; for each expert."""
    vectors = [{name: expert[name].float() - base[name].float() for name in base} for expert in experts]
    total = {name: sum(vector[name] for vector in vectors) for name in base}
    return [
        {
            name: base[name].float() + (vector[name].abs() > factor * (total[name] - vector[name]).abs()) * total[name]
            for name in base
        }
        for vector in vectors
    ]


def test_a_rebuilt_expert_is_the_plain_formula_s(run, zoo, tmp_path, capsys):
    before = snapshot(zoo)
    base = tensors_of(zoo / BASE)
    plain = rebuilt_plainly(base, [tensors_of(zoo / folder) for folder in EXPERTS.values()])
    for expert, expected in zip(EXPERTS, plain, strict=True):
        assert extract(run, expert=expert, output=tmp_path / expert) == 0
        found = tensors_of(tmp_path / expert)
        assert {name: tensor.dtype for name, tensor in found.items()} == {name: base[name].dtype for name in base}
        for name, tensor in found.items():
            if "proj" in name:
                torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
            else:
                assert tensor.equal(base[name])
        assert f"expert {expert}: {tmp_path / expert} (0." in capsys.readouterr().out
    assert snapshot(zoo) == before


def test_the_folder_is_complete(run, zoo, tmp_path):
    assert extract(run, output=tmp_path / "new" / "Math") == 0
    folder = tmp_path / "new" / "Math"
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    base = contents(zoo / BASE)
    found = contents(folder)
    assert set(found) == {*base, "README.md"}
    for name in base:
        assert found[name] == base[name] or name.endswith(".safetensors"), name
    card = found["README.md"].decode()
    assert "# Math\n" in card
    assert "a merge of 3 experts of `Mistral-7B-v0.1`" in card


def random_folders(tmp_path, dtype):
    shapes = {"a": (37, 29), "b": (501,), "empty": (0, 3), "scalar": (), "norm": (8,)}
    return [
        write_checkpoint(
            tmp_path / str(seed),
            {
                name: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
                for name, shape in shapes.items()
            },
        )
        for seed in range(4)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("workers", [Workers(1), Workers(2, forked=True)], ids=str)
def test_every_type_and_block_gives_the_merged_model_or_the_base(dtype, workers, tmp_path, monkeypatch):
    """Entry by entry, and to the bit in half precision."""
    folders = random_folders(tmp_path, dtype)
    names = ["x", "y", "z"]
    given = flags(folders[0], **dict(zip(names, folders[1:], strict=True)))
    run = merged(tmp_path / "out", "--method", "tall", "--exclude_params", "norm", *given)
    base, *experts = (tensors_of(folder) for folder in folders)
    summed = tensors_of(run.model)
    monkeypatch.setattr(streaming, "BLOCK", 53)  # masks can be read from any entry on
    monkeypatch.setattr(streaming, "STEP", 13)
    monkeypatch.setattr(Workers, "for_entries", lambda *_: workers)
    plain = rebuilt_plainly(base, experts)
    for name, expected in zip(names, plain, strict=True):
        assert extract(run, expert=name, output=tmp_path / name) == 0
        found = tensors_of(tmp_path / name)
        assert found.pop("norm").equal(base["norm"])
        if dtype == torch.float32:
            torch.testing.assert_close(found, {key: expected[key] for key in found}, rtol=1e-6, atol=1e-6)
        else:
            assert_same_bytes(found, {key: expected[key].to(dtype) for key in found})
            assert all(((found[key] == base[key]) | (found[key] == summed[key])).all() for key in found)


def test_only_the_run_and_the_base_are_needed(run, zoo, tmp_path):
    assert extract(run, output=tmp_path / "1") == 0
    moved = shutil.move(run.folder, tmp_path / "moved")
    record = json.loads((tmp_path / "moved" / "config.json").read_text())
    record["options"]["base_model_path"] = "/gone"
    record["options"]["expert"] = dict.fromkeys(EXPERTS, "/gone")
    (tmp_path / "moved" / "config.json").write_text(json.dumps(record))
    shutil.copytree(zoo / BASE, tmp_path / BASE)
    given = ["extract", str(moved), "--expert", "Math", "--output", str(tmp_path / "2")]
    assert main([*given, "--base_model_path", str(tmp_path / BASE)]) == 0
    assert contents(tmp_path / "2") == contents(tmp_path / "1")


def test_nothing_half_written_is_left(run, tmp_path, monkeypatch):
    def stop(*arguments, **keywords):
        write_output(*arguments, **keywords)
        raise KeyboardInterrupt

    monkeypatch.setattr("expert_merging.extract.write_output", stop)
    with pytest.raises(KeyboardInterrupt):
        extract(run, output=tmp_path / "new")
    assert not list(tmp_path.glob("new*"))


# What is refused


def test_other_folders_are_refused(run, zoo, tmp_path, capsys):
    output = tmp_path / "new"
    other = merged(tmp_path / "other", "--method", "weight_average", "--cache_dir", zoo)
    assert refusal(capsys, other, output=output) == (
        f"{other.folder} is a run of weight_average; experts can be rebuilt from runs of --method tall and emr"
    )
    for text in ("{", "[]", '{"method": "tall"}', "{}", '{"method": "tall", "options": {"base_model_path": 3}}'):
        other.config.write_text(text)
        assert refusal(capsys, other, output=output) == (
            f"{other.folder} is no run: it has no readable config.json of one"
        )
    run.model.rename(run.partial_model)
    assert refusal(capsys, run, output=output) == (f"{run.folder} is not complete; its own command continues it")
    assert not output.exists()


def test_unknown_experts_and_lost_masks_are_told(run, tmp_path, capsys):
    masks, output = run.model / "masks", tmp_path / "new"
    assert refusal(capsys, run, expert="math", output=output) == f"{masks} has no masks of 'math'. Did you mean 'Math'?"
    assert refusal(capsys, run, expert="Law", output=output) == (
        f"{masks} has no masks of 'Law'. Known: Chat, Code, Math."
    )
    masks.rename(tmp_path / "masks")
    assert refusal(capsys, run, output=output) == (f"{masks} has no masks; were they moved away from the merged model?")
    assert not output.exists()


def test_another_base_is_refused(run, zoo, tmp_path, capsys):
    """By its layout, or by what was copied from it."""
    smaller = write_checkpoint(tmp_path / "smaller", {"a": torch.ones(3)})
    for other in (smaller, zoo / EXPERTS["Chat"]):
        assert refusal(capsys, run, output=tmp_path / "new", base_model_path=other) == (
            f"{other} is not the base that {run.folder} was made of; give that with --base_model_path"
        )
    assert refusal(capsys, run, output=tmp_path / "new", base_model_path=tmp_path / "gone") == (
        f"checkpoint folder {tmp_path / 'gone'} does not exist"
    )


def test_another_base_is_refused_where_nothing_was_copied(zoo, tmp_path, capsys):
    """An expert has the base's layout; a copy of the base is the base."""
    given = ("--run_name", "all", "--exclude_params", "none", "--cache_dir", zoo)
    run = merged(tmp_path / "runs", "--method", "tall", *given)
    shutil.copytree(zoo / BASE, tmp_path / "copy", copy_function=shutil.copy)
    assert extract(run, output=tmp_path / "new", base_model_path=tmp_path / "copy") == 0
    for other in (zoo / EXPERTS["Math"], run.model):
        assert refusal(capsys, run, output=tmp_path / "other", base_model_path=other) == (
            f"{other} is not the base that {run.folder} was made of; give that with --base_model_path"
        )
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("change", [lambda mask: mask[:-1].clone(), lambda mask: mask.to(torch.int16)])
def test_masks_of_other_tensors_are_refused(change, run, zoo, tmp_path, capsys):
    file = min((run.model / "masks").iterdir())
    found = load_file(file)
    name = next(name for name in found if name.startswith("Math/"))
    save_file({**found, name: change(found[name])}, file)
    assert refusal(capsys, run, output=tmp_path / "new") == (
        f"{file}: the mask {name} does not fit the merged model's tensor of that name"
    )


def test_places_that_are_taken_or_forbidden_are_refused(run, zoo, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "half.partial").mkdir()
    assert refusal(capsys, run, output=tmp_path / "there") == (
        f"{tmp_path / 'there'} exists already; choose another --output, or move it away"
    )
    assert refusal(capsys, run, output=tmp_path / "half") == (
        f"{tmp_path / 'half.partial'} exists already; choose another --output, or move it away"
    )
    for folder in (zoo / BASE, run.folder):
        assert refusal(capsys, run, output=folder / "new") == (
            f"{folder / 'new'} would lie inside {folder}, which is never written to; choose another --output"
        )


@pytest.mark.parametrize("output", [".", "", "/"])
def test_folders_that_are_there_are_refused_by_any_name(output, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = tmp_path / output
    assert refusal(capsys, run, output=output) == f"{there} exists already; choose another --output, or move it away"


def test_places_where_no_folder_can_be_are_refused(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert refusal(capsys, run, output=tmp_path / "file" / "new") == (
        f"{tmp_path / 'file'} is a file where {tmp_path / 'file' / 'new'} needs a folder; choose another --output"
    )
    long = tmp_path / ("n" * 300)
    assert refusal(capsys, run, output=long).endswith(
        "a longer name than the disk of " + f"{tmp_path} takes, 255 bytes"
    )
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert refusal(capsys, run, output=tmp_path / "link").startswith(f"{tmp_path / 'link'} exists already; ")


def test_a_disk_that_fills_up_is_told(run, tmp_path, capsys, monkeypatch):
    def fail(*_arguments, **_keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("expert_merging.extract.write_output", fail)
    assert refusal(capsys, run, output=tmp_path / "new") == (
        "the disk is full; make room, then the same command begins again"
    )
    assert not list(tmp_path.glob("new*"))


def test_a_full_or_closed_disk_is_told_before(run, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    message = refusal(capsys, run, output=tmp_path / "new")
    assert message.startswith("the result needs 0.0 GB and the disk of ")
    assert message.endswith("make room or choose another --output")
    monkeypatch.undo()
    monkeypatch.setattr("os.access", lambda *_: False)
    assert refusal(capsys, run, output=tmp_path / "new") == f"{tmp_path} cannot be written to; choose another --output"


@pytest.mark.parametrize("factor", [None, torch.ones(2), torch.tensor(float("nan")), torch.tensor(float("inf"))])
def test_a_factor_that_is_no_number_is_refused(factor, tmp_path, capsys):
    base, first, second = (write_checkpoint(tmp_path / name, {"a": torch.rand(9)}) for name in ("base", "A", "B"))
    run = merged(tmp_path / "runs", "--method", "emr", *flags(base, A=first, B=second))
    file = run.model / "masks" / "rescalers.safetensors"
    save_file({"B": torch.tensor(1.0)} if factor is None else {"A": factor}, file)
    assert refusal(capsys, run, expert="A", output=tmp_path / "new") == (
        f"{file} does not have the factor of 'A'; was it changed or moved away?"
    )
    assert not (tmp_path / "new").exists()
