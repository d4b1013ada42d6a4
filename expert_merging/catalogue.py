"""Lists and finds methods; the only module that imports them all."""

from __future__ import annotations

from expert_merging.errors import InputError, near_name
from expert_merging.learned import methods as learned_methods
from expert_merging.method import TABLE, Method
from expert_merging.methods import linear, sparse, spectral, truncation, wudi
from expert_merging.outputs import mirror
from expert_merging.search import methods as search_methods

# Kinds of methods, and the modules that register them; importing this module has done so.
KINDS = {
    "closed forms": (linear, sparse, spectral, truncation, wudi),
    "learned": (learned_methods,),
    "search": (search_methods,),
}


def all_methods() -> dict[str, Method]:
    """Every method by name, those that read samples last."""
    return dict(sorted(TABLE.items(), key=lambda item: item[1].reads_samples))


def comparable_methods() -> list[str]:
    """Names of methods that make one model of the base's kind out of experts and samples alone."""

    def is_comparable(method: Method) -> bool:
        applies_an_earlier_run = "coefficients" in method.needs and not method.reads_samples
        return method.outputs is mirror and not method.is_modifier and not applies_an_earlier_run

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
