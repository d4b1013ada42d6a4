"""Chunks: how many there are, and what their coefficients do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_merging.errors import InputError
from expert_merging.learned.chunks import apply, choose_axes, choose_chunks, chunk_count
from expert_merging.parts import Part


@given(elements=st.integers(1, 200), wanted=st.integers(1, 250))
@settings(max_examples=200, deadline=None)
def test_chunks_are_those_of_torch_chunk(elements, wanted):
    assert chunk_count(elements, wanted) == len(torch.chunk(torch.empty(elements), wanted))


@pytest.mark.parametrize("many", [1, 3, 10**6])
@given(
    elements=st.integers(1, 60),
    wanted=st.integers(1, 70),
    experts=st.integers(1, 4),
    cut=st.integers(1, 60),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_the_rule_on_blocks_is_the_rule_on_chunks(many, elements, wanted, experts, cut, seed):
    """Whether chunks are worked on one by one or together, and wherever a block begins and ends."""
    torch.manual_seed(seed)
    chunks = chunk_count(elements, wanted)
    coefficients, task_vectors = torch.rand(experts, chunks), torch.randn(experts, elements)
    expected = sum(
        torch.cat([value * part for value, part in zip(row, vector.chunk(chunks), strict=True)])
        for row, vector in zip(coefficients, task_vectors, strict=True)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("expert_merging.learned.chunks._MANY", many)
        starts = range(0, elements, cut)
        blocks = [apply(coefficients, task_vectors[:, start : start + cut], start, elements) for start in starts]
    torch.testing.assert_close(torch.cat(blocks), expected)


def test_the_last_matching_pattern_counts():
    parts = [Part.whole(name, (size,)) for name, size in {"a.q": 10, "a.k": 10, "b.q": 3}.items()]
    assert choose_chunks(parts, {"*": 2, "*.q": 4, "a.k": 0}) == {"a.q": 4, "a.k": 0, "b.q": 3}
    assert choose_chunks(parts, {}) == {"a.q": 1, "a.k": 1, "b.q": 1}


def test_columns_are_those_of_matrices_and_patterns_win():
    parts = [Part.whole(name, shape) for name, shape in {"q": (6, 4), "k": (6, 4), "norm": (4,)}.items()]
    assert choose_chunks(parts, {"k": 3}, "column") == {"q": 4, "k": 3, "norm": 1}
    assert choose_axes(parts, {"k": 3}, "column") == {"q": "columns"}
    assert choose_axes(parts, {"k": 3}, "row") == {}
    assert choose_chunks(parts, {"k": 3}, "direction") == {"q": 4, "k": 3, "norm": 1}
    assert choose_axes(parts, {"k": 3}, "rank") == {"q": "singular"}


def test_rows_are_those_of_matrices_and_patterns_win():
    shapes = {"layers.0.q": (6, 4), "layers.0.norm": (4,), "conv": (2, 3, 4), "lm_head.weight": (9, 4), "flat": (1, 5)}
    parts = [Part.whole(name, shape) for name, shape in shapes.items()]
    assert choose_chunks(parts, {}, "row") == {
        "layers.0.q": 6,
        "layers.0.norm": 1,
        "conv": 1,
        "lm_head.weight": 1,  # whose rows are words
        "flat": 1,
    }
    assert choose_chunks(parts, {"*q": 2, "conv": 0}, "row")["layers.0.q"] == 2


def test_chunks_are_not_asked_for_without_saying_how_many():
    with pytest.raises(InputError, match="--parametrisation chunk needs --coeffs_size_dict to say how many chunks"):
        choose_chunks([Part.whole("a", (4,))], {}, "chunk")


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"*.v": 2}, "'*.v' matches no merged parameter (a name looks like a.q)"),
        ({"a.q": -1}, "'a.q' asks for -1 chunks; 0 fixes a parameter, 1 or more are trained"),
        ({"*": 0}, "fixes every parameter; nothing is left to learn"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(patterns, message):
    with pytest.raises(InputError) as raised:
        choose_chunks([Part.whole("a.q", (10,))], patterns)
    assert message in str(raised.value)
