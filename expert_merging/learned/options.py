"""The options of methods that learn coefficients; read by the command line before torch is loaded.

Each class says itself what its options ask for: the objective, the directions and the coefficients. So nothing else
needs to know which method it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from expert_merging.errors import InputError
from expert_merging.flags import BelowOne, Count, CountOrNone, Factor, Fraction, Interval, NotNegative, Positive, Share
from expert_merging.parts import Part
from expert_merging.running.options import ComparingOptions

if TYPE_CHECKING:
    import torch

    from expert_merging.learned.parametrisations import CoefficientVector, Layout
    from expert_merging.learned.penalties import Penalty
    from expert_merging.running.objectives import Objective

# How many coefficients an expert has for a tensor.
Fineness: TypeAlias = Literal["layer", "chunk", "row", "column", "direction", "rank"]


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(ComparingOptions):
    """How coefficients are trained on samples.

    Args:
        scaling_coefficient: initial value of the coefficients, one for all experts or a list with one per expert;
            strictly between 0 and 1 (supermerge: -1 and 1), and by default the family's; for directions of a method any
            number, and by default 1 (weights: that of the mean).
        num_epochs: passes over the samples, fewer if patience ends first. With more than a finished run of the same
            run_name has, that one goes on.
        patience: epochs in a row without a better loss after which training stops; the loss is that on the held-out
            samples, and without them the epoch's mean.
        held_out: share of each task's samples that nothing is learned from. The best coefficients on them are kept, the
            initial ones if none are better, and they decide when training stops.
        learning_rate: AdamW's rate at the start of each cosine cycle; the published 0.5 is for few updates of
            coefficients of task vectors, and 0.02 has served other directions.
        gradient_accumulation_steps: samples per update.
        sam: how far from the coefficients, before the sigmoid that the published ones have, each update's gradient is
            taken: uphill, so that losses become small nearby too (sharpness-aware minimization; about 0.05). It doubles
            the time. 0 takes it at the coefficients themselves.
        task_vectors: where base and experts are kept in their own type while learning: on the device, in host memory,
            or on disk alone, read whenever they are needed; auto takes the first of these with enough memory, tensor by
            tensor.
        weight_gradients: when gradients of weights are turned into gradients of coefficients: after every sample, which
            takes least memory, or once per update, which reads the task vectors least often; auto decides by free
            memory. Also called rank_batches.
        shard: split base, merged weights and task vectors over the processes of the run, for models that fit on no
            device; also the experts while they are asked.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        logits_chunk_tokens: tokens whose logits are held at a time; by default as many as fit into 64 MiB.
        loss_alphas: weight of a task in the losses, by task; 1 where none is given.
        task_vector_coeffs_dict: factor on an expert's task vectors, by expert; 1 where none is given.
    """

    scaling_coefficient: Factor | list[Factor | None] | None = 0.3
    num_epochs: Count = 1
    patience: Count = 3
    held_out: BelowOne = 0.0
    learning_rate: Positive = 0.5
    gradient_accumulation_steps: Count = 8
    sam: NotNegative = 0.0
    task_vectors: Literal["auto", "device", "host", "disk"] = "auto"
    weight_gradients: Literal["auto", "sample", "update"] = "auto"
    shard: bool = False
    gradient_checkpointing: bool = False
    logits_chunk_tokens: Count | None = None
    loss_alphas: dict[str, NotNegative] | None = None
    task_vector_coeffs_dict: dict[str, Factor] | None = None

    @property
    def asked_directions(self) -> list[tuple[str, Mapping[str, Any] | None]]:
        """What coefficients may multiply, by name, and its options where they are not the defaults."""
        return [("task_vectors", None)]

    @property
    def regularisation_weight(self) -> float:
        """Weight of the coefficients' distance from their initial values."""
        return 0.0

    def usual_coefficient(self, family: float, experts: int) -> float:
        """Initial coefficient of task vectors where none is given.

        Args:
            family: the family's.
            experts: number of experts.
        """
        del experts
        return family

    def objective(self, layers: int | None) -> Objective:
        """What is made small.

        Args:
            layers: number of layers of the language model, None if ``config.json`` does not say.

        Raises:
            InputError: the options leave nothing to learn, or name layers that the model does not have.
        """
        del layers
        from expert_merging.running.objectives import prediction_entropy

        return prediction_entropy(self.logits_chunk_tokens)

    def penalty(self) -> Penalty:
        """What is added to the losses for coefficients as they are."""
        from expert_merging.learned.penalties import Distance

        return Distance(self.regularisation_weight)

    def chunks(self, parts: Iterable[Part]) -> dict[str, int]:
        """Number of coefficients per expert, by tensor name.

        Raises:
            InputError: the options do not fit the tensors.
        """
        return {part.name: 1 for part in parts}

    def axes(self, parts: Iterable[Part]) -> dict[str, str]:
        """Along what coefficients are, by tensor name, where they are not those of chunks."""
        del parts
        return {}

    def vector(self, layout: Layout, device: torch.device) -> CoefficientVector:
        """What is trained.

        Args:
            layout: which coefficients there are.
            device: where they are.
        """
        return layout.vector(device)

    @property
    def signed(self) -> bool:
        """See `expert_merging.learned.parametrisations.Layout`."""
        return False

    @property
    def free(self) -> bool:
        """Whether coefficients are their own raw numbers, also those of task vectors."""
        return False


@dataclass(frozen=True, kw_only=True)
class SplittingOptions:
    """How many coefficients a tensor has.

    Args:
        parametrisation: an expert's coefficients for a parameter, one (layer), several for chunks of it (chunk, with
            coeffs_size_dict), or one for each output row (row), input column (column) or singular direction
            (direction) of a matrix; or one, and whether each singular direction counts (rank).
        coeffs_size_dict: number of chunks with a coefficient of their own, by fnmatch pattern over parameter names; 0
            keeps the initial value, the last matching pattern counts. It wins over the parametrisation.
    """

    parametrisation: Fineness = "layer"
    coeffs_size_dict: dict[str, int] | None = None

    def chunks(self, parts: Iterable[Part]) -> dict[str, int]:
        """See `TrainingOptions.chunks`."""
        from expert_merging.learned.chunks import choose_chunks

        return choose_chunks(parts, self.coeffs_size_dict or {}, self.parametrisation)

    def axes(self, parts: Iterable[Part]) -> dict[str, str]:
        """See `TrainingOptions.axes`."""
        from expert_merging.learned.chunks import choose_axes

        return choose_axes(parts, self.coeffs_size_dict or {}, self.parametrisation)

    def vector(self, layout: Layout, device: torch.device) -> CoefficientVector:
        """See `TrainingOptions.vector`."""
        from expert_merging.learned.masks import GatedVector

        return GatedVector(layout, device) if self.parametrisation == "rank" else layout.vector(device)


@dataclass(frozen=True, kw_only=True)
class EntropyOptions(SplittingOptions, TrainingOptions):
    """Options of AdaMerging."""


@dataclass(frozen=True, kw_only=True)
class RankOptions(EntropyOptions):
    """Options of AdaRank.

    Args:
        initial_rank_ratio: share of each expert's strongest singular directions that count at first.
    """

    parametrisation: Fineness = "rank"
    learning_rate: Positive = 0.02
    initial_rank_ratio: Fraction = 1.0

    def vector(self, layout: Layout, device: torch.device) -> CoefficientVector:
        """See `TrainingOptions.vector`."""
        from expert_merging.learned.masks import GatedVector

        if self.parametrisation != "rank":
            return layout.vector(device)
        return GatedVector(layout, device, share=self.initial_rank_ratio)


@dataclass(frozen=True, kw_only=True)
class MaskOptions(EntropyOptions):
    """Options of concrete subspace learning.

    Args:
        scaling_coefficient: what the mask multiplies, one number for all experts or a list with one per expert, which
            is not learned; by default the family's.
    """

    parametrisation: Fineness = "row"
    learning_rate: Positive = 0.1

    @property
    def free(self) -> bool:
        """See `TrainingOptions.free`; the mask alone is bounded."""
        return True

    def chunks(self, parts: Iterable[Part]) -> dict[str, int]:
        """See `TrainingOptions.chunks`."""
        found = super().chunks(parts)
        if max(found.values()) == 1:
            raise InputError(
                "a mask with one number for each tensor leaves task arithmetic as it is, so there is nothing to learn; "
                "give --parametrisation row or column, or more chunks in --coeffs_size_dict"
            )
        return found

    def vector(self, layout: Layout, device: torch.device) -> CoefficientVector:
        """See `TrainingOptions.vector`."""
        from expert_merging.learned.masks import SharedMask

        return SharedMask(layout, device)


@dataclass(frozen=True, kw_only=True)
class LikelihoodOptions(TrainingOptions):
    """Options of methods that make answers likely."""

    loss_tokens: Literal["all", "response"] = "response"

    def objective(self, layers: int | None) -> Objective:
        """See `TrainingOptions.objective`."""
        del layers
        from expert_merging.running.objectives import answer_likelihood

        return answer_likelihood(self.logits_chunk_tokens)


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(SplittingOptions, LikelihoodOptions):
    """Options of SuperMerge."""

    @property
    def signed(self) -> bool:
        """See `TrainingOptions.signed`."""
        return True


@dataclass(frozen=True, kw_only=True)
class FrankWolfeOptions(LikelihoodOptions):
    """Options of Frank-Wolfe merging.

    Args:
        scaling_coefficient: coefficients at which the first gradient is taken, from 0 to 1, one for all experts or a
            list with one per expert; by default the family's.
        granularity: whether every tensor chooses its expert (layer), or all choose one together (task).
        learning_rate: share of the way to the chosen expert that the first update goes; the later ones go 2 / (t + 2)
            of it.
    """

    scaling_coefficient: Share | list[Share | None] | None = 0.3
    granularity: Literal["layer", "task"] = "layer"
    num_epochs: Count = 10
    patience: Count = 10
    learning_rate: Fraction = 1.0
    gradient_accumulation_steps: Count = 100

    @property
    def free(self) -> bool:
        """See `TrainingOptions.free`."""
        return True


@dataclass(frozen=True, kw_only=True)
class AlignmentOptions(TrainingOptions):
    """How the merged model is aligned with the experts.

    Args:
        directions: what the coefficients multiply, task_vectors or what each expert adds to the result of a method
            (svd, aswudi, ...), with the coefficient 1 and that method's other defaults; these coefficients may pass 1.
            Or trimmed, task vectors as TIES trims them; or weights, the experts' own, whose sum takes the place of the
            base's. Of several, separated by commas, those are taken whose merge is nearest to the experts on the
            samples.
        temperature: softens both distributions in the logit alignment.
        confident: leave tokens out of the logit alignment at which the expert is less sure than the merged model, and
            says something else.
        logits_divergence: what the logit alignment makes small, the divergence of Kullback and Leibler from the expert
            (kl, as published), or that of Jensen and Shannon (js), which is the same in both directions and bounded.
        logits_weight: weight of the logit alignment.
        hidden_states_weight: weight of the hidden-state alignment.
        hidden_states_layers: aligned hidden states; 0 is the embeddings' output, N the output of layer N, middle is
            half the number of layers.
        sparsity_reg_weight: weight of the coefficients' distance from their initial value.
    """

    scaling_coefficient: Factor | list[Factor | None] | None = None
    directions: str = "task_vectors"
    temperature: Positive = 1.0
    confident: bool = False
    logits_divergence: Literal["kl", "js"] = "kl"
    logits_weight: NotNegative = 1.0
    hidden_states_weight: NotNegative = 1.0
    hidden_states_layers: Literal["middle", "all", "none"] | list[Annotated[int, Interval("[0, inf)")]] = "middle"
    sparsity_reg_weight: NotNegative = 0.8

    @property
    def asked_directions(self) -> list[tuple[str, Mapping[str, Any] | None]]:
        """See `TrainingOptions.asked_directions`."""
        names = [name.strip() for name in self.directions.split(",")]
        return [(name, None) for name in dict.fromkeys(names)]

    @property
    def regularisation_weight(self) -> float:
        """See `TrainingOptions.regularisation_weight`."""
        return self.sparsity_reg_weight

    def objective(self, layers: int | None) -> Objective:
        """See `TrainingOptions.objective`."""
        from expert_merging.running.objectives import alignment

        aligned = self._aligned_layers(layers)
        if not aligned and self.logits_weight == 0:
            raise InputError(
                "neither logits nor hidden states are aligned, so there is nothing to learn; give --logits_weight or "
                "--hidden_states_weight and --hidden_states_layers a value that is not 0 or none"
            )
        return alignment(
            aligned,
            temperature=self.temperature,
            confident=self.confident,
            symmetric=self.logits_divergence == "js",
            logits_weight=self.logits_weight,
            hidden_states_weight=self.hidden_states_weight,
            slice_tokens=self.logits_chunk_tokens,
        )

    def _aligned_layers(self, count: int | None) -> tuple[int, ...]:
        """Indices of the aligned hidden states: 0 is the embeddings' output, N that of layer N."""
        chosen = self.hidden_states_layers
        if chosen == "none" or self.hidden_states_weight == 0:
            return ()
        if count is None:
            raise InputError(
                "config.json of the base does not say how many layers it has; give --hidden_states_layers none"
            )
        if chosen == "middle":
            return (count // 2,)
        if chosen == "all":
            return tuple(range(1, count + 1))
        outside = [layer for layer in chosen if int(layer) > count]
        if outside:
            raise InputError(f"--hidden_states_layers: the model has {count} layers (0 to {count}), got {outside[0]}")
        return tuple(int(layer) for layer in chosen)


@dataclass(frozen=True, kw_only=True)
class LearningOptions(SplittingOptions, AlignmentOptions):
    """Options of Expert Merging."""


@dataclass(frozen=True, kw_only=True)
class AligningOptions(LearningOptions):
    """Options of `align_merge`: those of Expert Merging with other defaults."""

    directions: str = "svd,aswudi"
    parametrisation: Fineness = "row"
    synthesize: CountOrNone = 100
    held_out: BelowOne = 0.1
    num_epochs: Count = 4
    learning_rate: Positive = 0.02
    loss_tokens: Literal["all", "response"] = "response"
    sparsity_reg_weight: NotNegative = 0.0


@dataclass(frozen=True, kw_only=True)
class DivergingOptions(LearningOptions):
    """Options of DivMerge: those of Expert Merging with other defaults."""

    logits_divergence: Literal["kl", "js"] = "js"
    hidden_states_layers: Literal["middle", "all", "none"] | list[Annotated[int, Interval("[0, inf)")]] = "none"
    sparsity_reg_weight: NotNegative = 0.0

    def usual_coefficient(self, family: float, experts: int) -> float:
        """See `TrainingOptions.usual_coefficient`: that of the mean, as published."""
        del family
        return 1 / max(2, experts)  # a bounded coefficient cannot be 1


@dataclass(frozen=True, kw_only=True)
class ColumnOptions(LearningOptions):
    """Options of DAM: those of Expert Merging with other defaults, and more.

    Args:
        similarity_weight: weight of how alike the coefficients of two experts are, their cosine for each parameter,
            mean over pairs of experts and sum over parameters.
        overlap_weight: weight of how far two experts share inputs, the smaller of their coefficients' magnitudes summed
            over a parameter's inputs, mean over pairs of experts and sum over parameters; published with 1e-5, and off.
    """

    directions: str = "weights"
    parametrisation: Fineness = "column"
    temperature: Positive = 2.0
    hidden_states_layers: Literal["middle", "all", "none"] | list[Annotated[int, Interval("[0, inf)")]] = "none"
    sparsity_reg_weight: NotNegative = 0.0
    learning_rate: Positive = 0.02
    similarity_weight: NotNegative = 0.01
    overlap_weight: NotNegative = 0.0

    def penalty(self) -> Penalty:
        """See `TrainingOptions.penalty`."""
        from expert_merging.learned.penalties import Pairs

        return Pairs(self.regularisation_weight, similarity=self.similarity_weight, overlap=self.overlap_weight)


@dataclass(frozen=True, kw_only=True)
class ChunkingOptions(AlignmentOptions):
    """Options of Expert Merging++.

    Args:
        coefficients: finished run of expert_merging, its coefficients.safetensors or a weight_coeffs.json, to start
            from instead of training the first stage.
        chunking: how many coefficients a parameter has in the second stage, by its importance, 2 for all, or none (one
            each, to compare with).
        budget: with chunking by importance, the upper bound on an expert's coefficients, as a multiple of the number of
            merged parameters.
        kappa: how much more the more important parameters get; 0 spreads the budget evenly, 1 in proportion.
        stage2_init: the second stage starts from the coefficients that the first has learned, or from the initial value
            again; parameters that get no chunk keep it.
        force: take earlier coefficients though they were learned with other weights.
    """

    coefficients: str | None = None
    chunking: Literal["importance", "all", "none"] = "importance"
    budget: Positive = 1.0
    kappa: NotNegative = 1.2
    stage2_init: Literal["learned", "initial"] = "learned"
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class TrimmingOptions(EntropyOptions):
    """Options of AdaMerging++, which learns on task vectors that TIES has trimmed.

    Args:
        density: fraction of the entries that each expert keeps.
    """

    density: Fraction = 0.2

    @property
    def asked_directions(self) -> list[tuple[str, Mapping[str, Any] | None]]:
        """See `TrainingOptions.asked_directions`."""
        return [("trimmed", {"density": self.density})]
