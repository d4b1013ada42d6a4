"""Finds the model family: by its name, or by the base that is to be merged."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expert_merging.backbone import Backbone
from expert_merging.checkpoints.hub import configuration_of, read_id
from expert_merging.checkpoints.sources import cached_beside, locate
from expert_merging.documents import read_object
from expert_merging.errors import InputError, about
from expert_merging.flags import current_name
from expert_merging.options import ROOT, cache_folder, read_options_file

# Flags by which the family is found.
TELLING = ("family", "config", "base_model_path", "cache_dir")
# Folders of the repository that hold something else.
_CORE = "expert_merging"


def family_names() -> list[str]:
    """Names of all families, as their folders are called."""
    return sorted(file.parent.name for file in ROOT.glob("*/backbone.py") if file.parent.name != _CORE)


def load_family(name: str) -> Backbone:
    """The model family whose folder has that name.

    Raises:
        InputError: there is none.
    """
    known = family_names()
    if name not in known:
        raise InputError(f"--family must be one of {', '.join(known)}, got {name}")
    backbone: Backbone = importlib.import_module(f"{name}.backbone").BACKBONE
    return backbone


def general_family() -> Backbone:
    """The family of all bases that have no family of their own."""
    return next(family for family in map(load_family, family_names()) if "" in family.evaluation)


def find_family(given: Mapping[str, str], environment: Mapping[str, str]) -> Backbone:
    """The family of the base that options name.

    Args:
        given: texts of flags by name: ``family``, ``config``, ``base_model_path`` and ``cache_dir`` count.
        environment: the process's environment, for ``CACHE_DIR``.

    Raises:
        InputError: there is no such family, or nothing tells which one is meant.
    """
    if "family" in given:
        return load_family(given["family"])
    values = {**(read_options_file(Path(given["config"])) if "config" in given else {}), **given}
    if isinstance(values.get("family"), str) and isinstance(values.get("options"), dict):
        return load_family(values["family"])  # a run's record
    base, cache = values.get("base_model_path"), values.get("cache_dir") or cache_folder(environment)
    if isinstance(base, str):
        return _of_model_type(_configuration(base))
    if isinstance(cache, str):
        return _of_cache(Path(cache))
    raise InputError(
        "which models are merged? Give --base_model_path PATH and --expert NAME=PATH for each expert, or --cache_dir "
        f"DIR with the checkpoints of one family ({', '.join(family_names())})"
    )


def values_of(flags: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """The last values of some flags, as texts; what is wrong with them is told when all are parsed."""
    found = {}
    for place, flag in enumerate(flags):
        text, equals, value = flag.partition("=")
        name = current_name(text[2:])
        if not text.startswith("--") or name not in names:
            continue
        following = flags[place + 1] if place + 1 < len(flags) else ""
        if equals or (following and not following.startswith("--")):
            found[name] = value if equals else following
    return found


def _configuration(base: str) -> Mapping[str, Any]:
    """``config.json`` of the base, a folder or a repository."""
    place, repository = Path(base), read_id(base)
    if repository is not None and not place.exists():
        return configuration_of(repository)
    with about("--base_model_path"):
        file = locate(place) / "config.json"
        if not file.is_file():
            raise InputError(f"{base} has no config.json that tells the family; is it the folder of a model?")
        return read_object(file)


def _of_model_type(configuration: Mapping[str, Any]) -> Backbone:
    """The family that is made for a kind of model, or for all that no other is made for."""
    kind = configuration.get("model_type")
    made = [family for family in map(load_family, family_names()) if kind and kind in family.evaluation]
    return made[0] if made else general_family()


def _of_cache(cache: Path) -> Backbone:
    """The family whose base lies in a folder.

    Raises:
        InputError: that of none does, or those of several.
    """
    if not cache.is_dir():
        raise InputError(f"--cache_dir {cache}: there is no such folder")
    families = [load_family(name) for name in family_names()]
    bases = {family.name: cache / family.base_folder for family in families}
    there = [name for name, place in bases.items() if place.exists() or cached_beside(place)]
    if len(there) == 1:
        return load_family(there[0])
    if there:
        raise InputError(f"{cache} has the bases of {' and '.join(there)}; give the --family that is meant")
    names = ", ".join(f"{place.name} ({name})" for name, place in bases.items())
    raise InputError(f"{cache} has the base of no family: {names}; give --base_model_path, or another --cache_dir")
