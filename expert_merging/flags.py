"""Flags from signatures: the keyword-only parameters of a function *are* flags of the command line.

Name, type, default and interval come from the signature, the help text from the ``Args`` section of the docstring, so
each is written once.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from expert_merging.documents import parse_json
from expert_merging.errors import InputError, Problems, near_name


@dataclass(frozen=True)
class Interval:
    """Allowed numbers, written as in mathematics: ``Interval("(0, 1]")`` is above 0 and at most 1."""

    text: str

    def __contains__(self, number: float) -> bool:
        low, high = (float(bound) for bound in self.text[1:-1].split(","))
        above = number > low if self.text[0] == "(" else number >= low
        below = number < high if self.text[-1] == ")" else number <= high
        return above and below


# Float32 has hardly larger numbers, and what is computed with them is infinite.
_LARGEST = 1e30
# Older names of flags, which command lines and configuration files may go on using.
RENAMED = {"rank_batches": "weight_gradients"}


def current_name(name: str) -> str:
    """The name of a flag today, with underscores."""
    name = name.replace("-", "_")
    return RENAMED.get(name, name)


Fraction = Annotated[float, Interval("(0, 1]")]
Share = Annotated[float, Interval("[0, 1]")]
BelowOne = Annotated[float, Interval("[0, 1)")]
Positive = Annotated[float, Interval("(0, inf)")]
NotNegative = Annotated[float, Interval("[0, inf)")]
Count = Annotated[int, Interval("[1, inf)")]
CountOrNone = Annotated[int, Interval("[0, inf)")]
# Nobody scales task vectors by more than a few; what is far beyond has been mistyped.
Factor = Annotated[float, Interval("[-1000, 1000]")]


@dataclass(frozen=True)
class Option:
    """One flag of a method.

    Args:
        name: parameter name; the flag is ``--name``.
        annotation: the parameter's resolved type, `Annotated` with an `Interval` where numbers are bounded.
        default: value where the user gives none.
        help: one sentence, from the docstring.
    """

    name: str
    annotation: Any
    default: Any
    help: str

    def convert(self, value: object) -> Any:
        """Turn a flag's text or a configuration file's value into the parameter's type.

        Raises:
            InputError: the value does not fit the type or the interval.
        """
        try:
            return _convert(value, self.annotation)
        except ValueError as error:
            hint = ""
            if "in (0, 1]" in str(error) and isinstance(value, str | int | float) and _is_percentage(value):
                hint = f"; for {value} % write {float(value) / 100:g}"
            elif "]" not in str(error) and _is_number(number := _parse_json(value)) and abs(number) > _LARGEST:
                hint = f"; {_LARGEST:g} is the largest number that can be computed with"
            raise InputError(f"--{self.name} must be {error}, got {self._faulty(value)}{hint}") from None

    def for_experts(self, given: Mapping[str, object], experts: Sequence[str], default: Any) -> list[Any]:
        """One number for each expert, in their order, from numbers by name; `is_one_per_expert` must hold.

        Args:
            given: numbers by expert.
            experts: names of the experts.
            default: number of the experts that are not named.

        Raises:
            InputError: there is no such expert, or a number does not fit.
        """
        (number,) = [typing.get_args(kind)[0] for kind in typing.get_args(self.annotation) if _is_list(kind)]
        problems, values = Problems(), dict.fromkeys(experts, default)
        for name, value in given.items():
            if name not in experts:
                problems.add(f"--{self.name}: there is no expert {name!r}. {near_name(name, [*experts])}")
                continue
            try:
                values[name] = _convert(value, number)
            except ValueError as error:
                problems.add(f"--{self.name} must be {error} for each expert, got {_shown(value)} for {name!r}")
        problems.check()
        return list(values.values())

    def _faulty(self, value: object) -> str:
        """The value as it was given, or of a dictionary the first entry that does not fit."""
        parsed = _parse_json(value)
        for kind in [self.annotation, *typing.get_args(self.annotation)]:
            if typing.get_origin(kind) is dict and isinstance(parsed, dict):
                for key, entry in parsed.items():
                    try:
                        _convert(entry, typing.get_args(kind)[1])
                    except ValueError:
                        return f"{_shown(entry)} for {str(key)!r}"
        return _shown(value)


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _is_percentage(value: str | int | float) -> bool:
    try:
        return 1 < float(value) <= 100
    except (ValueError, OverflowError):
        return False


def is_one_per_expert(annotation: Any) -> bool:
    """Whether a value is one number, or a list with one for every expert."""
    return any(_is_list(kind) and float in _kinds(kind) for kind in typing.get_args(annotation))


def _is_list(annotation: Any) -> bool:
    return typing.get_origin(annotation) is list


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    return {annotation, *(kind for part in typing.get_args(annotation) for kind in _kinds(part))}


def by_name(value: object) -> dict[str, object] | None:
    """The entries of a JSON object, None of any other value."""
    parsed = _parse_json(value)
    return {str(key): entry for key, entry in parsed.items()} if isinstance(parsed, dict) else None


def describe_type(annotation: Any) -> str:
    """What a value of the type looks like, for help and error texts."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is Annotated:
        return " ".join([describe_type(arguments[0]), *(f"in {note.text}" for note in arguments[1:])])
    if origin is Literal:
        return " or ".join(repr(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        if is_one_per_expert(annotation):
            return f"{describe_type(arguments[0])}, a list of them or a JSON object of them by expert"
        return " or ".join(describe_type(argument) for argument in arguments if argument is not type(None))
    if origin is list:
        return f"a list of {_plural(arguments[0])}"
    if origin is dict:
        return f"a JSON object of {_plural(arguments[1])} by name"
    names: dict[Any, str] = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}
    return names[annotation]


def _plural(annotation: Any) -> str:
    inner = typing.get_args(annotation) if typing.get_origin(annotation) is Annotated else (annotation,)
    words = {float: "numbers", int: "whole numbers", str: "texts"}
    return " ".join([words[inner[0]], *(f"in {note.text}" for note in inner[1:])])


def _convert(value: object, annotation: Any) -> Any:
    """The value as the annotated type.

    Raises:
        ValueError: it does not fit; the message says what is allowed, of a list or dictionary for one entry.
    """
    kind = typing.get_origin(annotation) or annotation
    return _CONVERTERS[kind](value, annotation)


def _refused(annotation: Any) -> ValueError:
    return ValueError(describe_type(annotation))


def _text(value: object, annotation: Any) -> str:
    if isinstance(value, str):
        return value
    raise _refused(annotation)


def _number(value: object, annotation: Any) -> float:
    parsed = _parse_json(value)
    if _is_number(parsed) and abs(parsed) <= _LARGEST:
        return float(parsed)
    raise _refused(annotation)


def _whole_number(value: object, annotation: Any) -> int:
    parsed = _parse_json(value)
    if _is_number(parsed) and parsed == int(parsed):
        return int(parsed)
    raise _refused(annotation)


def _truth(value: object, annotation: Any) -> bool:
    parsed = _parse_json(value)
    if isinstance(parsed, bool):
        return parsed
    raise _refused(annotation)


def _bounded(value: object, annotation: Any) -> Any:
    kind, *intervals = typing.get_args(annotation)
    with contextlib.suppress(ValueError):
        number = _convert(value, kind)
        if all(number in interval for interval in intervals):
            return number
    raise _refused(annotation)


def _choice(value: object, annotation: Any) -> Any:
    value = "no" if value is False else value  # as YAML reads a bare no
    if value in typing.get_args(annotation):
        return value
    raise _refused(annotation)


def _one_of(value: object, annotation: Any) -> Any:
    kinds = typing.get_args(annotation)
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        with contextlib.suppress(ValueError):
            if kind is not type(None):
                return _convert(value, kind)
    raise _refused(annotation)


def _list(value: object, annotation: Any) -> list[Any]:
    (kind,) = typing.get_args(annotation)
    parsed = _parse_json(value)
    return [_convert(entry, kind) for entry in (parsed if isinstance(parsed, list) else [parsed])]


def _dictionary(value: object, annotation: Any) -> dict[str, Any]:
    parsed = _parse_json(value)
    if not isinstance(parsed, dict):
        raise _refused(annotation)
    return {str(key): _convert(entry, typing.get_args(annotation)[1]) for key, entry in parsed.items()}


_CONVERTERS: dict[Any, Callable[[object, Any], Any]] = {
    str: _text,
    float: _number,
    int: _whole_number,
    bool: _truth,
    Annotated: _bounded,
    Literal: _choice,
    typing.Union: _one_of,
    types.UnionType: _one_of,
    list: _list,
    dict: _dictionary,
}


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _parse_json(value: object) -> Any:
    """The value behind a flag's text: JSON, or numbers separated by commas as the published command line has them."""
    if not isinstance(value, str):
        return value
    for text in (value, f"[{value}]"):
        try:
            return parse_json(text)
        except ValueError:
            continue
    return value


def read_options(function: Callable[..., Any]) -> dict[str, Option]:
    """The keyword-only parameters of a callable as options; of a class, those that it inherits as well."""
    parameters = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    if inspect.isclass(function):  # each class's annotations by what its own module imports
        hints = typing.get_type_hints(function, include_extras=True)
    else:
        # Only the options' annotations are resolved: the others name types that are imported for type checking alone.
        annotations = types.SimpleNamespace(__annotations__={entry.name: entry.annotation for entry in parameters})
        hints = typing.get_type_hints(annotations, vars(sys.modules[function.__module__]), include_extras=True)
    documented = reversed(inspect.getmro(function)) if inspect.isclass(function) else [function]
    texts: dict[str, str] = {}
    for entry in documented:
        texts |= _argument_texts(inspect.cleandoc(entry.__doc__ or ""))
    return {entry.name: Option(entry.name, hints[entry.name], entry.default, texts[entry.name]) for entry in parameters}


def _argument_texts(docstring: str) -> dict[str, str]:
    """Text of each entry in the docstring's ``Args`` section, joined to one line."""
    section = re.search(r"^Args:\n((?:^[ ]{4,}.*\n?|^\n)*)", docstring, re.MULTILINE)
    if section is None:
        return {}
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", section[1], re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
