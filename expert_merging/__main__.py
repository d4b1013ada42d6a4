"""``python -m expert_merging``, or ``expert-merging``: listens to signals before it imports what takes a while."""

from __future__ import annotations

import sys

from expert_merging.signals import CONTINUES, run_program

# Commands that go on with what they have; each of them says so in its record too, which takes longer to import.
CONTINUING = ("merge", "route", "sweep")


def run() -> int:
    """Import the commands, and run the one that the user has typed."""
    from expert_merging.commands.main import main

    return main()


def main() -> None:
    """Run the program, and end with its exit code."""
    run_program(run, CONTINUES if "".join(sys.argv[1:2]) in CONTINUING else "the same command begins again")


if __name__ == "__main__":
    main()
