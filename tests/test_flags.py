"""Options come from signatures, values from texts, methods from their names."""

from __future__ import annotations

import datetime
import math
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_merging.catalogue import all_methods
from expert_merging.errors import InputError
from expert_merging.flags import (
    Count,
    Factor,
    Fraction,
    Interval,
    NotNegative,
    Option,
    Positive,
    is_one_per_expert,
    read_options,
)
from expert_merging.parser import GENERAL


def option(annotation: object) -> Option:
    return Option("density", annotation, None, "What it is.")


def problem(annotation: object, value: object) -> str:
    with pytest.raises(InputError) as caught:
        option(annotation).convert(value)
    return str(caught.value)


@given(low=st.integers(-3, 0), high=st.integers(1, 4), number=st.integers(-5, 5))
@pytest.mark.parametrize("first", "([")
@pytest.mark.parametrize("last", ")]")
def test_intervals_are_written_as_in_mathematics(first, last, low, high, number):
    inside = low < number < high or (number == low and first == "[") or (number == high and last == "]")
    assert (number in Interval(f"{first}{low}, {high}{last}")) == inside


def test_intervals_may_have_no_end():
    assert 1e300 in Interval("[0, inf)")
    assert math.nan not in Interval("[0, inf)")


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (float, "1", 1.0),
        (float, "1e-5", 1e-5),
        (float, " 0.3 ", 0.3),
        (float, 1, 1.0),
        (int, "7", 7),
        (int, "7.0", 7),
        (int, "1e3", 1000),
        (int, "-1", -1),
        (str, "0.3", "0.3"),
        (str, "", ""),
        (str | None, "none", "none"),
        (str | None, None, None),
        (bool, "true", True),
        (bool, False, False),
        (float | list[float], "0.3", 0.3),
        (float | list[float], "[0.2,0.3,0.4]", [0.2, 0.3, 0.4]),
        (float | list[float], "0.2, 0.3", [0.2, 0.3]),
        (float | list[float], [1, 2], [1.0, 2.0]),
        (list[int], "3", [3]),
        (list[int], "1,2", [1, 2]),
        (list[int], "[]", []),
        (list[str], ".*norm.*", [".*norm.*"]),
        (list[str], "[a-z].*", ["[a-z].*"]),
        (list[str], '["a", "b"]', ["a", "b"]),
        (Literal["auto", "no"], "no", "no"),
        (Literal["auto", "no"], False, "no"),
        (Literal["middle", "none"] | list[int], "none", "none"),
        (Literal["middle", "none"] | list[int], "0,2", [0, 2]),
        (dict[str, int], '{"Chat": 3}', {"Chat": 3}),
        (dict[str, int], {"Chat": "3", 4: 5.0}, {"Chat": 3, "4": 5}),
        (Fraction, "1", 1.0),
        (Count, "1", 1),
    ],
    ids=str,
)
def test_texts_become_values(annotation, text, value):
    converted = option(annotation).convert(text)
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize(
    ("annotation", "text", "message"),
    [
        (float, "much", "a number, got much"),
        (float, "nan", "a number, got nan"),
        (float, "NaN", "a number, got NaN"),
        (float, "Infinity", "a number, got Infinity"),
        (float, "1e999", "a number, got 1e999"),
        (float, "1" + "0" * 400, "a number, got 1" + "0" * 400),
        (float, True, "a number, got true"),
        (float, "[0.1]", "a number, got [0.1]"),
        (int, "2.5", "a whole number, got 2.5"),
        (str, 3, "a text, got 3"),
        (str | None, datetime.date(2026, 1, 2), 'a text, got "2026-01-02"'),
        (bool, "yes", "true or false, got yes"),
        (Literal["auto", "no"], "maybe", "'auto' or 'no', got maybe"),
        (Literal["auto", "fp16"], False, "'auto' or 'fp16', got false"),
        (Positive, "0", "a number in (0, inf), got 0"),
        (NotNegative, "-1", "a number in [0, inf), got -1"),
        (Count, "0", "a whole number in [1, inf), got 0"),
        (float | list[float], "low", "a number, a list of them or a JSON object of them by expert, got low"),
        (list[float], '["a"]', 'a number, got ["a"]'),
        (list[Annotated[int, Interval("[0, inf)")]], "-1", "a whole number in [0, inf), got -1"),
        (dict[str, Count], '{"Math": 1, "Chat": 0}', "a whole number in [1, inf), got 0 for 'Chat'"),
        (
            dict[str, Count] | None,
            {"Chat": "0"},
            "a JSON object of whole numbers in [1, inf) by name, got 0 for 'Chat'",
        ),
        (dict[str, Count], "5", "a JSON object of whole numbers in [1, inf) by name, got 5"),
        (Fraction, "0", "a number in (0, 1], got 0"),
        (Fraction, "80", "a number in (0, 1], got 80; for 80 % write 0.8"),
        (float, "-1e31", "a number, got -1e31; 1e+30 is the largest number that can be computed with"),
        (Positive, 1e39, "a number in (0, inf), got 1e+39; 1e+30 is the largest number that can be computed with"),
        (Fraction, 12.5, "a number in (0, 1], got 12.5; for 12.5 % write 0.125"),
        (Fraction, "800", "a number in (0, 1], got 800"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit_is_refused_with_what_is_allowed(annotation, text, message):
    assert problem(annotation, text) == f"--density must be {message}"


PER_EXPERT = [float | list[float], NotNegative | list[NotNegative], Factor | list[Factor | None] | None]


@pytest.mark.parametrize("annotation", PER_EXPERT, ids=str)
def test_one_number_per_expert_may_be_given_by_name(annotation):
    assert is_one_per_expert(annotation)
    known = option(annotation)
    assert known.for_experts({"Math": "0.5"}, ("Chat", "Math", "Code"), 0.3) == [0.3, 0.5, 0.3]
    with pytest.raises(InputError) as caught:
        known.for_experts({"Maths": 1, "Code": "high"}, ("Chat", "Math", "Code"), 0.3)
    kind = {0: "a number", 1: "a number in [0, inf)", 2: "a number in [-1000, 1000]"}[PER_EXPERT.index(annotation)]
    assert list(caught.value.problems) == [
        "--density: there is no expert 'Maths'. Did you mean 'Math'?",
        f"--density must be {kind} for each expert, got high for 'Code'",
    ]


@pytest.mark.parametrize("annotation", [float, list[float], Literal["none"] | list[Count], dict[str, float]], ids=str)
def test_other_numbers_are_not_by_expert(annotation):
    assert not is_one_per_expert(annotation)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
OPTIONS = [*GENERAL.values(), *(option for method in all_methods().values() for option in method.options.values())]


@given(value=JSON | st.from_regex(r"[-\[{]?[0-9eE.,\"a]{0,12}[\]}]?", fullmatch=True))
@pytest.mark.parametrize(
    "known", {str(known.annotation): known for known in OPTIONS}.values(), ids=lambda known: known.name
)
def test_any_value_is_taken_or_refused_in_words(known, value):
    try:
        converted = known.convert(value)
    except InputError as error:
        assert str(error).startswith(f"--{known.name} must be ")  # noqa: PT017
    else:
        assert known.convert(converted) == converted


def test_options_are_read_from_signature_and_docstring():
    def shrink(task_vectors, *, density: Fraction = 0.5, steps: Count = 3):
        """Shrink.

        Args:
            task_vectors: not an option.
            density: fraction of entries
                that are kept.
            steps: how often; e.g. 3.

        Returns:
            density: not this one.
        """

    options = read_options(shrink)
    assert list(options) == ["density", "steps"]
    assert options["density"] == Option("density", Fraction, 0.5, "fraction of entries that are kept.")
    assert options["steps"].help == "how often; e.g. 3."


def test_an_option_without_help_cannot_be_registered():
    def silent(task_vectors, *, density: Fraction = 0.5):
        """Say nothing about density."""

    with pytest.raises(KeyError, match="density"):
        read_options(silent)
