"""Nothing in the sources runs what a file says, and no pinned library is one with a known hole in what is used here."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    file
    for folder in ("expert_merging", "InternVL", "Mistral", "Qwen2VL", "zoo", "benchmarks", "dataset", "docs")
    for file in (ROOT / folder).rglob("*.py")
)
# Modules whose files are programs.
PICKLES = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "jsonpickle"}
RUNNING = {"eval", "exec", "compile", "__import__"}
# What may be imported of them: the error, and what reads an error back that this process has just written.
ALLOWED = {
    ("expert_merging/learned/state.py", "pickle.UnpicklingError"),
    ("expert_merging/convert.py", "pickle"),
    ("expert_merging/forks.py", "pickle"),
}
# Where text is parsed; everything else asks these.
PARSERS = {
    "yaml.load": {"expert_merging/documents.py"},
    "json.loads": {"expert_merging/documents.py"},
}
# Read by what wrote them, in the same run or from the project's own files.
OWN = ("zoo/", "benchmarks/", "docs/", "expert_merging/outputs.py", "expert_merging/methods/tall.py")
OWN_TOO = ("expert_merging/statistics/gram.py",)


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Calls, by what is called: ``eval``, ``torch.load``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def faults(name: str, text: str) -> list[str]:
    """What a source does that none may do."""
    tree = ast.parse(text)
    found = [
        module for module in imports(tree) if module.partition(".")[0] in PICKLES and (name, module) not in ALLOWED
    ]
    for called, call in calls(tree):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if called in RUNNING or (called.startswith("pickle.") and name != "expert_merging/forks.py"):
            found.append(called)
        if called == "torch.load" and given.get("weights_only") != "True":
            found.append(called)
        if "trust_remote_code" in given and given["trust_remote_code"] == "True" and name != "InternVL/remote.py":
            found.append("trust_remote_code")
        if called.startswith("yaml.") and called not in ("yaml.safe_load", "yaml.YAMLError", "yaml.safe_dump"):
            found += [] if name in PARSERS.get(called, ()) else [called]
        if called == "json.loads" and name not in PARSERS[called] and not name.startswith((*OWN, *OWN_TOO)):
            found.append(called)
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_source_runs_what_a_file_says(file):
    assert faults(str(file.relative_to(ROOT)), file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import pickle", ["pickle"]),
        ("from pickle import loads", ["pickle.loads"]),
        ("pickle.loads(data)", ["pickle.loads"]),
        ("eval('1')", ["eval"]),
        ("torch.load(file)", ["torch.load"]),
        ("torch.load(file, weights_only=False)", ["torch.load"]),
        ("yaml.load(text, yaml.Loader)", ["yaml.load"]),
        ("yaml.unsafe_load(text)", ["yaml.unsafe_load"]),
        ("json.loads(text)", ["json.loads"]),
        ("AutoModel.from_pretrained(folder, trust_remote_code=True)", ["trust_remote_code"]),
        ("torch.load(file, weights_only=True)", []),
    ],
)
def test_the_check_finds_what_it_looks_for(text, found):
    assert faults("expert_merging/x.py", text) == found


# The first versions without holes that are known in what this project calls, by their advisories.
SAFE = {
    "torch": (2, 6),  # CVE-2025-32434: torch.load with weights_only
    "transformers": (4, 53),  # CVE-2025-6051 and others: regular expressions that take for ever
    "PyYAML": (5, 4),  # CVE-2020-14343: loaders that run code
    "pillow": (10, 3),  # CVE-2024-28219; CVE-2023-50447
    "safetensors": (0, 5),
    "jinja2": (3, 1, 6),  # CVE-2025-27516: a way out of the sandbox
}


def test_no_library_may_be_older_than_its_last_known_hole():
    required = {
        name.lower(): tuple(map(int, version.split(".")))
        for name, version in re.findall(r"^([\w-]+)>=([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    }
    for name, least in SAFE.items():
        assert required[name.lower()] >= least, name


def test_nothing_that_is_kept_is_a_link():
    """A link of a developer's machine leads nowhere on another one."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a clone")
    listed = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert listed.stdout
    assert [line for line in listed.stdout.splitlines() if line.startswith("120000")] == []
