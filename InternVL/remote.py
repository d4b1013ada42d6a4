"""InternVL by the code that a checkpoint brings, for variants that transformers' own classes do not cover.

Nothing here runs unless the user asks for it with ``--trust_remote_code``.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_merging.errors import InputError
from expert_merging.libraries import import_transformers
from expert_merging.shortage import shortage_of
from InternVL.layout import read_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(f"expert_merging.{__name__}")  # below the logger that the command shows

# What the published code imports besides torch and transformers.
_PACKAGES = ("torchvision", "timm", "einops")


@functools.cache
def _warn(folder: Path) -> None:
    """Say once which files of a folder will be executed."""
    scripts = sorted(file.name for file in folder.glob("*.py"))
    logger.warning("--trust_remote_code: executing %s of %s", ", ".join(scripts) or "no file", folder)


def check_code(folder: Path) -> None:
    """Check that a folder has the files of code that its ``config.json`` names; those in other repositories are not.

    Raises:
        InputError: one is missing.
    """
    named = read_config(folder).get("auto_map") or {}
    files = {f"{name.split('.')[0]}.py" for name in named.values() if isinstance(name, str) and "--" not in name}
    missing = sorted(file for file in files if not (folder / file).is_file())
    if missing:
        raise InputError(
            f"{folder} lacks {', '.join(missing)}, which its config.json names as the model's code; download it again"
        )


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """Around everything that executes code of a folder.

    Raises:
        InputError: the code does not run here.
    """
    _warn(folder)
    try:
        yield
    except ImportError as error:
        missing = [name for name in _PACKAGES if not _imports(name)]
        raise InputError(
            f"{folder}: its code does not import: {_first_line(error)}. Not installed or not working here: "
            f"{', '.join(missing) or 'none of its usual packages'}; install a version that fits torch"
        ) from error
    except Exception as error:  # what foreign code raises cannot be foreseen
        if shortage_of(error) is not None:
            raise
        version = import_transformers().__version__
        raise InputError(
            f"{folder}: its code does not run with transformers {version}: {_first_line(error)}"
        ) from error


def load(folder: Path, dtype: torch.dtype, image_token: int) -> Any:
    """The model of the checkpoint's own class, in evaluation mode.

    Args:
        folder: the checkpoint.
        dtype: type of the weights in memory.
        image_token: id of the token that stands for picture features.
    """
    with running(folder):
        model = import_transformers().AutoModel.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=True
        )
        return _adapted(model, image_token).eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer, of the checkpoint's own class if it has one."""
    with running(folder):
        return import_transformers().AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=True
        )


def _first_line(error: Exception) -> str:
    return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # noqa: BLE001  (whatever keeps it from loading, it is of no use)
        return False
    return True


def _adapted(model: Any, image_token: int) -> Any:
    """The model with the calls of a transformers model, which the original class has in other forms."""
    import torch

    class Adapted(type(model)):  # type: ignore[misc]
        @property
        def base_model(self) -> Any:
            return functools.partial(_decode, self)

        def get_output_embeddings(self) -> Any:
            return self.language_model.get_output_embeddings()

        def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
            # The original gives the new tokens alone.
            return torch.cat([input_ids, super().generate(input_ids=input_ids, **options)], dim=1)

    model.__class__ = Adapted
    model.img_context_token_id = image_token
    model.generation_config = model.language_model.generation_config
    return model


def _decode(
    model: Any, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor | None = None, **options: Any
) -> Any:
    """The language model's outputs before its head, with picture features in their places."""
    embeddings = model.language_model.get_input_embeddings()(input_ids)
    if pixel_values is not None:
        places = (input_ids == model.img_context_token_id)[..., None]
        features = model.extract_feature(pixel_values)
        embeddings = embeddings.masked_scatter(places, features.to(embeddings.dtype))
    return model.language_model.base_model(inputs_embeds=embeddings, attention_mask=attention_mask, **options)
