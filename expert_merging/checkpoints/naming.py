"""Names of tensors that stand in a container: what wrappers, and classes that hold the model, put into names.

A wrapper's words are known and taken out wherever they stand. Any other beginning that all names have, or lack, is
found by comparing with names that are known.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

# What torch.compile, FSDP, activation checkpointing, PEFT and data parallelism put into names.
_WRAPPERS = re.compile(
    r"(?:(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model)\.|\A(?:module\.)+)"
)
# A decoder's layers, as nearly all published checkpoints call them.
DECODER = r"model\.layers\."
# What may be lacking before all names: a language model's in a larger model, a decoder's without its output head.
_HOLDERS = ("model.", "language_model.", "language_model.model.")


@dataclass(frozen=True)
class Container:
    """What a checkpoint's names have that others lack, or lack that others have.

    Args:
        extra: what stands before all names, once wrappers' words are out.
        lacking: what does not.
    """

    extra: str = ""
    lacking: str = ""

    def unwrapped(self, name: str) -> str:
        """The name without the container."""
        return self.lacking + _WRAPPERS.sub("", name).removeprefix(self.extra)

    def words(self, names: Iterable[str]) -> str:
        """How the names are read, for messages; empty where they are as they should be."""
        found = {word for name in names for word in _WRAPPERS.findall(name)}
        without = [*sorted(found), *filter(None, [self.extra])]
        parts = [f"without {' and '.join(map(repr, without))}"] if without else []
        parts += [f"with {self.lacking!r} before them"] if self.lacking else []
        return " and ".join(parts)


def find_container(names: Collection[str], is_known: Callable[[str], bool], known: Collection[str] = ()) -> Container:
    """The plainest container without which the most names are known.

    Args:
        names: all names of a checkpoint.
        is_known: whether a name is one that it could have without a container.
        known: names of the model that it is compared with, whose common beginning may be what it lacks.
    """
    plain = [_WRAPPERS.sub("", name) for name in names]
    candidates = [
        *(Container(extra, lacking) for extra in ("", *_beginnings(plain)) for lacking in ("", *_HOLDERS)),
        *(Container("", lacking) for lacking in _beginnings(known)),
    ]
    if all(map(is_known, plain)):
        return candidates[0]
    return max(candidates, key=lambda container: sum(is_known(container.unwrapped(name)) for name in plain))


def _beginnings(names: Collection[str]) -> list[str]:
    """The beginnings that all names have in common, up to a dot each, the shortest first."""
    first, last = min(names, default=""), max(names, default="")
    return [first[:end] for end in range(1, len(first)) if first[end - 1] == "." and last.startswith(first[:end])]


def published_names(
    names: Collection[str], file_name: Callable[[str], str], landmark: str
) -> tuple[Container, dict[str, str]]:
    """What a base's tensors are called in the published checkpoints.

    Args:
        names: the names in its files.
        file_name: published name of a parameter, whatever naming it was saved with.
        landmark: pattern of names that a published checkpoint has (`re.match`).

    Returns:
        The container that the names are in, and published names by name.
    """
    container = find_container(names, lambda name: re.match(landmark, file_name(name)) is not None)
    return container, {name: file_name(container.unwrapped(name)) for name in names}


def names_of_base(
    names: Collection[str], base: Mapping[str, str], file_name: Callable[[str], str]
) -> tuple[Container, dict[str, str]]:
    """What an expert's tensors are called in its base.

    A tensor that the base lacks keeps its name, without the container; so do several that would get the same name.

    Args:
        names: the names in the expert's files.
        base: published names of the base's tensors by name.
        file_name: published name of a parameter, whatever naming it was saved with.

    Returns:
        The container that the expert's names are in, and names by the name in its files.
    """
    times = Counter(base.values())
    own = {published: name for name, published in base.items() if times[published] == 1}
    container = find_container(names, lambda name: file_name(name) in times, list(base))
    plain = {name: container.unwrapped(name) for name in names}
    found = {name: own.get(file_name(unwrapped), unwrapped) for name, unwrapped in plain.items()}
    for choices in (plain, {name: name for name in names}):
        taken = Counter(found.values())
        found = {name: choices[name] if taken[new] > 1 else new for name, new in found.items()}
    return container, found


def cut_otherwise(base: Mapping[str, str], expert: Mapping[str, str]) -> dict[str, str]:
    """What is wrong, by name, with tensors that one of two checkpoints has whole and the other in parts.

    Args:
        base: published names of the base's tensors by name.
        expert: the same of the expert's.
    """
    parts = Counter(base.values()), Counter(published for name, published in expert.items() if name not in base)
    return {
        name: f"{published} is {parts[1][published]} tensors here and {parts[0][published]} in the base: they were "
        "saved by classes that cut it differently; save both by the same class (or exclude it)"
        for name, published in {**expert, **base}.items()
        if parts[1][published] and max(part[published] for part in parts) > 1
    }
