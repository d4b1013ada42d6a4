"""Problems are collected and near names offered."""

from __future__ import annotations

import pytest

from expert_merging.errors import InputError, Problems, near_name


def test_problems_of_several_checks_are_raised_together_and_once():
    problems = Problems()
    problems.add("first")
    with problems.collecting():
        raise InputError("second", "first")
    with pytest.raises(InputError) as caught:
        problems.check()
    assert caught.value.problems == ("first", "second")


def test_no_problems_no_error():
    Problems().check()


def test_only_what_the_user_can_put_right_is_collected():
    with pytest.raises(ZeroDivisionError), Problems().collecting():
        raise ZeroDivisionError


@pytest.mark.parametrize("name", ["task_arithmetik", "task-arithmetic", "TASK_ARITHMETIC", "taskarithmetic"])
def test_the_nearest_name_is_offered(name):
    assert near_name(name, ["weight_average", "task_arithmetic"]) == "Did you mean 'task_arithmetic'?"


def test_without_a_near_name_all_are_listed():
    assert near_name("xyz", ("beta", "alpha")) == "Known: alpha, beta."


def test_nothing_is_offered_where_nothing_is_known():
    assert near_name("xyz", []) == "None is known."
