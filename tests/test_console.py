"""The terminal shows progress, and plain lines where it is none."""

from __future__ import annotations

import logging
import re
import threading
from contextlib import closing
from types import SimpleNamespace

import pytest
from rich.table import Table

from expert_merging.console import Terminal

logger = logging.getLogger("expert_merging.test")


def work(terminal):
    with terminal.progress("merging", 100.0, "B") as advance:
        advance(60.0, "layer 1")
        advance(40.0)


def test_lines_and_progress_are_plain_where_output_is_no_terminal(capsys):
    with closing(Terminal()) as terminal:
        logger.info("hello [bold]you[/bold]")
        work(terminal)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "hello [bold]you[/bold]"
    assert re.fullmatch(r"merging took \d+\.\d s", lines[1])
    assert len(lines) == 2


def test_a_log_that_cannot_be_written_is_an_error_like_any_other(tmp_path, capsys):
    def full(_text):
        raise OSError("No space left on device")

    with closing(Terminal()) as terminal:
        terminal.log_to(tmp_path / "log")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(terminal.handlers[-1], "stream", SimpleNamespace(write=full))
            with pytest.raises(OSError, match="No space left on device"):
                logger.info("hello")
    assert capsys.readouterr().err == ""


def test_a_tracker_s_thread_leaves_a_full_disk_to_the_main_thread(capsys):
    def fail(error):
        raise error

    with closing(Terminal()):
        thread = threading.Thread(target=fail, args=[OSError("full")])
        thread.start()
        thread.join()
    assert capsys.readouterr().err == ""


def test_names_are_no_markup_anywhere(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with closing(Terminal()) as terminal:
        terminal.console.print("[/red]")
        table = Table("[/red]")
        table.add_row("[/red]")
        terminal.console.print(table)
        with terminal.progress("[/red]", 1.0, "B") as advance:
            advance(1.0, "[/red]")
    assert capsys.readouterr().out.count("[/red]") >= 4


def test_warnings_begin_as_such(capsys):
    with closing(Terminal()):
        logger.warning("careful with [bold]%s[/bold]", "this")
    assert capsys.readouterr().out == "warning: careful with [bold]this[/bold]\n"


def test_a_bar_is_shown_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    with closing(Terminal()) as terminal:
        logger.info("hello [bold]you[/bold]")
        work(terminal)
        with terminal.progress("learning", 3, "update") as advance:
            advance(3)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    assert "hello [bold]you[/bold]" in shown
    assert "100/100 bytes" in shown
    assert "3/3 updates" in shown
    assert "━━━" in shown


def test_other_processes_show_nothing(capsys):
    with closing(Terminal(quiet=True)) as terminal:
        logger.info("hello")
        logger.warning("careful")
        work(terminal)
        terminal.console.print("plan")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_the_log_file_has_times_and_is_continued(tmp_path):
    (tmp_path / "merge.log").write_text("earlier\n")
    with closing(Terminal()) as terminal:
        terminal.log_to(tmp_path / "merge.log")
        logger.info("hellö")
        logger.warning("careful")
    earlier, hello, careful = (tmp_path / "merge.log").read_text(encoding="utf-8").splitlines()
    assert earlier == "earlier"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO hellö", hello)
    assert re.fullmatch(r"[\d, :-]{23} warning: careful", careful)


def test_what_was_said_before_is_in_the_file_once(tmp_path, capsys):
    with closing(Terminal()) as terminal:
        logger.warning("found while checking")
        terminal.log_to(tmp_path / "merge.log")
        logger.info("hello")
    assert [line[24:] for line in (tmp_path / "merge.log").read_text().splitlines()] == [
        "warning: found while checking",
        "INFO hello",
    ]
    assert capsys.readouterr().out == "warning: found while checking\nhello\n"


@pytest.mark.parametrize(("level", "propagate"), [(logging.NOTSET, True), (logging.ERROR, False)])
def test_a_closed_terminal_is_silent_and_leaves_logging_as_it_was(level, propagate, capsys, monkeypatch, tmp_path):
    package = logging.getLogger("expert_merging")
    before = list(package.handlers)
    monkeypatch.setattr(package, "level", level)
    monkeypatch.setattr(package, "propagate", propagate)
    terminal = Terminal()
    terminal.log_to(tmp_path / "merge.log")
    terminal.close()
    logger.info("hello")
    assert capsys.readouterr().out == ""
    assert (tmp_path / "merge.log").read_text() == ""
    assert (package.handlers, package.level, package.propagate) == (before, level, propagate)


def test_how_long_it_took_is_not_said_of_work_that_failed(capsys):
    with closing(Terminal()) as terminal:
        logger.info("started")
        with pytest.raises(ZeroDivisionError), terminal.progress("merging", 1, "B"):
            raise ZeroDivisionError
    assert capsys.readouterr().out == "started\n"
