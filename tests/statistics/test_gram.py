"""Gram matrices: both forms, and their files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from expert_merging.statistics.gram import Gram, Grams, GramSum, write_grams

CPU = torch.device("cpu")


def gram_of(*batches: torch.Tensor) -> Gram:
    total = GramSum()
    for batch in batches:
        total.add(batch)
    return total.finish()


def vectors(count: int, inputs: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("counts", [(3,), (2, 3), (5, 4), (7,), (1, 9, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_mean_of_outer_products_however_it_is_kept(counts, dtype):
    batches = [vectors(count, seed=count).to(dtype) for count in counts]
    gram, whole = gram_of(*batches), torch.cat(batches).double()
    expected = whole.T @ whole / len(whole)
    assert gram.vectors == sum(counts)
    assert gram.is_summed == (sum(counts) >= 6), "vectors are kept where they are fewer than inputs"
    assert gram.is_summed or gram.values.dtype == dtype
    torch.testing.assert_close(gram.matrix(CPU), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gram.diagonal(CPU), expected.diagonal(), rtol=1e-6, atol=1e-6)
    left = vectors(4).double()
    torch.testing.assert_close(gram.product(left), left @ expected, rtol=1e-6, atol=1e-6)
    if not gram.is_summed:
        torch.testing.assert_close(gram.rows(CPU).T @ gram.rows(CPU), expected)


def test_many_vectors_in_half_precision_are_added_up_in_float32():
    """In bfloat16 a sum of ones ends at 256."""
    ones = torch.ones(1000, 2, dtype=torch.bfloat16)
    assert gram_of(ones, ones).matrix(CPU).tolist() == [[1, 1], [1, 1]]


def test_the_vectors_of_a_sum_are_gone():
    with pytest.raises(ValueError, match="gone"):
        gram_of(vectors(9)).rows(CPU)


def test_files_give_back_what_was_written(tmp_path):
    grams = {("q", "k"): gram_of(vectors(3).bfloat16()), ("o",): gram_of(vectors(9))}
    write_grams(tmp_path / "A.safetensors", grams)
    write_grams(tmp_path / "B.safetensors", {("o",): gram_of(vectors(2))})
    assert {file.name for file in tmp_path.iterdir()} == {"A.safetensors", "B.safetensors"}
    assert {tensor.dtype for tensor in load_file(tmp_path / "A.safetensors").values()} == {
        torch.bfloat16,
        torch.float32,
    }
    read = Grams({name: tmp_path / f"{name}.safetensors" for name in "AB"})
    assert read.names == {"q", "k", "o"}
    assert read.of("unknown") == (None, None)
    for name in ("q", "k"):
        gram, missing = read.of(name)
        assert missing is None
        assert gram.values.equal(grams["q", "k"].values)
        assert (gram.vectors, gram.is_summed) == (3, False)
    summed, kept = read.of("o")
    assert (summed.vectors, summed.is_summed, kept.vectors, kept.is_summed) == (9, True, 2, False)
    assert summed.values.equal(grams["o",].values)


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(AttributeError):
        write_grams(tmp_path / "A.safetensors", {("q",): gram_of(vectors(3)), ("k",): None})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("counts", [(2, 3), (2, 9), (8, 9)], ids=str)
def test_a_layer_that_shares_its_inputs_only_at_times_has_all_of_them(counts, tmp_path):
    first, second = (vectors(count, seed=count) for count in counts)
    write_grams(tmp_path / "A.safetensors", {("q", "k"): gram_of(first), ("q",): gram_of(second)})
    grams = Grams({"A": tmp_path / "A.safetensors"})
    whole = torch.cat([first, second]).double()
    (gram,) = grams.of("q")
    torch.testing.assert_close(gram.matrix(CPU), whole.T @ whole / len(whole), rtol=1e-6, atol=1e-6)
    assert grams.of("k")[0].vectors == counts[0]
