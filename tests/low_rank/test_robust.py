"""RobustMerge against the steps of its authors' code, one expert and one direction after the other."""

from __future__ import annotations

import pytest
import torch

from expert_merging.low_rank.robust import lost_scale
from tests.command import merged, refusal
from tests.low_rank.adapters import (
    Pairs,
    Zoo,
    assert_near,
    pairs_of,
    scattered_pairs,
    together,
    write_adapter,
    write_zoo,
)
from tests.methods.elsewhere import assert_agrees

ROBUST = ("--method", "robustmerge")
SHAPES = {"layers.0.q_proj": (30, 24), "layers.1.q_proj": (16, 40)}


def kept(factor: torch.Tensor, dropped: int) -> torch.Tensor:
    if dropped == 0:
        return factor.double()
    threshold = sorted(factor.abs().flatten().tolist())[dropped - 1]
    return torch.where(factor.abs() >= threshold, factor, 0.0).double()


def twin(pairs: Pairs, density: float = 0.2, scaled_share: float = 0.2) -> dict[str, torch.Tensor]:
    found = {}
    for module in {module for own in pairs.values() for module in own}:
        total = torch.zeros_like(pairs["A"][module][1]).double()
        weighted, divisor = torch.zeros_like(pairs["A"][module][0]).double(), 0.0
        for left, right in (own[module] for own in pairs.values()):
            pruned = kept(right, int(round((1 - density) * right.numel(), 6)))
            scales = [
                float(row.abs().sum() / less.abs().sum()) for row, less in zip(right.double(), pruned, strict=True)
            ]
            lowest = sorted(scales)[int((1 - scaled_share) * len(scales))]
            own = torch.tensor([max(scale, lowest) for scale in scales])
            total += 2 * pruned
            weighted += 2 * own * kept(left, int(round((1 - density) * left.numel(), 6)))
            divisor = divisor + own
        rank = len(total)
        found[f"{module}.weight"] = (weighted / divisor) @ total / rank  # the adapters' scale
    return found


def test_factors_are_merged_as_by_the_authors(tmp_path):
    pairs = pairs_of({"A": 5, "B": 5, "C": 5}, SHAPES)
    zoo = write_zoo(tmp_path, pairs)
    assert_near(zoo.change(tmp_path / "out", *ROBUST), twin(pairs), 1e-5)


def test_the_authors_code_gives_the_same(tmp_path):
    pairs = scattered_pairs({"A": 3, "B": 3, "C": 3})
    found = write_zoo(tmp_path, pairs, alpha=3).change(tmp_path / "out", *ROBUST)
    assert_agrees(together(found), "authors", "robustmerge")


@pytest.mark.parametrize(("density", "scaled_share"), [(0.5, 0.6), (1, 0.2)])
def test_shares_can_be_chosen(density, scaled_share, tmp_path):
    pairs = pairs_of({"A": 5, "B": 5}, SHAPES)
    given = ("--density", density, "--scaled_share", scaled_share, "--fuse_weight", 2)
    found = write_zoo(tmp_path, pairs).change(tmp_path / "out", *ROBUST, *given)
    assert_near(found, twin(pairs, density, scaled_share), 1e-5)


def test_the_adapter_has_the_rank_of_the_experts_and_is_the_dense_result(tmp_path):
    zoo = write_zoo(tmp_path, pairs_of({"A": 5, "B": 5}, SHAPES))
    run = merged(tmp_path / "out", *ROBUST, "--output", "adapter", *zoo.flags)
    again = Zoo(zoo.base, {"Merged": run.model})
    alone = again.change(tmp_path / "again", "--method", "task_arithmetic", "--scaling_coefficient", 1)
    assert '"r": 5' in (run.model / "adapter_config.json").read_text()
    assert_near(alone, zoo.change(tmp_path / "dense", *ROBUST))


def test_what_is_fed_the_inputs_is_the_right_factor_of_transposed_weights_too(tmp_path):
    pairs = pairs_of({"A": 4, "B": 4}, {"c_attn": (20, 20)})
    turned = {
        expert: {module: (right.T, left.T) for module, (left, right) in own.items()} for expert, own in pairs.items()
    }
    zoo = write_zoo(tmp_path, pairs)
    experts = {
        name: write_adapter(tmp_path / f"turned {name}", own, fan_in_fan_out=True) for name, own in turned.items()
    }
    found = Zoo(zoo.base, experts).change(tmp_path / "out", *ROBUST)
    # Files of transposed weights have the factor that is fed the inputs as lora_A, as all others.
    straight = {expert: {"c_attn": (own["c_attn"][0], own["c_attn"][1])} for expert, own in turned.items()}
    assert_near(found, {name: tensor.T for name, tensor in twin(straight).items()}, 1e-5)


def test_a_direction_of_which_nothing_is_left_counts_as_much_as_the_one_that_lost_most():
    right = torch.tensor([[4.0, 4.0], [1.0, 3.0], [1.0, 1.0], [0.0, 0.0]])
    pruned = torch.tensor([[4.0, 4.0], [0.0, 3.0], [0.0, 0.0], [0.0, 0.0]])
    expected = torch.tensor([1.0, 4 / 3, 4 / 3, 4 / 3])
    torch.testing.assert_close(lost_scale(right, pruned, 0.999), expected)
    torch.testing.assert_close(lost_scale(right * 0, pruned * 0, 0.2), torch.ones(4))
    torch.testing.assert_close(lost_scale(right, pruned, 0.0), torch.full((4,), 4 / 3))


def test_factors_of_several_ranks_are_refused(tmp_path, capsys):
    zoo = write_zoo(tmp_path, pairs_of({"A": 1, "B": 2}, SHAPES))
    assert refusal(capsys, *ROBUST, *zoo.flags) == (
        "robustmerge merges factors of one rank, and those of layers.0.q_proj.weight have 1 (A), 2 (B); choose a "
        "method for several ranks, such as core_space"
    )
