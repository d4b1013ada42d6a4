"""What a checkpoint's folder has beside weights is copied, and nothing from elsewhere, nothing private, no pipe."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
from safetensors.torch import save_file

from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.checkpoints.hub import Repository, _wanted
from expert_merging.checkpoints.other_files import check_other_files, not_copied, other_files
from expert_merging.convert import pickle_files
from expert_merging.errors import InputError
from tests.checkpoints import write_checkpoint
from tests.command import TENSORS, merged, refusal

PRIVATE = (
    ".env", ".env.local", "prod.env", "server.pem", "certs/tls.key", "id_rsa", "id_ed25519.pub", ".netrc",
    ".ssh/config", "token", "stored_tokens", "credentials.json", "secrets.yaml", "optimizers.txt", "Optimizer_states/0",
    "keystore.jks", "deploy_key", "api_key.txt", "hf-access-token", "my.secret_key.json", "ssh_key.pub",
)  # fmt: skip
OF_TOOLS = (
    ".git/HEAD", ".gitignore", ".cache/huggingface/x.lock", "__pycache__/modeling_x.pyc", "runs/Nov27/x",
    ".ipynb_checkpoints/a.json", "optimizer.pt", "wandb/run-1/x.wandb", "mlruns/0/meta.yaml", "cache/0",
)  # fmt: skip


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def found(folder: Path) -> list[str]:
    return [str(path) for path in other_files(folder)]


def link(place: Path, target: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


def problems(folder: Path) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        check_other_files(folder)
    return caught.value.problems


def left(folder: Path, why: str, *names: str) -> str:
    return (
        f"not copied from {folder}, since they are {why}: {', '.join(names)}; put copies into the merged folder if "
        "they belong there"
    )


OUT = "links to what lies outside of it, is private or weights"
AGAIN = "links to folders that are copied already"


def test_everything_but_weights_is_another_file(tmp_path):
    kept = [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "modeling_x.py", "merges.txt",
        "model.safetensors.index.json", "nested/deeper/notes.txt", "nested/vocab.json", "tokenizer.model",
        "special_tokens_map.json", "tokens.txt", ".gitattributes", "keys.md", "environment.yml",
    ]  # fmt: skip
    left_out = [
        "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "tf_model.h5", "flax_model.msgpack",
        "onnx/model.onnx", "model.safetensors", "consolidated.safetensors", "original/consolidated.00.pth",
        "adapter.safetensors.index.json", *OF_TOOLS,
    ]  # fmt: skip
    put(tmp_path, *kept, *left_out)
    assert sorted(found(tmp_path)) == sorted(kept)
    assert not_copied(tmp_path) == []


def test_private_files_are_never_copied_and_named(tmp_path):
    put(tmp_path, *PRIVATE, "nested/.env", "notes.txt")
    assert found(tmp_path) == ["notes.txt"]
    (line,) = not_copied(tmp_path)
    names = ".env, .env.local, .netrc, .ssh, Optimizer_states and 17 more"
    assert line == left(tmp_path, "private, by their names", names)


@pytest.mark.parametrize("name", PRIVATE)
def test_links_to_private_files_are_not_followed(tmp_path, name):
    put(tmp_path, name)
    link(tmp_path / "notes.txt", name)
    assert found(tmp_path) == []


def test_what_is_never_copied_is_not_downloaded():
    small = {"config.json": 1, "model.safetensors": 1, "nested/notes.txt": 1}
    private = dict.fromkeys([*PRIVATE, *OF_TOOLS], 1)
    assert _wanted(Repository("a/b"), {**small, **private}, pickles=False) == small


# Links.


def test_links_inside_the_folder_are_followed(tmp_path):
    put(tmp_path, "real/notes.txt", "real/deeper/more.txt")
    link(tmp_path / "a.txt", "real/notes.txt")
    link(tmp_path / "docs", "real")
    link(tmp_path / "real" / "up.txt", "../a.txt")
    assert found(tmp_path) == [
        "a.txt", "docs/notes.txt", "docs/up.txt", "docs/deeper/more.txt",
        "real/notes.txt", "real/up.txt", "real/deeper/more.txt",
    ]  # fmt: skip
    assert not_copied(tmp_path) == []


@pytest.mark.parametrize("where", ["snapshots/abc", "snapshots/abc/nested"])
def test_links_into_the_cache_of_the_same_repository_are_followed(tmp_path, where):
    put(tmp_path / "models--a--b", "blobs/1234")
    put(tmp_path / "models--a--other", "blobs/1234", "snapshots/abc/config.json")
    folder = tmp_path / "models--a--b" / where
    link(folder / "tokenizer.json", os.path.relpath(tmp_path / "models--a--b" / "blobs" / "1234", folder))
    link(folder / "notes.txt", os.path.relpath(tmp_path / "models--a--other" / "blobs" / "1234", folder))
    link(folder / "refs", os.path.relpath(tmp_path / "models--a--b", folder))
    assert found(folder) == ["tokenizer.json"]
    assert not_copied(folder) == [left(folder, OUT, "notes.txt", "refs")]


def test_links_out_of_the_folder_are_left_out_and_named(tmp_path):
    put(tmp_path / "secret", "id_rsa", "notes.txt", "nested/more.txt")
    folder = put(tmp_path / "base", "config.json", "nested/own.txt", "model.safetensors")
    for place, target in {
        "relative.txt": "../secret/notes.txt",
        "absolute.txt": str(tmp_path / "secret" / "notes.txt"),
        "nested/tree": "../../secret/nested",
        "weights.txt": "model.safetensors",
        "beside.txt": "../base-2/notes.txt",
    }.items():
        link(folder / place, target)
    put(tmp_path / "base-2", "notes.txt")
    assert found(folder) == ["config.json", "nested/own.txt"]
    names = ("absolute.txt", "beside.txt", "relative.txt", "weights.txt", "nested/tree")
    assert not_copied(folder) == [left(folder, OUT, *names)]


def test_the_folder_itself_may_be_a_link(tmp_path):
    put(tmp_path / "real", "config.json", "nested/notes.txt")
    link(tmp_path / "real" / "a.txt", "nested/notes.txt")
    (tmp_path / "given").symlink_to("real")
    assert found(tmp_path / "given") == ["a.txt", "config.json", "nested/notes.txt"]


def test_a_configuration_that_lies_elsewhere_is_refused(tmp_path):
    put(tmp_path, "elsewhere/config.json")
    link(tmp_path / "base" / "config.json", "../elsewhere/config.json")
    assert problems(tmp_path / "base") == (
        f"{tmp_path / 'base' / 'config.json'} is a link that leads out of its folder, and such links are not copied; "
        "put a copy in its place",
    )


def test_links_that_lead_nowhere_are_refused(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("../blobs/gone")
    (tmp_path / "loop").symlink_to("loop")
    assert problems(tmp_path) == tuple(
        f"{tmp_path / name} is a link to a file that is gone; download it again" for name in ("loop", "tokenizer.json")
    )


def test_links_back_up_end(tmp_path):
    put(tmp_path, "docs/notes.txt")
    link(tmp_path / "loop", ".")
    link(tmp_path / "docs" / "up", "..")
    assert found(tmp_path) == ["docs/notes.txt"]
    assert not_copied(tmp_path) == [left(tmp_path, AGAIN, "loop", "docs/up")]


def test_folders_that_link_to_each_other_end(tmp_path):
    """In a process of its own, which can be ended: the number of paths through the links grows with its factorial."""
    names = [f"folder{number}" for number in range(12)]
    for one, other in permutations(names, 2):
        link(tmp_path / one / other, f"../{other}")
    for name in names:
        put(tmp_path / name, "notes.txt")
    code = "import sys; from pathlib import Path; from expert_merging.checkpoints.other_files import other_files\n"
    code += "print(*other_files(Path(sys.argv[1])), sep='\\n')"
    command = [sys.executable, "-c", code, str(tmp_path)]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    assert {f"{name}/notes.txt" for name in names} <= set(lines)
    assert len(lines) <= len(names) ** 2


def test_folders_deeper_than_any_model_s_are_refused(tmp_path):
    base = put(tmp_path / "base", "/".join("a" * 64) + "/notes.txt")
    assert found(base) == ["/".join("a" * 64) + "/notes.txt"]
    put(base, "/".join("a" * 65) + "/notes.txt")
    assert problems(base) == (f"{base} has folders in folders, more than 64 deep; move them away",)


# The same in a whole run.


def test_a_merge_copies_nothing_from_outside_and_warns(command, tmp_path):
    put(tmp_path, "secret/id_rsa", "secret/tree/deep.txt")
    base = put(tmp_path / "base", ".env", "nested/own.txt")
    link(base / "notes.txt", "../secret/id_rsa")
    link(base / "tree", "../secret/tree")
    run = merged(tmp_path / "out", *command[:-2])
    written = sorted(str(path.relative_to(run.model)) for path in run.model.rglob("*") if path.is_file())
    assert written == ["README.md", "config.json", "model.safetensors", "nested/own.txt"]
    text = run.log.read_text()
    assert f"warning: {left(base, OUT, 'notes.txt', 'tree')}\n" in text
    assert f"warning: {left(base, 'private, by their names', '.env')}\n" in text


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_copies_are_readable_by_those_who_can_read_the_original(command, tmp_path):
    modes = {"closed.txt": 0o600, "open.txt": 0o666, "code.py": 0o755, "kept.txt": 0o400, "config.json": 0o600}
    for name, mode in modes.items():
        if name != "config.json":
            put(tmp_path / "base", name)
        (tmp_path / "base" / name).chmod(mode)
    run = merged(tmp_path / "out", *command[:-2])
    expected = {"closed.txt": 0o600, "open.txt": 0o640, "code.py": 0o640, "kept.txt": 0o400, "config.json": 0o600}
    assert {name: (run.model / name).stat().st_mode & 0o777 for name in modes} == expected
    assert (run.model / "model.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("limit", "problem"), [("PC_NAME_MAX", "has a longer name than"), ("PC_PATH_MAX", "would have a path of more than")]
)
def test_names_that_the_disk_of_the_result_does_not_take(limit, problem, command, tmp_path, capsys, monkeypatch):
    put(tmp_path / "base", "n" * 150)
    sizes = {"PC_NAME_MAX": 255, "PC_PATH_MAX": 4096, limit: 149}
    monkeypatch.setattr(os, "pathconf", lambda _, name: sizes[name])
    assert problem in refusal(capsys, *command)
    assert not (tmp_path / "out").exists()


# What is no file.


def special(kind: str, place: Path) -> None:
    if kind == "a named pipe":
        os.mkfifo(place)
    elif kind == "a device":
        place.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as server:
            before = Path.cwd()
            os.chdir(place.parent)  # paths of sockets are short
            server.bind(place.name)
            os.chdir(before)


def refused_as(kind: str, file: Path) -> str:
    return f"{file} is {kind}, not a file; remove it, or put a file in its place"


@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a device"])
@pytest.mark.parametrize("name", ["notes.txt", "tokenizer.json", "config.json", "model.safetensors"])
@pytest.mark.parametrize("whose", ["base", "a"])
def test_what_is_no_file_is_called_what_it_is(kind, name, whose, command, tmp_path, capsys):
    (tmp_path / whose / name).unlink(missing_ok=True)
    special(kind, tmp_path / whose / name)
    assert refusal(capsys, *command) == refused_as(kind, tmp_path / whose / name)


@pytest.mark.parametrize("kind", ["a named pipe", "a socket"])
def test_what_is_no_file_in_a_folder_of_the_base(kind, command, tmp_path, capsys):
    put(tmp_path / "base", "nested/a.txt")
    special(kind, tmp_path / "base" / "nested" / "b.txt")
    assert refusal(capsys, *command) == refused_as(kind, tmp_path / "base" / "nested" / "b.txt")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_in_an_adapter(name, command, tmp_path, capsys):
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 1}')
    (tmp_path / "a" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "a" / name)
    assert refusal(capsys, *command) == refused_as("a named pipe", tmp_path / "a" / name)


def test_a_pipe_among_pickles(tmp_path):
    os.mkfifo(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError) as caught:
        pickle_files(tmp_path)
    assert str(caught.value) == refused_as("a named pipe", tmp_path / "pytorch_model.bin")


def test_a_pipe_of_somebody_s_tool_is_left_alone(tmp_path):
    base = write_checkpoint(tmp_path, TENSORS)
    os.mkfifo(base / ".watcher")
    save_file(TENSORS, base / "model.safetensors")
    assert Checkpoint(base).entries
    check_other_files(base)
