"""A merged adapter as peft has it: its configuration, and names and shapes of its tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expert_merging.card import CARD
from expert_merging.checkpoints.adapter_files import CONFIG
from expert_merging.checkpoints.folders import ADAPTER, required_object
from expert_merging.checkpoints.lora import Change, Matrix
from expert_merging.errors import Problems, first_of
from expert_merging.low_rank.changes import Changes
from expert_merging.low_rank.factors import Factors
from expert_merging.outputs import Made, Output, Slot

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "base_model.model."
_ROLE = ".lora_"


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter with one product of two factors for each tensor.

    Args:
        changes: what the experts change; tensors are named as in the first expert that has them.
        ranks: rank of each tensor's factors.
    """

    changes: Changes
    ranks: Mapping[str, int]

    def check(self) -> None:
        """Check that an adapter has a place for everything.

        Raises:
            InputError: something is trained that is no product of factors, or experts name or turn it differently.
        """
        problems = Problems()
        if self.changes.others:
            problems.add(
                f"--output adapter: {first_of(self.changes.others, 2)} is trained otherwise than by two factors, which "
                "a merged adapter has no place for; exclude it (--exclude_params), or write a dense model"
            )
        if differing := self._named_differently():
            problems.add(
                f"--output adapter: {differing} differently, as different versions of transformers do; save them again "
                "with one version, or write a dense model"
            )
        problems.check()

    def _named_differently(self) -> str:
        """Whose names do not go together, and of what; empty where there is one model that has them all."""
        for name, found in self.changes.products.items():
            if len({tuple(matrix.entry.name for matrix in _pair(change)) for change in found.values()}) > 1:
                return f"{' and '.join(found)} name the factors of {name}"
        # Of adapters that share no tensor, one has the names of the base's files, and another those in memory.
        renaming: dict[str, bool] = {}
        for name, found in self.changes.products.items():
            for expert, change in found.items():
                is_renamed = f"{_module(_pair(change)[0])}.weight" != name
                renaming[expert] = renaming.get(expert, False) or is_renamed
        named = [expert for expert in self.changes.adapters if expert in renaming]
        return "" if len({*renaming.values()}) == 1 else f"{' and '.join(named)} name their modules"

    def output(self, card: str) -> Output:
        """The adapter's folder.

        Args:
            card: text of its ``README.md``.
        """
        slots = [slot for name in self.ranks for slot in self._slots(name)]
        text = json.dumps(self._config(), indent=2) + "\n"
        return Output({ADAPTER: tuple(slots)}, is_model=False, beside={CONFIG: text.encode(), CARD: card.encode()})

    def tensors(self, name: str, factors: Factors) -> Iterator[tuple[str, Tensor]]:
        """Both factors of a tensor as they are stored, by name."""
        padded = factors.cut(self.ranks[name]).padded(self.ranks[name])
        for matrix, slot, tensor in zip(
            self._matrices(name), self._slots(name), (padded.left, padded.right), strict=True
        ):
            yield slot.name, (tensor.mT if matrix.transposed else tensor).reshape(slot.shape)

    def _matrices(self, name: str) -> tuple[Matrix, Matrix]:
        return _pair(next(iter(self.changes.products[name].values())))

    def _slots(self, name: str) -> Iterator[Slot]:
        for number, matrix in enumerate(self._matrices(name)):
            shape = list(matrix.entry.shape)
            shape[(number == 0) != matrix.transposed] = self.ranks[name]
            yield Slot.of(matrix.entry.name, "F32", tuple(shape), Made(matrix.entry.name))

    def _config(self) -> dict[str, Any]:
        """What peft reads; it has defaults for the rest."""
        modules = {name: _module(self._matrices(name)[0]) for name in self.ranks}
        largest = max(self.ranks.values())
        pattern = {modules[name]: rank for name, rank in self.ranks.items() if rank != largest}
        first = next(iter(self.changes.adapters.values()))
        bases = [adapter.settings.base for adapter in self.changes.adapters.values()]
        return {
            "peft_type": "LORA",
            "task_type": required_object(first.folder / CONFIG).get("task_type"),
            "base_model_name_or_path": next((base for base in bases if base), None),
            "r": largest,
            "lora_alpha": largest,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "target_modules": sorted(modules.values()),
            "fan_in_fan_out": first.settings.fan_in_fan_out,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        }


def _pair(change: Change) -> tuple[Matrix, Matrix]:
    assert change.right is not None  # noqa: S101  (it is a product)
    return change.left, change.right


def _module(matrix: Matrix) -> str:
    """The module that a factor belongs to, as peft knows it."""
    return matrix.entry.name.removeprefix(_PREFIX).partition(_ROLE)[0]
