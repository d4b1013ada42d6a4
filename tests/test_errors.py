"""Problems are collected and near names offered."""

from __future__ import annotations

import errno
import os

import pytest

from expert_merging.errors import InputError, Problems, file_problem, near_name


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


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "the disk is full; make room, then the same command continues"),
        (errno.EDQUOT, "the disk is full; make room, then the same command continues"),
        (
            errno.EFBIG,
            "a file would be larger than the file system, or `ulimit -f`, allows; with that changed, the same ",
        ),
        (errno.EIO, "a file or a connection cannot be used (Input/output error); the same command continues"),
    ],
)
def test_errors_of_the_system_are_told_by_what_to_do(number, expected):
    assert str(file_problem(OSError(number, os.strerror(number)), "continues")).startswith(expected)


@pytest.mark.parametrize("name", ["task_arithmetik", "task-arithmetic", "TASK_ARITHMETIC", "taskarithmetic"])
def test_the_nearest_name_is_offered(name):
    assert near_name(name, ["weight_average", "task_arithmetic"]) == "Did you mean 'task_arithmetic'?"


def test_without_a_near_name_all_are_listed():
    assert near_name("xyz", ("beta", "alpha")) == "Known: alpha, beta."


def test_nothing_is_offered_where_nothing_is_known():
    assert near_name("xyz", []) == "None is known."
