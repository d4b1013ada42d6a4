"""``python -m expert_merging``: listens to signals before it imports what takes a while."""

from __future__ import annotations

from expert_merging.signals import run_program


def run() -> int:
    """Import the commands, and run the one that the user has typed."""
    from expert_merging.commands.main import main

    return main()


if __name__ == "__main__":
    run_program(run, "the same command begins again")
