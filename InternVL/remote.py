"""InternVL by the code that a checkpoint brings, for variants that transformers' own classes do not cover.

Nothing here runs unless the user asks for it with ``--trust_remote_code``.
"""

from __future__ import annotations

import functools
import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_merging.backbone import import_transformers
from expert_merging.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

# What the published code imports besides torch and transformers.
_PACKAGES = ("torchvision", "timm", "einops")


@functools.cache
def warn(folder: Path) -> None:
    """Say once which files of a folder will be executed."""
    scripts = sorted(file.name for file in folder.glob("*.py"))
    logger.warning("--trust_remote_code: executing %s of %s", ", ".join(scripts) or "no file", folder)


def load(folder: Path, dtype: torch.dtype, image_token: int) -> Any:
    """The model of the checkpoint's own class, in evaluation mode.

    Args:
        folder: the checkpoint.
        dtype: type of the weights in memory.
        image_token: id of the token that stands for picture features.

    Raises:
        InputError: its code does not run here.
    """
    warn(folder)
    transformers = import_transformers()
    try:
        model = transformers.AutoModel.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=True
        )
    except ImportError as error:
        missing = [name for name in _PACKAGES if not _imports(name)]
        raise InputError(
            f"{folder}: its code needs packages that do not import here ({', '.join(missing) or error}); install them "
            "(a torchvision that fits torch among them), or leave out --trust_remote_code"
        ) from error
    except Exception as error:
        raise InputError(
            f"{folder}: its code does not run with transformers {transformers.__version__}: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    return _adapted(model, image_token).eval()


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
