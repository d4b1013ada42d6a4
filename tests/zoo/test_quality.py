"""The quality benchmark on hardly trained experts: what is measured, chosen and resumed."""

from __future__ import annotations

import json
from concurrent.futures import Future

import pytest

from benchmarks import quality, ranking
from benchmarks.quality import Case
from benchmarks.recipes import ABLATION, CHOICE, FIRST_STAGE, METHOD, Variant


def test_every_method_is_measured_and_no_two_share_a_run_or_figures(tmp_path, monkeypatch):
    variants = quality.variants()
    assert {"ties", "svd", "wudi2", "adamerging", "expert_merging", "expert_merging++"} <= {
        variant.label for variant in variants if variant.group == METHOD
    }
    assert len({variant.label for variant in variants}) == len(variants)
    monkeypatch.setattr(quality, "default_folder", lambda family, seed: tmp_path)
    (tmp_path / "zoo.json").write_text("{}")
    cases = [Case(variant, seed) for variant in variants for seed in (0, 1)]
    assert len({case.run.folder for case in cases}) == len(cases)
    assert len({case.score for case in cases}) == len(cases)


def test_rank_correlation_by_hand():
    assert ranking.rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert ranking.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # Ranks 0, 1.5, 1.5, 3 and 0, 1, 2, 3: 4.5 / sqrt(4.5 * 5).
    assert ranking.rank_correlation([1, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def row(group, method, divergence, flags=None):
    return {"group": group, "method": method, "divergence": divergence, "flags": flags or {}}


def test_the_choice_looks_at_divergences_alone_and_leaves_ablations_out():
    rows = {
        "base": row("zoo", "", 0.0),
        "ties": {**row(METHOD, "ties", 0.9), "accuracy": 99.0},
        "ties: scaling_coefficient 2": row(CHOICE, "ties", 0.5, {"scaling_coefficient": 2}),
        "expert_merging": row(METHOD, "expert_merging", 0.4),
        "expert_merging without logits": row(ABLATION, "expert_merging", 0.1),
    }
    assert ranking.choose(rows) == {"ties": "ties: scaling_coefficient 2", "expert_merging": "expert_merging"}
    (tuned,) = quality.tuned(rows)
    assert tuned == Variant("ties, coefficient chosen", "ties", {"scaling_coefficient": 2})


class Inline:
    """A pool that works in this process."""

    def __init__(self, *_args, **_keywords):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def small(own_zoo, tmp_path, monkeypatch):
    """The benchmark on one hardly trained zoo, in this process, with few variants and short training."""
    config = tmp_path / "config.yaml"
    config.write_text("samples_per_task: 2\nloss_tokens: response\nmax_new_tokens: 4\n")
    monkeypatch.setattr(quality, "WORK", tmp_path / "work")
    monkeypatch.setattr(quality, "CONFIG", config)
    monkeypatch.setattr(quality, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(quality, "default_folder", lambda family, seed: own_zoo)
    monkeypatch.setattr(quality, "build", lambda seed: None)
    few = [
        Variant("expert_merging", "expert_merging"),
        Variant("task_arithmetic", "task_arithmetic"),
        Variant("expert_merging++, chunking all", "expert_merging++", {"chunking": "all"}, ABLATION, True),
        Variant("task_arithmetic: more", "task_arithmetic", {"scaling_coefficient": 0.5}, CHOICE),
    ]
    monkeypatch.setattr(quality, "variants", lambda: few)

    def run(*arguments):
        file = tmp_path / "quality.json"
        monkeypatch.setattr("sys.argv", ["quality", "--seeds", "0", "--held_out", "2", "--json", str(file), *arguments])
        quality.main()
        return json.loads(file.read_text())

    return run


@pytest.mark.slow
def test_the_figures_have_a_row_for_everything_and_choices_answer_no_test_question(small, tmp_path, monkeypatch):
    found = small()
    rows = found["rows"]
    assert rows["base"]["divergence"] == pytest.approx(1)
    assert {"Chat expert", "expert_merging", "task_arithmetic", "expert_merging++, chunking all"} <= set(rows)
    assert "accuracy" not in rows["task_arithmetic: more"]
    for label in ("expert_merging", "task_arithmetic", "expert_merging++, chunking all"):
        assert set(rows[label]["seeds"]["0"]["accuracy"]) == {"Chat", "Math", "Code", "mean"}
    assert found["settings"]["seeds"] == [0]
    (second,) = tmp_path.glob("work/seed0/expert_merging++/*/config.json")
    first = json.loads(second.read_text())["options"]["coefficients"]
    assert first.startswith(str(tmp_path / "work" / "seed0" / "expert_merging" / "expert-merging-"))
    monkeypatch.setattr(quality, "merge", None)
    monkeypatch.setattr(quality, "score", None)
    again = small()
    assert again["rows"] == rows, "a finished benchmark measures nothing again"


def test_a_failed_merge_is_told_with_its_variant(small, monkeypatch):
    wrong = Variant(FIRST_STAGE, "ties", {"density": 80})
    monkeypatch.setattr(quality, "variants", lambda: [wrong])
    with pytest.raises(SystemExit, match="expert_merging, seed 0: error: --density must be"):
        small()
