"""Repositories of a Hub on this machine are downloaded, merged and told of; the Hub's cache is understood."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

from expert_merging import writing
from expert_merging.checkpoints import hub as hubs
from expert_merging.checkpoints.folders import origin
from expert_merging.checkpoints.hub import Repository, read_id
from expert_merging.checkpoints.sources import locate, locate_all
from expert_merging.commands.main import main
from expert_merging.comparing.compare import find_models
from expert_merging.errors import InputError
from expert_merging.options import resolve
from expert_merging.parser import parse
from Mistral.backbone import BACKBONE
from tests.checkpoints import write_checkpoint
from tests.command import COMMAND, TENSORS, flags, merge, merged, refusal, refused
from tests.hub import COMMIT, OLDER, serving

SHARDS = ({"a": torch.ones(3)}, {"b": torch.ones(2)})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving(monkeypatch, tmp_path / "cache") as server:
        yield server


@pytest.fixture
def published(hub, tmp_path):
    """A Hub with a base and two experts, and flags that name them."""
    for name, shift in {"org/base": 0.0, "org/law": 0.5, "other/code": -2.0}.items():
        tensors = {key: tensor + shift for key, tensor in TENSORS.items()}
        folder = write_checkpoint(tmp_path / name, tensors)
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n")
        hub.add(name, folder)
    return [*COMMAND, "--base_model_path", "org/base", "--expert", "Law=org/law", "--expert", "Code=other/code"]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def publish(hub, folder, *files, name="org/model", commit=COMMIT):
    """Publish a folder with files beside its weights."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(file)
    hub.add(name, folder, commit)


def problems(place, **options):
    with pytest.raises(InputError) as caught:
        locate_all(Path(place), {}, **options)
    return list(caught.value.problems)


def problem(place, **options):
    (found,) = problems(place, **options)
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", Repository("org/name")),
        ("Org-1/na.me_2@v1.0", Repository("Org-1/na.me_2", "v1.0")),
        ("org/name@refs/pr/1", Repository("org/name", "refs/pr/1")),
        *(
            (text, None)
            for text in ("name", "./org/name", "../name", "/org/name", "~/name", "a/b/c", "org/name/", "a/b@")
        ),
        ("org/nämé", None),
    ],
)
def test_what_may_name_a_repository(text, expected):
    assert read_id(text) == expected


def test_a_repository_in_flags_is_no_path_unless_there_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "base").mkdir(parents=True)
    given = [
        "--base_model_path",
        "here/base",
        "--expert",
        "A=org/a@v1",
        "--expert",
        "B=./org/b",
        "--output_path",
        "x/y",
    ]
    general = resolve(parse(given, BACKBONE), {}, BACKBONE).general
    assert general["base_model_path"] == str(tmp_path / "here" / "base")
    assert general["expert"] == {"A": "org/a@v1", "B": str(tmp_path / "org" / "b")}
    assert general["output_path"] == str(tmp_path / "x" / "y")


# Downloads.


def test_repositories_are_merged_like_folders(published, tmp_path):
    run = merged(tmp_path / "out", *published)
    folders = flags(tmp_path / "org/base", Law=tmp_path / "org/law", Code=tmp_path / "other/code")
    same = merged(tmp_path / "same", *COMMAND, *folders)
    assert (run.model / "model.safetensors").read_bytes() == (same.model / "model.safetensors").read_bytes()


def test_the_card_names_repositories_with_revision_and_licence(published, tmp_path):
    card = (merged(tmp_path / "out", *published).model / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == ["org/base", "org/law", "other/code"]
    assert f"| Law | `org/law` (revision {COMMIT}, licence apache-2.0) |" in card
    assert "`org/base` merged with 2 experts" in card
    assert str(tmp_path) not in card


def test_a_download_is_made_once(published, hub, tmp_path, capsys):
    assert merge(*published, "--output_path", tmp_path / "1") == 0
    sent = len(hub.sent)
    assert "downloading other/code: 3 files of" in capsys.readouterr().out
    assert merge(*published, "--output_path", tmp_path / "2") == 0
    assert len(hub.sent) == sent
    assert "downloading" not in capsys.readouterr().out


def test_only_safetensors_and_small_files_are_downloaded(hub, tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "model", *SHARDS)
    left = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.safetensors",
        "model.gguf",
        "tf_model.h5",
    ]
    left += ["onnx/model.onnx", "original/consolidated.00.pth", "training_args.bin", "checkpoint-500/config.json"]
    left += ["global_step5/latest", "sub/model.safetensors"]
    publish(hub, folder, *left, "tokenizer.model", "docs/a[1].txt", "movie.mp4")
    (folder / "movie.mp4").write_bytes(b"0" * 3000)
    monkeypatch.setattr(hubs, "_SMALL", 2000)
    found = locate(Path("org/model"))
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert sorted(str(file.relative_to(found)) for file in found.rglob("*") if file.is_file()) == sorted(
        ["config.json", "docs/a[1].txt", "tokenizer.model", *shards]
    )


def test_a_single_file_wins_over_shards(hub, tmp_path):
    folder = write_checkpoint(tmp_path / "model", *SHARDS)
    write_checkpoint(folder, SHARDS[0])
    publish(hub, folder)
    assert [file.name for file in locate(Path("org/model")).glob("model*.safetensors")] == ["model.safetensors"]


def test_an_adapter_is_downloaded(hub, tmp_path):
    publish(hub, tmp_path / "adapter", "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    names = sorted(file.name for file in locate(Path("org/model")).iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("revision", ["v1", OLDER])
def test_a_revision_is_a_tag_or_a_commit(hub, tmp_path, revision):
    publish(hub, write_checkpoint(tmp_path / "new", *SHARDS), "new.txt")
    publish(hub, write_checkpoint(tmp_path / "old", *SHARDS), "old.txt", commit=OLDER)
    found = locate(Path(f"org/model@{revision}"))
    assert (found / "old.txt").is_file()
    assert origin(found) == ("org/model", OLDER)


def test_a_folder_wins_over_a_repository(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    publish(hub, write_checkpoint(tmp_path / "elsewhere", *SHARDS))
    write_checkpoint(tmp_path / "org" / "model", *SHARDS)
    assert locate(Path("org/model")) == Path("org/model")
    assert not hub.sent


def test_a_dry_run_downloads_nothing_and_tells_what_is_missing(published, hub, tmp_path, capsys):
    locate(Path("org/base"))
    hub.sent.clear()
    size = sum(file.stat().st_size for file in (tmp_path / "org/law").iterdir()) / 1e6
    assert refused(capsys, *published, "--dry_run", "--output_path", tmp_path / "out") == [
        f"--dry_run downloads nothing, and {name} is not in the Hub's cache: 3 files of {size:.1f} MB are missing"
        for name in ("org/law", "other/code")
    ]
    assert not hub.sent
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_what_is_in_the_cache(published, hub, tmp_path, capsys):
    for name in ("org/base", "org/law", "other/code"):
        locate(Path(name))
    assert merge(*published, "--dry_run", "--output_path", tmp_path / "out") == 0
    assert "all checks passed" in capsys.readouterr().out


def test_extract_and_align_take_repositories(published, tmp_path):
    run = merged(tmp_path / "out", "--method", "tall", *published[2:])
    target = tmp_path / "law"
    arguments = [
        "extract",
        str(run.folder),
        "--expert",
        "Law",
        "--output",
        str(target),
        "--base_model_path",
        "org/base",
    ]
    assert main(arguments) == 0
    assert (target / "model.safetensors").is_file()
    assert find_models([Path("org/law")])[0].folder == locate(Path("org/law"))


# What can be wrong.


def test_a_missing_folder_beside_repositories_that_cannot_be_read(hub, tmp_path):
    with pytest.raises(InputError) as caught:
        locate_all(Path("org/none"), {"A": tmp_path / "none"})
    assert len(caught.value.problems) == 2
    assert f"checkpoint folder {tmp_path / 'none'} does not exist" in caught.value.problems


def test_no_such_repository(hub):
    assert problem("org/none") == (
        f"org/none is neither a folder here nor a repository that can be read on the Hub ({hub.url}/org/none); is the "
        "name right? A private one needs `hf auth login`"
    )


def test_no_such_revision(hub, tmp_path):
    publish(hub, write_checkpoint(tmp_path / "model", *SHARDS))
    assert problem("org/model@v2") == (
        f"org/model has no revision 'v2'; {hub.url}/org/model/tree/main lists branches and tags"
    )


@pytest.mark.parametrize("name", ["org/a--b", "org/name.git", f"org/{'n' * 97}"])
def test_a_name_that_no_repository_can_have(hub, name):
    assert problem(name).startswith(f"{name} is no folder here and no name of a repository: ")


def test_a_gated_repository_that_was_downloaded_before(hub, tmp_path):
    publish(hub, write_checkpoint(tmp_path / "model", *SHARDS))
    found = locate(Path("org/model"))
    hub.gated.add("org/model")
    assert locate(Path("org/model")) == found


def test_a_gated_repository(hub, tmp_path):
    publish(hub, write_checkpoint(tmp_path / "model", *SHARDS))
    hub.gated.add("org/model")
    assert problem("org/model", dry_run=True) == (
        f"org/model is gated: accept its terms at {hub.url}/org/model, then `hf auth login`"
    )


def test_another_refusal(hub, tmp_path):
    hub.broken = 418
    assert problem("org/model").startswith("the Hub refuses org/model: Client error '418 I'm a Teapot'")


@pytest.mark.usefixtures("offline")
def test_offline_without_a_download(tmp_path):
    assert problem("org/model@v1") == (
        f"org/model@v1 is no folder here and not in the Hub's cache ({tmp_path / 'cache'}), and HF_HUB_OFFLINE forbids "
        "to ask the Hub"
    )


def test_no_network(tmp_path, monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert re.fullmatch(
        rf"org/model is no folder here and not in the Hub's cache \({tmp_path}/cache\), and the Hub cannot be reached "
        r"\(.+\)",
        problem("org/model"),
    )


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
@pytest.mark.parametrize("reason", ["offline", "broken"])
def test_what_is_in_the_cache_is_taken_where_the_hub_cannot_be_asked(hub, tmp_path, monkeypatch, reason, revision):
    publish(hub, write_checkpoint(tmp_path / "model", *SHARDS))
    found = locate(Path("org/model"))
    if reason == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        hub.broken = 503
    assert locate(Path(f"org/model{revision}")) == found


@pytest.mark.parametrize("error", [HTTPError("gone\nmore"), LocalEntryNotFoundError("gone"), RuntimeError("gone")])
def test_a_connection_that_is_lost(hub, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    publish(hub, write_checkpoint(tmp_path / "model", *SHARDS))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert problem("org/model") == (
        "org/model is not complete: the Hub cannot be reached (gone); the same command continues the download"
    )


def test_a_disk_that_is_too_small(hub, tmp_path, monkeypatch):
    publish(hub, write_checkpoint(tmp_path / "model", *SHARDS))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: usage._replace(free=10))
    assert problem("org/model") == (
        f"the download from the Hub needs 0.0 GB and the disk of {tmp_path / 'cache'} has 0.0 GB free; make room or "
        "choose another HF_HOME"
    )
    assert not hub.sent


def test_a_repository_of_pickles(hub, tmp_path):
    publish(hub, tmp_path / "model", "config.json", "pytorch_model.bin", "training_args.bin")
    assert problem("org/model") == (
        "org/model has its weights in pickle files (pytorch_model.bin), which can run code when they are opened; this "
        "converts them without running any, in the repository's folder: python -m expert_merging convert org/model "
        "NEW_FOLDER"
    )


def test_a_repository_that_need_not_be_converted(hub, tmp_path, capsys):
    publish(hub, write_checkpoint(tmp_path / "model", *SHARDS), "pytorch_model.bin")
    assert main(["convert", "org/model", str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err == (
        "error: org/model has safetensors files already, which are read; there is nothing to convert\n"
    )
    assert not hub.sent


def test_a_repository_without_pickles_cannot_be_converted(hub, tmp_path):
    publish(hub, tmp_path / "model", "config.json", "model.gguf")
    with pytest.raises(InputError, match=r"^org/model has no pickle files of a model; it has model\.gguf$"):
        locate(Path("org/model"), pickles=True)


def test_a_repository_without_weights(hub, tmp_path):
    publish(hub, tmp_path / "model", "config.json", "model-q4.gguf")
    assert problem("org/model") == "org/model has no safetensors files of a model; it has model-q4.gguf"


def test_all_that_is_wrong_is_told_before_anything_is_downloaded(hub, tmp_path):
    publish(hub, write_checkpoint(tmp_path / "model", *SHARDS))
    with pytest.raises(InputError) as caught:
        locate_all(Path("org/model"), {"A": tmp_path / "none", "B": Path("org/none")})
    first, second = sorted(caught.value.problems)
    assert first == f"checkpoint folder {tmp_path / 'none'} does not exist"
    assert second.startswith("org/none is neither a folder here nor")
    assert not hub.sent


# The cache.


@pytest.fixture
def cached(tmp_path):
    """A folder of the Hub's cache with two snapshots, of which the branch main is the second."""
    folder = tmp_path / "hub" / "models--org--Mistral-7B-v0.1"
    for commit in (OLDER, COMMIT):
        write_checkpoint(folder / "snapshots" / commit, TENSORS)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return folder


def test_a_folder_of_the_cache_means_its_newest_snapshot(cached, tmp_path):
    expert = write_checkpoint(tmp_path / "expert", {name: tensor + 1 for name, tensor in TENSORS.items()})
    run = merged(tmp_path / "out", *COMMAND, *flags(cached, A=expert))
    options = json.loads(run.config.read_text())["options"]
    assert options["base_model_path"] == str(cached / "snapshots" / COMMIT)
    assert f"| base | `org/Mistral-7B-v0.1` (revision {COMMIT}) |" in (run.model / "README.md").read_text()


def test_a_cache_of_the_hub_serves_as_cache_dir(cached, tmp_path):
    expert = write_checkpoint(tmp_path / "expert", {name: tensor + 1 for name, tensor in TENSORS.items()})
    run = merged(tmp_path / "out", *COMMAND, "--cache_dir", cached.parent, "--expert", f"A={expert}")
    assert json.loads(run.config.read_text())["options"]["base_model_path"] == str(cached / "snapshots" / COMMIT)


def test_a_single_snapshot_needs_no_branch(cached):
    shutil.rmtree(cached / "refs")
    shutil.rmtree(cached / "snapshots" / OLDER)
    assert locate(cached) == cached / "snapshots" / COMMIT


def test_several_snapshots_without_a_branch(cached):
    shutil.rmtree(cached / "refs")
    snapshots = cached / "snapshots"
    assert problem(cached) == (
        f"{cached} has no snapshot of the branch main; give one of {snapshots / COMMIT}, {snapshots / OLDER}"
    )


def test_a_folder_of_the_cache_without_snapshots(cached):
    shutil.rmtree(cached / "snapshots")
    (cached / "snapshots").mkdir()
    assert problem(cached) == f"{cached} has no snapshot of the branch main; download it again"


def test_a_name_that_two_organisations_have(cached):
    shutil.copytree(cached, cached.parent / "models--other--Mistral-7B-v0.1")
    place = cached.parent / "Mistral-7B-v0.1"
    assert problem(place) == (
        f"{place} may be models--org--Mistral-7B-v0.1 and models--other--Mistral-7B-v0.1; give the one that is meant"
    )


def test_a_snapshot_that_is_gone(cached, capsys):
    place = cached / "snapshots" / ("0" * 40)
    assert refusal(capsys, *COMMAND, *flags(place, A=cached)) == (
        f"{place} is gone from the Hub's cache; `hf download org/Mistral-7B-v0.1 --revision {'0' * 40}` brings it back"
    )


# Runs.


def test_a_run_means_its_model(command, tmp_path):
    run = merged(tmp_path / "out", *command[:-2], "--run_name", "first")
    assert locate(run.folder) == run.model
    again = merged(tmp_path / "again", *COMMAND, *flags(tmp_path / "base", A=run.folder))
    options = json.loads(again.config.read_text())["options"]
    assert options["expert"] == {"A": str(run.model)}
    assert "| A | `first` |" in (again.model / "README.md").read_text()


def test_a_run_that_is_not_complete(command, tmp_path):
    run = merged(tmp_path / "out", *command[:-2])
    run.model.rename(run.partial_model)
    assert problem(run.folder) == f"{run.folder} is a run that is not complete; its own command continues it"


def test_a_run_with_several_models(command, tmp_path):
    run = merged(tmp_path / "out", "--method", "svd_intermediate", *command[2:-2])
    models = run.folder / "models"
    assert problem(run.folder) == (
        f"{run.folder} is a run that has left several models; give one of them: {models / 'A'}, {models / 'B'}"
    )
    assert locate(models / "A") == models / "A"
