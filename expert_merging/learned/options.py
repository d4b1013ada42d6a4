"""The options that methods share which learn coefficients; read by the command line before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from expert_merging.registry import Count, Interval, NotNegative, Positive


@dataclass(frozen=True, kw_only=True)
class LearningOptions:
    """How coefficients are learned.

    Args:
        scaling_coefficient: initial value of the coefficients, one for all experts or a list with one per expert;
            strictly between 0 and 1.
        data_dir: folder with one calibration file per task, TASK.json.
        samples_per_task: samples taken from each task file, from its beginning.
        samples_per_task_dict: numbers of samples that differ, by task.
        task_expert: expert by task (TASK=EXPERT), for task files that are not called like their expert.
        num_epochs: passes over the samples; stops early after 3 without a better mean loss.
        learning_rate: AdamW's rate at the start of each cosine cycle.
        temperature: softens both distributions in the logit alignment.
        gradient_accumulation_steps: samples per update.
        mixed_precision: type of the weights while learning; auto is bf16 or else fp16 on a GPU and float32 on a CPU.
        sparsity_reg_weight: weight of the coefficients' distance from their initial value.
        hidden_states_layers: aligned hidden states; 0 is the embeddings' output, N the output of layer N, middle is
            half the number of layers.
        hidden_states_weight: weight of the hidden-state alignment.
        loss_alphas: weight of a task in both alignment losses, by task; 1 where none is given.
        task_vector_coeffs_dict: factor on an expert's task vectors, by expert; 1 where none is given.
        coeffs_size_dict: number of chunks with a coefficient of their own, by fnmatch pattern over parameter names; 0
            keeps the initial value, the last matching pattern counts.
        loss_tokens: align on all tokens (as published) or on those that predict the response; the latter helps where
            prompts cannot be predicted.
        max_new_tokens: bound on the length of the responses that experts write where the files have none.
        prompt_template: text with {question} in it; by default the chat template of the base's tokenizer, or the bare
            question where it has none.
    """

    scaling_coefficient: float | list[float] = 0.3
    data_dir: str | None = None
    samples_per_task: Count = 5
    samples_per_task_dict: dict[str, Count] | None = None
    task_expert: dict[str, str] | None = None
    num_epochs: Count = 1
    learning_rate: Positive = 0.5
    temperature: Positive = 1.0
    gradient_accumulation_steps: Count = 8
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    sparsity_reg_weight: NotNegative = 0.8
    hidden_states_layers: Literal["middle", "all", "none"] | list[Annotated[int, Interval("[0, inf)")]] = "middle"
    hidden_states_weight: NotNegative = 1.0
    loss_alphas: dict[str, NotNegative] | None = None
    task_vector_coeffs_dict: dict[str, float] | None = None
    coeffs_size_dict: dict[str, int] | None = None
    loss_tokens: Literal["all", "response"] = "all"
    max_new_tokens: Count = 128
    prompt_template: str | None = None
