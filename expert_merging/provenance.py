"""What a run was made with: versions, the repository's revision and the time, for its record."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from expert_merging import __version__


def provenance() -> dict[str, Any]:
    """Versions, the repository's revision and the time, for the record."""
    return {
        "versions": {"expert_merging": __version__, "python": platform.python_version(), **library_versions()},
        "git_revision": _git_revision(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def library_versions() -> dict[str, str]:
    """Versions of the libraries that compute."""
    versions = {}
    for name in ("torch", "transformers", "accelerate", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _git_revision() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
