"""The Mistral family: Mistral-7B-v0.1 and its Chat, Math and Code experts.

Everything here works for any causal language model that transformers loads without remote code, so other bases can be
given with ``--base_model_path`` and ``--expert``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_merging.backbone import Backbone, import_transformers

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from expert_merging.calibration import Sample


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """The causal language model of the folder, in evaluation mode."""
    transformers = import_transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True
    )
    return model.eval()


def load_processor(folder: Path) -> Any:
    """The tokenizer of the folder."""
    return import_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)


def encode_prompt(tokenizer: Any, sample: Sample, template: str | None) -> dict[str, Tensor]:
    """Tokens of the prompt, ``(1, tokens)``.

    Made by the given template, else by the tokenizer's chat template, else of the bare question.
    """
    import torch

    if template is not None:
        tokens = tokenizer(template.replace("{question}", sample.question))["input_ids"]
    elif getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": sample.question}], tokenize=False, add_generation_prompt=True
        )
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        tokens = tokenizer(sample.question)["input_ids"]
    return {"input_ids": torch.tensor([tokens]), "attention_mask": torch.ones(1, len(tokens), dtype=torch.long)}


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
    load_processor=load_processor,
    encode_prompt=encode_prompt,
    test_questions=(
        "In two sentences, why does the sea look blue?",
        "A train covers 180 km in 2.5 hours. What is its mean speed in km/h?",
        "Write a Python function that returns the second largest number of a list.",
    ),
    evaluation="lm_eval --model hf --model_args pretrained={model} --tasks gsm8k,humaneval,mbpp --batch_size auto",
)
