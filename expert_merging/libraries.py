"""Libraries that do not import everywhere."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def import_transformers() -> Any:
    """Import transformers, hiding a torchvision that cannot be loaded.

    torchvision's package index wheel does not load beside a CPU-only torch, and transformers does not survive finding
    it. Without torchvision it uses its Pillow image processors.
    """
    if "torchvision" not in sys.modules:
        try:
            importlib.import_module("torchvision")
        except Exception:  # noqa: BLE001  (whatever keeps it from loading, it is of no use)
            sys.modules["torchvision"] = None  # type: ignore[assignment]
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:  # what is amiss is told in this program's own words
        transformers.utils.logging.set_verbosity_error()
    return transformers
