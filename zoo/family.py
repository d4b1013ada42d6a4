"""What building a zoo asks of a model family: a frozen record of names, numbers and functions.

Everything else (training, building, evaluating, the command line) is shared by all families. Adding a family is adding
a module with a ``FAMILY`` and naming it in ``FAMILY_MODULES``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_merging.backbone import Backbone
from expert_merging.errors import InputError, near_name

if TYPE_CHECKING:
    from torch import Tensor

FAMILY_MODULES = {
    "mistral": "zoo.mistral",
    "internvl": "zoo.internvl",
    "qwen2vl": "zoo.qwen2vl",
    "smollm2": "zoo.smollm2",
}
ZOO_ROOT = Path(__file__).parent / "models"

Batch = dict[str, "Tensor"]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast one model is trained.

    Attributes:
        steps: Optimizer steps.
        learning_rate: Highest learning rate of AdamW.
        warmup_steps: Steps in which the rate rises linearly from zero.
        decay_steps: Last steps, in which it falls linearly to zero.
        batch_size: Questions in a step.
        frozen: Regular expressions (``re.match``) of parameter names in the files that stay as they are.
    """

    steps: int
    learning_rate: float
    warmup_steps: int
    decay_steps: int
    batch_size: int = 64
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A model family: one base and one expert per task.

    Attributes:
        name: Name on the command line.
        backbone: The family as the merge command knows it; it names folders and experts and loads models.
        base_schedule: How the base is trained.
        expert_schedules: How the expert for each task is fine-tuned.
        new_model: Makes an untrained model; the random generator of torch is already seeded.
        save: Writes a model with its tokenizer or processor into a new folder.
        batches: Endless batches with ``labels`` for a task (``None``: the mixture that the base learns), seed and
            batch size.
        write_data: Writes ``dataset/`` and ``test/`` below a folder, for a seed.
        large: Trained in bfloat16, on all processors or a GPU, going on within a model after an interruption.
    """

    name: str
    backbone: Backbone
    base_schedule: Schedule
    expert_schedules: Mapping[str, Schedule]
    new_model: Callable[[], Any]
    save: Callable[[Any, Path], None]
    batches: Callable[[str | None, int, int], Iterator[Batch]]
    write_data: Callable[[Path, int], None]
    large: bool = False

    def places(self, zoo: Path) -> list[str]:
        """Arguments that tell the merge command where the models of a zoo are."""
        published: Backbone = importlib.import_module(f"{self.backbone.name}.backbone").BACKBONE
        if self.backbone.expert_folders == published.expert_folders:
            return ["--cache_dir", str(zoo)]
        experts = [f"{task}={zoo / folder}" for task, folder in self.backbone.expert_folders.items()]
        named = [word for expert in experts for word in ("--expert", expert)]
        return ["--base_model_path", str(zoo / self.backbone.base_folder), *named]


def default_folder(family_name: str, seed: int) -> Path:
    """Where a zoo is built unless the user names another folder."""
    return ZOO_ROOT / f"{family_name}-seed{seed}"


def load_family(name: str) -> Family:
    """Import the family called ``name``.

    Raises:
        InputError: There is none; the message gives the allowed names.
    """
    if name not in FAMILY_MODULES:
        raise InputError(f"there is no zoo family {name!r}. {near_name(name, list(FAMILY_MODULES))}")
    family: Family = importlib.import_module(FAMILY_MODULES[name]).FAMILY
    return family
