"""A LoRA adapter as an expert: its base's checkpoint with other numbers, which are computed as they are read.

Nothing is merged beforehand, on disk or in memory. What the adapter changes counts as float32, so that nothing is
rounded: peft would round to the base's type.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from expert_merging.checkpoints.adapter_files import (
    CONFIG,
    TOKENS,
    Contents,
    is_adapter,
    read_settings,
    sort_contents,
    weights_file,
)
from expert_merging.checkpoints.checkpoint import Checkpoint, Entry
from expert_merging.checkpoints.fingerprints import of_text
from expert_merging.checkpoints.lora import Adapted, Change, Matrix
from expert_merging.checkpoints.naming import find_container
from expert_merging.checkpoints.tying import is_tied
from expert_merging.documents import read_text
from expert_merging.errors import InputError, Problems
from expert_merging.roles import is_word_table, word_tables

if TYPE_CHECKING:
    from torch import Tensor

_LINEAR = ("lora_A", "lora_B")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_PAIRS = (_LINEAR, _EMBEDDING)


def open_checkpoint(
    folder: Path,
    base: Checkpoint | None,
    file_name: Callable[[str], str] = str,
    published: Mapping[str, str] | None = None,
) -> Checkpoint:
    """The checkpoint of an expert, be it a full model or an adapter.

    Args:
        folder: the expert.
        base: the base, which an adapter changes; None where it could not be opened, and then an adapter cannot either.
        file_name: published name of a parameter, whatever naming the expert was saved with.
        published: published names of the base's tensors, where more than that stands between.

    Raises:
        InputError: every problem found in the folder.
    """
    if not is_adapter(folder):
        return Checkpoint(folder)
    if base is None:
        read_settings(folder)
        weights_file(folder)
        raise InputError()  # what is wrong with the base has been said
    return Adapter(folder, base, file_name, published)


class Adapter(Checkpoint):
    """An adapter's folder, and the base that it changes, as the checkpoint of the model that they are together.

    Attributes:
        settings: what ``adapter_config.json`` says.
        whole: names of the tensors that the adapter has itself.
        has_own_head: head and embedding, which in the base are one, are so no longer, as one of them was trained whole.

    Args:
        folder: the folder as peft has saved it.
        base: the base.
        file_name: published name of a parameter, whatever naming the adapter was saved with.
        published: published names of the base's tensors, where more than that stands between.

    Raises:
        InputError: the folder cannot be used; every problem found is listed.
    """

    config_name = CONFIG
    kind = " (LoRA adapter)"

    def __init__(
        self,
        folder: Path,
        base: Checkpoint,
        file_name: Callable[[str], str] = str,
        published: Mapping[str, str] | None = None,
    ) -> None:
        self.base = base
        self.config = base.config
        self.settings = read_settings(folder)
        self._open(folder, [weights_file(folder)])
        published = published or {name: file_name(name) for name in base.entries}
        parts = _Parts(self, sort_contents(folder, self.entries), file_name, published)
        self._adapted = parts.adapted
        self.whole = frozenset(parts.whole)
        computed = {name: _in_float32(name, tensor, self.files[0]) for name, tensor in parts.adapted.items()}
        self.entries = {**base.entries, **parts.whole, **computed}
        self.has_own_head = parts.has_own_head
        if parts.kept in parts.adapted:
            self.entries |= dict.fromkeys(parts.tied, computed[parts.kept])

    def read_into(self, block: Tensor, name: str, start: int) -> None:
        """Fill a block ``(entries,)`` with entries of the flattened tensor, from ``start`` on."""
        entry = self.entries[name]
        if entry.name in self._adapted:
            self._adapted[entry.name].fill(block, start)
        else:
            self._read_entry(block, entry, start)

    def mapped(self, name: str) -> Tensor:
        """The flattened tensor ``(entries,)``; pages of a file where it is in one."""
        return self.read(name) if self.entries[name].name in self._adapted else super().mapped(name)

    @property
    def changed(self) -> frozenset[str]:
        """Names of all tensors that are not the base's."""
        return self.whole | self._adapted.keys()

    def changes(self, name: str) -> bool:
        """Whether a tensor of the base is another one here."""
        return self.entries[name] != self.base.entries[name]

    def product(self, name: str) -> Change | None:
        """The product of two matrices that is all that is added to a tensor of the base; None where that is not all."""
        adapted = self._adapted.get(self.entries[name].name)
        if adapted is None or adapted.change is None or adapted.change.right is None:
            return None
        is_all = adapted.change.magnitude is None and adapted.replacing is None
        start = adapted.start.entry
        return adapted.change if is_all and self.base.entries.get(start.name) == start else None

    def numbers(self, entry: Entry, start: int, stop: int) -> Tensor:
        """Entries ``[start, stop)`` of a tensor in a file, ``(stop - start,)`` float32."""
        import torch

        block = torch.empty(stop - start, dtype=entry.torch_dtype)
        self._read_entry(block, entry, start)
        return block.float()

    def fingerprint(self, *, whole: bool) -> str:
        """A digest that changes when the adapter or its base does."""
        return of_text(f"{super().fingerprint(whole=whole)}\n{self.base.fingerprint(whole=False)}")

    def content(self) -> str:
        """A digest that copies of the adapter and its base share."""
        settings = read_text(self.folder / CONFIG)
        return of_text(f"{super().content()}\n{self.base.content()}\n{settings}")


def _in_float32(name: str, tensor: Adapted, file: Path) -> Entry:
    """What a computed tensor looks like; it has no place in the file."""
    start = tensor.start.entry
    return Entry(name, "F32", start.shape, file, offset=0, size=4 * start.elements)


class _Parts:
    """The tensors that an adapter changes, by their names in the base's files.

    Attributes:
        adapted: those that are computed.
        whole: those that the adapter has itself.
        tied: the base's tensors that are embedding and head at once; empty where the two are apart.
        kept: the one of them that both are computed as.
    """

    def __init__(
        self, adapter: Adapter, contents: Contents, file_name: Callable[[str], str], published: Mapping[str, str]
    ) -> None:
        self.adapter = adapter
        self.settings = adapter.settings
        self.names = {new: name for name, new in published.items()}
        targets = [*contents.whole, *(f"{module}.weight" for module in contents.roles)]
        container = find_container(targets, lambda name: file_name(name) in self.names, list(published))
        self.file_name: Callable[[str], str] = lambda name: file_name(container.unwrapped(name))
        self.tied = [name for name in word_tables(adapter.base.entries) if name] if is_tied(adapter.base) else []
        self.kept = next(iter(self.tied), "")
        self.adapted: dict[str, Adapted] = {}
        self.whole: dict[str, Entry] = {}
        problems = Problems()
        for name, entry in contents.whole.items():
            with problems.collecting():
                self._put_whole(name, entry)
        for module, roles in contents.roles.items():
            with problems.collecting():
                self._put_adapted(module, roles)
        problems.check()

    @property
    def has_own_head(self) -> bool:
        """Whether one of head and embedding, which in the base are one, was trained whole, and the other was not."""
        shapes = [entry.shape for name, entry in self.whole.items() if is_word_table(name)]
        return bool(self.tied) and shapes == [self.adapter.base.entries[self.kept].shape]

    def _put_whole(self, name: str, entry: Entry) -> None:
        found = self.names.get(self.file_name(name), self.file_name(name))
        if found in self.whole:
            raise self._refusal(f"has {name} for a part of {found}, which cannot be taken apart")
        self.whole[found] = entry

    def _put_adapted(self, module: str, roles: Mapping[str, Entry]) -> None:
        weight, start = self._start(f"{module}.weight")
        change = self._change(module, roles, Matrix(start).shape)
        tokens = roles.get(TOKENS)
        rows = self.settings.tokens_of(module) if tokens else ()
        if tokens and (len(rows), *start.shape[1:]) != tokens.shape:
            raise self._refusal(f"has rows {list(tokens.shape)} of {module}, and {CONFIG} says which for {len(rows)}")
        if tokens and not set(rows) <= set(range(start.shape[0])):
            raise self._refusal(f"has rows of {module} that the base lacks; is it an adapter of this base?")
        self.adapted[weight] = Adapted(start, self.adapter.numbers, change, rows, tokens)
        if change is not None and "lora_B.bias" in roles:
            bias, start = self._start(f"{module}.bias")
            added = Change(Matrix(roles["lora_B.bias"]), None, change.scale)
            self._check_fits(module, added.left.shape, Matrix(start).shape)
            self.adapted[bias] = Adapted(start, self.adapter.numbers, added)

    def _start(self, name: str) -> tuple[str, Entry]:
        """Name in the base's files of a tensor that is adapted, and what it is before."""
        plain = self.file_name(name)
        found = self.kept if self.tied and is_word_table(plain) else self.names.get(plain)
        if found is None:
            raise self._refusal(f"adapts {name}, which the base lacks; is it an adapter of this base?")
        if found in self.adapted:
            raise self._refusal(f"adapts {name} as a part of {found}, which cannot be taken apart")
        own = self.names.get(plain, plain)  # of a head that is the embedding, the base may have no tensor
        start = self.whole.pop(own, self.adapter.base.entries[found])
        if not start.is_float:
            raise self._refusal(f"adapts {found}, which the base stores as {start.dtype}; use the unquantized base")
        return found, start

    def _change(self, module: str, roles: Mapping[str, Entry], shape: tuple[int, int]) -> Change | None:
        """What the adapter adds to a module's weight, which as a matrix has this shape."""
        kinds = [kind for kind in _PAIRS if roles.keys() & set(kind)]
        if not kinds and TOKENS in roles:
            return None
        lacking = [role for role in (kinds or _PAIRS)[0] if role not in roles]
        if lacking or len(kinds) > 1:
            raise self._refusal(f"has {', '.join(sorted(roles))} of {module} without {', '.join(lacking)}; download it")
        first, second = (roles[role] for role in kinds[0])
        straight = Matrix(second), Matrix(first)
        turned = Matrix(first, transposed=True), Matrix(second, transposed=True)
        is_embedding = kinds[0] == _EMBEDDING
        by_columns = is_embedding or (straight[0].shape[0], straight[1].shape[1]) != shape
        by_columns |= shape[0] == shape[1] and self.settings.fan_in_fan_out
        left, right = turned if by_columns else straight
        if left.shape[1] != right.shape[0] or left.shape[1] == 0:
            raise self._refusal(f"has matrices of ranks {left.shape[1]} and {right.shape[0]} for {module}; download it")
        if left.shape[0] < shape[0] and right.shape[1] == shape[1] and shape[0] % left.shape[0] == 0:
            raise self._refusal(f"adapts {module}, which is a part of a tensor in the base's files; leave it out")
        self._check_fits(module, (left.shape[0], right.shape[1]), shape)
        magnitude = roles.get("lora_magnitude_vector")
        if (magnitude is not None) != self.settings.dora:
            said = json.dumps(self.settings.dora)
            raise self._refusal(f"has {', '.join(sorted(roles))} of {module}, and {CONFIG} says use_dora {said}")
        if magnitude is not None:
            self._check_fits(module, (magnitude.elements,), (shape[by_columns],))
        return Change(left, right, self.settings.scale(module, left.shape[1]), magnitude, by_columns)

    def _check_fits(self, module: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise self._refusal(
                f"has numbers of the shape {list(found)} for {module}, where the base has {list(expected)}; is it an "
                "adapter of this base?"
            )

    def _refusal(self, what: str) -> InputError:
        return InputError(f"{self.adapter.folder} {what}")
