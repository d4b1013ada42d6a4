"""Methods that produce coefficients; their results are merged like any closed form's.

Such a method is called with the plan and the context before any tensor is read. It checks its options and returns the
`expert_merging.learned.Work` to do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from expert_merging.errors import InputError
from expert_merging.learned.options import LearningOptions
from expert_merging.registry import register

if TYPE_CHECKING:
    from expert_merging.learned import Context, Work
    from expert_merging.plan import Plan


@register(
    options=LearningOptions,
    learns=True,
    elementwise=True,
    family_defaults=("scaling_coefficient", "samples_per_task", "sparsity_reg_weight"),
)
def expert_merging(plan: Plan, context: Context, **options: object) -> Work:
    """One coefficient per expert and parameter, learned by aligning with each expert (arXiv 2509.25712).

    Raises:
        InputError: options, calibration files or tracker cannot be used.
    """
    from expert_merging.learned.trainer import prepare

    return prepare(plan, context, LearningOptions(**options))  # type: ignore[arg-type]


@register(learns=True, elementwise=True, keeps_single=False)
def coefficients(plan: Plan, _context: Context, *, coefficients: str | None = None) -> Work:
    """Coefficients of an earlier run, applied without learning.

    Args:
        plan: checkpoints and parameters.
        _context: unused.
        coefficients: run folder or coefficients.safetensors file to take the coefficients from.

    Raises:
        InputError: there are none, or they belong to other experts or parameters.
    """
    from expert_merging.learned import Work
    from expert_merging.learned.coefficients import load_coefficients

    if coefficients is None:
        raise InputError(
            "--method coefficients needs --coefficients RUN_OR_FILE: a finished run, or its coefficients.safetensors"
        )
    loaded = load_coefficients(Path(coefficients))
    problems = []
    if loaded.experts != tuple(plan.experts):
        problems.append(
            f"--coefficients {coefficients} belong to the experts {', '.join(loaded.experts)}, "
            f"given are {', '.join(plan.experts)}"
        )
    without = [name for name in plan.merged if name not in loaded.values]
    unknown = [name for name in loaded.values if name not in plan.merged]
    if without:
        problems.append(
            f"--coefficients {coefficients} has none for {without[0]} ({len(without)} in all); "
            "use the same --exclude_params"
        )
    if unknown:
        problems.append(f"--coefficients {coefficients} has {unknown[0]}, which is not merged ({len(unknown)} in all)")
    if problems:
        raise InputError(*problems)
    return Work(lambda: loaded, {"coefficients": loaded.fingerprint()}, (), trains=False)
