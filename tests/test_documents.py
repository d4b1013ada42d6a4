"""Texts, JSON, YAML and paths that users give: plain data, or one sentence that names the file."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path

import pytest

from expert_merging.documents import (
    check_arguments,
    escape_output,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_object,
    read_text,
    resolved,
)
from expert_merging.errors import InputError, one_line

DEEP = 100_000


def refusal(act, *arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        act(*arguments, **options)
    (problem,) = caught.value.problems
    assert len(problem.splitlines()) == 1
    return problem


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b"[" * DEEP, "nested too deeply"),
        (b'{"a":' * DEEP, "nested too deeply"),
        (b"[" * 101 + b"]" * 101, "nested too deeply"),
        (b"9" * 301, "a number of 301 digits"),
        (b'["\\ud800"]', r"half a character, '\ud800'"),
        (b'{"\\udfff": 1}', r"half a character, '\udfff'"),
        (b"\xef\xbb\xbf{}", "Unexpected UTF-8 BOM (decode using utf-8-sig): line 1 column 1 (char 0)"),
        (b"\xff", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        ("{}".encode("utf-16-le"), "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ],
)
def test_json_that_is_none_is_refused(tmp_path, content, reason):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    assert refusal(read_json, file) == f"{file} is not valid JSON ({reason}); download it again"


def test_json_is_read_up_to_a_hundred_levels_and_with_large_numbers(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("[" * 100 + "9" * 300 + "]" * 100)
    assert json.dumps(read_json(file)).strip("[]") == "9" * 300
    file.write_text('"\\ud83d\\ude00"')
    assert read_json(file) == "\U0001f600"


def test_what_is_no_object_is_refused_with_the_reader_s_advice(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("3")
    assert refusal(read_object, file, advice="move it away") == f"{file} holds int, not a JSON object; move it away"


def test_files_that_cannot_be_read_are_named(tmp_path):
    assert refusal(read_bytes, tmp_path) == f"{tmp_path} cannot be read (Is a directory)"
    assert refusal(read_bytes, tmp_path / "no") == f"{tmp_path / 'no'} cannot be read (No such file or directory)"
    (tmp_path / "loop").symlink_to("loop")
    assert refusal(read_text, tmp_path / "loop").endswith("loop cannot be read (Too many levels of symbolic links)")
    assert one_line(refusal(read_text, tmp_path / "a\0b")).endswith(r"a\x00b cannot be read (embedded null byte)")
    (tmp_path / "text").write_bytes(b"\xff")
    assert refusal(read_text, tmp_path / "text") == f"{tmp_path / 'text'} is no text in UTF-8; download it again"


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert refusal(read_text, tmp_path / "pipe") == f"{tmp_path / 'pipe'} is a named pipe, not a file; give a file"


def test_what_a_shell_s_command_writes_is_read():
    reader, writer = os.pipe()
    os.write(writer, b"seed: 1")
    os.close(writer)
    assert read_text(Path(f"/dev/fd/{reader}")) == "seed: 1"
    os.close(reader)


def test_files_are_read_up_to_a_bound(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x" * (1 << 20))
    assert len(read_bytes(file, largest=1 << 20)) == 1 << 20
    os.truncate(file, (1 << 20) + 1)
    assert refusal(read_bytes, file, largest=1 << 20) == f"{file} has more than 1 MiB, too many for a file of its kind"
    os.truncate(file, 1 << 40)  # which takes no room on the disk, and none in memory
    assert "has more than 128 MiB" in refusal(read_bytes, file)
    assert "has more than 1 MiB" in refusal(read_bytes, Path("/dev/zero"), largest=1 << 20)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * DEEP, "nested too deeply"),
        ("- " * DEEP, "nested too deeply"),
        ("{a: " * 1000, "nested too deeply"),
        ("a: &x [1]\nb: *x\n", "it has references (*name); write out what they stand for"),
        ("a: &x {b: *x}\n", "it has references (*name); write out what they stand for"),
        ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor for the tag"),
        ("a: !!set {b}\n", "could not determine a constructor for the tag"),
        ("a: !!binary aGk=\n", "could not determine a constructor for the tag"),
        ("a: !!int x\n", "invalid literal for int()"),
        ("a: !!int ''\n", "string index out of range"),
        ("a: !!float x\n", "could not convert string to float"),
        ("a: !!bool x\n", "'x'"),
        ("? [a]\n: 1\n", "while constructing a mapping"),
        ('a: "\\ud800"\n', r"half a character, '\ud800'"),
        ("a: b\0", "unacceptable character #x0000"),
        ("x" * 300_000, "more than 256 KiB of YAML"),
    ],
)
def test_yaml_that_json_has_nothing_for_is_refused(text, reason):
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}"):
        parse_yaml(text)


def test_yaml_is_what_json_has():
    assert parse_yaml("a: 2020-01-01\nb: [1, 0.5, null, true]\nc: {<<: {d: 1}, e: x}\n") == {
        "a": "2020-01-01",
        "b": [1, 0.5, None, True],
        "c": {"d": 1, "e": "x"},
    }
    assert parse_json("[1e999]") == [float("inf")]


def test_paths_that_no_file_has_are_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert refusal(resolved, tmp_path / "a" / "c") == (
        f"the path {tmp_path / 'a' / 'c'} has a link in it that leads to itself; remove the link"
    )
    assert refusal(resolved, "a\0b") == r"the path 'a\x00b' has a NUL character in it, which no file's name has"
    assert refusal(resolved, os.fsdecode(b"\xff")) == (
        r"the path '\udcff' has a name that is no text in UTF-8; rename it"
    )
    assert resolved("~nosuchuser/x") == Path("~nosuchuser/x").absolute()
    assert resolved("~") == Path.home().resolve()


def test_arguments_are_text():
    check_arguments(["--method", "é"])
    assert refusal(check_arguments, ["--method", os.fsdecode(b"a\xff")]) == (
        r"'a\udcff' on the command line is no text in UTF-8; rename what it names"
    )


def test_output_shows_every_character_somehow(monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    escape_output()
    shown.write("é \udcff")
    shown.flush()
    assert shown.buffer.getvalue() == rb"\xe9 \udcff"
