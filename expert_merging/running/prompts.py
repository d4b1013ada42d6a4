"""Prompts of samples as model inputs, each made once a run and checked once.

Decoding a prompt's pictures and cutting them to the model's tiles or patches takes longer than all else about it
(150 ms on one core for twelve of InternVL's tiles). So what the checks of a run have made is kept until an expert is
asked, and given away then: the targets hold it from there on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expert_merging.asking import Formats
from expert_merging.backbone import Backbone
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.checkpoints.configurations import language_setting
from expert_merging.errors import InputError, Problems
from expert_merging.questions.calibration import Sample, entry_place


class Prompts:
    """Model inputs of samples' prompts.

    Args:
        backbone: the model family.
        base: the checkpoint whose tokenizer or processor makes them.
        formats: in whose words they are asked.
        keeps: `check` keeps what it makes; without, it is made again where a sample is asked.
    """

    def __init__(self, backbone: Backbone, base: Checkpoint, formats: Formats, *, keeps: bool = True) -> None:
        self.backbone, self.base, self.formats, self.keeps = backbone, base, formats, keeps
        self.processor = backbone.load_processor(base.folder)
        self._made: dict[Sample, Mapping[str, Tensor]] = {}

    def check(self, samples: Sequence[Sample]) -> list[int]:
        """Check that every sample can be encoded and fits into the model's context with its response.

        Returns:
            Tokens of each sample's prompt and response; one for a response that is still to be written.

        Raises:
            InputError: every problem found.
        """
        problems, lengths = Problems(), []
        for sample in samples:
            with problems.collecting():
                inputs = self._make(sample)
                given = 1 if sample.response is None else len(self.response_tokens(sample))
                lengths.append((sample, inputs["input_ids"].shape[1] + given))
                if self.keeps:
                    self._made[sample] = inputs
        with problems.collecting():
            check_lengths(self.base, self.backbone, lengths)
        problems.check()
        return [length for _, length in lengths]

    def get(self, sample: Sample) -> Mapping[str, Tensor]:
        """Inputs of a prompt that will be asked for once more, batch of one."""
        if sample not in self._made:
            self._made[sample] = self._make(sample)
        return self._made[sample]

    def take(self, sample: Sample) -> Mapping[str, Tensor]:
        """Inputs of a prompt, batch of one, which are forgotten here."""
        return self._made.pop(sample) if sample in self._made else self._make(sample)

    def end_tokens(self, sample: Sample) -> list[int]:
        """Tokens that end the model's turn after the sample's response."""
        return end_tokens(self.processor, self.formats.of(sample).end)

    def response_tokens(self, sample: Sample) -> list[int]:
        """Tokens of a sample's response and of the turn's end.

        What an expert has written stays as it is. Where it has come to its end, the rest of the turn's end follows,
        such as a line break; where it was cut off, nothing does.
        """
        end = self.end_tokens(sample)
        if sample.tokens is None:
            tokenizer = tokenizer_of(self.processor)
            return [*tokenizer(sample.response or "", add_special_tokens=False)["input_ids"], *end]
        written = list(sample.tokens)
        begun = next((count for count in range(len(end), 0, -1) if written[-count:] == end[:count]), len(end))
        return [*written, *end[begun:]]

    def _make(self, sample: Sample) -> Mapping[str, Tensor]:
        return self.backbone.encode_prompt(self.processor, sample, self.formats.of(sample))


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def end_tokens(processor: Any, end: str | None) -> list[int]:
    """Tokens that end a turn.

    Args:
        processor: a tokenizer, or what has one.
        end: the text that ends it; None for the tokenizer's end token, if there is one.
    """
    tokenizer = tokenizer_of(processor)
    if end is None:
        return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(tokenizer(end, add_special_tokens=False)["input_ids"])


def check_lengths(base: Checkpoint, backbone: Backbone, lengths: Sequence[tuple[Sample, int]]) -> None:
    """Check that the model has positions for so many tokens.

    Args:
        base: the checkpoint that says how many it has.
        backbone: the model family, for what makes samples shorter.
        lengths: samples, with the tokens of prompt and response.

    Raises:
        InputError: it has not; one problem for each file.
    """
    most = language_setting(base.config, "max_position_embeddings")
    long: dict[Path | None, list[tuple[Sample, int]]] = {}
    for sample, tokens in lengths:
        if most is not None and tokens > most:
            long.setdefault(sample.file, []).append((sample, tokens))
    problems = []
    for file, found in long.items():
        several = len(found) > 1
        place = entry_place(file, [sample.number for sample, _ in found]) if file else found[0][0].place
        tokens = max(tokens for _, tokens in found)
        flags = backbone.picture_bounds if any(sample.images for sample, _ in found) else ()
        flags += ("max_new_tokens",) if any(sample.tokens for sample, _ in found) else ()
        lower = " or lower " + " or ".join(f"--{flag}" for flag in flags) if flags else ""
        problems.append(
            f"{place}: prompt and response have {'up to ' if several else ''}{tokens} tokens and the model takes "
            f"at most {most}; shorten the sample{'s' if several else ''}{lower}"
        )
    if problems:
        raise InputError(*problems)


def with_response(inputs: Mapping[str, Tensor], response: Sequence[int]) -> dict[str, Tensor]:
    """Model inputs of a prompt and the response that follows it.

    Args:
        inputs: inputs of the prompt, batch of one; those with a number per token get zeros for the response.
        response: tokens.
    """
    prompt = inputs["input_ids"]
    added = torch.tensor([response], dtype=torch.long)
    extended = {
        name: torch.cat([value, value.new_zeros(added.shape)], dim=1)
        for name, value in inputs.items()
        if value.shape == prompt.shape and not value.is_floating_point()
    }
    tokens = torch.cat([prompt, added], dim=1)
    return {**inputs, **extended, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def place(inputs: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Model inputs on a device, pictures in the type of the weights."""
    return {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in inputs.items()
    }
