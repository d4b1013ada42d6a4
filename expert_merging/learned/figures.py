"""Pictures of learned coefficients and of the layers' importance; beside each one its data as CSV.

Drawn with matplotlib's objects alone: no state of its own, no display.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from expert_merging.learned.history import OVER_TIME, load_over_time
from expert_merging.learned.importance import Layer, load_layers, save_layers, write_table
from expert_merging.roles import OTHER, OUTSIDE, STAGES, SUBMODULES
from expert_merging.writing import write_atomically

LAYERS = "layers.csv"
_SHADES = ("#9ecae1", "#4292c6", "#08306b", "#bdbdbd")
_LONGEST_AXIS = 8
# Cells beside each other whose values fit into them, where a line has several panels.
_MOST_VALUES = 12


def draw_all(layers: Sequence[Layer], folder: Path, run: str) -> dict[str, Any]:
    """Write the table of layers, every picture and its data.

    Args:
        layers: as `expert_merging.learned.importance.describe_layers` makes them.
        folder: where to, made if it does not exist; coefficients over time are drawn if their table is there.
        run: what the run is called in titles.

    Returns:
        The pictures by name, ``(height, width, 3)`` uint8 arrays.
    """
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    save_layers(layers, folder / LAYERS)
    pictures: dict[str, Callable[[Sequence[Layer], Path, str], Any]] = {
        "importance": importance_by_stage,
        "submodules": shares_by_submodule,
        "depth": coefficients_by_stage,
        "coefficients": coefficient_map,
        "chunks": chunk_map,
    }
    if (folder / OVER_TIME).exists():
        pictures["over_time"] = coefficients_over_time
    # Names of experts and runs are no formulas, whatever signs they have.
    with matplotlib.rc_context({"text.parse_math": False}):
        return {name: draw(layers, folder / f"{name}.png", run) for name, draw in pictures.items()}


def redraw(folder: Path, run: str) -> list[Path]:
    """Draw everything again from the tables in the folder; the files written."""
    drawn = draw_all(load_layers(folder / LAYERS), folder, run)
    return [folder / LAYERS, *(folder / f"{name}.{end}" for name in drawn for end in ("png", "csv"))]


def importance_by_stage(layers: Sequence[Layer], file: Path, run: str) -> Any:
    """Importance of each submodule in the early, middle and late third (paper, Figure 4)."""
    table = sum_by(layers, lambda layer: layer.importance)
    _write_stages(file, table)
    figure, (axis,) = make_figure(1, 1, width=8)
    _bars(axis, table, "share of the importance of all layers")
    return finish_figure(figure, file, "Importance of each submodule by depth", run)


def shares_by_submodule(layers: Sequence[Layer], file: Path, run: str) -> Any:
    """Share of the parameters, and of the coefficients, by submodule (paper, Figure 3)."""
    submodules = present(layers)
    parameters = {name: sum(layer.parameters for layer in layers if layer.submodule == name) for name in submodules}
    means = {
        name: float(numpy.mean([_strength(layer) for layer in layers if layer.submodule == name]))
        for name in submodules
    }
    columns = {"share of parameters": _normalised(parameters), "normalised coefficient": _normalised(means)}
    rows = [[name, *(values[name] for values in columns.values())] for name in submodules]
    write_table(file.with_suffix(".csv"), ["submodule", *columns], rows)
    figure, axes = make_figure(1, 2, width=9)
    for axis, (title, values) in zip(axes, columns.items(), strict=True):
        axis.bar(list(values), list(values.values()), color=_SHADES[1])
        axis.set_ylabel(title)
    return finish_figure(figure, file, "Parameters and mean coefficients of each submodule", run)


def coefficients_by_stage(layers: Sequence[Layer], file: Path, run: str) -> Any:
    """Share of the coefficients across depth, for each submodule (paper, Figure 5).

    A share is the mean coefficient of a submodule in a third, relative to the sum of all these means.
    """
    sums, counts = sum_by(layers, _strength), sum_by(layers, lambda _: 1.0)
    means = {
        name: {stage: value / counts[name][stage] for stage, value in stages.items()} for name, stages in sums.items()
    }
    whole = sum(value for stages in means.values() for value in stages.values()) or 1.0
    table = {name: {stage: value / whole for stage, value in stages.items()} for name, stages in means.items()}
    _write_stages(file, table)
    figure, (axis,) = make_figure(1, 1, width=8)
    _bars(axis, table, "share of the mean coefficients")
    return finish_figure(figure, file, "Mean coefficients of each submodule by depth", run)


def coefficient_map(layers: Sequence[Layer], file: Path, run: str) -> Any:
    """Mean coefficient of each expert at each depth, one panel for a submodule."""
    experts = list(layers[0].coefficients)
    rows = [[layer.name, layer.submodule, layer.depth, *layer.coefficients.values()] for layer in layers]
    write_table(file.with_suffix(".csv"), ["name", "submodule", "depth", *experts], rows)
    groups = _panels(layers)
    panels = {
        title: numpy.array([[layer.coefficients[expert] for layer in group] for expert in experts])
        for title, group in groups.items()
    }
    depths = {title: _depths(group) for title, group in groups.items()}
    title = "Mean coefficients of each expert by submodule and depth"
    return _heat_maps(panels, experts, depths, "coefficient", file, title, run)


def chunk_map(layers: Sequence[Layer], file: Path, run: str) -> Any:
    """Number of chunks by submodule and depth, 0 where all coefficients are fixed."""
    rows = [[layer.name, layer.submodule, layer.depth, layer.importance, layer.chunks] for layer in layers]
    write_table(file.with_suffix(".csv"), ["name", "submodule", "depth", "importance", "chunks"], rows)
    groups = _panels(layers)
    depth = max((layer.depth for layer in layers if layer.depth is not None), default=0) + 1
    grid = numpy.full((len(groups), max(depth, *map(len, groups.values()))), numpy.nan)
    for row, (_, group) in zip(grid, groups.items(), strict=True):
        for position, layer in enumerate(group):
            column = position if layer.depth is None else layer.depth
            row[column] = numpy.nan_to_num(row[column]) + layer.chunks
    depths = {"": list(range(grid.shape[1]))}
    return _heat_maps({"": grid}, list(groups), depths, "chunks", file, "Chunks of each submodule by depth", run)


def coefficients_over_time(_: Sequence[Layer], file: Path, run: str) -> Any:
    """Mean coefficient of each expert by depth, update after update; from the table beside the picture."""
    found = load_over_time(file.with_suffix(".csv"))
    panels = {expert: numpy.array(rows) for expert, rows in found.coefficients.items()}
    updates = dict.fromkeys(panels, found.updates)
    title = "Mean coefficients of each expert by layer while learning"
    return _heat_maps(panels, found.depths, updates, "coefficient", file, title, run, across="update")


def present(layers: Sequence[Layer]) -> list[str]:
    """Submodules that occur, in their usual order."""
    found = {layer.submodule for layer in layers}
    return [name for name in (*SUBMODULES, OTHER) if name in found]


def sum_by(layers: Sequence[Layer], value: Callable[[Layer], float]) -> dict[str, dict[str, float]]:
    """Sum of a value over the layers of each submodule and stage that occur together."""
    table: dict[str, dict[str, float]] = {}
    for submodule in present(layers):
        for stage in (*STAGES, OUTSIDE):
            found = [value(layer) for layer in layers if (layer.submodule, layer.stage) == (submodule, stage)]
            if found:
                table.setdefault(submodule, {})[stage] = sum(found)
    return table


def _strength(layer: Layer) -> float:
    return float(numpy.mean([abs(value) for value in layer.coefficients.values()]))


def _normalised(values: Mapping[str, float]) -> dict[str, float]:
    whole = sum(values.values()) or 1
    return {name: value / whole for name, value in values.items()}


def _panels(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Layers of each submodule by depth; those outside the numbered layers stand together."""
    numbered = [layer for layer in layers if layer.depth is not None]
    groups = {name: [layer for layer in numbered if layer.submodule == name] for name in present(layers)}
    groups[OUTSIDE] = [layer for layer in layers if layer.depth is None]
    return {name: sorted(group, key=lambda layer: layer.depth or 0) for name, group in groups.items() if group}


def _depths(group: Sequence[Layer]) -> list[int]:
    return [position if layer.depth is None else layer.depth for position, layer in enumerate(group)]


def _write_stages(file: Path, table: Mapping[str, Mapping[str, float]]) -> None:
    rows = [[name, stage, value] for name, stages in table.items() for stage, value in stages.items()]
    write_table(file.with_suffix(".csv"), ["submodule", "stage", "share"], rows)


def make_figure(rows: int, columns: int, *, width: float, height: float = 3.6) -> tuple[Any, list[Any]]:
    """An empty picture with panels, its size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flatten())


def _bars(axis: Any, table: Mapping[str, Mapping[str, float]], label: str) -> None:
    stages = [stage for stage in (*STAGES, OUTSIDE) if any(stage in values for values in table.values())]
    width = 0.8 / len(stages)
    for number, stage in enumerate(stages):
        places = numpy.arange(len(table)) + width * (number - (len(stages) - 1) / 2)
        values = [found.get(stage, 0.0) for found in table.values()]
        axis.bar(places, values, width, label=stage, color=_SHADES[(*STAGES, OUTSIDE).index(stage)])
    axis.set_xticks(range(len(table)), list(table))
    axis.set_ylabel(label)
    axis.legend(frameon=False)


def _heat_maps(
    panels: Mapping[str, Any],
    rows: Sequence[str],
    columns: Mapping[str, Sequence[int]],
    label: str,
    file: Path,
    title: str,
    run: str,
    *,
    across: str = "layer",
) -> Any:
    """Panels with the same rows and one colour bar.

    Args:
        panels: ``(rows, columns)`` by title.
        rows: names.
        columns: numbers, by panel.
        label: what is shown.
        file: where to.
        title: of the picture.
        run: what the run is called.
        across: what the columns are.
    """
    from matplotlib.ticker import MaxNLocator

    wide = min(3, len(panels))
    lines = -(-len(panels) // wide)
    figure, axes = make_figure(lines, wide, width=max(4.2 * wide, 6), height=max((0.9 + 0.3 * len(rows)) * lines, 2.4))
    low = min(float(numpy.nanmin(grid)) for grid in panels.values())
    high = max(float(numpy.nanmax(grid)) for grid in panels.values())
    image: Any = None
    for axis, (name, grid) in zip(axes, panels.items(), strict=False):
        image = axis.imshow(grid, aspect="auto", vmin=low, vmax=high, cmap="viridis", interpolation="nearest")
        axis.set_title(name, fontsize=9)
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        step = -(-len(columns[name]) // _LONGEST_AXIS)
        axis.set_xticks(range(0, len(columns[name]), step), columns[name][::step])
        axis.tick_params(labelsize=8)
        if grid.shape[1] <= (_MOST_VALUES if wide > 1 else 2 * _MOST_VALUES):
            _write_values(axis, grid, image)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    bar = figure.colorbar(image, ax=axes, label=label, shrink=0.9)
    if all((grid[~numpy.isnan(grid)] % 1 == 0).all() for grid in panels.values()):
        bar.locator = MaxNLocator(integer=True)
        bar.update_ticks()
    figure.supxlabel(across, fontsize=9)
    return finish_figure(figure, file, title, run)


def _write_values(axis: Any, grid: Any, image: Any) -> None:
    """Write each cell's value into it, on dark colours in white."""
    for (row, column), value in numpy.ndenumerate(grid):
        if not numpy.isnan(value):
            colour = "black" if image.norm(value) > 0.6 else "white"
            text = f"{value:.0f}" if value % 1 == 0 else f"{value:.2f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)


def finish_figure(figure: Any, file: Path, title: str, run: str) -> Any:
    """Write the picture as PNG and return it as ``(height, width, 3)`` uint8 array."""
    from matplotlib.image import imsave

    figure.suptitle(f"{title}\n{run}", fontsize=10)
    figure.set_dpi(110)
    figure.canvas.draw()  # once: drawing is most of the time, and saving a figure draws it again
    picture = numpy.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    written = io.BytesIO()
    imsave(written, picture, format="png")
    write_atomically(file, written.getvalue())
    return picture
