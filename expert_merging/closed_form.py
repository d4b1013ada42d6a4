"""A closed form inside another method, given in one text such as ``ties density=0.2``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from expert_merging.context import Context
from expert_merging.errors import InputError, Problems, about, near_name
from expert_merging.flags import Option, current_name, is_one_per_expert
from expert_merging.method import Method, Preparation
from expert_merging.plan import Rule


@dataclass(frozen=True)
class ClosedForm:
    """A closed form that merges some tensors of a run.

    Args:
        method: the closed form.
        options: value of every option.
        context: the run, with no other tensors to merge.
        preparation: what it does before it merges.
    """

    method: Method
    options: Mapping[str, Any]
    context: Context
    preparation: Preparation

    @classmethod
    def of(cls, given: str, context: Context, flag: str) -> ClosedForm:
        """The closed form of a text.

        Args:
            given: its name, and options that differ from its defaults.
            context: the run, with no other tensors to merge.
            flag: where the user gives it, for messages.

        Raises:
            InputError: there is none, or it cannot merge these experts.
        """
        name, *settings = given.split() or [""]
        with about(f"--{flag} {given}"):
            method: Method = context.find_method(name)
            _check_closed_form(method)
            options = method.defaults(context.backbone.defaults) | _read(settings, method)
            check_one_per_expert(method.options, options, tuple(context.plan.experts))
            return cls(method, options, context, method.prepared(context, options))

    def on(self, context: Context) -> ClosedForm:
        """The same for other tensors."""
        return replace(self, context=context, preparation=self.method.prepared(context, self.options))

    @property
    def described(self) -> str:
        """Name and options."""
        given = {name: value for name, value in self.options.items() if value is not None}
        return " ".join([self.method.name, *(f"{name}={value}" for name, value in given.items())])

    def rule(self) -> Rule:
        """Do what is to be done before merging; the rule."""
        plan = self.context.plan
        found = self.preparation.run() if plan.merged else {}
        return self.method.rule({"seed": self.context.seed, "experts": tuple(plan.experts), **found}, self.options)


def _check_closed_form(method: Method) -> None:
    """Check that the method makes one dense model of nothing but the base and the experts."""
    if not method.is_closed_form:
        raise InputError(
            "that is no closed form; choose a method that merges the base and experts alone into one dense model, such "
            "as weight_average, task_arithmetic, ties or svd"
        )


def check_one_per_expert(known: Mapping[str, Option], values: Mapping[str, Any], experts: Sequence[str]) -> None:
    """Check that options that take a number for each expert have as many.

    Raises:
        InputError: there are more or fewer.
    """
    problems = [
        f"--{name} has {len(value)} values for {len(experts)} experts ({', '.join(experts)})"
        for name, value in values.items()
        if isinstance(value, list) and is_one_per_expert(known[name].annotation) and len(value) != len(experts)
    ]
    if problems:
        raise InputError(*problems)


def _read(settings: list[str], method: Method) -> dict[str, Any]:
    """Options by name.

    Raises:
        InputError: every one that the method does not have, or that does not fit.
    """
    problems, values = Problems(), dict[str, Any]()
    for setting in settings:
        name, equals, value = setting.partition("=")
        name = current_name(name)
        if not equals or not value:
            problems.add(f"options follow the method as NAME=VALUE without blanks, got {setting!r}")
        elif name not in method.options:
            problems.add(f"{method.name} has no option {name!r}. {near_name(name, [*method.options])}")
        elif name in values:
            problems.add(f"{name!r} is given twice")
        else:
            with problems.collecting():
                values[name] = method.options[name].convert(value)
    problems.check()
    return values
