"""Core Space and KnOTS, merged between the factors, are what whole decompositions give."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from expert_merging.checkpoints.adapter import Adapter
from tests.checkpoints import tensors_of, write_checkpoint
from tests.command import flags, merged, refusal, refused
from tests.low_rank.adapters import (
    SHAPES,
    Zoo,
    assert_near,
    by_tensor,
    core_twin,
    draw,
    knots_twin,
    pairs_of,
    scattered_pairs,
    ties_everywhere,
    together,
    total,
    write_adapter,
    write_zoo,
)
from tests.methods.elsewhere import assert_agrees
from tests.methods.reference import iso_reference, svd_reference
from tests.methods.test_sparse import plain_ties

TWINS = {"core_space": core_twin, "knots": knots_twin}
SUM = "task_arithmetic scaling_coefficient=1"
both = pytest.mark.parametrize("method", TWINS)


def each_ties(density: float):
    return by_tensor(lambda own: plain_ties(own.flatten(1), density).view(own.shape[1:]))


@both
@pytest.mark.parametrize(
    ("inner", "rule"),
    [
        (SUM, total),
        ("ties density=0.4", ties_everywhere(0.4)),
        ("ties density=0.5 ties_scope=tensor", each_ties(0.5)),
        ("svd", by_tensor(svd_reference)),
        ("iso", by_tensor(iso_reference)),
    ],
)
def test_coordinates_are_merged_as_whole_decompositions_give_them(method, inner, rule, tmp_path):
    pairs = pairs_of()
    zoo = write_zoo(tmp_path, pairs, alpha=6)
    found = zoo.change(tmp_path / "out", "--method", method, "--inner", inner, "--scaling_coefficient", 0.5)
    expected = {name: 0.5 * tensor for name, tensor in TWINS[method](pairs, rule, alpha=6).items()}
    assert_near(found, expected, 1e-5)
    assert not found["norm.weight"].any()


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("core_space ties", "ties density=0.1 ties_scope=tensor"),
        ("core_space tsv", "svd"),
        ("core_space tsv isotropized", "svd"),
        ("core_space cart", "cart cart_rank_ratio=0.04 cart_coefficient=0.1"),
        ("knots ties", "ties"),
    ],
)
def test_the_authors_code_gives_the_same(name, inner, tmp_path):
    """Whose adapters have the scale 1, which they leave out; singular values are made equal where none is zero."""
    pairs = scattered_pairs({"A": 3, "B": 3, "C": 3 if "isotropized" in name else 4})
    base = write_zoo(tmp_path, pairs).base
    experts = {
        expert: write_adapter(tmp_path / f"as {expert}", own, alpha=len(own["q"][1])) for expert, own in pairs.items()
    }
    given = ["--method", name.split()[0], "--inner", inner, *(["--isotropize"] if "isotropized" in name else [])]
    found = Zoo(base, experts).change(tmp_path / "out", *given)
    assert_agrees(together(found) if "knots" in name else found["q.weight"], "authors", name, 1e-4)


@both
def test_a_sum_of_coordinates_is_the_sum_of_the_changes(method, tmp_path):
    """Nothing is lost: also where an expert leaves a tensor alone, and where two experts are one."""
    pairs = {**pairs_of(), "D": pairs_of()["A"]}
    pairs["B"] = {name: pairs["B"][name] for name in [*SHAPES][:2]}
    zoo = write_zoo(tmp_path, pairs)
    found = zoo.change(tmp_path / "out", "--method", method, "--inner", SUM)
    expected = zoo.change(tmp_path / "sum", "--method", "task_arithmetic", "--scaling_coefficient", 1)
    assert_near(found, expected)


def test_the_order_of_the_experts_does_not_matter(tmp_path):
    pairs = pairs_of()
    given = ["--method", "core_space", "--inner", "ties"]
    first = write_zoo(tmp_path / "a", pairs).change(tmp_path / "1", *given)
    other = write_zoo(tmp_path / "b", {name: pairs[name] for name in "CAB"}).change(tmp_path / "2", *given)
    assert_near(first, other, 1e-5)


@both
@pytest.mark.parametrize("inner", ["dare_ties", "pcb", "doge_ta", "opcm", "della", "sce"])
def test_any_closed_form_merges_coordinates(method, inner, tmp_path):
    zoo = write_zoo(tmp_path, pairs_of())
    found = zoo.change(tmp_path / "out", "--method", method, "--inner", inner)
    assert all(found[f"{name}.weight"].any() and found[f"{name}.weight"].isfinite().all() for name in SHAPES)


@both
def test_the_coefficient_zero_gives_the_base(method, tmp_path):
    found = write_zoo(tmp_path, pairs_of()).change(tmp_path / "out", "--method", method, "--scaling_coefficient", 0)
    assert not any(tensor.any() for tensor in found.values())


def test_singular_values_can_be_made_equal(tmp_path):
    found = write_zoo(tmp_path, pairs_of()).change(tmp_path / "out", "--method", "core_space", "--isotropize")
    for name in SHAPES:
        sizes = torch.linalg.svdvals(found[f"{name}.weight"])
        kept = sizes[sizes > 1e-4]
        torch.testing.assert_close(kept, kept.mean().expand(len(kept)))


@both
def test_changes_of_nothing_add_nothing(method, tmp_path):
    nothing = {"A": {"q": (torch.zeros(4, 2), draw(2, 3, seed=0))}, "B": {"q": (torch.zeros(4, 1), torch.zeros(1, 3))}}
    found = write_zoo(tmp_path, nothing).change(tmp_path / "out", "--method", method)
    assert not found["q.weight"].any()


def test_the_rank_of_the_result_can_be_cut(tmp_path):
    pairs = pairs_of()
    found = write_zoo(tmp_path, pairs).change(
        tmp_path / "out", "--method", "core_space", "--inner", SUM, "--merged_rank", 2
    )
    for name, tensor in core_twin(pairs, total).items():
        left, sizes, right = torch.linalg.svd(tensor, full_matrices=False)
        assert_near(found, {name: left[:, :2] * sizes[:2] @ right[:2]}, 1e-5)


def test_no_expert_is_read_where_factors_say_all(tmp_path, monkeypatch):
    """Beside that, what somebody trained as a whole is averaged."""
    pairs = pairs_of()
    zoo = write_zoo(tmp_path, pairs, base=0.5)
    asked = []
    fill = Adapter.read_into

    def read(self, block, name, start):
        asked.append(name)
        fill(self, block, name, start)

    monkeypatch.setattr(Adapter, "read_into", read)
    merged(tmp_path / "a", "--method", "core_space", *zoo.flags)
    asked_before = set(asked)
    whole = {"base_model.model.norm.weight": torch.full((4,), 2.0)}
    file = zoo.experts["A"] / "adapter_model.safetensors"
    save_file({**load_file(file), **whole}, file, metadata={"format": "pt"})
    run = merged(tmp_path / "b", "--method", "core_space", "--scaling_coefficient", 0.6, *zoo.flags)
    assert tensors_of(run.model)["norm.weight"].allclose(torch.full((4,), 1.2))
    assert set(asked) - asked_before <= {"norm.weight"}
    assert "3 tensors are merged by their factors, and 1 are averaged" in run.log.read_text()


def test_what_is_no_plain_adapter_is_refused(tmp_path, capsys):
    zoo = write_zoo(tmp_path, pairs_of())
    full = write_checkpoint(tmp_path / "full", tensors_of(zoo.base))
    pair = {"layers.0.q_proj": (draw(9, 1, seed=1), draw(1, 6, seed=2))}
    dora = write_adapter(tmp_path / "dora", pair, use_dora=True)
    magnitude = {"base_model.model.layers.0.q_proj.lora_magnitude_vector": torch.ones(9)}
    file = dora / "adapter_model.safetensors"
    save_file({**load_file(file), **magnitude}, file, metadata={"format": "pt"})
    lines = refused(capsys, "--method", "knots", *flags(zoo.base, Full=full, Dora=dora, A=zoo.experts["A"]))
    advice = "and knots merges LoRA adapters by their factors; use a method for full models, such as svd or ties"
    assert lines == [
        f"expert Full ({full}) is a full model, {advice}",
        f"expert Dora ({dora}) has norms of its own (use_dora), {advice}",
    ]


def test_adapters_that_change_nothing_that_is_merged_are_refused(tmp_path, capsys):
    zoo = write_zoo(tmp_path, {"A": {"q_proj": (draw(4, 1, seed=0), draw(1, 3, seed=1))}})
    line = refusal(capsys, "--method", "core_space", *flags(zoo.base, **zoo.experts), "--exclude_params", ".*q_proj.*")
    assert line == (
        "no adapter changes a parameter that is merged by a product of two factors; core_space has nothing to do"
    )


@pytest.mark.parametrize(("side", "number"), [(0, float("nan")), (1, float("inf")), (0, 1e38)])
def test_numbers_that_are_none_are_refused(side, number, tmp_path, capsys):
    """Or that are none in the product, in float32."""
    pairs = pairs_of({"A": 1})
    pairs["A"]["layers.0.k_proj"][side][0, 0] = number
    pairs["A"]["layers.0.k_proj"][1 - side][0, 0] = 5.0
    zoo = write_zoo(tmp_path, pairs)
    line = refusal(capsys, "--method", "core_space", *zoo.flags, "--output_path", tmp_path / "out")
    assert line == "expert A has NaN or infinite values in its change of layers.0.k_proj.weight; download it again"


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        ("karchers", "--inner karchers: no method named 'karchers'"),
        ("regmean", "--inner regmean: that is no closed form"),
        ("core_space", "--inner core_space: that is no closed form"),
        ("widen", "--inner widen: that needs the base's weights, which have no coordinates among those of changes"),
        ("ties density=2", "--inner ties density=2: --density must be a number in (0, 1]"),
        (
            "task_arithmetic scaling_coefficient=[1,2]",
            "--inner task_arithmetic scaling_coefficient=[1,2]: --scaling_coefficient has 2 values for 3 experts",
        ),
    ],
)
def test_inner_methods_that_cannot_merge_coordinates_are_refused(inner, said, tmp_path, capsys):
    zoo = write_zoo(tmp_path, pairs_of())
    assert refusal(capsys, "--method", "core_space", "--inner", inner, *zoo.flags).startswith(said)


def test_a_base_that_is_damaged_is_named(tmp_path, capsys):
    zoo = write_zoo(tmp_path, pairs_of(), base=float("nan"))
    line = refusal(capsys, "--method", "core_space", *zoo.flags, "--output_path", tmp_path / "out")
    assert line.startswith("the base has 84 NaN or infinite values in layers.1.q_proj.weight")


@pytest.mark.parametrize("inner", ["svd", "iso", "cart cart_rank_ratio=1"])
def test_methods_that_turn_with_the_space_give_what_they_give_of_whole_matrices(inner, tmp_path):
    """Where there is room for all directions of every expert, as there is in large matrices."""
    pairs = pairs_of({"A": 2, "B": 2}, {"layers.0.q_proj": (14, 11), "layers.0.k_proj": (9, 12)})
    zoo = write_zoo(tmp_path, pairs)
    name, *options = inner.split()
    given = [piece for option in options for piece in ("--" + option.split("=")[0], option.split("=")[1])]
    expected = zoo.change(tmp_path / "dense", "--method", name, *given)
    assert_near(zoo.change(tmp_path / "out", "--method", "core_space", "--inner", inner), expected, 1e-4)
