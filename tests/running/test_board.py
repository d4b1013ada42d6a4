"""TensorBoard's table of hyperparameters compares runs, whether or not they learn."""

from __future__ import annotations

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from expert_merging.run import Run
from expert_merging.running.board import hyperparameters, note_scores


def make_run(folder, **options):
    folder.mkdir(parents=True)
    record = {"family": "Mistral", "method": folder.parent.name, "seed": 3, "options": options}
    (folder / "config.json").write_text(json.dumps(record))
    return Run(folder)


def test_options_are_told_by_value_and_those_without_are_left_out(tmp_path):
    run = make_run(tmp_path / "ties" / "r", density=0.2, post=None, expert={"Math": "/x"}, force=True)
    assert hyperparameters(run) == {
        "run": "r",
        "method": "ties",
        "family": "Mistral",
        "seed": 3,
        "density": 0.2,
        "expert": '{"Math": "/x"}',
        "force": True,
    }
    assert hyperparameters(run.stage("stage1")) == hyperparameters(run)
    assert run.title == "ties r"
    assert run.stage("stage1").title == "ties r stage1"


def test_scores_of_a_run_that_learns_nothing_stand_beside_its_options(tmp_path):
    run = make_run(tmp_path / "ties" / "r", density=0.2)
    note_scores(run, {"gsm8k": 61.5})
    events = EventAccumulator(str(run.board)).Reload()
    assert [point.value for point in events.Scalars("final/gsm8k")] == [61.5]
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    assert metadata.parse_session_start_info_plugin_data(content).hparams["density"].number_value == 0.2
