"""Coefficients as results: the rule that they are, and their files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from expert_merging.errors import InputError
from expert_merging.learned.coefficients import Coefficients, load_coefficients
from expert_merging.parts import Part


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
    merged = load_coefficients(tmp_path).merge(torch.ones(2, 4), Part("w", (2, 2), 0, 4))
    assert merged.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_missing_and_damaged_files_are_named(tmp_path):
    file = tmp_path / "coefficients.safetensors"
    with pytest.raises(InputError, match="does not exist; give a finished run of a method that learns"):
        load_coefficients(tmp_path)
    make_coefficients().save(file)
    good = (tmp_path / "coefficients.json").read_text()
    for broken, problem in {
        "{": r"is not valid JSON \(.*\); learn them again",
        "[]": "holds list, not a JSON object; learn them again",
        '{"experts": ["x"]}': "are not coefficients of a run",
    }.items():
        (tmp_path / "coefficients.json").write_text(broken)
        with pytest.raises(InputError, match=problem):
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


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"chunks": ["w", "v"]}, "are not coefficients of a run"),
        ({"chunks": {"w": 0, "v": 1}}, "are not coefficients of a run"),
        ({"chunks": {"w": "2", "v": 1}}, "are not coefficients of a run"),
        ({"task_vector_scale": [float("nan"), 1]}, "has a task_vector_scale that is NaN or infinite"),
        ({"task_vector_scale": 1}, "are not coefficients of a run"),
        ({"fixed": 3}, "are not coefficients of a run"),
        ({"directions": {"name": "svd"}}, "are not coefficients of a run"),
    ],
    ids=str,
)
def test_mistakes_of_an_editor_are_told(change, problem, tmp_path):
    make_coefficients().save(tmp_path / "coefficients.safetensors")
    described = json.loads((tmp_path / "coefficients.json").read_text())
    (tmp_path / "coefficients.json").write_text(json.dumps({**described, **change}))
    with pytest.raises(InputError, match=problem):
        load_coefficients(tmp_path)


def test_names_that_are_no_texts_are_texts(tmp_path):
    make_coefficients().save(tmp_path / "coefficients.safetensors")
    described = json.loads((tmp_path / "coefficients.json").read_text())
    (tmp_path / "coefficients.json").write_text(json.dumps({**described, "experts": [1, 2]}))
    assert load_coefficients(tmp_path).experts == ("1", "2")


def test_the_published_format_has_a_value_or_a_list_per_chunk_for_each_expert(tmp_path):
    make_coefficients().save_published(tmp_path / "weight_coeffs.json")
    published = json.loads((tmp_path / "weight_coeffs.json").read_text())
    assert published == {"w": [[0.5, 0.25], [1.0, 0.0]], "v": [0.125, 0.75]}


def test_directions_are_kept_and_decide(tmp_path):
    plain = make_coefficients()
    other = replace(plain, directions={"name": "svd", "options": {"scaling_coefficient": 1.0}})
    other.save(tmp_path / "coefficients.safetensors")
    assert load_coefficients(tmp_path).directions == other.directions
    assert load_coefficients(tmp_path).fingerprint() == other.fingerprint() != plain.fingerprint()


def test_files_of_version_0_2_with_trimming_are_read(tmp_path):
    make_coefficients().save(tmp_path / "coefficients.safetensors")
    described = json.loads((tmp_path / "coefficients.json").read_text())
    assert "directions" not in described
    described["trimming"] = {"thresholds": [0.5, 0.25], "majority": -1.0}
    (tmp_path / "coefficients.json").write_text(json.dumps(described))
    assert load_coefficients(tmp_path).directions == {
        "name": "trimmed",
        "options": {"thresholds": [0.5, 0.25], "majority": -1.0},
    }
    described["trimming"] = {"thresholds": [0.5, 0.25]}
    (tmp_path / "coefficients.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match="are not coefficients of a run"):
        load_coefficients(tmp_path)
