"""Pictures of learned coefficients."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor

from expert_merging.learned.coefficients import Coefficients
from expert_merging.writing import write_atomically

_LAYER = re.compile(r"^(.*?\blayers)\.(\d+)\.(.+?)(?:\.weight)?$")


def by_submodule(coefficients: Coefficients) -> dict[str, dict[int, Tensor]]:
    """Mean coefficient ``(experts,)`` of each tensor: submodule name -> layer number -> value.

    Tensors outside the numbered layers stand alone, at layer 0.
    """
    table: dict[str, dict[int, Tensor]] = {}
    for name, value in coefficients.values.items():
        match = _LAYER.match(name)
        submodule, layer = (match[3], int(match[2])) if match else (name.removesuffix(".weight"), 0)
        table.setdefault(submodule, {})[layer] = value.mean(dim=1)
    return table


def coefficient_map(coefficients: Coefficients, file: Path) -> Any:
    """Draw expert x depth, one panel per submodule, and write it as PNG.

    Returns:
        The picture as ``(height, width, 3)`` uint8 array.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table = by_submodule(coefficients)
    experts = coefficients.experts
    columns = min(3, len(table))
    rows = -(-len(table) // columns)
    figure = Figure(figsize=(4.2 * columns, (0.9 + 0.3 * len(experts)) * rows), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    low = min(float(value.min()) for value in coefficients.values.values())
    high = max(float(value.max()) for value in coefficients.values.values())
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    image: Any = None
    for axis, (submodule, layers) in zip(axes, table.items(), strict=False):
        grid = numpy.stack([layers[layer].numpy() for layer in sorted(layers)], axis=1)
        image = axis.imshow(grid, aspect="auto", vmin=low, vmax=high, cmap="viridis", interpolation="nearest")
        axis.set_title(submodule, fontsize=9)
        axis.set_yticks(range(len(experts)), experts, fontsize=8)
        axis.set_xticks(range(len(layers)) if len(layers) <= 8 else range(0, len(layers), 8))
        axis.tick_params(labelsize=8)
    for axis in axes[len(table) :]:
        axis.set_axis_off()
    figure.colorbar(image, ax=list(axes), label="coefficient", shrink=0.9)
    figure.supxlabel("layer", fontsize=9)
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=110)
    write_atomically(file, written.getvalue())
    canvas.draw()
    return numpy.asarray(canvas.buffer_rgba())[..., :3].copy()
