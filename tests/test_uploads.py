"""What users upload says nothing of the machine, and names show as they are: no name forges a line or a heading."""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from markdown_it import MarkdownIt

from expert_merging.backbone import Evaluation
from expert_merging.card import code, inline, model_card
from expert_merging.console import Terminal
from expert_merging.errors import InputError, lines_of, one_line
from Mistral.backbone import BACKBONE
from tests.checkpoints import write_checkpoint
from tests.command import COMMAND, flags, merged, refused
from tests.test_card import DESCRIPTION, LOADING

# A line of its own, a colour, a window's title, a turn of the writing direction, markup, another line's end.
FORGED = (
    "a\nerror: all is lost", "a\rb", "a\x1b[31mred", "a\x1b]0;title\x07", "a\u202eb", "[/red]", "[bold]x", "a\u2028b",
    "a\x85b", "a\x00b", ":bomb:", "a\tb",
)  # fmt: skip
# What Markdown may take for something else.
MARKED = (
    "# heading", "x | y", "`code`", "``", "<script>alert(1)</script>", "[a](http://b)", "![a](b)", "*a*", "__a__",
    "a\\", "\\|", "&lt;", "~~a~~", "a|`b`|c", "a_b", "$$x$$", "</td>",
)  # fmt: skip


def rendered(text: str) -> MarkdownIt:
    return MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(text)


def headings(text: str) -> list[str]:
    tokens = rendered(text.split("---\n", 2)[-1])
    return [following.content for token, following in pairwise(tokens) if token.type == "heading_open"]


def shown(text: str) -> str:
    """What a reader sees of a paragraph, if nothing in it is markup."""
    (inner,) = [token for token in rendered(text) if token.type == "inline"]
    assert {child.type for child in inner.children} <= {"text", "text_special", "code_inline"}, inner.children
    return "".join(child.content for child in inner.children)


# One line.


@pytest.mark.parametrize("name", FORGED)
def test_one_line_has_printable_characters_alone(name):
    assert one_line(name).isprintable()
    one_line(name).encode()


@pytest.mark.parametrize("name", ["plain", "Zoë 7 日本語 [x] <y>"])
def test_printable_text_stays_as_it_is(name):
    assert one_line(name) == name


@pytest.mark.parametrize("name", FORGED)
def test_an_error_is_one_line_whatever_names_are_in_it(name):
    text = lines_of(InputError(f"{name} is missing", "another"))
    assert text.splitlines() == [f"error: {one_line(name)} is missing", "error: another"]


@pytest.mark.parametrize("name", FORGED)
def test_terminal_and_log_show_names_as_one_line(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "300")
    terminal = Terminal()
    terminal.log_to(tmp_path / "merge.log")
    logging.getLogger("expert_merging.x").info("read %s", name)
    logging.getLogger("expert_merging.x").warning(f"lost {name}")
    with terminal.progress(f"merging {name}", 2, "B") as advance:
        advance(2, name)
    terminal.close()
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    assert f"read {one_line(name)}\n" in said
    assert f"warning: lost {one_line(name)}\n" in said
    assert not re.search(r"[^\n\r\x20-\x7e\u2500-\u257f]", said.replace(one_line(name), ""))
    lines = (tmp_path / "merge.log").read_bytes().decode().split("\n")
    assert [line[24:] for line in lines[:2]] == [f"INFO read {one_line(name)}", f"warning: lost {one_line(name)}"]
    assert len(lines) == 4


@pytest.mark.parametrize("name", ["w\nerror: all is lost", "w\x1b[31m", "[/red]", "w\u202e"])
def test_tensors_of_any_name_in_a_run(name, tmp_path, capsys, monkeypatch):
    base = write_checkpoint(tmp_path / "base", {name: torch.zeros(3)})
    expert = write_checkpoint(tmp_path / "expert", {name: torch.ones(3)})
    monkeypatch.setenv("FORCE_COLOR", "1")
    run = merged(tmp_path / "out", *COMMAND, *flags(base, A=expert))
    assert run.log.read_text().count(f"in {one_line(name)}\n") == 1
    said = re.sub(r"\x1b\[([0-9;]*m|\?25[lh]|2K|1A|\d*[A-GJK])", "", capsys.readouterr().out)
    assert name == "[/red]" or name not in said
    other = write_checkpoint(tmp_path / "other", {"fine": torch.ones(3), name: torch.ones(4)})
    (line, *_) = refused(capsys, *COMMAND, *flags(base, A=other))
    assert one_line(name) in line or "fine" in line


# The card.


@pytest.mark.parametrize("name", [name for name in (*FORGED, *MARKED) if "\x00" not in name])
def test_names_in_the_card_show_as_they_are(name):
    assert shown(f"x {inline(name)} y") == f"x {one_line(name)} y"
    assert shown(f"x {code(name)} y") == f"x {one_line(name)} y"


@pytest.mark.parametrize("name", [name for name in (*FORGED, *MARKED) if "\x00" not in name])  # no path has NUL
def test_a_card_has_its_own_headings_rows_and_sources(name, tmp_path):
    licensed = tmp_path / "base"
    licensed.mkdir()
    front = yaml.safe_dump({"license": one_line(name)})
    (licensed / "README.md").write_text(f"---\n{front}---\n")
    folder = name.replace("/", "")
    experts = {name: f"/x/{folder}", "B": "/x/b"}
    options = {"base_model_path": str(licensed), "expert": experts, "prompt_template": f"{name}\n```\n# x"}
    text = model_card(
        {**DESCRIPTION, "options": options}, title=name, loading=LOADING, merged=1, tensors=1, about=inline(name)
    )
    text.encode()
    assert [re.sub(r"\\(.)", r"\1", heading) for heading in headings(text)][1:] == ["Options", "Use"]
    assert len(headings(text)) == 3
    assert yaml.safe_load(text.split("---\n", 2)[1])["base_model"] == ["base", one_line(folder), "b"]
    rows = [token for token in rendered(text.split("---\n", 2)[-1]) if token.type in ("tr_open", "td_open")]
    assert [row.type for row in rows].count("tr_open") == 1 + 1 + len(experts)
    assert [row.type for row in rows].count("td_open") == 2 * (1 + len(experts))
    assert not [token for token in rendered(text.split("---\n", 2)[-1]) if token.type == "html_block"]


# What lies in model/.


def traces(folder: Path, *places: Path | str) -> list[str]:
    """Files below a folder that name a place of the machine, or the user."""
    words = [str(place).encode() for place in (*places, os.path.join(os.path.expanduser("~"), ""), Path.cwd())]
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [str(file) for file in files if any(word in file.read_bytes() for word in words)]


def method_commands() -> list[object]:
    slow = pytest.mark.slow
    return [
        ["--method", "task_arithmetic"],
        ["--method", "task_arithmetic", "--tokenizer", "union", "--embeddings", "mean"],
        ["--method", "task_arithmetic", "--tokenizer", "Chat"],
        ["--method", "tall"],
        pytest.param(["--method", "svd_intermediate"], marks=slow),
        pytest.param(["--method", "moe"], marks=slow),
        pytest.param(["--method", "expert_merging"], marks=slow),
    ]


@pytest.mark.parametrize("arguments", method_commands(), ids=lambda arguments: " ".join(arguments[1:]))
def test_a_model_says_nothing_of_the_machine(arguments, tiny_zoo, tmp_path):
    family = replace(BACKBONE, evaluation={"mistral": Evaluation(vlmeval={"class": "X"}, benchmarks={"B": "B"})})
    if "expert_merging" in arguments:
        data = tiny_zoo / "dataset"
        arguments = [*arguments, "--samples_per_task", 1, "--max_new_tokens", 2, "--log_with", "none"]
        arguments += ["--data_dir", data]
    run = merged(tmp_path, *arguments, "--cache_dir", tiny_zoo, family=family)
    run.holds_several = not run.is_complete
    assert any(run.model.rglob("README.md"))
    assert traces(run.model, tmp_path, tiny_zoo, tiny_zoo.parent) == []
    for folder in run.model.iterdir() if run.holds_several else [run.model]:
        file = run.evaluation(folder.name if run.holds_several else "")
        (settings,) = json.loads(file.read_text())["model"].values()
        assert settings["model_path"] == str(folder.resolve())


def test_coefficients_and_samples_lie_on_this_machine_alone(tiny_zoo, tmp_path):
    options = {**DESCRIPTION["options"], "data_dir": str(tmp_path), "coefficients": str(tmp_path / "gone")}
    options |= {"prompt_template": "/no_think {question}", "device": "cpu"}
    text = model_card({**DESCRIPTION, "options": options}, title="t", loading=LOADING, merged=1, tensors=1)
    assert str(tmp_path) not in text
    assert '"prompt_template": "/no_think {question}"' in text


def test_the_base_s_own_settings_that_name_the_home_are_told_of(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, place in {"config.json": "home/me/base", "added.json": "homeless", "notes.txt": "home/me"}.items():
        content = {"model_type": "mistral", "trained_on": str(tmp_path / place)}
        (tmp_path / "base" / name).write_text(json.dumps(content))
    run = merged(tmp_path / "out", *command[:-2])
    told = [line for line in run.log.read_text().splitlines() if "places on this machine" in line]
    assert [line[24:] for line in told] == [
        f"warning: config.json of {tmp_path / 'base'} has places on this machine in it ({tmp_path / 'home'}/), and "
        "copies have all that it has; take them out of the merged folder before you upload it"
    ]
    assert (run.model / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()


@pytest.mark.parametrize(("place", "is_told"), [("/data/me/base", True), ("mistralai/Mistral-7B-v0.1", False)])
def test_where_a_model_was_loaded_from_is_told_of(place, is_told, command, tmp_path):
    content = {"model_type": "mistral", "_name_or_path": place}
    (tmp_path / "base" / "config.json").write_text(json.dumps(content))
    log = merged(tmp_path / "out", *command[:-2]).log.read_text()
    assert (f"config.json of {tmp_path / 'base'} has places on this machine in it ({place})" in log) == is_told


@pytest.mark.parametrize("name", ["Chat|`x`", "# Chat <b>", "[a](b)"])
def test_a_run_with_experts_of_any_name(name, command, tmp_path):
    base, expert = tmp_path / "base", (tmp_path / "a").rename(tmp_path / "a#b|c`d")
    run = merged(tmp_path / "out", *COMMAND, "--base_model_path", base, "--expert", f"{name}={expert}")
    assert len(headings((run.model / "README.md").read_text())) == 3
    assert f"| {inline(name)} | " in (run.model / "README.md").read_text()
