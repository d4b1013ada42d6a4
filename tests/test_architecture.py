"""No module imports upward, and none imports itself in a circle: neither lazily nor for types alone."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("InternVL", "Mistral", "Qwen2VL")
PACKAGES = ("expert_merging", *FAMILIES, "zoo", "benchmarks", "dataset")

# From below to above; a module may import from its own line and from those before it.
LAYERS = (
    ("errors", "documents", "parts", "progress", "arithmetic", "libraries", "digests", "__init__"),
    ("flags", "roles", "processes", "shortage", "writing"),
    ("machine", "signals", "forks", "workers", "kept", "provenance", "records", "run", "outcome", "console"),
    ("checkpoints",),
    ("questions",),
    ("backbone",),
    ("plan", "stored", "wholes"),
    ("streaming", "likeness", "card", "asking"),
    ("context",),
    ("outputs",),
    ("word_tables",),
    ("merged_tokenizer",),
    ("method", "merge"),
    ("closed_form",),
    ("methods",),
    ("running",),
    ("statistics", "learned", "mixtures", "low_rank", "alignment"),
    ("search",),
    ("catalogue",),
    ("parser",),
    ("options",),
    ("idle", "families"),
    ("advice", "relief", "run_names", "repeating", "unchanged"),
    ("checks",),
    ("preparing",),
    ("comparing", "convert", "extract", "summary", "verify"),
    ("compress",),
    ("routing",),
    ("publishing",),
    ("job",),
    ("cli",),
    ("commands",),
    ("__main__",),
)


def modules() -> dict[str, Path]:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py") if file.name != "model_merging.py"]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


MODULES = modules()


def imported(name: str) -> set[str]:
    """Modules of the project that a module imports anywhere in its text."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inside or {node.module}
    return (found & MODULES.keys()) - {name}


def layer(name: str) -> int:
    """Number of the layer of a module of the core."""
    _, _, rest = name.partition(".")
    top = rest.split(".")[0] or "__init__"
    (number,) = [number for number, names in enumerate(LAYERS) if top in names]
    return number


def test_no_module_imports_itself_in_a_circle():
    try:
        TopologicalSorter({name: imported(name) for name in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] == "expert_merging"])
def test_the_core_imports_downward_alone(name):
    for other in imported(name):
        assert other.split(".")[0] == "expert_merging", f"{name} imports {other}"
        assert layer(other) <= layer(name), f"{name} imports {other} from above"


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] in FAMILIES])
def test_families_import_the_core_and_not_one_another(name):
    own = name.split(".")[0]
    assert {other.split(".")[0] for other in imported(name)} <= {own, "expert_merging", "dataset"}


def test_the_launcher_s_variables_are_read_in_one_place():
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    readers = {
        name
        for name, file in MODULES.items()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and (node.value in names or node.value.startswith("ACCELERATE_"))
    }
    assert readers == {"expert_merging.processes"}
