"""The command: resolve options, run the job, tell the user what went wrong.

With `console`, the only module that prints or exits.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence

from expert_merging.backbone import Backbone
from expert_merging.catalogue import all_methods, kind_of
from expert_merging.documents import check_arguments, escape_output
from expert_merging.errors import InputError, file_problem, lines_of, tell
from expert_merging.options import Resolved, resolve
from expert_merging.parser import parse, show_default
from expert_merging.processes import await_end, is_lost_process, is_main_process, tell_launcher
from expert_merging.relief import advice, out_of_memory
from expert_merging.shortage import shortage_of
from expert_merging.signals import CONTINUES


def main(backbone: Backbone, arguments: Sequence[str] | None = None) -> int:
    """Run the command of a family.

    Args:
        backbone: the family.
        arguments: command line without the program's name; the process's own by default.

    Returns:
        Exit code: 0, or 1 after an error that the user can put right.
    """
    escape_output()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        check_arguments(arguments)
        given = parse(arguments, backbone)
        if given.get("list_methods"):
            _list_methods(backbone)
            return 0
        return _merge(resolve(given, os.environ, backbone), backbone)
    except InputError as error:
        return fail(error, at_once=is_main_process())
    except OSError as error:
        return fail(file_problem(error, "continues where it stopped"), at_once=is_main_process())
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        lost = InputError("another process of this run has ended, so this one does too; what it said last tells why")
        return fail(lost, at_once=False)
    except KeyboardInterrupt:
        if is_main_process():
            print(f"\ninterrupted; {CONTINUES}", file=sys.stderr)
        return 130


def fail(error: InputError, *, at_once: bool) -> int:
    """Tell an error, once for all processes of a run.

    Most errors are every process's. The main one tells them, and its launcher then ends the others, which wait for
    that: one that nobody ends has found something of its own.

    Args:
        error: what to tell.
        at_once: do not wait for the launcher.

    Returns:
        Exit code.
    """
    if not at_once:
        await_end()
    if not tell_launcher(lines_of(error).rstrip()):
        tell(error)
    return 1


def _merge(resolved: Resolved, backbone: Backbone) -> int:
    from expert_merging.checks import check
    from expert_merging.console import Terminal
    from expert_merging.publishing import check_publication

    terminal = Terminal(quiet=not is_main_process())
    job = None
    try:
        job = check(resolved, backbone, terminal)
        published = check_publication(job) if is_main_process() else ()
        if resolved.general["dry_run"]:
            from expert_merging.summary import print_plan

            print_plan(job, terminal.console, published)
            return 0
        from expert_merging.job import perform

        return perform(job, terminal)
    except (MemoryError, OSError, RuntimeError) as error:
        shortage = shortage_of(error)
        if shortage is None:
            raise
        on_gpu = shortage.on_gpu if job is None else job.context.device != "cpu"
        relief = advice(shortage, resolved, backbone, on_gpu=on_gpu, doing=terminal.doing)
        raise out_of_memory(shortage, terminal.doing, relief) from None
    finally:
        if job is not None:
            job.context.run.release()
        terminal.close()


def _list_methods(backbone: Backbone) -> None:
    from rich.table import Table

    from expert_merging.console import Screen

    methods = all_methods().values()
    lines = {
        method.name: [
            f"--{name} {show_default(name, value)}" for name, value in method.defaults(backbone.defaults).items()
        ]
        for method in methods
    }
    # What many methods have is shown once, below.
    reading = [method.name for method in methods if method.reads_samples]
    learning = [method.name for method in methods if method.reads_samples and kind_of(method) == "learned"]
    of_samples = _in_all(lines, reading)
    of_learning = [line for line in _in_all(lines, learning) if line not in of_samples]
    console = Screen(markup=False)
    table = Table(header_style="bold", show_lines=True)
    table.add_column("method", no_wrap=True)
    width = max(19, console.width - 61)  # what the other columns leave
    table.add_column("what it does", max_width=width, overflow="fold")
    table.add_column("options and defaults", overflow="fold")
    for method in methods:
        shown = lines[method.name]
        for names, shared, title in ((reading, of_samples, "sample"), (learning, of_learning, "learning")):
            if method.name in names:
                shown = [*(line for line in shown if line not in shared), f"the {title} options below"]
        table.add_row("\n".join(method.names), method.summary, "\n".join(shown))
    table.add_row("sample options", "What all methods that read samples have.", "\n".join(of_samples))
    table.add_row("learning options", "What all methods that learn have.", "\n".join(of_learning))
    console.print(table)


def _in_all(lines: Mapping[str, list[str]], names: Sequence[str]) -> list[str]:
    """A line for each option that all methods of these names have, with the value that most of them have."""
    by_option = [{line.split()[0]: line for line in lines[name]} for name in names]
    options = [option for option in by_option[0] if all(option in own for own in by_option)]
    return [Counter(own[option] for own in by_option).most_common(1)[0][0] for option in options]
