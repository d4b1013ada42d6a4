"""The zoo and the family that runs and models belong to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from expert_merging.documents import resolved
from expert_merging.errors import InputError
from expert_merging.run import Run
from zoo.build import DESCRIPTION
from zoo.family import FAMILY_MODULES, default_folder, load_family


def zoo_of(places: Sequence[Path]) -> Path:
    """The zoo whose experts were merged, or to which a model belongs; Mistral's default zoo where nothing says it.

    Args:
        places: folders of runs or of models.

    Raises:
        InputError: a run's base is in no zoo, or the places belong to several.
    """
    found = list(dict.fromkeys(zoo for zoo in map(_zoo_of_one, places) if zoo is not None))
    if len(found) > 1:
        zoos = ", ".join(map(str, found))
        raise InputError(f"these are of several zoos ({zoos}); evaluate those of one zoo at a time, or give --zoo")
    return found[0] if found else default_folder("mistral", 0)


def _zoo_of_one(place: Path) -> Path | None:
    record = _run_at(place).record
    base = resolved(place) if record is None else Path(str(record["options"].get("base_model_path")))
    if (base.parent / DESCRIPTION).is_file():
        return base.parent
    if record is not None:
        raise InputError(
            f"{place} is a run of {record['family']} whose base {base} is in no zoo; give the zoo to measure it by: "
            "--zoo DIR"
        )
    return None


def _run_at(place: Path) -> Run:
    return Run.found_at(place) or Run(place)


def refuse_others(places: Sequence[Path], zoo: Path, family: str) -> None:
    """Refuse runs and models of another family than a zoo's, which the zoo's family cannot load.

    Args:
        places: folders of runs or of models.
        zoo: the zoo, for the message.
        family: its family, as the command's folder is called.

    Raises:
        InputError: there are such.
    """
    others = {place: own for place in places if (own := _family_of(place)) not in (None, family)}
    if others:
        raise InputError(
            *(f"{place} is of {own}, and the zoo in {zoo} is of {family}" for place, own in others.items())
        )


def _family_of(place: Path) -> str | None:
    """The family of a run, or of a model whose ``model_type`` is one family's alone; None where it cannot be told."""
    record = _run_at(place).record
    if record is not None:
        return str(record["family"])
    try:
        kind = json.loads((place / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    backbones = [load_family(name).backbone for name in FAMILY_MODULES]
    return next((backbone.name for backbone in backbones if kind and kind in backbone.evaluation), None)
