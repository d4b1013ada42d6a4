"""Merges that are only to be measured: a rule's result is written into a live model instead of into files.

The numbers are those that the files would have: each is rounded to the base's type first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from expert_merging.errors import InputError
from expert_merging.merge import merged_parts, pieces_of
from expert_merging.parts import Part
from expert_merging.plan import Plan, Rule
from expert_merging.stored import Run, stored_tensors
from expert_merging.streaming import Reader, block_entries
from expert_merging.wholes import load_solver, whole_workers
from expert_merging.workers import Workers


class InMemory:
    """The base's model, whose weights become those of one merge after the other.

    Args:
        model: the base's model; its merged parameters will be overwritten.
        plan: checkpoints and parameters.
        file_name: name in a checkpoint file of a parameter's name in memory.
        device: where the arithmetic is done.

    Raises:
        InputError: a merged tensor is not a parameter of the loaded model.
    """

    def __init__(self, model: Any, plan: Plan, file_name: Callable[[str], str], device: torch.device) -> None:
        self.model = model.eval().requires_grad_(False)
        self.plan, self.device = plan, device
        self.reader = Reader(plan, device)
        self.weights = {name: weight.detach().view(-1) for name, weight in model.named_parameters()}
        stored = stored_tensors(model, file_name)
        missing = [name for name in plan.merged if file_name(name) not in stored]
        if missing:
            raise InputError(f"{missing[0]} is in the checkpoint but is no parameter of the loaded model; exclude it")
        self.runs = {name: stored[file_name(name)] for name in plan.merged}
        load_solver(device)

    def merge(self, rule: Rule, unit: str, names: Iterable[str] | None = None) -> Any:
        """Write what a rule makes into the model.

        Args:
            rule: how task vectors become one.
            unit: what it is fed, as `expert_merging.method.Method` has it.
            names: the tensors that are merged; by default all.

        Returns:
            The model.
        """
        size, in_blocks = self.plan.base_elements, unit in ("entries", "rows")
        # Threads, since forked processes would write into memory of their own.
        by_entries = replace(Workers.for_entries(size, self.device), forked=False)
        workers = by_entries if in_blocks else Workers(whole_workers(size, self.device))
        parts = merged_parts(self.plan, self.plan.merged if names is None else names, unit, block_entries(self.device))
        workers.work_through(parts, lambda part: self._merge(part, rule, unit))
        return self.model

    def _merge(self, part: Part, rule: Rule, unit: str) -> None:
        with self.reader.streaming():
            for piece, values in self._made(part, rule, unit):
                self.write(piece, values)

    def _made(self, part: Part, rule: Rule, unit: str) -> Iterator[tuple[Part, torch.Tensor]]:
        """What a rule makes of the pieces of a part, in the base's type; each is overwritten by the next."""
        dtype = self.plan.base.entries[part.name].torch_dtype
        for piece, base, task_vectors in pieces_of(self.reader, part, unit):
            made = rule(task_vectors, piece, base.view(task_vectors.shape[1:]))
            found = made["merged"] if isinstance(made, Mapping) else made
            yield piece, base.add_(found.reshape(-1)).to(dtype)

    def write(self, piece: Part, values: torch.Tensor) -> None:
        """Put merged entries, ``(entries,)``, into the parameters that hold them."""
        before = 0
        for run in self.runs[piece.name]:
            length = run.stop - run.start
            first, stop = max(piece.start, before), min(piece.stop, before + length)
            if first < stop:
                self._place(run, first - before, values[first - piece.start : stop - piece.start])
            before += length

    def read(self, name: str, rule: Rule, unit: str) -> torch.Tensor:
        """The entries ``(entries,)`` of a tensor that a merge has written here, in float32, as files would have them.

        Where the model's type is another than the files', and has rounded them, they are made again.

        Args:
            name: the tensor; nothing else may have been written into it since.
            rule: as for `merge`.
            unit: as for `merge`.
        """
        held = [self.weights[run.parameter][run.start : run.stop] for run in self.runs[name]]
        if all(values.dtype in (torch.float32, self.plan.base.entries[name].torch_dtype) for values in held):
            return torch.cat(held).float()
        made = torch.empty(self.plan.part(name).elements, device=self.device)
        with self.reader.streaming():
            for part in merged_parts(self.plan, [name], unit, block_entries(self.device)):
                for piece, values in self._made(part, rule, unit):
                    made[piece.start : piece.stop] = values
        return made

    def _place(self, run: Run, start: int, values: torch.Tensor) -> None:
        self.weights[run.parameter][run.start + start : run.start + start + len(values)].copy_(values)
