"""Options of everything that runs models on samples; read by the command line before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from expert_merging.flags import Count, CountOrNone


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Which samples are asked, and how.

    Args:
        data_dir: folder with one calibration file per task, TASK.json.
        samples_per_task: samples taken from each task file, from its beginning.
        samples_per_task_dict: numbers of samples that differ, by task.
        task_expert: expert by task (TASK=EXPERT), for task files that are not called like their expert.
        mixed_precision: type of the weights while models run; auto is what accelerate launch was told, else bf16 or
            fp16 on a GPU and float32 on a CPU.
        loss_tokens: look at all tokens (as published) or at those that predict the response; the latter helps where
            prompts cannot be predicted.
        max_new_tokens: bound on the length of the responses that experts write where the files have none.
        prompt_template: text with {question} in it, and what ends a turn after {response} if that is not the family's
            end; for all, or by expert or task. By default each expert is asked in its own words, by its chat template
            or a known format, else in the base's.
    """

    data_dir: str | None = None
    samples_per_task: Count = 5
    samples_per_task_dict: dict[str, Count] | None = None
    task_expert: dict[str, str] | None = None
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    loss_tokens: Literal["all", "response"] = "all"
    max_new_tokens: Count = 128
    prompt_template: dict[str, str] | str | None = None


@dataclass(frozen=True, kw_only=True)
class ComparingOptions(SampleOptions):
    """How models are compared with the experts.

    Args:
        synthesize: further questions per task, each the beginning of one of its questions and the rest of another, with
            some pieces from elsewhere in them.
        batch_tokens: tokens, padding included, that go through a model together; a sample that has more goes alone. By
            default at most 2048, and as many as take a tenth of the device's memory while learning.
    """

    synthesize: CountOrNone = 0
    batch_tokens: Count | None = None
