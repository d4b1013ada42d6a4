"""In whose words a finished model is asked: those that its run has recorded, else its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expert_merging.asking import GIVEN, TASK, Formats
from expert_merging.backbone import Backbone
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.checkpoints.configurations import language_setting
from expert_merging.errors import InputError
from expert_merging.questions.formats import Format
from expert_merging.questions.templates import read_template


def words_of(
    backbone: Backbone,
    model: Checkpoint,
    record: Mapping[str, Any] | None = None,
    given: str | Mapping[str, str] | None = None,
) -> Formats:
    """How a model is asked.

    Questions of an expert's task are put in the expert's words, as the run has recorded them; all others in those that
    the model's own folder asks for.

    Args:
        backbone: the model family.
        model: the model.
        record: ``config.json`` of its run; None for a model that no run has made.
        given: a text with ``{question}`` in it for all, or texts by task, which count before everything else.

    Raises:
        InputError: the run's record is damaged, or the folder's chat template cannot be read.
    """
    end = backbone.asking.end
    if isinstance(given, str):
        return Formats(Format.of_text(GIVEN, given, end))
    try:
        asking = (record or {}).get("asking", {})
        named = {str(name): Format.of_record(one) for name, one in asking.get("formats", {}).items()}
    except (KeyError, TypeError, AttributeError):
        raise InputError(
            f"the config.json of the run that made {model.folder} does not say how its models were asked; give {GIVEN}"
        ) from None
    experts = {name: one for name, one in named.items() if not name.startswith(TASK)}
    told = (record or {}).get("options", {}).get("task_expert") or {}
    tasks = {task: experts[expert] for task, expert in told.items() if expert in experts}
    tasks |= {name.removeprefix(TASK): one for name, one in named.items() if name.startswith(TASK)}
    tasks |= {name: Format.of_text(GIVEN, text, end) for name, text in (given or {}).items()}
    return Formats(_own(backbone, model), experts, tasks)


def _own(backbone: Backbone, model: Checkpoint) -> Format:
    """How a model's folder asks to be asked."""
    asking = backbone.asking
    template = read_template(model.folder) if asking.reads_templates else None
    known = asking.known_format(model.folder, language_setting(model.config, "vocab_size"))
    usable = template is not None and asking.fault(template) is None
    return known if known and not usable else asking.format_of(template)
