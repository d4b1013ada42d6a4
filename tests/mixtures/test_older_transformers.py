"""Mixtures load in transformers 4.49 with every tensor in its place, and compute there what they compute here.

It is skipped unless OLDER_TRANSFORMERS names a folder that has it::

    pip install --no-deps --target FOLDER 'transformers==4.49.*' 'tokenizers==0.21.*' 'huggingface-hub<1'
    OLDER_TRANSFORMERS=FOLDER python -m pytest tests/mixtures/test_older_transformers.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from expert_merging.commands.main import main
from tests.checkpoints import BASE, EXPERTS, perturb, write_tasks
from tests.command import merged
from tests.mixtures.merging import save_mixture
from tests.mixtures.test_moe import KINDS, MOE, save_dense

FOLDER = os.environ.get("OLDER_TRANSFORMERS")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDER, reason="OLDER_TRANSFORMERS names no folder")]
TOKENS = torch.arange(4, 24)[None]
PROGRAM = """
import sys, torch, transformers
from safetensors.torch import save_file
assert transformers.__version__.startswith("4."), transformers.__version__
model, report = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(report.values()), report
with torch.no_grad():
    save_file({"logits": model.eval()(torch.arange(4, 24)[None]).logits.contiguous()}, sys.argv[2])
"""


def assert_same_there(folder, tmp_path):
    """The older version finds every tensor and has the same logits."""
    file, env = tmp_path / "logits.safetensors", {**os.environ, "PYTHONPATH": str(FOLDER)}
    given = [sys.executable, "-c", PROGRAM, str(folder), str(file)]
    done = subprocess.run(given, env=env, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        here = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits
    torch.testing.assert_close(load_file(file)["logits"], here, rtol=1e-4, atol=1e-4)


# Transformers 4.49 has no Qwen3, and computes no Qwen2 with a window in some layers, dense or not.
SETTINGS = {"mistral": KINDS["mistral"], "llama": KINDS["llama"], "qwen2": {"use_sliding_window": False}}


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_mixture_of_dense_experts(kind, tmp_path):
    zoo = tmp_path / "zoo"
    save_dense(zoo / BASE, kind, **SETTINGS[kind])
    for number, folder in enumerate(EXPERTS.values()):
        perturb(zoo / BASE, zoo / folder, number)
    assert_same_there(merged(tmp_path / "out", *MOE, "--cache_dir", zoo, "--router", "random").model, tmp_path)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "olmoe"])
def test_a_mixture_with_fewer_experts(kind, tmp_path):
    write_tasks(tmp_path / "dataset", responses=dict.fromkeys(EXPERTS, "42"))
    given = ["compress", save_mixture(tmp_path / kind, kind), "--output", tmp_path / "new", "--experts", 3]
    assert main([*map(str, given), "--data_dir", str(tmp_path / "dataset"), "--samples_per_task", "2"]) == 0
    assert json.loads((tmp_path / "new" / "config.json").read_text())["model_type"] == kind
    assert_same_there(tmp_path / "new", tmp_path)
