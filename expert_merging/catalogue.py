"""Lists and finds methods; the only module that imports them all."""

from __future__ import annotations

from expert_merging.errors import InputError, near_name
from expert_merging.learned import methods as learned_methods
from expert_merging.method import TABLE, Method
from expert_merging.methods import consensus, interpolation, linear, sparse, spectral, tall, truncation, wudi
from expert_merging.mixtures import moe
from expert_merging.search import methods as search_methods
from expert_merging.statistics import regmean

# Kinds of methods, and the modules that register them; importing this module has done so.
KINDS = {
    "closed forms": (linear, interpolation, sparse, spectral, truncation, wudi),
    "several artefacts": (tall,),
    "modifiers": (consensus,),
    "statistics": (regmean,),
    "learned": (learned_methods,),
    "search": (search_methods,),
    "mixtures": (moe,),
}


def all_methods() -> dict[str, Method]:
    """Every method by name, those that read samples last."""
    return dict(sorted(TABLE.items(), key=lambda item: item[1].reads_samples))


def find_method(name: str) -> Method:
    """The method of that name or alias; dashes count as underscores, and capitals as small letters.

    Raises:
        InputError: there is none; the message offers the nearest name.
    """
    methods = all_methods()
    aliases = {alias: method.name for method in methods.values() for alias in method.aliases}
    asked = name.lower().replace("-", "_")
    asked = aliases.get(asked, asked)
    if asked not in methods:
        raise InputError(f"no method named {name!r}. {near_name(name, [*methods, *aliases])}")
    return methods[asked]
