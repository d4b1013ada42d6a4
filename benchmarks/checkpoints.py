"""Random checkpoints with the shapes of published models, written as fast as the disk takes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.shapes import Shape, parameter_shapes
from expert_merging.outputs import Made, Slot, make_header
from expert_merging.parts import Part

if TYPE_CHECKING:
    from torch import Tensor

# Entries of the noise that a checkpoint repeats, an odd number, so that rows of a matrix do not repeat; drawing
# billions would take longer than what is measured.
_PERIOD = (1 << 24) + 43


def everywhere(_name: str, _shape: Shape) -> bool:
    """Of experts that differ from the base in every parameter."""
    return True


def make_checkpoints(
    folders: Sequence[Path],
    config: Mapping[str, Any],
    *,
    distinct: int | None = None,
    differs: Callable[[str, Shape], bool] = everywhere,
) -> None:
    """A random base and its experts in bfloat16; kept for the next time.

    Args:
        folders: the base's and the experts'.
        config: their ``config.json``.
        distinct: number of different experts; the others are links to them, which saves disk. None for all.
        differs: whether the experts have a parameter of their own, by its name and shape, or the base's.
    """
    file = "model.safetensors"
    missing = {number: folder for number, folder in enumerate(folders) if not (folder / file).exists()}
    if not missing:
        return
    slots = [Slot.of(name, "BF16", shape, Made(name)) for name, shape in parameter_shapes(config).items()]
    with ThreadPoolExecutor(4) as pool:
        done = []
        for number, folder in missing.items():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(config))
            if distinct is not None and number > distinct:
                (folder / file).symlink_to(folders[1 + (number - 1) % distinct] / file)
            else:
                done.append(pool.submit(_write, folder / file, slots, number, differs))
        for future in done:
            future.result()


def _write(file: Path, slots: Sequence[Slot], number: int, differs: Callable[[str, Shape], bool]) -> None:
    """Write the base (number 0) or an expert, whose entries are the base's plus noise of its own."""
    noise = _noise(0) * 0.02
    own = noise + _noise(number) * 0.002 if number else noise
    # The scales of norms are about 1, or no signal would come through.
    values = {(0, 0): _entries(noise), (0, 1): _entries(noise + 1), (1, 0): _entries(own), (1, 1): _entries(own + 1)}
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        stream.write(make_header(slots))
        position = 0
        for slot in slots:
            is_scale = len(slot.shape) == 1 and slot.name.endswith("weight")
            data = values[differs(slot.name, slot.shape), is_scale]
            for entries in _repeated(Part.whole(slot.name, slot.shape).elements, position):
                stream.write(data[entries])
            position += slot.size // 2
    partial.rename(file)


def _noise(seed: int) -> Tensor:
    import torch

    return torch.randn(_PERIOD, generator=torch.Generator().manual_seed(seed))


def _entries(values: Tensor) -> memoryview:
    """The values in bfloat16, an item for each."""
    import torch

    return memoryview(values.bfloat16().view(torch.int16).numpy())  # type: ignore[arg-type]


def _repeated(count: int, position: int) -> Iterator[slice]:
    """Where so many entries, from a position of the file on, are in the noise."""
    end = position + count
    while position < end:
        start = position % _PERIOD
        stop = min(_PERIOD, start + end - position)
        yield slice(start, stop)
        position += stop - start
