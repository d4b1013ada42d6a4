"""TALL masks against the plain formula, and the files they come in."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from expert_merging import streaming
from expert_merging.methods.linear import task_arithmetic
from expert_merging.methods.tall import _pack_by_numpy, _pack_by_torch, pack, tall, unpack
from expert_merging.workers import Workers
from tests.checkpoints import BASE, EXPERTS, make_zoo, tensors_of, write_checkpoint
from tests.command import assert_same_bytes, contents, flags, merge, merge_plainly, merged, refusal

SHAPES = [(), (1,), (7,), (8,), (5, 3), (2, 3, 4), (0,), (0, 4)]
NAMES = ("a", "b", "merged")
TALL = ("--method", "tall", "--run_name", "r")


def task_vectors(shape, experts=3):
    return torch.randn(experts, *shape, generator=torch.Generator().manual_seed(0)) * 0.1


def plain_masks(given: torch.Tensor, factors: list[float], scale: float = 1.0) -> list[torch.Tensor]:
    """Entry by entry."""
    total = given.sum(0) * scale
    return [
        torch.tensor(
            [abs(own) > factor * abs(all_ - own) for own, all_ in zip(row.flatten(), total.flatten(), strict=True)],
            dtype=torch.bool,
        )
        for row, factor in zip(given, factors, strict=True)
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("factor", "scale"), [(0.4, 1.0), (0.0, 1.0), (1.0, 0.5), ([0.2, 0.9, 3.0], 1.0)])
def test_masks_are_the_plain_formula_s(shape, factor, scale):
    vectors = task_vectors(shape)
    made = tall(vectors.clone(), NAMES, tall_lambda=factor, scaling_coefficient=scale)
    assert made.keys() == {"merged", *(f"mask of {name}" for name in NAMES)}
    torch.testing.assert_close(made["merged"], vectors.sum(0) * scale)
    entries = vectors[0].numel()
    masks = plain_masks(vectors, factor if isinstance(factor, list) else [factor] * 3, scale)
    for name, mask in zip(NAMES, masks, strict=True):
        packed = made[f"mask of {name}"]
        assert packed.shape == (-(-entries // 8),)
        assert unpack(packed, entries).bool().equal(mask)


def test_one_expert_is_its_own_sum_and_has_a_bit_for_every_change():
    vectors = task_vectors((5, 3), 1)
    vectors[0, 2] = 0
    made = tall(vectors.clone(), ("a",))
    assert made["merged"].equal(vectors[0])
    assert unpack(made["mask of a"], 15).bool().view(5, 3).equal(vectors[0] != 0)


def test_zero_task_vectors_give_no_bit():
    made = tall(torch.zeros(3, 20), NAMES)
    assert not any(tensor.any() for tensor in made.values())


@pytest.mark.parametrize("factors", [(0.2, 0.3), (0.3, 0.6), (0.6, 2.0)])
def test_a_larger_factor_leaves_a_smaller_mask(factors):
    smaller, larger = (
        unpack(tall(task_vectors((1000,)), NAMES, tall_lambda=factor)["mask of a"], 1000) for factor in factors
    )
    assert (smaller >= larger).all()
    assert smaller.sum() > larger.sum()


@given(st.lists(st.booleans(), max_size=40))
def test_bits_are_packed_as_numpy_does_and_come_back(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack(mask)
    assert packed.tolist() == numpy.packbits(numpy.array(bits, dtype=bool)).tolist()
    assert _pack_by_torch(mask).equal(_pack_by_numpy(mask))
    assert unpack(packed, len(bits)).bool().equal(mask)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A base in several files."""
    return make_zoo(tmp_path_factory.mktemp("zoo"), max_shard_size="20KB")


def test_the_run_has_the_merged_model_and_a_bit_per_entry_and_expert(zoo, tmp_path):
    run = merged(tmp_path, *TALL, "--cache_dir", zoo, "--tall_lambda", "0.3")
    folders = [zoo / folder for folder in EXPERTS.values()]
    summed = merge_plainly(zoo / BASE, folders, lambda given: task_arithmetic(given, scaling_coefficient=1.0))
    assert_same_bytes(tensors_of(run.model), summed)
    base, experts = tensors_of(zoo / BASE), [tensors_of(folder) for folder in folders]
    found = tensors_of(run.model / "masks")
    changed = [name for name in base if "proj" in name]
    assert set(found) == {f"{expert}/{name}" for expert in EXPERTS for name in changed}
    for name in changed:
        vectors = torch.stack([expert[name] - base[name] for expert in experts])
        for expert, mask in zip(EXPERTS, plain_masks(vectors[:, :2], [0.3] * 3), strict=True):
            packed = found[f"{expert}/{name}"]
            assert packed.dtype == torch.uint8
            assert packed.numel() == -(-base[name].numel() // 8)
            assert numpy.unpackbits(packed.numpy(), count=len(mask)).astype(bool).tolist() == mask.tolist()
    files = sorted(path.name for path in (run.model / "masks").iterdir())
    assert len(files) > 1
    assert set(files) <= {path.name for path in (zoo / BASE).iterdir()}


def test_the_header_says_how_masks_were_made(zoo, tmp_path):
    run = merged(tmp_path, *TALL, "--cache_dir", zoo, "--tall_lambda", "[0.2,0.3,0.6]", "--scaling_coefficient", "0.5")
    base = tensors_of(zoo / BASE)
    for file in (run.model / "masks").iterdir():
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        assert json.loads(metadata["experts"]) == list(EXPERTS)
        assert json.loads(metadata["tall_lambda"]) == [0.2, 0.3, 0.6]
        assert json.loads(metadata["scaling_coefficient"]) == 0.5
        assert metadata["packing"] == "numpy.packbits"
        names = {name.split("/", 1)[1] for name in load_file(file)}
        assert json.loads(metadata["shapes"]) == {name: list(base[name].shape) for name in names}


def random_folders(tmp_path):
    shapes = {"a": (37, 29), "b": (501,), "empty": (0, 3), "scalar": ()}
    return [
        write_checkpoint(
            tmp_path / str(seed),
            {name: torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for name, shape in shapes.items()},
        )
        for seed in range(4)
    ]


def tall_of(folders, output, *more):
    base, *experts = folders
    given = flags(base, **dict(zip(NAMES, experts, strict=True)))
    return merged(output, *TALL, "--exclude_params", "none", *more, *given)


@pytest.mark.parametrize("block", [8, 64, 1 << 19])
@pytest.mark.parametrize("workers", [Workers(1), Workers(2), Workers(2, forked=True)], ids=str)
def test_bytes_do_not_depend_on_blocks_and_workers(block, workers, tmp_path, monkeypatch):
    folders = random_folders(tmp_path)
    expected = contents(tall_of(folders, tmp_path / "whole").model)
    monkeypatch.setattr(streaming, "BLOCK", block)
    monkeypatch.setattr(streaming, "STEP", max(8, block // 4))
    monkeypatch.setattr(Workers, "for_entries", lambda *_: workers)
    assert contents(tall_of(folders, tmp_path / "parts").model) == expected


@pytest.mark.parametrize(("block", "step"), [(20, 20), (24, 20)])
def test_blocks_that_cut_a_byte_are_refused(block, step, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", block)
    monkeypatch.setattr(streaming, "STEP", step)
    with pytest.raises(ValueError, match=r"^a is cut at entry 20, inside a run of 8$"):
        tall_of(random_folders(tmp_path), tmp_path / "out")


def test_a_result_of_the_wrong_length_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("expert_merging.methods.tall.pack", lambda mask: mask.flatten().byte())
    with pytest.raises(ValueError, match=r"^mask of a of 1073 entries of a: 1073 instead of 135$"):
        tall_of(random_folders(tmp_path), tmp_path / "out")


@pytest.mark.parametrize("lost", ["masks", "model"])
def test_a_run_that_was_killed_continues_with_what_is_missing(lost, zoo, tmp_path, capsys):
    run = merged(tmp_path, *TALL, "--cache_dir", zoo)
    expected = contents(run.model)
    run.model.rename(run.partial_model)
    folder = run.partial_model / ("masks" if lost == "masks" else "")
    missing, *kept = sorted(folder.glob("*.safetensors"))
    missing.rename(missing.with_name(missing.name + ".partial"))
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert merge(*TALL, "--cache_dir", zoo, "--output_path", tmp_path) == 0
    assert contents(run.model) == expected
    assert all(
        (run.model / path.relative_to(run.partial_model)).stat().st_mtime_ns == time for path, time in before.items()
    )


def test_a_model_with_masks_can_be_loaded_and_merged_like_any_other(zoo, tmp_path):
    from transformers import AutoModelForCausalLM

    run = merged(tmp_path / "1", *TALL, "--cache_dir", zoo)
    _, report = AutoModelForCausalLM.from_pretrained(run.model, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again = merged(tmp_path / "2", "--method", "weight_average", *flags(zoo / BASE, A=run.model))
    assert_same_bytes(tensors_of(again.model), tensors_of(run.model))


def test_half_precision_gets_masks_of_exact_differences(tmp_path):
    shapes = {"a": (37, 29)}
    folders = [
        write_checkpoint(
            tmp_path / str(seed),
            {
                name: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
                for name, shape in shapes.items()
            },
        )
        for seed in range(4)
    ]
    run = tall_of(folders, tmp_path / "out")
    base, *experts = (tensors_of(folder)["a"].float() for folder in folders)
    masks = plain_masks(torch.stack([expert - base for expert in experts]), [0.4] * 3)
    packed = load_file(run.model / "masks" / "model.safetensors")
    for name, mask in zip(NAMES, masks, strict=True):
        assert unpack(packed[f"{name}/a"], mask.numel()).bool().equal(mask)


def test_a_factor_for_each_expert_or_one_for_all(zoo, tmp_path, capsys):
    common = [*TALL, "--cache_dir", zoo, "--output_path", tmp_path / "out"]
    message = "--tall_lambda has 2 values for 3 experts (Chat, Math, Code)"
    assert refusal(capsys, *common, "--tall_lambda", "[0.2,0.3]") == message
    message = "--tall_lambda must be a number in [0, inf), a list of them or a JSON object of them by expert, got -1"
    assert refusal(capsys, *common, "--tall_lambda", "-1") == message
    assert not (tmp_path / "out").exists()
