"""Merge Qwen2-VL experts: ``python model_merging.py --method expert_merging --cache_dir DIR --data_dir ../dataset``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from expert_merging.signals import CONTINUES, run_program


def merge() -> int:
    """Import what merging needs, which takes a while, and merge."""
    from expert_merging.cli import main
    from Qwen2VL.backbone import BACKBONE

    return main(BACKBONE)


if __name__ == "__main__":
    run_program(merge, CONTINUES)
