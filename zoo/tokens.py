"""Tokenizers of small models: one that reads characters, and Qwen2's, which reads bytes, in its published files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_merging.libraries import import_transformers
from expert_merging.writing import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_ROLES = ("eos_token", "pad_token", "additional_special_tokens")


def character_tokenizer(
    vocabulary: Mapping[str, int], special: Sequence[str], *, words: Sequence[str] = (), **settings: Any
) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for every character, of which decoding adds no blanks.

    Args:
        vocabulary: number of every token.
        special: tokens that decoding may skip.
        words: longer tokens of ordinary text.
        settings: of `transformers.PreTrainedTokenizerFast`; a ``bos_token`` comes before every text.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    backend = Tokenizer(models.WordLevel(dict(vocabulary), unk_token=settings["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    start = settings.get("bos_token")
    if start is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", pair=f"{start} $A $B", special_tokens=[(start, vocabulary[start])]
        )
    backend.add_special_tokens(list(special))
    backend.add_tokens([AddedToken(word, normalized=False) for word in words])
    return import_transformers().PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def save_slow_tokenizer(
    folder: Path,
    vocabulary: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    special: Mapping[str, int],
    settings: Mapping[str, Any],
) -> None:
    """Write a Qwen2 tokenizer as folders published before fast tokenizers have it.

    Args:
        folder: where the model is.
        vocabulary: number of every byte and of what bytes are joined to.
        merges: the pairs that are joined, in their order.
        special: number of every special token.
        settings: entries of ``tokenizer_config.json``.
    """
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    described = {str(number): {"content": token, **plain} for token, number in special.items()}
    files = {
        "vocab.json": vocabulary,
        "added_tokens.json": special,
        "special_tokens_map.json": {role: settings[role] for role in _ROLES if role in settings},
        "tokenizer_config.json": {
            **settings,
            "added_tokens_decoder": described,
            "tokenizer_class": "Qwen2Tokenizer",
        },
    }
    for name, content in files.items():
        write_atomically(folder / name, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())
    joined = "".join(f"{first} {second}\n" for first, second in merges)
    write_atomically(folder / "merges.txt", f"#version: 0.2\n{joined}".encode())
