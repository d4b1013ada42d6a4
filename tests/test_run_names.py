"""Names of runs say what differs from the defaults, and a run is found by the digest at their end."""

from __future__ import annotations

import json
import re

import pytest

from expert_merging.options import resolve
from expert_merging.parser import parse
from expert_merging.records import digest_of_run
from expert_merging.run import Run
from expert_merging.run_names import default_folder
from expert_merging.writing import can_name_file
from Mistral.backbone import BACKBONE
from tests.checkpoints import write_checkpoint
from tests.command import COMMAND, TENSORS, flags, merge, merged


def name_of(output, *arguments):
    """The name of the one run that a command leaves, without its digest."""
    run = merged(output, *arguments)
    assert re.fullmatch(r".*-[0-9a-f]{8}", run.name)
    assert run.name.endswith(digest_of_run(json.loads(run.config.read_text())))
    return run.name[:-9]


def test_a_run_with_the_family_s_experts_and_defaults_has_the_family_s_name(tiny_zoo, tmp_path):
    assert name_of(tmp_path, *COMMAND, "--cache_dir", tiny_zoo) == "Mistral"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("--scaling_coefficient", "0.4"), "scaling_coefficient_0.4"),
        (("--scaling_coefficient", "[0.1, 1e-5, 2]"), "scaling_coefficient_0.1_1e-05_2"),
        (("--scaling_coefficient", '{"Math": 0.5}'), "scaling_coefficient_0.3_0.5_0.3"),
        (("--seed", "7", "--scaling_coefficient", "0.3"), "seed_7"),
        (("--exclude_params", "none"), "exclude_params_none"),
        (("--exclude_params", ".*norm.*", "model.layers.[01].*"), "exclude_params_.norm._model.layers.01"),
        (("--post", "svc"), "post_svc"),
        (("--method", "ties", "--density", "0.5"), "density_0.5"),
    ],
)
def test_the_name_has_what_differs(tiny_zoo, tmp_path, arguments, name):
    assert name_of(tmp_path, *COMMAND, "--cache_dir", tiny_zoo, *arguments) == f"Mistral-{name}"


def test_other_experts_are_named(command, tmp_path):
    assert name_of(tmp_path / "out", *command) == "Mistral-A_B"


def test_where_calibration_files_are_is_named_without_its_folders(tiny_zoo, tmp_path, capsys):
    arguments = ("--cache_dir", tiny_zoo, "--data_dir", tiny_zoo / "dataset", "--max_new_tokens", 40)
    assert merge("--method", "adamerging", *arguments, "--output_path", tmp_path, "--dry_run") == 0
    assert f"{tmp_path}/adamerging/Mistral-data_dir_dataset-max_new_tokens_40-" in capsys.readouterr().out


def test_what_the_method_does_comes_before_what_it_reads(tiny_zoo, tmp_path, capsys):
    arguments = (
        "--cache_dir",
        tiny_zoo,
        "--data_dir",
        tiny_zoo / "dataset",
        "--max_new_tokens",
        40,
        "--post",
        "featcal",
    )
    given = ("--method", "task_arithmetic", "--scaling_coefficient", 0.4, *arguments, "--samples_per_task", 2)
    assert merge(*given, "--output_path", tmp_path, "--dry_run") == 0
    name = "Mistral-post_featcal-scaling_coefficient_0.4-data_dir_dataset-samples_per_task_2-"
    assert f"{tmp_path}/task_arithmetic/{name}" in capsys.readouterr().out


def test_names_are_short_and_can_be_used_anywhere(tmp_path):
    base = write_checkpoint(tmp_path / "base", TENSORS)
    experts = {f"expert, number {number}: {'x' * 30}": write_checkpoint(tmp_path / str(number), TENSORS)
               for number in range(5)}  # fmt: skip
    patterns = [f"pattern{number}.*" for number in range(40)]
    run = merged(tmp_path / "out", *COMMAND, *flags(base, **experts), "--exclude_params", *patterns)
    assert re.fullmatch(r"[A-Za-z0-9._-]+", run.name)
    assert can_name_file(run.name)
    assert len(run.name) < 120


def test_a_run_of_an_earlier_version_is_continued(command, tmp_path, capsys):
    """Names were the family's and the digest."""
    run = merged(tmp_path / "out", *command)
    earlier = run.folder.with_name(f"Mistral-{run.name[-8:]}")
    run.folder.rename(earlier)
    capsys.readouterr()
    assert merge(*command) == 0
    assert "this run is complete already" in capsys.readouterr().out
    assert [folder.name for folder in earlier.parent.iterdir()] == [earlier.name]


def test_the_folder_of_the_run_s_own_name_wins(tmp_path):
    given = [*map(str, COMMAND), "--base_model_path", "/b", "--expert", "A=/a", "--scaling_coefficient", "0.5"]
    resolved = resolve(parse(given, BACKBONE), {}, BACKBONE)
    description = {
        "family": "Mistral",
        "method": "task_arithmetic",
        "options": {"expert": {"A": "/a"}, "scaling_coefficient": 0.5},
        "checkpoints": {},
    }
    digest = digest_of_run(description)
    own = tmp_path / f"Mistral-A-scaling_coefficient_0.5-{digest}"
    assert default_folder(tmp_path, "Mistral", description, resolved, BACKBONE) == own
    (tmp_path / f"Mistral-{digest}").mkdir()
    assert default_folder(tmp_path, "Mistral", description, resolved, BACKBONE) == tmp_path / f"Mistral-{digest}"
    own.mkdir()
    assert default_folder(tmp_path, "Mistral", description, resolved, BACKBONE) == own


def test_a_folder_of_another_family_is_no_run_of_this_one(command, tmp_path):
    run = merged(tmp_path / "out", *command)
    other = run.folder.with_name(f"InternVL-{run.name[-8:]}")
    run.folder.rename(other)
    assert merge(*command) == 0
    assert Run(other.with_name(run.name)).is_complete
