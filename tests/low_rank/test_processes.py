"""Several processes write what one writes."""

from __future__ import annotations

import pytest

from expert_merging.cli import main
from Mistral.backbone import BACKBONE
from tests.command import merged
from tests.launching import run_together
from tests.low_rank.adapters import pairs_of, write_zoo


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(tmp_path):
    """Which share the passes over coordinates."""
    zoo = write_zoo(tmp_path, pairs_of())
    given = ["--method", "knots", *zoo.flags, "--run_name", "r", "--device", "cpu"]
    alone = merged(tmp_path / "alone", *given)
    arguments = [str(one) for one in (*given, "--output_path", tmp_path / "together")]
    done = run_together(2, main, BACKBONE, arguments, folder=tmp_path)
    assert done.codes == (0, 0), done.stderr
    file = "model/model.safetensors"
    assert (tmp_path / "together" / "knots" / "r" / file).read_bytes() == (alone.folder / file).read_bytes()
