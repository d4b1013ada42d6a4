"""Which zoo and family a run or a model is measured by."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from expert_merging.errors import InputError
from expert_merging.run import Run
from zoo.belonging import refuse_others, zoo_of
from zoo.build import DESCRIPTION
from zoo.family import default_folder


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """What tells a zoo from other folders."""
    folder = tmp_path / "zoo"
    (folder / "base").mkdir(parents=True)
    (folder / DESCRIPTION).write_text("{}")
    return folder


def make_run(folder: Path, base: Path, family: str = "InternVL") -> Path:
    (folder / "model").mkdir(parents=True)
    record = {"family": family, "method": "ties", "options": {"base_model_path": str(base)}}
    Run(folder).config.write_text(json.dumps(record))
    return folder


def test_a_zoo_is_that_of_the_base_or_of_the_model(zoo: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "ties" / "a", zoo / "base")
    for places in ([run], [run / "model"], [zoo / "base"], [run, zoo / "base", tmp_path / "unknown"]):
        assert zoo_of(places) == zoo
    assert zoo_of([]) == zoo_of([tmp_path / "unknown"]) == default_folder("mistral", 0)


def test_a_run_of_no_zoo_needs_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "ties" / "a", tmp_path / "real" / "base")
    problem = (
        f"{run} is a run of InternVL whose base {tmp_path / 'real' / 'base'} is in no zoo; give the zoo to measure"
    )
    with pytest.raises(InputError, match=re.escape(problem)):
        zoo_of([run])


def test_runs_of_several_zoos_are_refused(zoo: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "base").mkdir(parents=True)
    (other / DESCRIPTION).write_text("{}")
    runs = [make_run(tmp_path / "ties" / name, folder / "base") for name, folder in (("a", zoo), ("b", other))]
    problem = f"these are of several zoos ({zoo}, {other}); evaluate those of one zoo at a time, or give --zoo"
    with pytest.raises(InputError, match=re.escape(problem)):
        zoo_of(runs)


def test_runs_and_models_of_another_family_are_refused(zoo: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "ties" / "a", zoo / "base")
    for name, kind in (("vision", "internvl_chat"), ("text", "llama"), ("broken", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("[]" if kind is None else json.dumps({"model_type": kind}))
    places = [run, *(tmp_path / name for name in ("vision", "text", "broken", "absent"))]
    refuse_others(places, zoo, "InternVL")
    with pytest.raises(InputError) as caught:
        refuse_others(places, zoo, "Mistral")
    assert list(caught.value.problems) == [
        f"{place} is of InternVL, and the zoo in {zoo} is of Mistral" for place in (run, tmp_path / "vision")
    ]
