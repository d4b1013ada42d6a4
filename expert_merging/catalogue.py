"""Lists and finds methods; the only module that imports them all."""

from __future__ import annotations

import itertools

from expert_merging.errors import InputError, near_name
from expert_merging.learned import methods as learned_methods
from expert_merging.method import AT_MOST_TWO, TABLE, Method
from expert_merging.methods import consensus, interpolation, linear, sparse, spectral, tall, truncation, wudi
from expert_merging.outputs import mirror

# Kinds of methods, and the modules that register them; importing this module has done so.
KINDS = {
    "closed forms": (linear, interpolation, sparse, spectral, truncation, wudi),
    "several artefacts": (tall,),
    "modifiers": (consensus,),
    "learned": (learned_methods,),
}


def all_methods() -> dict[str, Method]:
    """Every method by name, in the order of their kinds and modules, those that read samples last."""
    places = {module.__name__: place for place, module in enumerate(itertools.chain(*KINDS.values()))}

    def place(method: Method) -> tuple[bool, int]:
        return method.reads_samples, places.get(method.merge.__module__, len(places))

    return dict(sorted(TABLE.items(), key=lambda item: place(item[1])))


def comparable_methods() -> list[str]:
    """Names of methods that make one model of the base's kind out of any experts, and samples alone."""

    def is_comparable(method: Method) -> bool:
        applies_an_earlier_run = "coefficients" in method.needs and not method.reads_samples
        takes_any_number = AT_MOST_TWO not in method.promises
        is_model = method.outputs is mirror and not method.is_modifier
        return is_model and takes_any_number and not applies_an_earlier_run

    return [name for name, method in all_methods().items() if is_comparable(method)]


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
