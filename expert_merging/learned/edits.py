"""Edits of coefficients: factors on those of some experts, at some depths, of some submodules.

``Math: 1.2, layers 20- mlp: 0.8`` are two. Words of one kind (experts, depths, parts of a layer) are alternatives, and
those of different kinds go together. Where several edits meet, their factors are multiplied.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

import torch

from expert_merging.errors import InputError, Problems, near_name
from expert_merging.flags import Interval
from expert_merging.learned.coefficients import Coefficients
from expert_merging.roles import OTHER, OUTSIDE, STAGES, SUBMODULES, find_places

_FACTORS = Interval("[-1000, 1000]")
_DEPTHS = (*STAGES, OUTSIDE)
_PARTS = {
    "attention": ("q", "k", "v", "qkv", "o"),
    "mlp": ("gate", "up", "gate_up", "down"),
    **{name: (name,) for name in (*SUBMODULES, OTHER)},
}
_RANGE = r"\d+(?:-\d*)?"
_TOKEN = re.compile(
    rf"""\s*(?:"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<sign>[,:])|
    layers?\s+(?P<ranges>{_RANGE}(?:\s+{_RANGE})*)(?![^\s,:])|(?P<word>[^\s,:"']+))""",
    re.VERBOSE,
)
_FORM = "takes WHAT: FACTOR, several with commas between them, such as 'Math: 1.2, layers 20- mlp: 0.8'"

# What a word is about, and whether it means an expert, or a parameter, of some name.
_Kind: TypeAlias = Literal["expert", "depth", "part"]
_Meaning: TypeAlias = tuple[_Kind, Callable[[str], bool]]


@dataclass(frozen=True)
class Edit:
    """A factor on some of the coefficients.

    Args:
        text: as it was given.
        factor: the factor.
        experts: whose coefficients it is for.
        names: parameters whose coefficients it is for.
    """

    text: str
    factor: float
    experts: tuple[str, ...]
    names: tuple[str, ...]


def edited(coefficients: Coefficients, edits: Sequence[Edit]) -> Coefficients:
    """Coefficients with the factors of all edits on them."""
    factors = {name: torch.ones(len(coefficients.experts), 1, dtype=torch.float64) for name in coefficients.values}
    for edit in edits:
        rows = [coefficients.experts.index(name) for name in edit.experts]
        for name in edit.names:
            factors[name][rows] *= edit.factor
    values = {name: (value.double() * factors[name]).float() for name, value in coefficients.values.items()}
    return replace(coefficients, values=values)


def read_edits(text: str, experts: Sequence[str], names: Sequence[str]) -> tuple[Edit, ...]:
    """The edits that a text asks for.

    Args:
        text: what ``--edit`` was given.
        experts: names of the experts.
        names: names of the merged parameters.

    Raises:
        InputError: everything in it that is no edit, or means nothing in this model.
    """
    problems, words, found = Problems(), _Words(experts, names), list[Edit]()
    for tokens in _split(text):
        with problems.collecting():
            found.append(_read_edit(tokens, words))
    problems.check()
    return tuple(found)


def _split(text: str) -> Iterator[list[re.Match[str]]]:
    """The tokens of each edit.

    Raises:
        InputError: a quotation mark has no other.
    """
    tokens: list[re.Match[str]] = []
    position, text = 0, text.rstrip()
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            raise InputError(f"--edit {text!r}: a quotation mark has no other")
        position = token.end()
        if token["sign"] == ",":
            yield tokens
            tokens = []
        else:
            tokens.append(token)
    yield tokens


def _read_edit(tokens: Sequence[re.Match[str]], words: _Words) -> Edit:
    """One edit.

    Raises:
        InputError: all that is wrong with it.
    """
    text = "".join(token[0] for token in tokens).strip()
    if len(tokens) < 3 or [token["sign"] for token in tokens] != [*[None] * (len(tokens) - 2), ":", None]:
        raise InputError(f"--edit {_FORM}, got {text!r}")
    problems, factor, meanings = Problems(), _factor_of(tokens[-1][0].strip()), list[_Meaning]()
    if factor is None:
        problems.add(f"--edit {text!r}: the factor must be a number in {_FACTORS.text}")
    for token in tokens[:-2]:
        with problems.collecting():
            meanings += words.meanings(token)
    problems.check()
    experts = _meant(words.experts, meanings, ("expert",))
    names = _meant(words.names, meanings, ("depth", "part"))
    if not names:
        raise InputError(f"--edit {text!r}: no merged parameter is that (a name looks like {next(iter(words.names))})")
    return Edit(text, factor or 0.0, experts, names)


def _factor_of(text: str) -> float | None:
    try:
        factor = float(text)
    except ValueError:
        return None
    return factor if factor in _FACTORS else None


def _meant(names: Sequence[str], meanings: Sequence[_Meaning], kinds: Sequence[_Kind]) -> tuple[str, ...]:
    """The names that, of each kind that there is something of, one meaning has."""
    by_kind = [[test for kind, test in meanings if kind == wanted] for wanted in kinds]
    return tuple(name for name in names if all(any(test(name) for test in tests) for tests in by_kind if tests))


class _Words:
    """What words mean in a model.

    Args:
        experts: names of its experts.
        names: names of its merged parameters.
    """

    def __init__(self, experts: Sequence[str], names: Sequence[str]) -> None:
        self.experts, self.names = experts, names
        self.places = find_places(list(names))
        self.last = max((place.depth for place in self.places.values() if place.depth is not None), default=None)

    def meanings(self, token: re.Match[str]) -> list[_Meaning]:
        """What a token means: one thing, but of several ranges each.

        Raises:
            InputError: nothing, or two things.
        """
        if token["ranges"]:
            return [self._layers(text) for text in token["ranges"].split()]
        quoted = token["double"] if token["single"] is None else token["single"]
        word = token["word"] if quoted is None else quoted
        found: list[_Meaning] = [("expert", lambda name: name == word)] if word in self.experts else []
        if quoted is None:
            found += self._in_model(word)
        if len(found) > 1:
            raise InputError(
                f"--edit: {word} is an expert and a part of the model; put the expert's name in quotation marks, and "
                "name the part by layers or by a pattern"
            )
        if not found:
            known = [*self.experts, *([] if quoted is not None else ["layers 0-", *_DEPTHS, *_PARTS])]
            raise InputError(f"--edit: {word!r} means nothing here. {near_name(word, known)}")
        return found

    def _in_model(self, word: str) -> Iterator[_Meaning]:
        if word in _DEPTHS:
            yield "depth", lambda name: self.places[name].stage == word
        elif word in _PARTS:
            yield "part", lambda name: self.places[name].submodule in _PARTS[word]
        elif word in self.names or any(sign in word for sign in "*?["):
            yield "part", lambda name: fnmatchcase(name, word)

    def _layers(self, text: str) -> _Meaning:
        """What a range of layers means.

        Raises:
            InputError: there are no such layers.
        """
        if self.last is None:
            raise InputError(f"--edit layers {text}: no merged parameter has the number of a layer in its name")
        first, dash, end = text.partition("-")
        last = int(end) if end else self.last if dash else int(first)
        if not int(first) <= last <= self.last:
            raise InputError(f"--edit layers {text}: layers are 0-{self.last} here; 5- is all from 5 on")
        depths = range(int(first), last + 1)
        return "depth", lambda name: self.places[name].depth in depths
