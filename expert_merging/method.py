"""What a merging method is: one frozen record, and how functions become entries of the table of methods.

A run is check, prepare, merge, write. Whatever a method may be fits this: a closed form merges without preparation;
TIES prepares by a pass over all task vectors, RegMean by running models, Expert Merging by learning coefficients, a
search by scoring candidates; a mixture of experts writes other files. What differs is said here, and no driver asks
which method it has.

Nothing here, and no module that registers methods, imports torch when it is loaded: a typing mistake is answered
before torch is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from expert_merging.arithmetic import scaled_mean
from expert_merging.context import Context
from expert_merging.flags import Option, read_options
from expert_merging.outputs import Output, mirror
from expert_merging.parts import Part
from expert_merging.plan import Rule
from expert_merging.roles import is_matrix

if TYPE_CHECKING:
    from torch import Tensor

# What a method is fed: blocks of entries, blocks of rows, 2-D tensors as a whole, or any tensor as a whole; from fine
# to coarse.
Unit = Literal["entries", "rows", "matrix", "tensor"]
UNITS: tuple[Unit, ...] = ("entries", "rows", "matrix", "tensor")

ORDER_FREE, KEEPS_SINGLE, AT_MOST_TWO = "order_free", "keeps_single", "at_most_two"
PROMISES = (ORDER_FREE, KEEPS_SINGLE, AT_MOST_TWO)
SAMPLES = "samples"

# What every merge function may ask for by name beside what its preparation gives.
_ALWAYS_KNOWN = ("part", "base", "seed", "experts", "merged")
# What a preparation may return beside what it gives: tensors by name that outputs are to have as they are, and names of
# tensors that the merge function makes without what was merged before.
_BESIDE = {"made", "anew"}


@dataclass(frozen=True)
class Preparation:
    """The work that a method does before it merges, once its options are checked.

    Args:
        run: does it; what it returns is known to the merge function by these names.
        inputs: digests of what is read besides checkpoints, by name; a run is continued only with the same.
        notes: lines for the plan that ``--dry_run`` prints.
        unit: what the merge function has to be fed in this run, where that is coarser than the method's own unit.
        follows: ``run`` takes what was merged before, as ``run(rule, unit)``.
    """

    run: Callable[..., Mapping[str, Any]] = dict
    inputs: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unit: Unit = "entries"
    follows: bool = False


@dataclass(frozen=True)
class Prepare:
    """How a method is prepared.

    Args:
        function: ``(context, **options) -> Preparation``; checks at once, works later. It is given the options that it
            names, or all of them.
        gives: names of what the preparation will return, beside tensors by name that are written as they are
            (``made``), and names of tensors that are made without what was merged before (``anew``).
    """

    function: Callable[..., Preparation]
    gives: tuple[str, ...]


@dataclass(frozen=True)
class Method:
    """One merging method.

    Args:
        name: registry name and value of ``--method``, or of ``--post`` for one that needs ``merged``.
        merge: ``(task_vectors, *needs, **options) -> merged task vector``, or tensors by name: ``merged`` is that, and
            the others are what `outputs` has places for. The task vectors ``(experts, *shape)`` are float32, and memory
            that it may overwrite. It may run in a forked process, so nothing but its result is kept. It is given
            the options that it names, or all of them.
        options: its flags by name.
        described: the function whose docstring describes it.
        aliases: other names that the command line accepts.
        presets: further names, each of which stands for the method with settings of its own: values by option, general
            ones included, where the user gives none.
        family_defaults: options whose default the model family sets.
        promises: ``order_free``: the order of the experts does not change the result; ``keeps_single``: one expert with
            coefficient 1 gives that expert; ``at_most_two``: it is between two experts, or the base and one, and its
            preparation refuses more.
        needs: what else `merge` takes, by name: ``part`` (a `Part`), ``base`` (the base's entries), ``seed``,
            ``experts`` (names), ``merged`` (what another method has made of the same entries), and what `prepare`
            gives. They are its positional parameters after the task vectors.
        unit: ``entries``: each entry of the result depends on the same entry of the task vectors alone, so that blocks
            may be fed; ``rows``: the same of rows, ``(experts, rows, columns)``, where a row runs along a tensor's last
            dimension and a vector is one row; ``matrix``: 2-D tensors are fed as a whole, and all others, tables of
            words included, get the scaled mean; ``tensor``: all tensors are fed as a whole, tables of words as vectors.
        reads: what is read beside checkpoints: ``samples`` or nothing.
        reads_with: whether it is read with these options, where that depends on them.
        prepare: what is done before merging.
        parts: ``(task_vectors, *needs, **options) -> (experts, *shape)``: what each expert adds to the result, which is
            their sum; for methods that are such a sum.
        outputs: ``(context, **options) -> outputs``, what is written; by default the base's mirror.
        mirrors_with: whether that is a mirror of the base with these options, where it depends on them.
    """

    name: str
    merge: Callable[..., Any]
    options: Mapping[str, Option]
    described: Callable[..., Any]
    aliases: tuple[str, ...] = ()
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    family_defaults: tuple[str, ...] = ()
    promises: frozenset[str] = frozenset({ORDER_FREE, KEEPS_SINGLE})
    needs: tuple[str, ...] = ()
    unit: Unit = "tensor"
    reads: frozenset[str] = frozenset()
    reads_with: Callable[[Mapping[str, Any]], bool] | None = None
    prepare: Prepare | None = None
    parts: Callable[..., Tensor] | None = None
    outputs: Callable[..., tuple[Output, ...]] = mirror
    mirrors_with: Callable[[Mapping[str, Any]], bool] | None = None

    def __post_init__(self) -> None:
        """Refuse a record that no run could use."""
        known = {*_ALWAYS_KNOWN, *(self.prepare.gives if self.prepare else ())}
        for unknown, kind, allowed in (
            (set(self.needs) - known, "needs", known),
            ({self.unit} - set(UNITS), "unit", UNITS),
            (self.reads - {SAMPLES}, "reads", (SAMPLES,)),
            (self.promises - set(PROMISES), "promises", PROMISES),
            (set(self.family_defaults) - set(self.options), "family_defaults", self.options),
        ):
            if unknown:
                raise TypeError(
                    f"method {self.name}: {kind} cannot be {min(unknown)!r}; known are {', '.join(sorted(allowed))}"
                )
        if self.parts is not None and _needs(self.parts) != self.needs:
            raise TypeError(
                f"method {self.name}: merge and parts must need the same, {', '.join(self.needs) or 'nothing'}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """All names that the command line accepts, its own first."""
        return (self.name, *self.aliases, *self.presets)

    @property
    def summary(self) -> str:
        """First line of its description."""
        return (self.described.__doc__ or "").strip().split("\n")[0]

    @property
    def is_modifier(self) -> bool:
        """Whether it improves what another method has merged (``--post``)."""
        return "merged" in self.needs

    @property
    def reads_samples(self) -> bool:
        """Whether it runs models on calibration samples, perhaps with some options alone."""
        return SAMPLES in self.reads

    def reads_samples_with(self, options: Mapping[str, Any]) -> bool:
        """Whether it runs models on calibration samples with these options."""
        return self.reads_samples and (self.reads_with is None or self.reads_with(options))

    def writes_mirror_with(self, options: Mapping[str, Any]) -> bool:
        """Whether it writes one model of the base's kind with these options."""
        return self.outputs is mirror or (self.mirrors_with is not None and self.mirrors_with(options))

    @property
    def is_closed_form(self) -> bool:
        """Whether it makes one model of the base's kind out of checkpoints alone."""
        is_own_method = not self.is_modifier and "coefficients" not in self.needs
        return self.outputs is mirror and is_own_method and not self.reads_samples

    @property
    def merges_any_experts(self) -> bool:
        """Whether it makes one model of the base's kind out of any number of experts, and samples if it reads them."""
        makes_one = self.is_closed_form or (self.outputs is mirror and self.reads_samples and not self.is_modifier)
        return makes_one and AT_MOST_TWO not in self.promises

    def defaults(self, family: Mapping[str, Any]) -> dict[str, Any]:
        """Default of every option, with the family's value where the method leaves it to the family.

        Args:
            family: values by option, for all methods that leave it to the family, or by ``method.option``.
        """
        left = {name: family[name] for name in self.family_defaults if name in family}
        return {
            name: family.get(f"{self.name}.{name}", left.get(name, option.default))
            for name, option in self.options.items()
        }

    def prepared(self, context: Context, options: Mapping[str, Any]) -> Preparation:
        """Check what the options mean for this run; the work is still to be done.

        Raises:
            InputError: they cannot be used.
        """
        if self.prepare is None:
            return Preparation(unit=self.unit)
        found = self.prepare.function(context, **accepted(self.prepare.function, options))
        return replace(found, run=self._promised(found.run), unit=coarsest([self.unit, found.unit]))

    def _promised(self, run: Callable[..., Mapping[str, Any]]) -> Callable[..., Mapping[str, Any]]:
        """The work of a preparation, which must return what it was registered to give, and may return `_BESIDE`."""
        gives = set(self.prepare.gives) if self.prepare else set()

        def checked(*before: Any) -> Mapping[str, Any]:
            found = run(*before)
            if set(found) - _BESIDE != gives - _BESIDE:
                raise TypeError(
                    f"method {self.name}: its preparation returns {_listed(found)}, and was registered to give "
                    f"{_listed(gives)}"
                )
            return found

        return checked

    def rule(self, known: Mapping[str, Any], options: Mapping[str, Any]) -> Rule:
        """The rule that merges a part's task vectors.

        Args:
            known: ``seed``, ``experts``, and what the preparation has returned.
            options: value of every option.
        """
        return self._rule(self.merge, known, options)

    def parts_rule(self, known: Mapping[str, Any], options: Mapping[str, Any]) -> Rule:
        """The rule that gives what each expert adds, ``(experts, *shape)``.

        Args:
            known: as for `rule`.
            options: value of every option.
        """
        if self.parts is None:
            raise TypeError(f"method {self.name} is no sum over the experts")
        return self._rule(self.parts, known, options, keeps_experts=True)

    def _rule(
        self,
        function: Callable[..., Any],
        known: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        keeps_experts: bool = False,
    ) -> Rule:
        own = accepted(function, options)
        coefficient = options.get("scaling_coefficient", 1.0)

        def rule(task_vectors: Tensor, part: Part, base: Tensor, merged: Tensor | None = None) -> Any:
            if self.unit == "matrix" and not is_matrix(part):
                if merged is not None:
                    return merged
                weight = coefficient / len(task_vectors)
                return task_vectors * weight if keeps_experts else scaled_mean(task_vectors, coefficient)
            shape = task_vectors.shape[1:]
            if self.unit == "rows":
                task_vectors, base, merged = _in_rows(part, task_vectors, base, merged)
            given = {"part": part, "base": base, "merged": merged}
            needed = [given[name] if name in given else known[name] for name in self.needs]
            made = function(task_vectors, *needed, **own)
            return made.view(shape) if self.unit == "rows" else made

        return rule


def _in_rows(
    part: Part, task_vectors: Tensor, base: Tensor, merged: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a rule is given, as rows of the part's tensor."""
    columns = max(1, part.columns)
    merged = None if merged is None else merged.reshape(-1, columns)
    return task_vectors.reshape(len(task_vectors), -1, columns), base.reshape(-1, columns), merged


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def coarsest(units: Iterable[Unit]) -> Unit:
    """The unit that contains all of them."""
    found = set(units)
    # Tensors that are no matrices are fed in blocks for the one, whose bounds may lie inside rows.
    return "tensor" if {"rows", "matrix"} <= found else max(found, key=UNITS.index)


def accepted(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a function names among its keyword-only parameters, or all where it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(entry.kind is inspect.Parameter.VAR_KEYWORD for entry in parameters):
        return dict(options)
    named = {entry.name for entry in parameters if entry.kind is inspect.Parameter.KEYWORD_ONLY}
    return {name: value for name, value in options.items() if name in named}


def modified(rules: Sequence[Rule], anew: Sequence[Container[str]]) -> Rule:
    """A rule followed by modifiers, each given the task vectors as they were and what was merged so far.

    Only methods that write the base's mirror alone are modified, so there is one result.

    Args:
        rules: the rule and the modifiers.
        anew: of each, names of the tensors that it makes without what was merged so far, which is not made for it.
    """
    if len(rules) == 1:
        return rules[0]

    def modify(task_vectors: Tensor, part: Part, base: Tensor) -> Any:
        first = max((number for number, names in enumerate(anew) if part.name in names), default=0)
        merged = None
        for rule in rules[first:-1]:
            merged = rule(task_vectors.clone(), part, base, merged)
        return rules[-1](task_vectors, part, base, merged)

    return modify


# Every registered method by name.
TABLE: dict[str, Method] = {}


def register(
    *, options: Callable[..., Any] | None = None, name: str | None = None, **fields: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter the decorated merge function into the table of methods.

    Args:
        options: callable (a dataclass, for instance) whose signature and docstring hold the options; by default the
            function itself.
        name: the method's name where it is not the function's.
        fields: fields of `Method`.

    Raises:
        TypeError: the record makes no sense, such as a need that nothing gives.
    """

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        enter_method(function, described=function, name=name, options=options, **fields)
        return function

    return enter


def enter_method(
    merge: Callable[..., Any],
    *,
    described: Callable[..., Any],
    name: str | None = None,
    options: Callable[..., Any] | None = None,
    **fields: Any,
) -> None:
    """Enter a method into the table whose description is another function's than its merge function's.

    Args:
        merge: the merge function.
        described: the function whose name and docstring describe the method.
        name: as for `register`.
        options: as for `register`.
        fields: fields of `Method`.
    """
    method = Method(
        name=name or described.__name__,
        merge=merge,
        options=read_options(options or described),
        described=described,
        needs=_needs(merge),
        **fields,
    )
    TABLE[method.name] = method


def _needs(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the positional parameters after the first."""
    parameters = inspect.signature(function).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(entry.name for entry in parameters if entry.kind in positional)[1:]
