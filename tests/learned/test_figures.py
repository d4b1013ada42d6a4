"""Pictures with their data, from the table of layers alone."""

from __future__ import annotations

import csv

import pytest

from expert_merging.learned import figures
from expert_merging.learned.figures import draw_all, redraw
from expert_merging.learned.history import save_history
from tests.learned.test_importance import make_layers


def read(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
def test_every_picture_has_its_data_beside_it(tmp_path):
    layers = make_layers()
    pictures = draw_all(layers, tmp_path / "analysis", "ties run")
    for name, picture in pictures.items():
        assert picture.ndim == 3
        assert picture.shape[2] == 3
        assert len({tuple(colour) for colour in picture.reshape(-1, 3)[::50]}) > 1, "an empty picture"
        assert (tmp_path / "analysis" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    tables = {name: read(tmp_path / "analysis" / f"{name}.csv") for name in pictures}
    for name in ("importance", "depth"):
        assert sum(float(row["share"]) for row in tables[name]) == pytest.approx(1)
    for column in ("share of parameters", "normalised coefficient"):
        assert sum(float(row[column]) for row in tables["submodules"]) == pytest.approx(1)
    assert tables["importance"][0] == {"submodule": "q", "stage": "early", "share": str(layers[0].importance)}
    assert [row["chunks"] for row in tables["chunks"]] == ["2", "0", "1"]
    assert [float(row["y"]) for row in tables["coefficients"]] == [0.5, 0.75, 0.5]


@pytest.mark.slow
def test_drawing_again_gives_the_same_files(tmp_path):
    draw_all(make_layers(), tmp_path, "ties run")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for file in tmp_path.glob("*.png"):
        file.unlink()
    assert {file.name for file in redraw(tmp_path, "ties run")} == set(before)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_titles_name_the_run_and_cells_have_values_whatever_the_names(tmp_path, monkeypatch):
    """A dollar sign in a name begins no formula."""
    drawn = []
    finish = figures.finish_figure

    def note(figure, *arguments):
        picture = finish(figure, *arguments)
        drawn.append(figure)
        return picture

    monkeypatch.setattr(figures, "finish_figure", note)
    save_history([], [[0, [[0.5], [0.25]]], [1, [[0.75], [0.25]]]], ("$x^", "y_{"), ("0",), tmp_path)
    pictures = draw_all(make_layers(), tmp_path, "expert_merging $\\bad{run$")
    assert "over_time" in pictures
    for figure in drawn:
        assert figure.get_suptitle().split("\n")[1] == "expert_merging $\\bad{run$"
    texts = {text.get_text() for axis in drawn[-1].axes for text in axis.texts}
    assert texts == {"0.50", "0.75", "0.25"}
    assert {text.get_text() for axis in drawn[4].axes for text in axis.texts} >= {"2", "0", "1"}, "chunks"
