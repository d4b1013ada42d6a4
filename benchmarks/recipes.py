"""What the quality benchmark merges: every method, ablations, and settings to choose among."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product

from expert_merging.catalogue import all_methods

FIRST_STAGE, SECOND_STAGE = "expert_merging", "expert_merging++"
METHOD, ABLATION, CHOICE = "method", "ablation", "choice"
# What closed forms are scaled by, around their defaults.
COEFFICIENTS = {
    **dict.fromkeys(("task_arithmetic", "dare_ta"), (0.4, 0.5, 0.6)),
    "weight_average": (1.2, 1.4, 1.8),
    **dict.fromkeys(("ties", "dare_ties"), (0.5, 0.7, 1.4)),
    "svd": (0.7, 0.85, 1.2),
    **dict.fromkeys(("iso", "iso_cts"), (1.2, 1.5, 1.8)),
    **dict.fromkeys(("wudi", "wudi2", "iwudi", "swudi", "aswudi"), (0.4, 0.6, 0.8)),
}


@dataclass(frozen=True)
class Variant:
    """One way to merge.

    Args:
        label: row of the table.
        method: registry name.
        flags: values of options, by name, that differ from the zoo's configuration.
        group: whether it is a method as it is, an ablation, or one of several settings to choose among; the last are
            never measured on test questions.
        second_stage: it starts from the coefficients that `FIRST_STAGE` has learned.
    """

    label: str
    method: str
    flags: Mapping[str, str | float] = field(default_factory=dict)
    group: str = METHOD
    second_stage: bool = False


def variants() -> list[Variant]:
    """Everything that is measured."""
    return [*_methods(), *_ablations(), *_choices()]


def _methods() -> Iterator[Variant]:
    """Every method that makes one model, with its defaults."""
    for name, method in all_methods().items():
        if method.merges_any_experts:
            yield Variant(name, name)


def _ablations() -> Iterator[Variant]:
    """Those of the paper's Table 4, where the zoo's configuration has equal task weights; and other task weights."""
    for words, option in {"hidden states": "hidden_states_weight", "logits": "logits_weight"}.items():
        yield Variant(f"{FIRST_STAGE} without {words}", FIRST_STAGE, {option: 0}, ABLATION)
    # Which the zoo's configuration is without; this is the published weight.
    yield Variant(f"{FIRST_STAGE} with regulariser", FIRST_STAGE, {"sparsity_reg_weight": 0.8}, ABLATION)
    for task in ("Chat", "Math", "Code"):
        yield Variant(f"{FIRST_STAGE}, {task} weighs 4", FIRST_STAGE, {"loss_alphas": f"{task}=4"}, ABLATION)
    for chunking in ("none", "all"):
        yield Variant(f"{SECOND_STAGE}, chunking {chunking}", SECOND_STAGE, {"chunking": chunking}, ABLATION, True)


def _choices() -> Iterator[Variant]:
    """Settings among which the score without labels chooses."""
    for method, values in COEFFICIENTS.items():
        for value in values:
            yield _choice(method, scaling_coefficient=value)
    settings: dict[str, tuple[float, ...]] = {
        "num_epochs": (12, 50),
        "learning_rate": (0.3,),
        "sparsity_reg_weight": (0.03, 0.1),
    }
    for name, choices in settings.items():
        for value in choices:
            yield _choice(FIRST_STAGE, **{name: value})
    for budget, start in product((1, 2, 4, 8), ("learned", "initial")):
        yield _choice(SECOND_STAGE, budget=budget, stage2_init=start)
    for budget, options in product((1, 4), ({"kappa": 0.6}, {"sparsity_reg_weight": 0.03})):
        yield _choice(SECOND_STAGE, budget=budget, stage2_init="learned", **options)


def _choice(method: str, **flags: str | float) -> Variant:
    words = ", ".join(f"{name} {value}" for name, value in flags.items())
    return Variant(f"{method}: {words}", method, flags, CHOICE, second_stage=method == SECOND_STAGE)
