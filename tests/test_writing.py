"""Nothing half-written has its final name, and a full disk is noticed before."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_merging.errors import InputError
from expert_merging.writing import ShardWriter, check_file, check_free_disk, partial_name, put_aside, write_atomically

Usage = namedtuple("Usage", "total used free")


def test_too_little_disk_is_refused_with_both_sizes(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or Usage(0, 0, 2_000_000_000))
    check_free_disk(tmp_path / "not" / "yet", 2_000_000_000)
    with pytest.raises(InputError) as caught:
        check_free_disk(tmp_path / "not" / "yet", 3_500_000_000)
    assert str(caught.value) == (
        f"the result needs 3.5 GB and the disk of {tmp_path / 'not' / 'yet'} has 2.0 GB free; "
        "make room or choose another --output_path"
    )
    assert asked == [tmp_path, tmp_path]


@given(size=st.integers(1, 100), order=st.randoms())
def test_blocks_may_be_written_in_any_order(tmp_path_factory, size, order):
    target = tmp_path_factory.mktemp("shard") / "x.safetensors"
    content = bytes(number % 251 for number in range(1000))
    writer = ShardWriter(target, content[:10], len(content))
    starts = list(range(10, 1000, size))
    order.shuffle(starts)
    for start in starts:
        writer.write(memoryview(content)[start : start + size], start)
    assert not target.exists()
    writer.finish()
    assert target.read_bytes() == content
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    import os

    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, view, offset: whole(file, view[:3], offset))
    writer = ShardWriter(tmp_path / "x", b"0123456789", 10)
    writer.finish()
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_what_an_interrupted_run_left_is_written_over(tmp_path):
    (tmp_path / "x.partial").write_bytes(b"old and longer")
    writer = ShardWriter(tmp_path / "x", b"new", 5)
    writer.finish()
    assert (tmp_path / "x").read_bytes() == b"new\0\0"


def test_an_abandoned_file_is_removed(tmp_path):
    ShardWriter(tmp_path / "x", b"header", 100).abandon()
    assert not list(tmp_path.iterdir())


def test_small_files_are_replaced_as_a_whole(tmp_path, monkeypatch):
    import os

    target = tmp_path / "config.json"
    write_atomically(target, b"first")
    monkeypatch.setattr(os, "rename", lambda *names: pytest.fail("stopped", pytrace=False))
    with pytest.raises(pytest.fail.Exception):
        write_atomically(target, b"second")
    assert target.read_bytes() == b"first"
    monkeypatch.undo()
    write_atomically(target, b"second")
    assert target.read_bytes() == b"second"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_replaced_file_stays_closed(tmp_path):
    file = tmp_path / "file"
    write_atomically(file, b"old")
    file.chmod(0o600)
    write_atomically(file, b"new")
    assert (file.read_bytes(), file.stat().st_mode & 0o777) == (b"new", 0o600)


@pytest.mark.parametrize("interrupted", [False, True])
def test_what_is_put_aside_loses_nothing(interrupted, tmp_path):
    texts = {"a.json": "third", "a.base.json": "second", "a.base.base.json": "first"}
    for _ in range(1 + interrupted):
        for name, text in texts.items():  # as a run that goes on copies the base's files again
            (tmp_path / name).write_text(text)
        assert put_aside(tmp_path / "a.json") == tmp_path / "a.base.json"
    kept = {file.name.replace("base.", "", 1): file.read_text() for file in tmp_path.iterdir() if file.name != "a.json"}
    assert kept == texts


@pytest.mark.parametrize("name", ["short", "n" * 247, "n" * 248, "n" * 255, "日" * 85])
def test_files_of_any_name_can_be_written(name, tmp_path):
    write_atomically(tmp_path / name, b"content")
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_long_names_that_begin_alike_are_written_to_different_places(tmp_path):
    assert partial_name(tmp_path / ("n" * 254 + "a")) != partial_name(tmp_path / ("n" * 254 + "b"))


def test_a_file_of_results_needs_a_folder_that_can_be_written_to(tmp_path, monkeypatch):
    check_file(tmp_path / "scores.json", "--json")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(InputError) as error:
        check_file(tmp_path / "scores.json", "--json")
    assert str(error.value) == f"--json {tmp_path}/scores.json: {tmp_path} cannot be written to; choose another folder"
