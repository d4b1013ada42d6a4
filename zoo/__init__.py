"""Small real experts, trained here in minutes, to merge and to measure merges with.

A zoo is a folder that serves as ``--cache_dir`` of the merge command: a base model and one expert per task, under the
folder names that the command expects, with calibration questions in ``dataset/`` (a ``--data_dir``) and held-out
questions with their answers in ``test/``. ``python -m zoo build mistral`` (or ``internvl``, ``qwen2vl``) makes one,
``python -m zoo evaluate RUN...`` compares merged models with it.
"""
