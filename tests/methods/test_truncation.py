"""Models of single experts with truncated task vectors."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from expert_merging.catalogue import find_method
from expert_merging.methods.truncation import svd_intermediate
from expert_merging.parts import Part
from tests.checkpoints import BASE, EXPERTS, tensors_of
from tests.command import contents, merge, refusal

NAMES = ("a", "b", "c")


@pytest.mark.parametrize(("ratio", "rank"), [(None, 4), (0.5, 6), (1.0, 12), (0.01, 1)])
def test_the_strongest_directions_are_kept(ratio, rank):
    task_vector = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    result = svd_intermediate(task_vector[None], NAMES, rank_ratio=ratio, scaling_coefficient=2.0) / 2
    assert torch.linalg.matrix_rank(result) == rank
    # Eckart-Young: what is left out has the norm of the singular values beyond the rank.
    left_out = torch.linalg.svdvals(task_vector)[rank:].norm()
    torch.testing.assert_close((task_vector - result).norm(), left_out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ratio", "experts", "rank"), [(0.29, 1, 29), (None, 3, 33), (None, 100, 1)])
def test_ranks_are_counted_without_rounding(ratio, experts, rank):
    """In binary, 100 * 0.29 is less than 29."""
    task_vector = torch.randn(100, 110, generator=torch.Generator().manual_seed(0))
    result = svd_intermediate(task_vector[None], ("a",) * experts, rank_ratio=ratio)
    assert torch.linalg.matrix_rank(result) == rank


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_no_change_stays_no_change(shape):
    assert svd_intermediate(torch.zeros(1, *shape), NAMES).equal(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (0, 4)])
def test_what_is_no_matrix_keeps_its_change(shape):
    task_vectors = torch.randn(1, *shape)
    rule = find_method("svd_intermediate").rule({"experts": NAMES}, {"scaling_coefficient": 1.0, "rank_ratio": None})
    assert rule(task_vectors, Part.whole("a", shape), torch.zeros(shape)).equal(task_vectors[0])


def test_every_expert_gets_a_complete_model(tiny_zoo, tmp_path, capsys):
    command = ["--method", "svd_intermediate", "--cache_dir", tiny_zoo, "--output_path", tmp_path, "--run_name", "r"]
    assert merge(*command) == 0
    models = tmp_path / "svd_intermediate" / "r" / "models"
    assert sorted(path.name for path in models.iterdir()) == sorted(EXPERTS)
    base = tensors_of(tiny_zoo / BASE)
    for name, folder in EXPERTS.items():
        _, report = AutoModelForCausalLM.from_pretrained(models / name, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert (models / name / "tokenizer.json").read_bytes() == (tiny_zoo / BASE / "tokenizer.json").read_bytes()
        own, result = tensors_of(tiny_zoo / folder), tensors_of(models / name)
        key = "model.layers.0.mlp.up_proj.weight"
        expected = base[key] + svd_intermediate((own[key] - base[key])[None], NAMES)
        torch.testing.assert_close(result[key], expected)
    before = contents(models)
    assert merge(*command) == 0
    assert "this run is complete already" in capsys.readouterr().out
    assert contents(models) == before


def test_a_killed_run_continues_with_the_next_model(tiny_zoo, tmp_path, monkeypatch):
    command = ["--method", "svd_intermediate", "--cache_dir", tiny_zoo, "--run_name", "r", "--output_path"]
    assert merge(*command, tmp_path / "whole") == 0
    calls = []

    def stop_at_second(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write_output(*arguments, **keywords)

    from expert_merging.merge import write_output

    monkeypatch.setattr("expert_merging.job.write_output", stop_at_second)
    assert merge(*command, tmp_path / "stopped") == 130
    stopped = tmp_path / "stopped" / "svd_intermediate" / "r"
    assert not (stopped / "models").exists()
    monkeypatch.undo()
    assert merge(*command, tmp_path / "stopped") == 0
    assert contents(stopped / "models") == contents(tmp_path / "whole" / "svd_intermediate" / "r" / "models")


def test_a_ratio_out_of_range_is_refused(tiny_zoo, capsys):
    message = refusal(capsys, "--method", "svd_intermediate", "--cache_dir", tiny_zoo, "--rank_ratio", "2")
    assert message == "--rank_ratio must be a number in (0, 1], got 2; for 2 % write 0.02"
