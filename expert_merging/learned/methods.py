"""Methods that learn coefficients; their results are merged like any closed form's.

Each is described by the function that prepares it: it checks the options before any tensor is read, and returns the
work to do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_merging.context import Context
from expert_merging.errors import InputError
from expert_merging.flags import Factor
from expert_merging.learned.options import (
    AligningOptions,
    AnswerOptions,
    ChunkingOptions,
    ColumnOptions,
    DivergingOptions,
    EntropyOptions,
    FrankWolfeOptions,
    LearningOptions,
    MaskOptions,
    RankOptions,
    TrainingOptions,
    TrimmingOptions,
)
from expert_merging.method import ORDER_FREE, SAMPLES, Preparation, Prepare, enter_method
from expert_merging.parts import Part
from expert_merging.plan import Rule

if TYPE_CHECKING:
    from torch import Tensor

    from expert_merging.learned.coefficients import Coefficients


def merge_with_coefficients(
    task_vectors: Tensor, part: Part, base: Tensor, coefficients: Coefficients, directions: Rule
) -> Tensor:
    """Sum of the task vectors, or of what stands for them, each chunk times its coefficient (paper, Eq. 5)."""
    merged = coefficients.merge(directions(task_vectors, part, base), part)
    return merged - base if coefficients.is_whole else merged


def learns(**fields: Any) -> Callable[[Callable[..., Preparation]], Callable[..., Preparation]]:
    """Enter a method that learns coefficients from samples, by the function that prepares it.

    Args:
        fields: as for `expert_merging.method.enter_method`.
    """

    def enter(prepare: Callable[..., Preparation]) -> Callable[..., Preparation]:
        given = {"unit": "entries", "reads": frozenset({SAMPLES}), **fields}
        prepared = Prepare(prepare, ("coefficients", "directions"))
        enter_method(merge_with_coefficients, described=prepare, prepare=prepared, **given)
        return prepare

    return enter


@learns(options=LearningOptions, family_defaults=("samples_per_task", "sparsity_reg_weight"))
def expert_merging(context: Context, **options: object) -> Preparation:
    """One coefficient per expert and parameter, learned by aligning with each expert (arXiv 2509.25712).

    Raises:
        InputError: options, calibration files or tracker cannot be used.
    """
    from expert_merging.learned.stages import one_stage

    return one_stage(context, LearningOptions(**options))  # type: ignore[arg-type]


@learns(options=AligningOptions, presets={"align_distil": {"post": ["distil"]}}, family_defaults=("samples_per_task",))
def align_merge(context: Context, **options: object) -> Preparation:
    """A coefficient per expert and row of the closed form that is nearest to the experts, aligned with each expert.

    Expert Merging where interference has been taken out first: it begins at the best of several closed forms, moves
    along what each expert adds to that one's result, and learns from questions that are crossed out of those given.
    `--method align_distil` is this, and then its layers distilled, see `distil`.

    Raises:
        InputError: options, calibration files or tracker cannot be used.
    """
    from expert_merging.learned.stages import one_stage

    return one_stage(context, AligningOptions(**options))  # type: ignore[arg-type]


@learns(options=DivergingOptions, family_defaults=("samples_per_task",))
def divmerge(context: Context, **options: object) -> Preparation:
    """A coefficient per expert and parameter that makes the Jensen-Shannon divergence small (2025, arXiv 2509.02108).

    DivMerge: the merged model's distribution of the next token is drawn to each task's expert on answers that the
    expert has written, the mean being the start. Trained like Expert Merging, whose sigmoid keeps coefficients between
    0 and 1, where the original's are free.

    Raises:
        InputError: options, calibration files or tracker cannot be used.
    """
    from expert_merging.learned.stages import one_stage

    return one_stage(context, DivergingOptions(**options))  # type: ignore[arg-type]


@learns(options=AnswerOptions, family_defaults=("scaling_coefficient", "samples_per_task"))
def supermerge(context: Context, **options: object) -> Preparation:
    """A coefficient between -1 and 1 per expert and parameter that makes answers likely (2024, arXiv 2412.10416).

    SuperMerge: the cross-entropy of the samples' answers is minimised, those that the task files give, or else those
    that each task's expert writes. Coefficients are hyperbolic tangents, so an expert may count negatively. Trained
    like Expert Merging. The original's merging of groups one after the other, to save memory, is not needed here.

    Raises:
        InputError: options, calibration files or tracker cannot be used.
    """
    from expert_merging.learned.stages import one_stage

    return one_stage(context, AnswerOptions(**options))  # type: ignore[arg-type]


@learns(options=MaskOptions, family_defaults=("scaling_coefficient", "samples_per_task"))
def concrete_ta(context: Context, **options: object) -> Preparation:
    """Task arithmetic behind a mask of rows that all experts share, learned by entropy (2023, arXiv 2312.06173).

    Concrete subspace learning: what is masked is taken from no expert, and the rest counts more. Trained like
    AdaMerging, on the same samples. The original masks each entry, by 2,000 steps of Adam at 0.001; here a mask has a
    number for each row of a matrix, unless the parametrisation says otherwise, since one for each entry takes as much
    as a model.

    Raises:
        InputError: options, calibration files or tracker cannot be used.
    """
    from expert_merging.learned.stages import one_stage

    return one_stage(context, MaskOptions(**options))  # type: ignore[arg-type]


@learns(options=FrankWolfeOptions, family_defaults=("scaling_coefficient", "samples_per_task"))
def fw_hard(context: Context, **options: object) -> Preparation:
    """Coefficients by Frank and Wolfe's steps, each towards the expert that makes answers likelier (arXiv 2503.12649).

    FW-Merging (2025): at each of ten iterations every tensor goes some of the way to the expert whose task vector
    points most against the gradient, or back to the base if none does. The way is 2 / (t + 2) of what is left, times
    the learning rate. Answers are those of the task files, or else those that each task's expert writes. The original
    removes small entries like TIES at every step, which would be no sum of task vectors.

    Raises:
        InputError: options, calibration files or tracker cannot be used.
    """
    from expert_merging.learned.frank_wolfe import FrankWolfeTrainer
    from expert_merging.learned.stages import one_stage

    chosen = FrankWolfeOptions(**options)  # type: ignore[arg-type]
    return one_stage(context, chosen, trainer=FrankWolfeTrainer)


@learns(options=RankOptions, family_defaults=("scaling_coefficient", "samples_per_task"))
def adarank(context: Context, **options: object) -> Preparation:
    """AdaMerging that also chooses which singular directions of each task vector count (2025, arXiv 2503.22178).

    A direction counts or does not. The choice and a coefficient for each expert and matrix are learned together by
    minimising entropy, on the samples of AdaMerging and trained like it, where the original has Adam at 0.00005 for
    thousands of steps and coefficients that no sigmoid bounds. Tables of words are not decomposed.

    Raises:
        InputError: options, calibration files or tracker cannot be used.
    """
    from expert_merging.learned.stages import one_stage

    return one_stage(context, RankOptions(**options))  # type: ignore[arg-type]


@learns(options=ColumnOptions, family_defaults=("samples_per_task",))
def dam(context: Context, **options: object) -> Preparation:
    """A coefficient per expert and input of each matrix, on whole weights (DAM, 2024, arXiv 2410.08371).

    Differentiable adaptive merging: each expert's columns have coefficients of their own, which start at the mean and
    may leave 0 and 1. They draw the merged model to each task's expert at a temperature of 2, and two experts'
    coefficients of a matrix apart. Trained like Expert Merging, by AdamW with restarts at a larger rate, where the
    original's filters momentum (MoFO) and has 0.001 for 1,700 samples; the losses are means over samples, where it
    sums one of each task. Tensors that are no matrices have a coefficient each.

    Raises:
        InputError: options, calibration files or tracker cannot be used.
    """
    from expert_merging.learned.stages import one_stage

    return one_stage(context, ColumnOptions(**options))  # type: ignore[arg-type]


@learns(
    name="expert_merging++",
    aliases=("expert_merging_pp",),
    options=ChunkingOptions,
    family_defaults=("samples_per_task", "sparsity_reg_weight"),
)
def expert_merging_pp(context: Context, **options: object) -> Preparation:
    """Expert Merging, then several coefficients for the parameters that matter most (arXiv 2509.25712, section 3.3).

    Raises:
        InputError: options, calibration files, tracker or earlier coefficients cannot be used.
    """
    from expert_merging.learned.stages import two_stages

    return two_stages(context, ChunkingOptions(**options))  # type: ignore[arg-type]


@learns(options=EntropyOptions, family_defaults=("scaling_coefficient", "samples_per_task"))
def adamerging(context: Context, **options: object) -> Preparation:
    """A coefficient per expert and parameter, learned by minimising entropy (Yang et al., 2024, arXiv 2310.02575).

    Trained like Expert Merging, on the same samples, where the original has Adam at 1e-3 for 500 steps and clamps.

    Raises:
        InputError: options, calibration files or tracker cannot be used.
    """
    from expert_merging.learned.stages import one_stage

    return one_stage(context, EntropyOptions(**options))  # type: ignore[arg-type]


@learns(options=TrainingOptions, family_defaults=("scaling_coefficient", "samples_per_task"))
def adamerging_task(context: Context, **options: object) -> Preparation:
    """AdaMerging with one coefficient per expert.

    Raises:
        InputError: options, calibration files or tracker cannot be used.
    """
    from expert_merging.learned.stages import one_stage

    return one_stage(context, TrainingOptions(**options), shared=True)  # type: ignore[arg-type]


@learns(
    name="adamerging++",
    aliases=("adamerging_pp",),
    options=TrimmingOptions,
    promises=frozenset({ORDER_FREE}),
    family_defaults=("scaling_coefficient", "samples_per_task"),
)
def adamerging_pp(context: Context, **options: object) -> Preparation:
    """AdaMerging on task vectors that TIES has trimmed, without the entries that disagree in sign.

    Raises:
        InputError: options, calibration files or tracker cannot be used.
    """
    from expert_merging.learned.stages import one_stage

    return one_stage(context, TrimmingOptions(**options))  # type: ignore[arg-type]


@learns(reads=frozenset(), promises=frozenset({ORDER_FREE}))
def coefficients(
    context: Context,
    *,
    coefficients: str | None = None,
    task_vector_coeffs_dict: dict[str, Factor] | None = None,
    edit: str | None = None,
    force: bool = False,
) -> Preparation:
    """Coefficients of an earlier run, applied without learning.

    Args:
        context: the run.
        coefficients: run folder, coefficients.safetensors or weight_coeffs.json file to take the coefficients from.
        task_vector_coeffs_dict: factor on an expert's task vectors on top of what was learned, by expert, 1 where none
            is given and 0 to leave it out; of an expert that was not learned, its coefficient.
        edit: factors on some of the coefficients, such as 'Math: 1.2, layers 20- mlp: 0.8'; words are experts, layers
            with ranges, early, middle, late, attention, mlp, q, down and the like, or patterns of names.
        force: use coefficients though they were learned with other weights.

    Raises:
        InputError: there are none, or they belong to other experts, parameters or weights; or edits cannot be done.
    """
    from expert_merging.learned.earlier import applied

    if coefficients is None:
        raise InputError(
            "--method coefficients needs --coefficients RUN_OR_FILE: a finished run, its coefficients.safetensors, or "
            "the published implementation's weight_coeffs.json"
        )
    return applied(context, Path(coefficients), task_vector_coeffs_dict or {}, edit, force=force)
