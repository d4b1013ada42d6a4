"""Methods that produce coefficients; their results are merged like any closed form's.

Such a method is called with the plan and the context before any tensor is read. It checks its options and returns the
`expert_merging.learned.Work` to do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from expert_merging.errors import InputError
from expert_merging.learned.options import ChunkingOptions, LearningOptions, TrainingOptions, TrimmingOptions
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
    from expert_merging.learned.stages import one_stage

    return one_stage(plan, context, LearningOptions(**options))  # type: ignore[arg-type]


@register(
    name="expert_merging++",
    aliases=("expert_merging_pp",),
    options=ChunkingOptions,
    learns=True,
    elementwise=True,
    family_defaults=("scaling_coefficient", "samples_per_task", "sparsity_reg_weight"),
)
def expert_merging_pp(plan: Plan, context: Context, **options: object) -> Work:
    """Expert Merging, then several coefficients for the parameters that matter most (arXiv 2509.25712, section 3.3).

    Raises:
        InputError: options, calibration files, tracker or earlier coefficients cannot be used.
    """
    from expert_merging.learned.stages import two_stages

    return two_stages(plan, context, ChunkingOptions(**options))  # type: ignore[arg-type]


@register(
    options=TrainingOptions,
    learns=True,
    elementwise=True,
    family_defaults=("scaling_coefficient", "samples_per_task"),
)
def adamerging(plan: Plan, context: Context, **options: object) -> Work:
    """A coefficient per expert and parameter, learned by making predictions sure (Yang et al., 2024, arXiv 2310.02575).

    Trained like Expert Merging, on the same samples, where the original has Adam at 1e-3 for 500 steps and clamps.

    Raises:
        InputError: options, calibration files or tracker cannot be used.
    """
    from expert_merging.learned.stages import one_stage

    return one_stage(plan, context, TrainingOptions(**options))  # type: ignore[arg-type]


@register(
    options=TrainingOptions,
    learns=True,
    elementwise=True,
    family_defaults=("scaling_coefficient", "samples_per_task"),
)
def adamerging_task(plan: Plan, context: Context, **options: object) -> Work:
    """AdaMerging with one coefficient per expert.

    Raises:
        InputError: options, calibration files or tracker cannot be used.
    """
    from expert_merging.learned.stages import one_stage

    return one_stage(plan, context, TrainingOptions(**options), shared=True)  # type: ignore[arg-type]


@register(
    name="adamerging++",
    aliases=("adamerging_pp",),
    options=TrimmingOptions,
    learns=True,
    elementwise=True,
    keeps_single=False,
    family_defaults=("scaling_coefficient", "samples_per_task"),
)
def adamerging_pp(plan: Plan, context: Context, **options: object) -> Work:
    """AdaMerging on task vectors that TIES has trimmed, without the entries that disagree in sign.

    Raises:
        InputError: options, calibration files or tracker cannot be used.
    """
    from expert_merging.learned.stages import one_stage

    return one_stage(plan, context, TrimmingOptions(**options))  # type: ignore[arg-type]


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
    from expert_merging.learned.stages import matching_coefficients

    if coefficients is None:
        raise InputError(
            "--method coefficients needs --coefficients RUN_OR_FILE: a finished run, or its coefficients.safetensors"
        )
    loaded = matching_coefficients(Path(coefficients), plan)
    return Work(lambda: loaded, {"coefficients": loaded.fingerprint()})
