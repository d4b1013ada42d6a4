"""What ``--run_tests`` does: a merged model answers its family's test questions."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from expert_merging.asking import Formats
from expert_merging.context import Context
from expert_merging.running.generating import generate
from expert_merging.running.prompts import end_tokens, place

logger = logging.getLogger(__name__)


def ask_questions(context: Context, folder: Path, formats: Formats) -> None:
    """Let a merged model answer, and write questions and answers to the log.

    Args:
        context: the run.
        folder: the model.
        formats: in whose words it is asked.
    """
    plan, backbone, device = context.plan, context.backbone, context.device
    logger.info("questions to  %s", folder)
    processor = backbone.load_processor(folder)
    dtype = torch.float32 if device == "cpu" else plan.base.entries[plan.merged[0]].torch_dtype
    model = backbone.load_model(folder, dtype).to(device)
    for sample in backbone.test_questions:
        asked = formats.of(sample)
        inputs = place(backbone.encode_prompt(processor, sample, asked), torch.device(device), dtype)
        ((answer, _),) = generate(model, processor, [inputs], 128, end_tokens(processor, asked.end)[:1])
        pictures = "".join(f" [{picture.name}]" for picture in sample.images)
        logger.info("question: %s%s", sample.question, pictures)
        for number, line in enumerate(answer.strip().split("\n")):
            logger.info("%-8s  %s", "" if number else "answer:", line)
