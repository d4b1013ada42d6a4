"""The experiments' files say what they do: every point is a run of every family, and the command ends in a page."""

from __future__ import annotations

from pathlib import Path

import pytest

from expert_merging.catalogue import all_methods, find_method
from expert_merging.commands.main import main
from expert_merging.commands.sweep import read
from expert_merging.comparing.grid import label_of, points_of
from expert_merging.families import family_names, load_family
from expert_merging.options import resolve

FOLDER = Path(__file__).parent.parent / "experiments"
FILES = sorted(file.name for file in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", FILES)
def test_every_point_is_a_run_of_every_family(name, tmp_path):
    own_family = name.startswith("table") and name != "table4.yaml"
    for family in [None] if own_family else family_names():
        named = {} if family is None else {"family": family}
        own, merging, backbone = read({**named, "more": [str(FOLDER / name)]})
        points = points_of(own.sweep)
        assert len(points) > 1
        assert own.report == f"results/{Path(name).stem}.html"
        for point in points:
            resolved = resolve({**merging, **point, "data_dir": str(tmp_path)}, {}, backbone)
            assert not set(resolved.ignored) & set(point), f"{label_of(point)}: an option that the method lacks"


def test_one_has_every_method_that_merges_any_experts_into_one_model():
    points = points_of(read({"family": "Mistral", "more": [str(FOLDER / "methods.yaml")]})[0].sweep)
    plain = {point["method"] for point in points if not point.keys() & {"post", "scaling_coefficient"}}
    assert plain - {"prodistill"} == {name for name, method in all_methods().items() if method.merges_any_experts}
    chosen = {point["method"] for point in points if point.get("scaling_coefficient") == "auto"}
    known = {name: find_method(name) for name in plain - {"prodistill"}}
    assert chosen == {
        name for name, method in known.items() if method.is_closed_form and "scaling_coefficient" in method.options
    }


@pytest.mark.parametrize(
    ("name", "family"), [("table1.yaml", "InternVL"), ("table2.yaml", "Qwen2VL"), ("table3.yaml", "Mistral")]
)
def test_tables_have_every_expert_alone(name, family):
    own, _, backbone = read({"more": [str(FOLDER / name)]})
    assert backbone.name == family
    alone = [point["scaling_coefficient"] for point in points_of(own.sweep) if "scaling_coefficient" in point]
    experts = load_family(family).expert_folders
    assert alone == [0, *({name: int(name == own) for name in experts} for own in experts)]


@pytest.mark.slow
def test_an_experiment_ends_in_its_page(tiny_zoo, tmp_path, monkeypatch):
    pytest.importorskip("plotly")
    (tmp_path / "results").mkdir()
    (tmp_path / "zoo.yaml").write_text("num_epochs: 1\nmax_new_tokens: 4\n")
    monkeypatch.chdir(tmp_path)
    given = [
        "--cache_dir",
        str(tiny_zoo),
        "--data_dir",
        str(tiny_zoo / "dataset"),
        "--output_path",
        "out",
        "--device",
        "cpu",
    ]
    command = ["sweep", str(FOLDER / "importance.yaml"), "--family", "Mistral", "--config", "zoo.yaml", *given]
    assert main(command) == 0
    page = (tmp_path / "results" / "importance.html").read_text()
    for words in ("Importance and chunks", "Coefficients", "expert_merging++</"):
        assert words in page, words
    assert len([*tmp_path.glob("out/*/*/model")]) == 2
