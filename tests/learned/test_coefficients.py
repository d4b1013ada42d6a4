"""Coefficients: chunks, the rule, gradients, files."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_merging.errors import InputError
from expert_merging.learned.coefficients import (
    Coefficients,
    CoefficientVector,
    add_inner_products,
    apply,
    choose_chunks,
    chunk_count,
    load_coefficients,
)
from expert_merging.parts import Part


@given(elements=st.integers(1, 200), wanted=st.integers(1, 250))
@settings(max_examples=200, deadline=None)
def test_chunks_are_those_of_torch_chunk(elements, wanted):
    assert chunk_count(elements, wanted) == len(torch.chunk(torch.empty(elements), wanted))


@given(
    elements=st.integers(1, 60),
    wanted=st.integers(1, 70),
    experts=st.integers(1, 4),
    cut=st.integers(1, 60),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_the_rule_on_blocks_is_the_rule_on_chunks(elements, wanted, experts, cut, seed):
    torch.manual_seed(seed)
    chunks = chunk_count(elements, wanted)
    coefficients, task_vectors = torch.rand(experts, chunks), torch.randn(experts, elements)
    expected = sum(
        torch.cat([value * part for value, part in zip(row, vector.chunk(chunks), strict=True)])
        for row, vector in zip(coefficients, task_vectors, strict=True)
    )
    blocks = [
        apply(coefficients, task_vectors[:, start : start + cut], start, elements) for start in range(0, elements, cut)
    ]
    torch.testing.assert_close(torch.cat(blocks), expected)


@given(elements=st.integers(1, 60), wanted=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_inner_products_are_the_gradient_of_the_rule(elements, wanted, seed):
    torch.manual_seed(seed)
    chunks = chunk_count(elements, wanted)
    coefficients = torch.rand(3, chunks, requires_grad=True)
    task_vectors, gradient = torch.randn(3, elements), torch.randn(elements)
    merged = sum(
        torch.cat([value * part for value, part in zip(row, vector.chunk(chunks), strict=True)])
        for row, vector in zip(coefficients, task_vectors, strict=True)
    )
    (expected,) = torch.autograd.grad((merged * gradient).sum(), coefficients)
    total = torch.ones(3, chunks)
    for part in gradient.split(max(1, elements // 3)):  # as when a merged tensor is several parameters in memory
        start = part.storage_offset()
        add_inner_products(total, part, task_vectors[:, start : start + len(part)], start, elements)
    torch.testing.assert_close(total - 1, expected, rtol=1e-4, atol=1e-5)


def test_the_last_matching_pattern_counts():
    sizes = {"a.q": 10, "a.k": 10, "b.q": 3}
    assert choose_chunks(sizes, {"*": 2, "*.q": 4, "a.k": 0}) == {"a.q": 4, "a.k": 0, "b.q": 3}
    assert choose_chunks(sizes, {}) == {"a.q": 1, "a.k": 1, "b.q": 1}


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
        choose_chunks({"a.q": 10}, patterns)
    assert message in str(raised.value)


def test_the_vector_starts_at_the_initial_values_and_keeps_fixed_ones():
    vector = CoefficientVector({"a": 2, "b": 0, "c": 1}, [0.2, 0.7])
    values = vector.by_name()
    torch.testing.assert_close(values["a"], torch.tensor([[0.2, 0.2], [0.7, 0.7]]))
    torch.testing.assert_close(values["b"], torch.tensor([[0.2], [0.7]]))
    assert vector.raw.numel() == 6
    assert vector.fixed == ("b",)
    assert torch.equal(vector(), vector.anchor)


def test_the_vector_starts_where_it_is_told_and_is_anchored_at_the_initial_values():
    start = {"a": torch.tensor([0.1, 0.9]), "b": torch.tensor([0.4, 0.6])}
    vector = CoefficientVector({"a": 2, "b": 0}, [0.2, 0.7], start=start)
    values = vector.by_name()
    torch.testing.assert_close(values["a"], torch.tensor([[0.1, 0.1], [0.9, 0.9]]))
    assert torch.equal(values["b"], torch.tensor([[0.4], [0.6]]))
    torch.testing.assert_close(vector.anchor, torch.tensor([0.2, 0.2, 0.7, 0.7]))


def test_a_shared_vector_has_one_coefficient_per_expert():
    vector = CoefficientVector({"a": 1, "b": 1}, [0.2, 0.7], shared=True)
    assert vector.raw.numel() == 2
    vector.raw.data += 1
    values = vector.by_name()
    assert torch.equal(values["a"], values["b"])
    assert torch.equal(values["a"].flatten(), vector())


def make_coefficients() -> Coefficients:
    return Coefficients(
        experts=("x", "y"),
        values={"w": torch.tensor([[0.5, 0.25], [1.0, 0.0]]), "v": torch.tensor([[0.125], [0.75]])},
        task_vector_scale=(1.0, 2.0),
        fixed=("v",),
        provenance={"updates": 7},
    )


def test_files_keep_everything(tmp_path):
    coefficients = make_coefficients()
    coefficients.save(tmp_path / "coefficients.safetensors")
    for place in (tmp_path, tmp_path / "coefficients.safetensors"):
        loaded = load_coefficients(place)
        assert (loaded.experts, loaded.task_vector_scale, loaded.fixed) == (("x", "y"), (1.0, 2.0), ("v",))
        assert loaded.provenance == {"updates": 7}
        assert list(loaded.values) == ["w", "v"]
        assert all(torch.equal(loaded.values[name], coefficients.values[name]) for name in loaded.values)
        assert loaded.fingerprint() == coefficients.fingerprint()


def test_an_edited_scale_changes_the_rule(tmp_path):
    make_coefficients().save(tmp_path / "coefficients.safetensors")
    described = json.loads((tmp_path / "coefficients.json").read_text())
    described["task_vector_scale"] = [0.0, 1.0]
    (tmp_path / "coefficients.json").write_text(json.dumps(described))
    merged = load_coefficients(tmp_path).rule(torch.ones(2, 4), Part("w", (2, 2), 0, 4))
    assert merged.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_missing_and_damaged_files_are_named(tmp_path):
    file = tmp_path / "coefficients.safetensors"
    with pytest.raises(InputError, match="does not exist; give a finished run of a method that learns"):
        load_coefficients(tmp_path)
    make_coefficients().save(file)
    good = (tmp_path / "coefficients.json").read_text()
    for broken in ("{", "[]", '{"experts": ["x"]}'):
        (tmp_path / "coefficients.json").write_text(broken)
        with pytest.raises(InputError, match="are not coefficients of a run"):
            load_coefficients(tmp_path)
    (tmp_path / "coefficients.json").write_text(good.replace('"w": 2', '"w": 3'))
    with pytest.raises(InputError, match="disagree about w"):
        load_coefficients(tmp_path)
    (tmp_path / "coefficients.json").write_text(good.replace("2.0", "2.0, 3.0"))
    with pytest.raises(InputError, match="disagree about task_vector_scale"):
        load_coefficients(tmp_path)
    (tmp_path / "coefficients.json").write_text(good)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(InputError, match="are not coefficients of a run"):
        load_coefficients(tmp_path)


def test_the_published_format_has_a_value_or_a_list_per_chunk_for_each_expert(tmp_path):
    make_coefficients().save_published(tmp_path / "weight_coeffs.json")
    published = json.loads((tmp_path / "weight_coeffs.json").read_text())
    assert published == {"w": [[0.5, 0.25], [1.0, 0.0]], "v": [0.125, 0.75]}
