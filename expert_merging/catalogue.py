"""Lists and finds methods; the only module that imports them all."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from expert_merging.errors import InputError, near_name
from expert_merging.learned import methods as learned_methods
from expert_merging.low_rank import robust, spaces, weighted
from expert_merging.method import TABLE, Method
from expert_merging.methods import (
    ace,
    arcee,
    breadcrumbs,
    calibration,
    cart,
    competition,
    consensus,
    dare,
    della,
    doge,
    drm,
    emr,
    fusechat,
    geometry,
    interpolation,
    linear,
    lore,
    opcm,
    sparse,
    spectral,
    superposition,
    tall,
    truncation,
    widen,
    wudi,
)
from expert_merging.mixtures import merged_routers, moe
from expert_merging.search import methods as search_methods
from expert_merging.statistics import aim, distil, featcal, fisher, led, lot, mats, ota, regmean, regmean_pp

# Kinds of methods, and the modules that register them; importing this module has done so.
KINDS = {
    "closed forms": (
        linear,
        interpolation,
        arcee,
        geometry,
        sparse,
        dare,
        della,
        breadcrumbs,
        fusechat,
        competition,
        widen,
        spectral,
        truncation,
        cart,
        wudi,
        ace,
        opcm,
        doge,
        drm,
        lore,
        superposition,
    ),
    "adapters": (spaces, robust, weighted),
    "several artefacts": (tall, emr),
    "modifiers": (consensus, calibration, aim, featcal, distil, merged_routers),
    "statistics": (regmean, regmean_pp, mats, lot, fisher, ota, led),
    "learned": (learned_methods,),
    "search": (search_methods,),
    "mixtures": (moe,),
}


def all_methods() -> dict[str, Method]:
    """Every method by name, in the order of `KINDS`, and those that read samples last."""
    places = {module.__name__: place for place, module in enumerate(itertools.chain(*KINDS.values()))}

    def place(method: Method) -> tuple[bool, int]:
        return method.reads_samples, places.get(method.described.__module__, len(places))

    return dict(sorted(TABLE.items(), key=lambda item: place(item[1])))


def kind_of(method: Method) -> str:
    """The method's kind, one of `KINDS`."""
    own = method.described.__module__
    return next((kind for kind, modules in KINDS.items() if own in {module.__name__ for module in modules}), "other")


def find_method(name: str) -> Method:
    """The method of that name, alias or preset; dashes count as underscores, and capitals as small letters.

    Raises:
        InputError: there is none; the message offers the nearest name.
    """
    methods = all_methods()
    names = {known: method for method in methods.values() for known in method.names[1:]} | methods
    asked = _plain(name)
    if asked not in names:
        raise InputError(f"no method named {name!r}. {near_name(name, list(dict.fromkeys([*methods, *names])))}")
    return names[asked]


def preset_of(name: str) -> Mapping[str, Any]:
    """Values by option that a name stands for, where it is that of a preset."""
    presets = {preset: values for method in all_methods().values() for preset, values in method.presets.items()}
    return presets.get(_plain(name), {})


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
