"""Whether checkpoints are still what a run has read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expert_merging.errors import InputError
from expert_merging.plan import Plan


def check_unchanged(plan: Plan, record: Mapping[str, Any]) -> None:
    """Check that what was merged is what was checked, before the result gets its name.

    Args:
        plan: the checkpoints, as they were opened.
        record: the run's ``config.json``.

    Raises:
        InputError: weight files were written or replaced since, or other files have other contents.
    """
    changed = [
        f"{'the base' if name == 'base' else f'expert {name}'} ({checkpoint.folder})"
        for name, checkpoint in plan.checkpoints.items()
        if not checkpoint.is_as_opened() or checkpoint.fingerprint(whole=name == "base") != record["checkpoints"][name]
    ]
    if changed:
        raise InputError(
            f"files of {' and '.join(changed)} were written while this run read them, and what it has made may be of "
            "both contents; no model was left. Start the same command again when nobody writes there"
        )
