"""What goes into linear layers while each expert runs over its own samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from expert_merging.context import Context
from expert_merging.errors import InputError
from expert_merging.kept import Kept
from expert_merging.roles import is_in_decoder, is_matrix, is_router
from expert_merging.running.samples import Samples
from expert_merging.running.targets import Asked
from expert_merging.statistics.gram import Gram, Grams, GramSum, write_grams
from expert_merging.statistics.norms import NormWatch
from expert_merging.stored import stored_tensors


def matrices(context: Context) -> list[str]:
    """Names of the tensors that are merged as matrices."""
    return [name for name in context.plan.merged if is_matrix(context.plan.part(name))]


def most_bytes(context: Context, samples: Samples) -> dict[str, int]:
    """The most bytes that each expert's Gram matrices take, in memory and on the disk.

    Layers that share their inputs share their matrix, which only a running model shows.
    """
    plan = context.plan
    columns = {name: plan.base.entries[name].shape[1] for name in matrices(context)}

    def size(name: str, tokens: int) -> int:
        # Outside the language model there may be more vectors than tokens, as a vision tower has patches.
        return 4 * columns[name] * min(columns[name], tokens if is_in_decoder(name) else columns[name])

    asked = {name: sum(sample.expert == name for sample in samples.samples) for name in plan.experts}
    return {expert: sum(size(name, samples.longest * count) for name in columns) for expert, count in asked.items()}


def place_of(context: Context, folder: Path) -> str:
    """Where a folder is in the run's, as its files are noted."""
    return folder.relative_to(context.run.kept.file.parent).as_posix()


def file_of(folder: Path, expert: str) -> Path:
    """Where an expert's statistics are."""
    return folder / f"{expert}.safetensors"


def files_of(context: Context, folder: Path | None = None) -> dict[str, Path]:
    """The file of each expert's statistics in a folder of the run's, by default the one of statistics."""
    return {expert: file_of(folder or context.run.statistics, expert) for expert in context.plan.experts}


# ``(expert's name, its model, its samples)`` to Gram matrices, by the names of the tensors that share them.
Find: TypeAlias = Callable[[str, Any, Iterator[Asked]], dict[tuple[str, ...], Gram]]


def gather_grams(context: Context, samples: Samples, *, with_norms: bool = False) -> Grams:
    """Gram matrices of every merged matrix's inputs, by expert; those of an earlier part of the run are taken.

    Args:
        context: the run.
        samples: what the experts are asked.
        with_norms: the diagonals of what merged norms scale, too.

    Raises:
        InputError: an expert answers with nothing or computes NaN; or nothing that is merged is a linear layer's.
    """
    names, file_name = matrices(context), context.backbone.file_name

    def find(_expert: str, model: Any, own: Iterator[Asked]) -> dict[tuple[str, ...], Gram]:
        if not with_norms:
            return grams_of(model, names, file_name, own)
        norms = NormWatch(model, context.plan.merged, file_name)
        return grams_of(model, names, file_name, norms.watching(own)) | norms.finish()

    return gather(context, samples, lambda expert: context.plan.only([expert]).opened, find)


def gather(
    context: Context,
    samples: Samples,
    opened: Callable[[str], str],
    find: Find,
    *,
    who: str = "expert {}",
    what: str = "inputs",
    folder: Path | None = None,
) -> Grams:
    """Statistics of each expert, in the run's folder; those that are there already are taken.

    They have to be as they were written, and no checkpoint that they are of may have been written since.

    Args:
        context: the run.
        samples: what the experts are asked.
        opened: a digest that differs once a checkpoint was written that an expert's statistics are of.
        find: finds an expert's statistics.
        who: what has computed them, with a place for the expert's name, for messages.
        what: what they are of a tensor or layer, for messages.
        folder: where they are kept, in the run's; by default the one of statistics.

    Raises:
        InputError: an expert answers with nothing or computes NaN.
    """

    def keep(expert: str, model: Any, own: Iterator[Asked], file: Path, kept: Kept) -> None:
        grams = find(expert, model, own)
        _refuse_nan(grams, who.format(expert), what, samples.precision)
        write_grams(file, grams, kept)

    return Grams(gather_files(context, samples, opened, keep, folder))


def gather_files(
    context: Context,
    samples: Samples,
    opened: Callable[[str], str],
    keep: Callable[[str, Any, Iterator[Asked], Path, Kept], None],
    folder: Path | None = None,
) -> dict[str, Path]:
    """A file of statistics for each expert, in the run's folder; those that are there already are taken.

    Args:
        context: the run.
        samples: what the experts are asked.
        opened: as for `gather`.
        keep: ``(expert's name, its model, its samples, file, what notes it)``; writes an expert's file.
        folder: as for `gather`.

    Raises:
        InputError: an expert answers with nothing.
    """
    folder = folder or context.run.statistics
    place = place_of(context, folder)
    files = files_of(context, folder)
    kept = {expert: context.run.kept.within(place, opened(expert)) for expert in files}
    left = [expert for expert, file in files.items() if not (file.exists() and kept[expert].has(file))]
    if left:
        folder.mkdir(parents=True, exist_ok=True)

        @torch.no_grad()
        def look(expert: str, model: Any, own: Iterator[Asked]) -> None:
            keep(expert, model, own, files[expert], kept[expert])

        missing = replace(context, plan=context.plan.only(left))
        maker = samples.target_maker(missing, (), torch.device(context.device))
        maker.ask([sample for sample in samples.samples if sample.expert in left], look)
    return files


def grams_of(
    model: Any,
    names: Iterable[str],
    file_name: Callable[[str], str],
    asked: Iterable[Asked],
    new_sum: Callable[[], GramSum] = GramSum,
) -> dict[tuple[str, ...], Gram]:
    """Gram matrices of what goes into a model's layers while it runs, by the names of the tensors that share them.

    Args:
        model: the model.
        names: the layers' tensors.
        file_name: published name of a parameter in memory.
        asked: what it runs on.
        new_sum: as for `InputWatch`.
    """
    watch = InputWatch(model, {file_name(name): name for name in names}, file_name, new_sum)
    try:
        for one in asked:
            watch.run(one)
        return watch.finish()
    finally:
        watch.close()


def _refuse_nan(grams: Mapping[tuple[str, ...], Gram], who: str, what: str, precision: str) -> None:
    faulty = [names[0] for names, gram in grams.items() if not bool(torch.isfinite(gram.values).all())]
    if faulty:
        hint = "; in bf16 there is room for larger numbers (--mixed_precision)" if precision == "fp16" else ""
        raise InputError(f"{who} computes NaN or infinite {what} of {faulty[0]}{hint}")


class InputWatch:
    """Adds up the Gram matrix of what goes into each linear layer of a model.

    Layers that get the same tensor one after the other (query, key and value; gate and up) share one sum. Which do is
    seen while the model runs, and not known from names: where a layer gets its inputs now with others and now without,
    each case has a sum of its own.

    Args:
        model: the model.
        wanted: names of tensors by their published names.
        file_name: published name of a parameter in memory.
        new_sum: what adds up the inputs that layers share.

    Raises:
        InputError: the model has no linear layer with such a weight.
    """

    def __init__(
        self,
        model: Any,
        wanted: Mapping[str, str],
        file_name: Callable[[str], str],
        new_sum: Callable[[], GramSum] = GramSum,
    ) -> None:
        self.model, self.new_sum = model, new_sum
        self.tensors: dict[str, list[str]] = {}
        self._sums: dict[tuple[str, ...], GramSum] = {}
        self._sharing: list[str] = []
        self._inputs: Tensor | None = None
        self._version = 0
        self._vectors: Tensor | None = None
        self._asked: Asked | None = None
        stored = stored_tensors(model, file_name)
        pieces = {wanted[name]: [run.parameter for run in runs] for name, runs in stored.items() if name in wanted}
        layers = {
            f"{name}.weight": part
            for name, part in model.named_modules()
            if isinstance(part, torch.nn.Linear) or is_router(f"{name}.weight")
        }
        self.hooks = []
        for tensor, parameters in pieces.items():
            if all(parameter in layers for parameter in parameters):
                for parameter in parameters:
                    self.tensors.setdefault(parameter, []).append(tensor)
        for parameter in self.tensors:
            hook = self._hook(parameter)
            self.hooks.append(layers[parameter].register_forward_pre_hook(hook, with_kwargs=True))
        if not self.hooks:
            raise InputError(
                f"{type(model).__name__} has no linear layer (torch.nn.Linear) among what is merged; use a method that "
                "does not look at inputs"
            )

    def run(self, asked: Asked, forward: Callable[[], Any] | None = None) -> Any:
        """Run the model, or a part of it, over a sample.

        Args:
            asked: the sample.
            forward: runs the part.

        Returns:
            What it returns.
        """
        self._asked = asked
        made = forward() if forward else self.model.base_model(**asked.inputs, use_cache=False)
        self._flush()
        self._asked = None
        return made

    def finish(self) -> dict[tuple[str, ...], Gram]:
        """The Gram matrices, by the names of the tensors that share them.

        Raises:
            InputError: a tensor is cut into rows in memory that have different inputs.
        """
        pieces: dict[str, set[str]] = {}
        for parameter, tensors in self.tensors.items():
            for tensor in tensors:
                pieces.setdefault(tensor, set()).add(parameter)
        found = {}
        for sharing in list(self._sums):
            names = tuple(dict.fromkeys(tensor for parameter in sharing for tensor in self.tensors[parameter]))
            for name in names:
                if not pieces[name] <= set(sharing):
                    raise InputError(f"the rows of {name} have different inputs in the model; exclude it")
            found[names] = self._sums.pop(sharing).finish()
        return found

    def close(self) -> None:
        """Let go of the model."""
        while self.hooks:
            self.hooks.pop().remove()

    def _hook(self, parameter: str) -> Callable[..., None]:
        def see(_layer: Any, positional: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            if self._asked is not None:  # what runs outside of `run` is not watched
                self._see(parameter, positional[0] if positional else named["input"])

        return see

    def _see(self, parameter: str, inputs: Tensor) -> None:
        """Take a layer's inputs, unless they are those of the layer before."""
        is_same = inputs is self._inputs and inputs._version == self._version
        if is_same and parameter not in self._sharing:
            self._sharing.append(parameter)
            return
        self._flush()
        # Held until another comes, so that it is no other tensor in the same place.
        self._inputs, self._version, self._sharing = inputs, inputs._version, [parameter]
        self._vectors = self._selected(parameter, inputs).reshape(-1, inputs.shape[-1]).clone()

    def _selected(self, parameter: str, inputs: Tensor) -> Tensor:
        """The inputs at the sample's tokens; all of them where they are no tokens, as in a vision tower."""
        assert self._asked is not None  # noqa: S101  (set by whoever runs the model)
        shape = self._asked.inputs["input_ids"].shape
        # Layers of mixtures are given all tokens in one dimension.
        if is_in_decoder(self.tensors[parameter][0]) and inputs.shape[:-1].numel() == shape.numel():
            return inputs.reshape(*shape, -1)[:, self._asked.tokens]
        return inputs

    def _flush(self) -> None:
        """Add the inputs that the last layers shared to their sum."""
        if self._vectors is not None and len(self._vectors):
            self._sums.setdefault(tuple(self._sharing), self.new_sum()).add(self._vectors)
        self._inputs = self._vectors = None
