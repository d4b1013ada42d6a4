"""Finished models that are ready to be asked: their families, their words, and what loads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from expert_merging.asking import Formats, check_given
from expert_merging.backbone import Backbone
from expert_merging.checkpoints.adapter_files import is_adapter
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.checkpoints.configurations import language_setting
from expert_merging.checkpoints.folders import required_object
from expert_merging.comparing.compare import Compared
from expert_merging.comparing.words import words_of
from expert_merging.errors import InputError, Problems, about
from expert_merging.families import family_names, load_family
from expert_merging.processes import choose_device
from expert_merging.questions.labelled import Question
from expert_merging.running.prompts import Prompts
from expert_merging.workers import fitting_threads


@dataclass(frozen=True)
class Asked:
    """A model that is ready to be asked.

    Args:
        model: the model.
        backbone: its family, with the settings of its run.
        formats: in whose words it is asked.
        processor: its tokenizer or processor.
        dtype: type of its weights.
        longest: tokens that it takes; None where that is not known.
    """

    model: Compared
    backbone: Backbone
    formats: Formats
    processor: Any
    dtype: Any
    longest: int | None


def family_of(model: Compared, family: str | None) -> Backbone:
    """The family of a model, with the settings of its run.

    Args:
        model: the model.
        family: that of models that no run has made; None for what their ``config.json`` says.

    Raises:
        InputError: there is no such family, or the model is an adapter.
    """
    if is_adapter(model.folder):
        raise InputError(f"{model.folder} is an adapter; give the model that it makes, such as a merge of it alone")
    if model.record is not None:
        backbone = load_family(model.record["family"])
        given = model.record["options"]
        return backbone.configured({name: given[name] for name in backbone.options if name in given})
    if family is not None:
        return load_family(family)
    kind = required_object(model.folder / "config.json").get("model_type")
    known = [
        backbone
        for backbone in map(load_family, family_names())
        if "" in backbone.evaluation or kind in backbone.evaluation
    ]
    return next((backbone for backbone in known if kind in backbone.evaluation), known[0])


def ready(
    compared: Sequence[Compared],
    backbones: Sequence[Backbone],
    words: str | Mapping[str, str] | None,
    questions: Sequence[Question] = (),
) -> list[Asked]:
    """The models with what asks them; all that can be wrong is told before the first is loaded.

    Args:
        compared: the models.
        backbones: their families.
        words: ``--prompt_template``.
        questions: what they will be asked.

    Raises:
        InputError: every model that cannot be asked, and why.
    """
    problems, found = Problems(), list[Asked]()
    problems.found += check_given(words, dict.fromkeys(words if isinstance(words, Mapping) else ()), set())
    checked: set[str] = set()
    for model, backbone in zip(compared, backbones, strict=True):
        with problems.collecting(), about(model.label):
            found.append(_prepared(model, backbone, words, questions, checked))
    problems.check()
    return found


def _prepared(
    model: Compared,
    backbone: Backbone,
    words: str | Mapping[str, str] | None,
    questions: Sequence[Question],
    checked: set[str],
) -> Asked:
    """A model with what asks it; its prompts are checked unless another model has the same."""
    checkpoint = Checkpoint(model.folder)
    with_picture = next((one.sample for one in questions if one.sample.images), None)
    if with_picture is not None and not backbone.takes_images:
        raise InputError(f"{with_picture.place} has a picture, and {backbone.name} is a language model")
    formats = words_of(backbone, checkpoint, model.record, words)
    prompts = Prompts(backbone, checkpoint, formats, keeps=False)
    longest = language_setting(checkpoint.config, "max_position_embeddings")
    key = f"{backbone.name} {formats.digest} {longest}"
    if key not in checked:
        prompts.check([one.sample for one in questions])
        checked.add(key)
    dtype = next(entry.torch_dtype for entry in checkpoint.entries.values() if entry.is_float)
    return Asked(model, backbone, formats, prompts.processor, dtype, longest)


def load(asked: Asked, device: str) -> Any:
    """The model on a device."""
    return asked.backbone.load_model(asked.model.folder, asked.dtype).to(choose_device(device))


@contextmanager
def loaded(asked: Asked, device: str) -> Iterator[Any]:
    """The model on a device, with as many threads as serve it; it is released afterwards."""
    model = load(asked, device)
    with fitting_threads(model.num_parameters()):
        yield model
