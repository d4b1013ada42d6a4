"""The Mistral family: Mistral-7B-v0.1 and its Chat, Math and Code experts.

Everything here works for any causal language model that transformers loads without remote code, so other bases can be
given with ``--base_model_path`` and ``--expert``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_merging import stored
from expert_merging.backbone import (
    Backbone,
    Evaluation,
    load_tokenizer,
    load_whole,
)
from expert_merging.checkpoints.reading import reading
from expert_merging.errors import InputError, first_line
from expert_merging.libraries import import_transformers
from expert_merging.questions.calibration import Sample
from expert_merging.questions.formats import Asking, Format
from expert_merging.questions.templates import template_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """The causal language model of the folder, in evaluation mode.

    Raises:
        InputError: the folder lacks a tensor of the model, or has one of another shape.
    """
    return load_whole("AutoModelForCausalLM", folder, dtype)


def parameter_names(folder: Path) -> list[str]:
    """Names of the model's parameters in memory, from ``config.json`` alone.

    Raises:
        InputError: transformers has no causal language model for it, or only with code from the folder.
    """
    automatic = import_transformers().AutoConfig
    with reading(folder, "configuration"):
        try:
            config = automatic.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            return stored.parameter_names("AutoModelForCausalLM", config)
        except ValueError as error:
            raise InputError(
                f"{folder} is no causal language model that transformers knows, and code of checkpoints is not "
                f"executed: {first_line(error)}"
            ) from None


def load_processor(folder: Path) -> Any:
    """The tokenizer of the folder."""
    return load_tokenizer(folder)


def encode_prompt(tokenizer: Any, sample: Sample, asked: Format | None) -> dict[str, Tensor]:
    """Tokens of the prompt, ``(1, tokens)``.

    Args:
        tokenizer: the base's.
        sample: the question.
        asked: how it is asked; None for the tokenizer's chat template, or the question as it is where it has none.

    Raises:
        InputError: the chat template cannot be used for it.
    """
    import torch

    asked = asked or ASKING.format_of(template_of(tokenizer))
    try:
        text = asked.prompt(sample.question)
    except InputError as error:
        raise InputError(f"{sample.place}: {error}") from None
    tokens = tokenizer(text, add_special_tokens=asked.adds_special_tokens)["input_ids"]
    return {"input_ids": torch.tensor([tokens]), "attention_mask": torch.ones(1, len(tokens), dtype=torch.long)}


ASKING = Asking(
    known={
        "Mistral-7B-Instruct-v0.1": Format("the format of Mistral-7B-Instruct-v0.1", "[INST] {question} [/INST]"),
        # As its authors evaluate it, without their examples.
        "MAmmoTH2-7B": Format(
            "the format of MAmmoTH2-7B",
            "You are supposed to provide a solution to a given problem.\n\n\nProblem:\n{question}\n"
            "Solution: Let's think step by step.\n",
        ),
        "Mistral-7B-codealpaca-lora": Format(
            "the format of Mistral-7B-codealpaca-lora (Alpaca)",
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\n{question}\n\n### Response:",
        ),
    },
    vocabulary=32000,
)

BACKBONE = Backbone(
    name="Mistral",
    base_folder="Mistral-7B-v0.1",
    expert_folders={
        "Chat": "Mistral-7B-Instruct-v0.1",
        "Math": "MAmmoTH2-7B",
        "Code": "Mistral-7B-codealpaca-lora",
    },
    exclude_params=(".*lm_head.*", ".*norm.*", ".*embed_tokens.*", ".*bias.*"),
    defaults={"scaling_coefficient": 0.3, "samples_per_task": 5, "sparsity_reg_weight": 0.8},
    load_model=load_model,
    parameter_names=parameter_names,
    load_processor=load_processor,
    encode_prompt=encode_prompt,
    asking=ASKING,
    test_questions=(
        Sample.test("In two sentences, why does the sea look blue?", expert="Chat"),
        Sample.test("A train covers 180 km in 2.5 hours. What is its mean speed in km/h?", expert="Math"),
        Sample.test("Write a Python function that returns the second largest number of a list.", expert="Code"),
    ),
    evaluation={
        "": Evaluation(
            by_expert={
                "Math": "lm_eval --model hf --model_args pretrained={model} --tasks gsm8k --batch_size auto",
                # Runs what the model writes, which takes two permissions.
                "Code": "HF_ALLOW_CODE_EVAL=1 lm_eval --model hf --model_args pretrained={model} "
                "--tasks humaneval,mbpp --batch_size auto --confirm_run_unsafe_code",
            },
            otherwise="lm_eval --model hf --model_args pretrained={model} --batch_size auto --tasks TASKS  "
            "# what your experts do; lm_eval ls tasks lists all",
        )
    },
)
