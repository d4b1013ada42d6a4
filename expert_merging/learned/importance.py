"""How much each merged tensor matters, and how many coefficients it is given for it (paper, section 3.3).

What the paper calls a layer is one parameter tensor, as its figures show.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from expert_merging.errors import InputError
from expert_merging.learned.chunks import chunk_count, chunk_length
from expert_merging.learned.coefficients import Coefficients
from expert_merging.roles import find_places
from expert_merging.writing import write_atomically

# Rounding must not turn a count that is whole by the formula into the next smaller one.
_ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class Layer:
    """One merged tensor.

    Args:
        name: tensor name.
        submodule: one of `expert_merging.roles.SUBMODULES`, or other.
        depth: number of its transformer layer; None outside the language model's layers.
        stage: third of the language model that it lies in, or outside.
        parameters: number of its entries.
        chunks: coefficients per expert; 0 where the coefficient is fixed.
        importance: share of the importance of all layers.
        coefficients: by expert, mean over its entries.
        magnitudes: mean absolute entry of the task vector, by expert.
    """

    name: str
    submodule: str
    depth: int | None
    stage: str
    parameters: int
    chunks: int
    importance: float
    coefficients: Mapping[str, float]
    magnitudes: Mapping[str, float]


def mean_coefficients(values: Tensor, elements: int) -> Tensor:
    """Mean over a tensor's entries of the coefficients of its chunks.

    Args:
        values: ``(experts, chunks)``.
        elements: size of the tensor.

    Returns:
        ``(experts,)``
    """
    chunks = values.shape[1]
    if chunks == 1:
        return values[:, 0]
    length = chunk_length(elements, chunks)
    lengths = torch.tensor([min(length, elements - length * chunk) for chunk in range(chunks)], dtype=torch.float64)
    return (values.double() * lengths).sum(1).div(elements).to(values.dtype)


def layer_importance(
    coefficients: Mapping[str, Sequence[float]], magnitudes: Mapping[str, Sequence[float]], sizes: Mapping[str, int]
) -> dict[str, float]:
    """``I_l = norm(sum_k |a_k^l| s_k^l n_l)``, which sums to 1 over layers (paper, section 3.3).

    ``s_k^l`` is the task vector's mean magnitude as a share of its sum over layers: the paper says that it is
    normalised but not how. Everything is 0 where no task vector has an entry other than 0.

    Args:
        coefficients: per expert, by tensor name.
        magnitudes: mean absolute entry of the task vector per expert, by tensor name.
        sizes: number of entries by tensor name.
    """
    totals = [math.fsum(column) for column in zip(*magnitudes.values(), strict=True)]
    raw = {
        name: size
        * math.fsum(
            abs(value) * magnitude / total
            for value, magnitude, total in zip(coefficients[name], magnitudes[name], totals, strict=True)
            if total
        )
        for name, size in sizes.items()
    }
    whole = math.fsum(raw.values())
    return {name: value / whole if whole else 0.0 for name, value in raw.items()}


def allocate_chunks(
    importance: Mapping[str, float], sizes: Mapping[str, int], *, budget: float, kappa: float
) -> dict[str, int]:
    """``m_l = floor(B I_l^kappa / sum I^kappa)`` (paper, Eq. 4), never more chunks than there are entries.

    Args:
        importance: of every layer.
        sizes: number of entries by tensor name.
        budget: B, coefficients per expert.
        kappa: how much more the more important layers get.

    Returns:
        Number of chunks by tensor name; 0 for a layer whose coefficient is fixed.

    Raises:
        InputError: no layer gets a chunk.
    """
    weights = {name: value**kappa for name, value in importance.items()}
    total = math.fsum(weights.values())
    wanted = {name: math.floor(budget * weight / total * _ROUNDING) if total else 0 for name, weight in weights.items()}
    chunks = {name: chunk_count(sizes[name], count) if count and sizes[name] else 0 for name, count in wanted.items()}
    if not any(chunks.values()):
        raise InputError(
            f"a budget of {budget:g} coefficients per expert, spread by importance over {len(chunks)} parameters, "
            "gives none of them a chunk; raise --budget, or lower --kappa where importance is spread thinly"
        )
    return chunks


def describe_layers(
    coefficients: Coefficients, magnitudes: Mapping[str, Sequence[float]], sizes: Mapping[str, int]
) -> list[Layer]:
    """Every merged tensor with its coefficients and its importance by them."""
    means = {name: mean_coefficients(value, sizes[name]).tolist() for name, value in coefficients.values.items()}
    strengths = {
        name: mean_coefficients(value.abs(), sizes[name]).tolist() for name, value in coefficients.values.items()
    }
    importance = layer_importance(strengths, magnitudes, sizes)
    places = find_places(list(coefficients.values))
    return [
        Layer(
            name,
            *places[name],
            parameters=sizes[name],
            chunks=0 if name in coefficients.fixed else value.shape[1],
            importance=importance[name],
            coefficients=dict(zip(coefficients.experts, means[name], strict=True)),
            magnitudes=dict(zip(coefficients.experts, magnitudes[name], strict=True)),
        )
        for name, value in coefficients.values.items()
    ]


def save_layers(layers: Sequence[Layer], file: Path) -> None:
    """Write the table of layers as CSV."""
    experts = list(layers[0].coefficients)
    fixed = ["name", "submodule", "depth", "stage", "parameters", "chunks", "importance"]
    header = [*fixed, *(f"coefficient {name}" for name in experts), *(f"magnitude {name}" for name in experts)]
    rows = [
        [
            *(getattr(layer, column) for column in fixed),
            *(layer.coefficients[name] for name in experts),
            *(layer.magnitudes[name] for name in experts),
        ]
        for layer in layers
    ]
    write_table(file, header, rows)


def load_layers(file: Path) -> list[Layer]:
    """Read what `save_layers` wrote.

    Raises:
        InputError: it is something else.
    """
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        layers = [_read_layer(row) for row in rows]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"{file} is not the table of layers that a run writes ({error!r})") from None
    if not layers:
        raise InputError(f"{file} has no layers")
    return layers


def _read_layer(row: Mapping[str, str]) -> Layer:
    def by_expert(kind: str) -> dict[str, float]:
        return {key.removeprefix(f"{kind} "): float(value) for key, value in row.items() if key.startswith(f"{kind} ")}

    return Layer(
        name=row["name"],
        submodule=row["submodule"],
        depth=int(row["depth"]) if row["depth"] else None,
        stage=row["stage"],
        parameters=int(row["parameters"]),
        chunks=int(row["chunks"]),
        importance=float(row["importance"]),
        coefficients=by_expert("coefficient"),
        magnitudes=by_expert("magnitude"),
    )


def write_table(file: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a CSV file; None is an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(file, text.getvalue().encode())
