"""The benchmark of mixtures on hardly trained experts: what is counted, and that every kind of way is answered."""

from __future__ import annotations

import itertools

import pytest
from transformers import AutoModelForCausalLM

from benchmarks import mixtures
from benchmarks.mixtures import Way, active
from expert_merging.questions.labelled import load_questions
from Mistral.backbone import BACKBONE
from tests.mixtures.merging import ACTIVE, COUNT, save_mixture


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_of_a_mixture_the_experts_that_work_count(kind, tmp_path, tiny_zoo):
    model = AutoModelForCausalLM.from_pretrained(save_mixture(tmp_path / "m", kind))
    own = sum(tensor.numel() for name, tensor in model.named_parameters() if ".experts." in name)
    assert active(tmp_path / "m") == model.num_parameters() - own * (COUNT - ACTIVE) // COUNT
    dense = tiny_zoo / BACKBONE.base_folder
    assert active(dense) == AutoModelForCausalLM.from_pretrained(dense).num_parameters()


@pytest.mark.slow
def test_every_kind_of_way_is_answered(built_zoo, tmp_path, monkeypatch):
    """A dense merge, a mixture, an artefact, and experts that are routed."""
    monkeypatch.setattr(mixtures, "WORK", tmp_path)
    questions = load_questions(built_zoo / "test", count=2)
    listed = mixtures.ways(built_zoo)
    rows = {}
    for way in itertools.islice(listed, 3):
        rows[way.label] = mixtures.row(way, questions)
    run = mixtures.merged(built_zoo, "emr")
    own = {name: mixtures.extracted(run, name) for name in BACKBONE.expert_folders}
    experts = {name: built_zoo / folder for name, folder in BACKBONE.expert_folders.items()}
    rows["emr"] = mixtures.row(Way("emr", own, 7_000_000, 0), questions)
    rows["route"] = mixtures.row(Way("route", experts, 0, 2), questions)
    assert list(rows) == ["base", "`weight_average`", "`task_arithmetic`", "emr", "route"]
    assert (rows["emr"][1], rows["emr"][2]) == ("7.0", rows["base"][2])
    assert float(rows["route"][2]) == pytest.approx(2 * float(rows["base"][2]), abs=0.02)
    for figures in rows.values():
        assert len(figures) == 8
        assert float(figures[-1]) == pytest.approx(sum(map(float, figures[4:7])) / 3, abs=0.1)
        assert float(figures[3]) > 0
