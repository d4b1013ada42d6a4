"""``python -m zoo``: listens to signals before it imports what takes a while."""

from __future__ import annotations

from expert_merging.signals import CONTINUES, run_program


def run() -> int:
    """Import the commands, and run the one that the user has typed."""
    from zoo.commands import main

    return main()


if __name__ == "__main__":
    run_program(run, CONTINUES)
