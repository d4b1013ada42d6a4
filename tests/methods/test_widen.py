"""WIDEN against its authors' code, and what ranks decide."""

from __future__ import annotations

import pytest
import torch

from expert_merging.methods.widen import score_ranks, widen
from expert_merging.parts import Part
from tests.methods.elsewhere import assert_agrees, inputs


@pytest.mark.parametrize(("ratio", "score"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.5)])
@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("matrix", "model.layers.0.mlp.weight", (6, 8)),
        ("vector", "model.layers.0.norm.weight", (9,)),
        ("embed", "model.embed_tokens.weight", (5, 4)),
    ],
)
def test_the_authors_code_agrees(kind, name, shape, ratio, score):
    base, given = inputs(shape)
    found = widen(given, Part.whole(name, shape), base, widen_ratio=ratio, widen_score=score)
    assert_agrees(found, "authors", f"widen {ratio} {score} {kind}")


def test_tables_of_words_may_come_as_vectors():
    base, given = inputs((5, 4))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        part = Part.whole(name, (5, 4))
        flat = widen(given.flatten(1), part, base.flatten())
        assert flat.view(5, 4).equal(widen(given.clone(), part, base))


def test_a_head_has_columns_and_embeddings_have_words():
    base, given = inputs((5, 4))
    head, table = (widen(given.clone(), Part.whole(f"{name}.weight", (5, 4)), base) for name in ("lm_head", "wte"))
    turned = widen(given.mT.contiguous(), Part.whole("lm_head.weight", (4, 5)), base.T.contiguous())
    assert turned.T.equal(table)
    assert not head.equal(table)


def test_the_middle_of_an_odd_number_of_columns_is_not_above_the_mean():
    ranks = torch.arange(101.0, dtype=torch.float64).expand(2, -1)
    scores = score_ranks(ranks, 1.0, 1.0)
    assert (scores == 1).sum(1).tolist() == [50, 50]
    assert scores[:, :51].eq(0.5).all()


def test_columns_of_zeros_have_no_direction():
    base, given = inputs((6, 8))
    base[:, 2] = 0
    given[0, :, 2] = 0
    found = widen(given, Part.whole("a", (6, 8)), base)
    assert found.isfinite().all()
