"""``pip install -e .`` gives the program ``expert-merging``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("expert_merging", "InternVL", "Mistral", "Qwen2VL", "dataset", "zoo")
FILES = ("pyproject.toml", "README.md", "requirements.txt", "LICENSE")


@pytest.mark.slow
def test_the_program_is_installed_and_runs_from_any_folder(tmp_path, tiny):
    """The build needs no network: what it builds with, and what the program needs, is here already."""
    project, environment = tmp_path / "project", tmp_path / "environment"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__", "models", "*.json"))
    for name in FILES:
        shutil.copy(ROOT / name, project / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install", "--quiet"]
    here = {**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"], "OMP_NUM_THREADS": "1"}
    offline = ["--no-index", "--no-build-isolation", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*pip, *offline, "-e", str(project)], check=True, env=here, timeout=120)
    program = str(environment / "bin" / "expert-merging")

    def run(*arguments: object) -> str:
        command = [program, *map(str, arguments)]
        done = subprocess.run(command, env=here, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout

    assert run("--help").startswith("usage: expert-merging ")
    output = tmp_path / "out"
    run("merge", "ties", *tiny[2:], "--output_path", output, "--run_name", "r", "--device", "cpu")
    assert (output / "ties" / "r" / "model" / "model.safetensors").is_file()
    assert " complete " in run("runs", output)
    assert run("runs", project.parent / "out", "--csv").startswith("run,family,method,")
