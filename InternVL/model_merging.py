"""Merge InternVL experts: ``python model_merging.py --method expert_merging --cache_dir DIR --data_dir ../dataset``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from expert_merging.cli import main
from InternVL.backbone import BACKBONE

if __name__ == "__main__":
    sys.exit(main(BACKBONE))
