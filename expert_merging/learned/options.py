"""The options of methods that learn coefficients; read by the command line before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from expert_merging.flags import Count, Fraction, Interval, NotNegative, Positive
from expert_merging.running.options import SampleOptions


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(SampleOptions):
    """How coefficients are trained on samples.

    Args:
        scaling_coefficient: initial value of the coefficients, one for all experts or a list with one per expert;
            strictly between 0 and 1.
        num_epochs: passes over the samples; stops early after 3 without a better mean loss.
        learning_rate: AdamW's rate at the start of each cosine cycle.
        gradient_accumulation_steps: samples per update.
        task_vectors: where base and experts are kept in their own type while learning: on the device, in host memory,
            or on disk alone, read whenever they are needed; auto takes the first of these with room, tensor by tensor.
        rank_batches: turn weight gradients into coefficients' gradients after every sample, which takes least memory,
            or once per update, which reads the task vectors least often; auto decides by free memory.
        shard: split base, merged weights and task vectors over the processes of the run, for models that no device has
            room for; also the experts while they are asked.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        logits_chunk_tokens: tokens whose logits are held at a time; by default as many as fit into 64 MiB.
        loss_alphas: weight of a task in the losses, by task; 1 where none is given.
        task_vector_coeffs_dict: factor on an expert's task vectors, by expert; 1 where none is given.
    """

    scaling_coefficient: float | list[float] = 0.3
    num_epochs: Count = 1
    learning_rate: Positive = 0.5
    gradient_accumulation_steps: Count = 8
    task_vectors: Literal["auto", "device", "host", "disk"] = "auto"
    rank_batches: Literal["auto", "sample", "update"] = "auto"
    shard: bool = False
    gradient_checkpointing: bool = False
    logits_chunk_tokens: Count | None = None
    loss_alphas: dict[str, NotNegative] | None = None
    task_vector_coeffs_dict: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class AlignmentOptions(TrainingOptions):
    """How the merged model is aligned with the experts.

    Args:
        temperature: softens both distributions in the logit alignment.
        logits_weight: weight of the logit alignment.
        hidden_states_weight: weight of the hidden-state alignment.
        hidden_states_layers: aligned hidden states; 0 is the embeddings' output, N the output of layer N, middle is
            half the number of layers.
        sparsity_reg_weight: weight of the coefficients' distance from their initial value.
    """

    temperature: Positive = 1.0
    logits_weight: NotNegative = 1.0
    hidden_states_weight: NotNegative = 1.0
    hidden_states_layers: Literal["middle", "all", "none"] | list[Annotated[int, Interval("[0, inf)")]] = "middle"
    sparsity_reg_weight: NotNegative = 0.8


@dataclass(frozen=True, kw_only=True)
class LearningOptions(AlignmentOptions):
    """Options of Expert Merging.

    Args:
        coeffs_size_dict: number of chunks with a coefficient of their own, by fnmatch pattern over parameter names; 0
            keeps the initial value, the last matching pattern counts.
    """

    coeffs_size_dict: dict[str, int] | None = None


@dataclass(frozen=True, kw_only=True)
class ChunkingOptions(AlignmentOptions):
    """Options of Expert Merging++.

    Args:
        coefficients: finished run of expert_merging, or its coefficients.safetensors, to start from instead of training
            the first stage.
        chunking: how many coefficients a parameter has in the second stage, by its importance, 2 for all, or none (one
            each, to compare with).
        budget: with chunking by importance, the upper bound on an expert's coefficients, as a multiple of the number of
            merged parameters.
        kappa: how much more the more important parameters get; 0 spreads the budget evenly, 1 in proportion.
        stage2_init: the second stage starts from the coefficients that the first has learned, or from the initial value
            again; parameters that get no chunk keep it.
    """

    coefficients: str | None = None
    chunking: Literal["importance", "all", "none"] = "importance"
    budget: Positive = 1.0
    kappa: NotNegative = 1.2
    stage2_init: Literal["learned", "initial"] = "learned"


@dataclass(frozen=True, kw_only=True)
class TrimmingOptions(TrainingOptions):
    """Options of AdaMerging++, which learns on task vectors that TIES has trimmed.

    Args:
        density: fraction of the entries that each expert keeps.
    """

    density: Fraction = 0.2
