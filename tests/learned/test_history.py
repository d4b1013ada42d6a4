"""What is kept of training: curves, and coefficients by depth over time."""

from __future__ import annotations

import csv

import pytest
import torch

from expert_merging.errors import InputError
from expert_merging.learned.history import Depths, add_snapshot, add_update, load_over_time, save_history
from expert_merging.learned.parametrisations import Layout

CHUNKS = {
    "model.layers.1.self_attn.q_proj.weight": 2,
    "model.layers.0.mlp.up_proj.weight": 1,
    "model.layers.1.mlp.up_proj.weight": 1,
    "model.layers.2.mlp.up_proj.weight": 0,
    "mlp1.0.weight": 1,
}


def test_means_by_depth_are_of_the_coefficients_as_they_are_laid_out():
    vector = Layout(CHUNKS, (0.5, 0.25), bounded=False).vector("cpu")
    with torch.no_grad():
        for name, values in {
            "model.layers.1.self_attn.q_proj.weight": [[1.0, 2.0], [10.0, 20.0]],
            "model.layers.0.mlp.up_proj.weight": [[4.0], [40.0]],
            "model.layers.1.mlp.up_proj.weight": [[6.0], [60.0]],
            "mlp1.0.weight": [[8.0], [80.0]],
        }.items():
            vector.view(vector.raw, name).copy_(torch.tensor(values))
    depths = Depths(CHUNKS)
    assert depths.names == ["0", "1", "outside"]
    assert depths.means(vector.by_expert()) == [[4.0, 3.0, 8.0], [40.0, 30.0, 80.0]]


@pytest.mark.parametrize(("updates", "kept"), [(63, range(64)), (64, range(0, 65, 2)), (300, range(0, 301, 8))])
def test_snapshots_stay_few_and_evenly_spread(updates, kept):
    snapshots = []
    for update in range(7, 7 + updates + 1):
        add_snapshot(snapshots, update, [[float(update)]])
    assert [shot[0] - 7 for shot in snapshots] == sorted({*kept, updates})
    assert all(means == [[float(update)]] for update, means in snapshots)


def test_tables_have_every_update_and_what_only_some_of_them_have(tmp_path):
    rows = []
    for count, loss in enumerate((4.0, 2.0), 1):
        add_update(rows, count, {"update": count}, {"total": loss})
    rows[-1]["total_epoch_mean"] = 3.0
    snapshots = [[0, [[0.5, 0.25], [0.5, 0.5]]], [2, [[0.75, 0.25], [0.5, 1.0]]]]
    save_history(rows, snapshots, ("a", "b"), ("0", "outside"), tmp_path / "analysis")
    with (tmp_path / "analysis" / "learning.csv").open(newline="") as stream:
        first, second = csv.DictReader(stream)
    assert first == {"update": "1", "total": "4.0", "total_smoothed": "4.0", "total_epoch_mean": ""}
    assert float(second.pop("total_smoothed")) == pytest.approx((0.9 * 4 + 2) / 1.9)
    assert second == {"update": "2", "total": "2.0", "total_epoch_mean": "3.0"}
    found = load_over_time(tmp_path / "analysis" / "over_time.csv")
    assert (found.updates, found.depths) == ([0, 2], ["0", "outside"])
    assert found.coefficients == {"a": [[0.5, 0.75], [0.25, 0.25]], "b": [[0.5, 0.5], [0.5, 1.0]]}


@pytest.mark.parametrize("text", ["", "update,expert\n1,a\n", "update,expert,depth,coefficient\n1,a,0,x\n"])
def test_another_table_is_refused(text, tmp_path):
    file = tmp_path / "over_time.csv"
    file.write_text(text)
    with pytest.raises(InputError, match="is not the table of coefficients that a run writes"):
        load_over_time(file)
