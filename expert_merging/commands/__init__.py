"""What is done beside merging: a file for each command of ``python -m expert_merging``."""
