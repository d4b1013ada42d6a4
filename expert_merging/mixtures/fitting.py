"""Routers that are made of samples: by least squares, or as directions of hidden states or embeddings.

A base among the experts has no samples of its own. Its row is zero, so it is rated above an expert that is rated below
zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.mixtures.statistics import FOR, NEGATIVE, OWN, RouterSamples
from expert_merging.mixtures.tensors import Mixture
from expert_merging.roles import word_tables
from expert_merging.statistics.gram import Gram, Grams, combined


def for_members(mixture: Mixture, rows: Tensor, temperature: float, places: Sequence[int] | None = None) -> Tensor:
    """A router ``(members, columns)`` float32 from experts' rows; who has no samples, such as the base, gets zeros.

    Args:
        mixture: the mixture.
        rows: ``(experts, columns)``.
        temperature: what logits are divided by.
        places: numbers of the experts that the rows are of; all by default.
    """
    router = torch.zeros(len(mixture.members), rows.shape[1])
    router[list(range(len(rows)) if places is None else places)] = rows.float().cpu() / temperature
    return router


def ridge_rows(grams: Sequence[Gram], ridge: float, device: torch.device) -> Tensor:
    """``W = B (A + lambda I)^-1``, least squares from router inputs to their expert (arXiv 2603.29765).

    ``A`` is the sum over experts of the mean of ``x x^T``, and the rows of ``B`` are the experts' means of ``x``.
    So experts count alike however long their samples are, where the paper counts tokens. ``lambda`` is relative to the
    mean square of the inputs, there absolute. The rows keep their lengths, which the paper makes 1: so a logit is what
    the fit says, near 1 for an expert's own inputs and near 0 for others'.

    Args:
        grams: of each expert, with the mean as the last row.
        ridge: lambda as a share of the mean of the diagonal of ``A``.
        device: where it is computed.

    Returns:
        ``(experts, columns)`` float64.
    """
    means = []
    total: Tensor | None = None
    for gram in grams:
        matrix = gram.matrix(device)
        means.append(matrix[-1, :-1].clone())
        total = matrix[:-1, :-1].clone() if total is None else total.add_(matrix[:-1, :-1])
    assert total is not None  # noqa: S101  (there are experts)
    total.diagonal().add_(ridge * total.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
    return torch.cholesky_solve(torch.stack(means).T, torch.linalg.cholesky(total)).T


def directions(means: Tensor, negatives: Tensor | None) -> Tensor:
    """Directions of length 1 of the experts' means, each less that of what the expert is not for.

    Args:
        means: ``(experts, columns)``.
        negatives: the same of what they are not for; None for nothing.
    """
    found = means if negatives is None else means - negatives
    return torch.nn.functional.normalize(found, dim=1)


def others(means: Tensor) -> Tensor:
    """For each expert, the mean over the other experts, ``(experts, columns)``; zeros where there is none."""
    return (means.sum(0) - means) / max(1, len(means) - 1)


def from_states(
    mixture: Mixture,
    grams: Grams,
    rows: Callable[[Sequence[Gram], Sequence[Gram]], Tensor],
    temperature: float,
    *,
    assigned: bool = False,
) -> dict[str, Tensor]:
    """Routers by name, from statistics of their inputs.

    Args:
        mixture: the mixture.
        grams: the statistics.
        rows: the experts' rows, from their statistics and those of what they are not for, which may be none.
        temperature: what logits are divided by.
        assigned: samples are for the experts that they were assigned to, instead of those that were asked.
    """
    made = {}
    for name, router in mixture.inputs.items():
        found = _of_assigned(mixture, grams, name) if assigned else grams.of(OWN + name)
        own = {place: gram for place, gram in enumerate(found) if gram is not None}
        negative = [gram for gram in grams.of(NEGATIVE + name) if gram is not None]
        made[router] = for_members(mixture, rows([*own.values()], negative), temperature, [*own])
    return made


def _of_assigned(mixture: Mixture, grams: Grams, name: str) -> list[Gram | None]:
    """Statistics of a router's inputs on the samples that were assigned to each expert, whoever was asked."""
    return [
        combined(gram for gram in grams.of(FOR.format(expert) + name) if gram is not None)
        for expert in mixture.plan.experts
    ]


def mean_of(gram: Gram, device: torch.device) -> Tensor:
    """The mean vector ``(columns,)`` of statistics that have it as their last row."""
    if gram.is_summed:
        return gram.values[-1, :-1].to(device).double() / gram.vectors
    return gram.values[:, :-1].to(device).double().mean(0)


def means_of_embeddings(base: Checkpoint, found: RouterSamples, experts: Sequence[str], kind: str) -> Tensor:
    """Mean of the base's embeddings over all tokens of each expert's samples, ``(experts, columns)`` float64.

    Responses that the files lack are not written for it.
    """
    prompts = found.samples.prompts
    embedding, _ = word_tables(base.entries)
    assert prompts is not None  # noqa: S101  (checked samples have them)
    assert embedding is not None  # noqa: S101  (the layout has one)
    columns = base.entries[embedding].shape[1]
    counts: dict[str, Counter[int]] = {expert: Counter() for expert in experts}
    for sample in found.of(kind):
        answer = [] if sample.response is None else prompts.response_tokens(sample)
        counts[sample.expert].update([*prompts.get(sample)["input_ids"][0].tolist(), *answer])
    rows = torch.zeros(len(experts), columns, dtype=torch.float64)
    for row, own in zip(rows, counts.values(), strict=True):
        for token, count in own.items():
            row += base.read(embedding, token * columns, (token + 1) * columns).double() * (count / own.total())
    return rows


def loads(router: Tensor, vectors: Tensor, per_token: int) -> Tensor:
    """Share of each expert in what a router assigns, ``(experts,)``, which sum to 1.

    Args:
        router: ``(experts, columns)``.
        vectors: inputs ``(tokens, columns)``.
        per_token: how many experts work on each token.
    """
    chosen = (vectors.float() @ router.T).topk(per_token, dim=1).indices
    return torch.bincount(chosen.flatten(), minlength=len(router)).double() / chosen.numel()


def conditions(routers: Mapping[str, Tensor]) -> dict[str, float]:
    """How unlike the differences between experts are that routers see: largest by smallest singular value.

    What all rows have in common changes no choice and no weight of an expert, so it is left out.
    """
    found = {}
    for name, router in routers.items():
        values = torch.linalg.svdvals(router - router.mean(0))[: max(1, len(router) - 1)]
        found[name] = float(values[0] / values[-1]) if values[-1] > 0 else float("inf")
    return found
