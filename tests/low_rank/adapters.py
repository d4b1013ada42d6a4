"""Small adapters of a base without a model class, written as peft writes them, and plain twins of merging them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.checkpoints import tensors_of, write_checkpoint
from tests.command import flags, merged
from tests.methods.elsewhere import numbers
from tests.methods.test_sparse import plain_ties

SHAPES = {"layers.0.q_proj": (9, 6), "layers.0.k_proj": (5, 8), "layers.1.q_proj": (12, 7)}
RANKS = {"A": 2, "B": 3, "C": 1}

Pairs = Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs_of(ranks: Mapping[str, int] = RANKS, modules: Mapping[str, tuple[int, int]] = SHAPES) -> Pairs:
    """Factors ``(B, A)`` by expert and module."""
    return {
        expert: {
            module: (draw(rows, rank, seed=10 * number + place), draw(rank, columns, seed=100 + 10 * number + place))
            for place, (module, (rows, columns)) in enumerate(modules.items())
        }
        for number, (expert, rank) in enumerate(ranks.items())
    }


def scattered_pairs(ranks: Mapping[str, int]) -> Pairs:
    """Factors of two modules of which other programs have merged the same."""
    return {
        expert: {
            module: (numbers((rows, rank), salt + place, 1.0), numbers((rank, columns), 1000 + salt + place, 1.0))
            for place, (module, (rows, columns)) in enumerate({"q": (12, 11), "k": (13, 14)}.items())
        }
        for salt, (expert, rank) in zip(range(0, 1000, 100), ranks.items(), strict=False)
    }


def together(changes: Mapping[str, Tensor]) -> Tensor:
    """The changes of these modules in one vector."""
    return torch.cat([changes[f"{module}.weight"].flatten() for module in ("q", "k")])


def write_adapter(folder: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], alpha: float = 1.0, **more: Any) -> Path:
    """An adapter's folder; with ``alpha`` its scale is ``alpha / rank``."""
    folder.mkdir(parents=True)
    tensors = {}
    for module, (left, right) in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = right.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = left.contiguous()
    rank = max(right.shape[0] for _, right in pairs.values())
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "base_model_name_or_path": "base", **more}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


class Zoo(NamedTuple):
    """A base and adapters of it."""

    base: Path
    experts: dict[str, Path]

    @property
    def flags(self) -> list[object]:
        return [*flags(self.base, **self.experts), "--exclude_params", "none"]

    def change(self, folder: Path, *options: object) -> dict[str, Tensor]:
        """What a run with these options adds to the base."""
        run, base = merged(folder, *options, *self.flags), tensors_of(self.base)
        return {name: tensor - base[name] for name, tensor in tensors_of(run.model).items()}


def write_zoo(folder: Path, pairs: Pairs, alpha: float = 1.0, base: float = 0.0) -> Zoo:
    """A base of the same number everywhere, with a tensor that no adapter changes, and the adapters."""
    shapes = {
        module: (left.shape[0], right.shape[1]) for own in pairs.values() for module, (left, right) in own.items()
    }
    weights = {f"{module}.weight": torch.full(shape, base) for module, shape in shapes.items()}
    weights["norm.weight"] = torch.ones(4)
    write_checkpoint(folder / "base", weights)
    return Zoo(folder / "base", {name: write_adapter(folder / name, own, alpha) for name, own in pairs.items()})


# A rule for the coordinates of all tensors: ``{module: (experts, height, width)} -> {module: (height, width)}``.
Rule = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def scaled_pairs(pairs: Pairs, module: str, alpha: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    found = [own.get(module) for own in pairs.values()]
    rows, columns = next((pair[0].shape[0], pair[1].shape[1]) for pair in found if pair)
    empty = torch.zeros(rows, 0), torch.zeros(0, columns)
    return [(left.double() * alpha / max(1, len(right)), right.double()) for left, right in (p or empty for p in found)]


def core_twin(pairs: Pairs, rule: Rule, alpha: float = 1.0) -> dict[str, Tensor]:
    """Core Space by whole decompositions of the factors side by side."""
    lefts, rights, cores = {}, {}, {}
    for module in {module for own in pairs.values() for module in own}:
        own = scaled_pairs(pairs, module, alpha)
        left, sizes, _ = torch.linalg.svd(torch.cat([left for left, _ in own], 1), full_matrices=False)
        lefts[module] = left[:, sizes > 1e-9]
        _, sizes, right = torch.linalg.svd(torch.cat([right for _, right in own]), full_matrices=False)
        rights[module] = right[sizes > 1e-9]
        cores[module] = torch.stack([lefts[module].T @ left @ right @ rights[module].T for left, right in own])
    return {f"{name}.weight": lefts[name] @ found @ rights[name] for name, found in rule(cores).items()}


def knots_twin(pairs: Pairs, rule: Rule, alpha: float = 1.0) -> dict[str, Tensor]:
    """KnOTS by a whole decomposition of the changes side by side."""
    lefts, own = {}, {}
    for module in {module for own in pairs.values() for module in own}:
        changes = [left @ right for left, right in scaled_pairs(pairs, module, alpha)]
        left, sizes, right = torch.linalg.svd(torch.cat(changes, 1), full_matrices=False)
        kept = sizes > 1e-9
        lefts[module] = left[:, kept]
        own[module] = torch.stack((sizes[kept, None] * right[kept]).chunk(len(changes), 1))
    return {f"{name}.weight": lefts[name] @ found for name, found in rule(own).items()}


def total(coordinates: dict[str, Tensor]) -> dict[str, Tensor]:
    """Task arithmetic."""
    return {name: own.sum(0) for name, own in coordinates.items()}


def ties_everywhere(density: float) -> Rule:
    """TIES with entries ranked over all tensors."""

    def rule(coordinates: dict[str, Tensor]) -> dict[str, Tensor]:
        sizes = [own[0].numel() for own in coordinates.values()]
        found = plain_ties(torch.cat([own.flatten(1) for own in coordinates.values()], 1), density)
        return {
            name: part.view(own.shape[1:])
            for (name, own), part in zip(coordinates.items(), found.split(sizes), strict=True)
        }

    return rule


def by_tensor(merge: Callable[[Tensor], Tensor]) -> Rule:
    """The same for each tensor alone."""
    return lambda coordinates: {name: merge(own) for name, own in coordinates.items()}


def assert_near(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    """Each tensor of the twin, to a share of its largest entry."""
    for name, tensor in expected.items():
        largest = float(tensor.abs().max())
        torch.testing.assert_close(
            found[name], tensor.float(), rtol=0, atol=tolerance * largest, msg=lambda text, name=name: f"{name}: {text}"
        )
