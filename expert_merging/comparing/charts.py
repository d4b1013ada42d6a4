"""The charts of a report, as plotly's figures; a name from a file is shown as it is, whatever signs it has."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expert_merging.comparing.finished import Finished
from expert_merging.comparing.scores_file import SetScore
from expert_merging.learned.figures import present
from expert_merging.learned.importance import Layer
from expert_merging.roles import OUTSIDE
from expert_merging.search.front import Point

# Okabe and Ito's colours, which most colour-blind readers can tell apart, without black and yellow.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_SIGNS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross")
# Values are written into the cells of a heat map that is not wider than this, and beside points that have no more.
_WIDEST = 12


@dataclass(frozen=True)
class Chart:
    """A chart.

    Args:
        name: its place in the page.
        title: what stands above it.
        about: what it shows, in words, also for those who do not see it.
        figure: plotly's ``data`` and ``layout``.
        choices: names of the columns of ``columns`` that the axes may show, where the reader may choose.
        columns: the points of each trace, by name.
    """

    name: str
    title: str
    about: str
    figure: Mapping[str, Any]
    choices: Sequence[str] = ()
    columns: Mapping[str, Sequence[Sequence[float | None]]] | None = None


def plain(text: object) -> str:
    """A name as plotly takes it, which reads tags in texts, and formulas between dollar signs."""
    return html.escape(str(text), quote=False).replace("$", "&#36;")


def colour(number: int) -> str:
    """The colour of a run, by its number."""
    return _COLOURS[number % len(_COLOURS)]


def score_charts(number: int, name: str, scores: Mapping[str, SetScore]) -> list[Chart]:
    """Bars with intervals, a line for each run across tasks, and two tasks against each other.

    Args:
        number: of the set, which makes names of charts different.
        name: of the set.
        scores: by run.
    """
    tasks = list(dict.fromkeys(task for one in scores.values() for task in one.tasks))
    metric = next(iter(scores.values())).metric
    charts = [_bars(number, name, metric, scores, tasks)]
    if len(tasks) > 1:
        charts += [_lines(number, name, metric, scores, tasks), _trade_off(number, name, metric, scores, tasks)]
    return charts


def _bars(number: int, name: str, metric: str, scores: Mapping[str, SetScore], tasks: Sequence[str]) -> Chart:
    import plotly.graph_objects as go

    figure = go.Figure()
    for place, (label, one) in enumerate(scores.items()):
        own = [one.tasks.get(task) for task in tasks]
        above = [None if score is None or score.high is None else score.high - score.mean for score in own]
        below = [None if score is None or score.low is None else score.mean - score.low for score in own]
        figure.add_bar(
            name=plain(label),
            x=[plain(task) for task in tasks],
            y=[None if score is None else score.mean for score in own],
            error_y={"type": "data", "symmetric": False, "array": above, "arrayminus": below, "color": "#808080"},
            marker_color=colour(place),
        )
    figure.update_layout(barmode="group", yaxis_title=plain(metric))
    about = f"A bar for each of {len(scores)} runs in each of {len(tasks)} tasks of {name}, with its 95 % interval."
    return Chart(f"bars-{number}", f"{name}: scores by task", about, _finished(figure))


def _lines(number: int, name: str, metric: str, scores: Mapping[str, SetScore], tasks: Sequence[str]) -> Chart:
    import plotly.graph_objects as go

    figure = go.Figure()
    for place, (label, one) in enumerate(scores.items()):
        figure.add_scatter(
            name=plain(label),
            x=[plain(task) for task in tasks],
            y=[one.tasks[task].mean if task in one.tasks else None for task in tasks],
            mode="lines+markers",
            **_look(place),
        )
    figure.update_layout(yaxis_title=plain(metric))
    about = (
        f"A line for each run across the tasks of {name}: lines that cross are runs that trade one task for another."
    )
    return Chart(f"lines-{number}", f"{name}: parallel coordinates", about, _finished(figure))


def _trade_off(number: int, name: str, metric: str, scores: Mapping[str, SetScore], tasks: Sequence[str]) -> Chart:
    import plotly.graph_objects as go

    columns = {task: [one.tasks[task].mean if task in one.tasks else None for one in scores.values()] for task in tasks}
    figure = go.Figure()
    for place, label in enumerate(scores):
        first, second = columns[tasks[0]][place], columns[tasks[1]][place]
        figure.add_scatter(name=plain(label), x=[first], y=[second], mode="markers", **_look(place, size=12))
    figure.update_layout(xaxis_title=plain(tasks[0]), yaxis_title=plain(tasks[1]))
    about = f"A point for each run: its {metric} in one task of {name} against another. The tasks can be chosen."
    title = f"{name}: trade-off of two tasks"
    points = {task: [[value] for value in column] for task, column in columns.items()}
    return Chart(f"trade-off-{number}", title, about, _finished(figure), tasks, _known(points))


def front_charts(runs: Sequence[Finished]) -> list[Chart]:
    """The trade-offs between tasks that each search has found, two tasks against each other."""
    return [_front(place, run) for place, run in enumerate(runs) if run.points]


def _coefficients(point: Point) -> str:
    """A candidate's coefficients, where they are few."""
    few = point.coefficients if len(point.coefficients) <= _WIDEST else {}
    return ", ".join(f"{key} {value:.3g}" for key, value in few.items())


def _front(place: int, run: Finished) -> Chart:
    import plotly.graph_objects as go

    tasks, figure = list(run.points[0].tasks), go.Figure()
    groups = {
        "merged": [point for point in run.points if point.number == 1],
        "trade-offs": sorted((point for point in run.points if point.number > 1), key=lambda point: point.number),
        "evaluated": [point for point in run.points if not point.number],
    }
    for number, (name, points) in enumerate(groups.items()):
        told = [_coefficients(point) for point in points]
        figure.add_scatter(
            name=name,
            x=[point.tasks[tasks[0]] for point in points],
            y=[point.tasks[tasks[1]] for point in points],
            text=[
                plain(f"front/{point.number}: {text}" if point.number else text)
                for point, text in zip(points, told, strict=True)
            ],
            mode="markers",
            marker={"color": ("#d55e00", "#0072b2", "#a0a0a0")[number], "size": (13, 9, 6)[number]},
        )
    figure.update_layout(xaxis_title=plain(tasks[0]), yaxis_title=plain(tasks[1]))
    columns = {task: [[point.tasks[task] for point in points] for points in groups.values()] for task in tasks}
    about = (
        f"A point for each of {len(run.points)} candidates: its score in one task against another, lower is better. No "
        "other candidate is better than a trade-off in every task. The tasks can be chosen."
    )
    return Chart(f"front-{place}", f"Trade-offs: {run.label}", about, _finished(figure), tasks, _known(columns))


def learning_charts(runs: Sequence[Finished]) -> list[Chart]:
    """Losses of all runs that learn, and the mean coefficient of each of their experts over time."""
    learning = {place: run for place, run in enumerate(runs) if run.curves}
    charts = [_losses(learning)] if learning else []
    held_out = {
        place: run for place, run in learning.items() if any("held_out_divergence" in row for row in run.curves)
    }
    return charts + ([_held_out(held_out)] if held_out else [])


def _losses(runs: Mapping[int, Finished]) -> Chart:
    import plotly.graph_objects as go

    figure = go.Figure()
    for place, run in runs.items():
        shown = {"legendgroup": str(place), "line": {"color": colour(place)}}
        for name, ending, look in (
            ("total", "", {"opacity": 0.25, "showlegend": False}),
            ("total_smoothed", "", {}),
            ("total_epoch_mean", " (epoch means)", {"mode": "markers", "marker": _look(place)["marker"]}),
        ):
            rows = [row for row in run.curves if name in row]
            figure.add_scatter(
                name=plain(run.label + ending),
                x=[row["update"] for row in rows],
                y=[row[name] for row in rows],
                **{"mode": "lines", **shown, **look},
            )
    figure.update_layout(xaxis_title="update", yaxis_title="loss")
    about = (
        "The loss of every update (faint), its exponential mean over about ten updates (line) and the mean of each "
        "epoch (marks), for each run that learns. Losses of runs with other options are not of the same scale."
    )
    return Chart("losses", "Losses while learning", about, _finished(figure))


def _held_out(runs: Mapping[int, Finished]) -> Chart:
    import plotly.graph_objects as go

    figure = go.Figure()
    for place, run in runs.items():
        rows = [row for row in run.curves if "held_out_divergence" in row]
        figure.add_scatter(
            name=plain(run.label),
            x=[row["update"] for row in rows],
            y=[row["held_out_divergence"] for row in rows],
            mode="lines+markers",
            **_look(place),
        )
    figure.update_layout(xaxis_title="update", yaxis_title="nats per token")
    about = "Divergence of the merged model from the experts on samples that were held out, after every epoch."
    return Chart("held-out", "Divergence on held-out samples", about, _finished(figure))


def coefficient_charts(runs: Sequence[Finished]) -> list[Chart]:
    """Heat maps of the coefficients of each run, with the same colours in all of them."""
    learned = {place: run for place, run in enumerate(runs) if run.layers and run.layers[0].coefficients}
    values = [value for run in learned.values() for layer in run.layers for value in layer.coefficients.values()]
    charts = []
    for place, run in learned.items():
        rows = {
            f"{expert}, {submodule}": {
                depth: _mean([layer.coefficients[expert] for layer in found])
                for depth, found in _by_depth(run.layers, submodule).items()
            }
            for expert in run.layers[0].coefficients
            for submodule in present(run.layers)
        }
        figure = _heat_map(rows, min(values), max(values), ".2f")
        about = "Mean coefficient of each expert in each submodule, by layer; the colours are the same for all runs."
        charts.append(Chart(f"coefficients-{place}", f"Coefficients: {run.label}", about, figure))
    return charts


def importance_charts(runs: Sequence[Finished]) -> list[Chart]:
    """Importance of the submodules by layer, and their chunks."""
    charts = []
    for place, run in enumerate(runs):
        if not run.layers:
            continue
        rows = {name: _by_depth(run.layers, name) for name in present(run.layers)}
        shares = {
            name: {depth: sum(one.importance for one in found) for depth, found in row.items()}
            for name, row in rows.items()
        }
        chunks = {
            name: {depth: float(sum(one.chunks for one in found)) for depth, found in row.items()}
            for name, row in rows.items()
        }
        highest = max(share for row in shares.values() for share in row.values())
        most = max(count for row in chunks.values() for count in row.values())
        about = "Share of each submodule in the importance of all layers, by layer."
        figure = _heat_map(shares, 0, highest, ".3f")
        charts.append(Chart(f"importance-{place}", f"Importance: {run.label}", about, figure))
        about = "Coefficients that each expert has in each submodule, by layer; 0 where they are fixed."
        figure = _heat_map(chunks, 0, most, ".0f")
        charts.append(Chart(f"chunks-{place}", f"Chunks: {run.label}", about, figure))
    return charts


def over_time_charts(runs: Sequence[Finished]) -> list[Chart]:
    """Coefficients by layer while each run learned."""
    charts = []
    for place, run in enumerate(runs):
        if run.over_time is None:
            continue
        found = run.over_time
        rows = {
            f"{expert}, {depth if depth == OUTSIDE else f'layer {depth}'}": dict(
                zip(map(str, found.updates), values, strict=True)
            )
            for expert, by_depth in found.coefficients.items()
            for depth, values in zip(found.depths, by_depth, strict=True)
        }
        values = [value for row in rows.values() for value in row.values()]
        figure = _heat_map(rows, min(values), max(values), ".2f", across="update")
        about = "Mean coefficient of each expert in each layer, after some of the updates."
        charts.append(Chart(f"over-time-{place}", f"Coefficients while learning: {run.label}", about, figure))
    return charts


def _by_depth(layers: Sequence[Layer], submodule: str) -> dict[str, list[Layer]]:
    """Layers of a submodule by the number of their depth, in order; those outside come last."""
    own = sorted((layer for layer in layers if layer.submodule == submodule), key=_place)
    found: dict[str, list[Layer]] = {}
    for layer in own:
        found.setdefault(OUTSIDE if layer.depth is None else str(layer.depth), []).append(layer)
    return found


def _place(layer: Layer) -> tuple[bool, int]:
    return layer.depth is None, layer.depth or 0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _heat_map(
    rows: Mapping[str, Mapping[str, float]], low: float, high: float, shown: str, *, across: str = "layer"
) -> Mapping[str, Any]:
    """Rows over columns, the first row on top; values stand in the cells if there are few columns.

    Args:
        rows: values by column.
        low: value of the darkest colour.
        high: value of the brightest.
        shown: format of the values, as d3 has it.
        across: what the columns are.
    """
    import plotly.graph_objects as go

    numbers = {column for row in rows.values() for column in row}
    columns = sorted(numbers, key=lambda name: (name == OUTSIDE, 0 if name == OUTSIDE else int(name)))
    figure = go.Figure()
    figure.add_heatmap(
        z=[[row.get(column) for column in columns] for row in rows.values()],
        x=columns,
        y=[plain(name) for name in rows],
        zmin=low,
        zmax=high,
        colorscale="Viridis",
        texttemplate=f"%{{z:{shown}}}" if len(columns) <= _WIDEST else None,
        hovertemplate=f"%{{y}}, {across} %{{x}}: %{{z:{shown}}}<extra></extra>",
    )
    figure.update_xaxes(type="category", title=across)
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_layout(height=110 + 20 * len(rows))
    return _finished(figure)


def _look(place: int, size: int = 8) -> dict[str, Any]:
    """Colour and sign of a run, by its number."""
    sign = _SIGNS[place % len(_SIGNS)]
    return {"marker": {"color": colour(place), "symbol": sign, "size": size}, "line": {"color": colour(place)}}


def _finished(figure: Any) -> Mapping[str, Any]:
    """The figure as data, without a theme: the page has its own."""
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02},
    )
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    content: Mapping[str, Any] = _known(figure.to_plotly_json())
    return content


def _known(value: Any) -> Any:
    """The value without numbers that JSON has not."""
    if isinstance(value, dict):
        return {name: _known(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_known(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
