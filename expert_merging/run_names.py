"""The names that runs get by default: what differs from the defaults, and a digest of all that decides the result.

The digest finds a run again. What stands before it is for readers, and may be called otherwise by another version.
Names have neither ``=`` nor commas, which lm_eval's ``--model_args`` would take for its own.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from expert_merging.backbone import Backbone
from expert_merging.options import Resolved
from expert_merging.records import digest_of_run
from expert_merging.running.options import SampleOptions

# Characters of a value, and of all that differs; the rest is left out, and the digest stands for it.
_VALUE, _ALL = 24, 90


def default_folder(
    parent: Path, family: str, description: Mapping[str, Any], resolved: Resolved, backbone: Backbone
) -> Path:
    """The folder of a run without a name of its own: the one that it has, under whatever name, or a new one.

    Args:
        parent: folder of the method's runs.
        family: how names begin.
        description: the run's ``config.json``.
        resolved: its options.
        backbone: the model family.
    """
    digest = digest_of_run(description)
    parts = _fitting(_differing(description, resolved, backbone))
    folder = parent / "-".join([family, *parts, digest])
    if folder.exists():
        return folder
    return next(iter(sorted(parent.glob(f"{glob.escape(family)}-*{digest}"))), folder)


def changed_options(description: Mapping[str, Any], resolved: Resolved) -> dict[str, Any]:
    """The options of a run's record that are not the defaults, without checkpoints."""
    defaults = resolved.defaults
    return {
        name: value
        for name, value in description["options"].items()
        if name not in ("expert", "base_model_path") and not (name in defaults and defaults[name] == value)
    }


def _differing(description: Mapping[str, Any], resolved: Resolved, backbone: Backbone) -> Iterator[str]:
    """What differs from the defaults, a part of the name each."""
    experts = list(description["options"]["expert"])
    if experts != list(backbone.expert_folders):
        yield _safe("_".join(experts))
    changed = changed_options(description, resolved)
    for name, value in sorted(changed.items(), key=lambda item: item[0] in SampleOptions.__dataclass_fields__):
        yield name if value is True else f"{name}_{_safe(_text(value))}"


def _fitting(parts: Iterator[str]) -> Iterator[str]:
    """The parts that there is room for, from the first on."""
    size = 0
    for part in parts:
        size += 1 + len(part)
        if size > _ALL:
            return
        yield part


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "_".join(f"{key}_{_text(one)}" for key, one in value.items())
    if isinstance(value, list):
        return "_".join(map(_text, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and os.path.isabs(value):
        return Path(value).name
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _safe(text: str) -> str:
    """The beginning of a text with those of its characters that any file, command line and address may have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "", text)[:_VALUE].rstrip(".-_") or "other"
