"""The page that shows runs side by side, in a real browser where there is one."""

from __future__ import annotations

import builtins
import json
import math
import re
import shutil
from contextlib import contextmanager

import pytest

from expert_merging.commands.main import main
from expert_merging.comparing.report_tables import ranks, score_table
from expert_merging.comparing.scores_file import Scores, SetScore, TaskScore, add_scores, as_json
from expert_merging.learned.history import add_update, save_history
from expert_merging.learned.importance import save_layers
from expert_merging.run import Run
from expert_merging.search.front import leave_front, ranked_front
from expert_merging.search.record import Evaluation
from expert_merging.summary import COMPLETE
from tests.command import merge, merged
from tests.learned.test_importance import make_layers

pytest.importorskip("plotly")

# Names that would be instructions where they are not shown as they are.
SCRIPT = "</script><script>document.title='taken'</script>"
PICTURE = "<img src=x onerror=\"document.title='taken'\">"
TEMPLATE = "{{ 7 * 7 }} $x^$ %{y} 'q\" <b>&amp;"


def make_run(folder, *, method="ties", scores=None, divergence=None, learned=False, **options):
    folder.mkdir(parents=True)
    record = {
        "family": "Mistral",
        "method": method,
        "options": options,
        "seed": 0,
        "run": {"run_name": folder.name, "device": "cpu"},
        "versions": {"torch": "2.9"},
    }
    (folder / "config.json").write_text(json.dumps(record))
    if scores:
        tasks = {task: TaskScore(*numbers) for task, numbers in scores.items()}
        add_scores(folder / "scores.json", Scores({"test": SetScore(tasks)}, divergence or {}))
    if learned:
        rows = []
        for count, loss in enumerate((2.0, 1.0), 1):
            add_update(rows, count, {"update": count}, {"total": loss})
        rows[-1] |= {"total_epoch_mean": 1.5, "held_out_divergence": 0.5}
        save_history(rows, [[0, [[0.3], [0.3]]], [2, [[0.5], [0.2]]]], (PICTURE, "y"), ("0",), folder / "analysis")
        save_layers(make_layers(), folder / "analysis" / "layers.csv")
    return folder


def add_front(folder):
    """What a search has found in two tasks: two trade-offs, and a candidate that one of them is better than."""
    evaluations = [
        Evaluation((0.2, 0.4), {"Math": 0.5, SCRIPT: 0.25}),
        Evaluation((0.3, 0.4), {"Math": 0.5, SCRIPT: 0.75}),
        Evaluation((0.4, 0.1), {"Math": 1.0, SCRIPT: 0.125}),
        Evaluation((9.0, 9.0), {"Math": math.nan, SCRIPT: math.nan}),
    ]
    leave_front(evaluations, ranked_front(evaluations), [PICTURE, "y"], Run(folder))


def make_runs(folder):
    """Three runs with hostile names; one learns, one has no scores."""
    responses = {"formats": {"a": {"from": "x"}}, f"Math/1/{SCRIPT}?": {"response": PICTURE, "tokens": [1]}}
    learned = make_run(
        folder / "expert_merging" / PICTURE,
        method="expert_merging",
        scores={"Math": (70.0, 65.0, 75.0, 200), SCRIPT: (30.0, 25.0, 35.0, 200)},
        divergence={"Math": 0.25},
        learned=True,
        note=TEMPLATE,
        seed=0,
    )
    (learned / "responses.json").write_text(json.dumps(responses))
    add_front(learned)
    plain = make_run(
        folder / "ties" / TEMPLATE.replace("/", ""),
        scores={"Math": (60.0, 55.0, 65.0, 200), SCRIPT: (40.0,)},
        divergence={"Math": 0.5},
        seed=1,
    )
    return [learned, plain, make_run(folder / "ties" / "bare", seed=1)]


def write_report(runs, file, *arguments):
    assert main(["report", *map(str, runs), "-o", str(file), *map(str, arguments)]) == 0
    return file.read_text()


def test_the_best_and_the_second_best_are_marked():
    assert ranks([1.0, 3.0, None, 2.0], True) == ["", "best", "", "second"]
    assert ranks([1.0, 3.0, float("nan"), 1.0], False) == ["best", "second", "", "best"]
    assert ranks([None, 3.0], True) == ["", ""], "nothing to compare with"


def test_of_bits_the_fewest_are_best_and_have_their_digits():
    def texts(bits):
        return SetScore({"A": TaskScore(bits)}, "bits_per_byte", higher_is_better=False)

    table = score_table("general", {"one": texts(2.134), "two": texts(2.118), "none": SetScore({}, "", False)})
    assert [[(cell.text, cell.rank) for cell in row.cells] for row in table.rows] == [
        [("2.134", "second")] * 2,
        [("2.118", "best")] * 2,
        [("-", "")] * 2,
    ]


def test_the_page_needs_nothing_from_elsewhere_and_shows_names_as_they_are(tmp_path):
    page = write_report(make_runs(tmp_path / "runs"), tmp_path / "report.html", "--title", SCRIPT)
    own = page.replace(page[page.index("/**\n* plotly") : page.index('"use strict";\nconst dark')], "")
    assert "src=" not in own.replace("img src=x", "")
    assert "http" not in own.replace("http-equiv", "")
    for text in (SCRIPT, PICTURE, TEMPLATE):
        assert text not in own
    assert own.count("<script>document") == 0


def test_numbers_that_are_none_and_records_that_say_nothing_are_passed_over(tmp_path):
    run = make_run(tmp_path / "m" / "r", scores={"a": (float("nan"),), "b": (1.0,)}, learned=True)
    record = json.loads((run / "config.json").read_text())
    record |= {"run": [1], "versions": "none", "family": "x; rm -rf ~"}
    (run / "config.json").write_text(json.dumps(record))
    table = (run / "analysis" / "layers.csv").read_text().splitlines()
    (run / "analysis" / "layers.csv").write_text("\n".join([table[0], table[1].replace("0.25", "nan"), *table[2:]]))
    (run / "analysis" / "learning.csv").write_text("update,total,total_smoothed\n1,inf,nan\n")
    page = write_report([run], tmp_path / "report.html")
    charts = [line for line in page.splitlines() if "data-of=" in line]
    assert len(charts) > 5
    for line in charts:
        json.loads(line[line.index(">") + 1 : line.rindex("<")], parse_constant=pytest.fail)
    assert "python &#39;x; rm -rf ~/model_merging.py&#39; --config run.yaml" in page
    bare = make_run(tmp_path / "m" / "s", learned=True)
    (bare / "analysis" / "layers.csv").write_text(
        "name,submodule,depth,stage,parameters,chunks,importance\na,q,0,early,1,1,1\n"
    )
    assert "Importance: m s" in write_report([bare], tmp_path / "report.html")


def test_settings_that_differ_and_those_of_some_methods_stand_apart(tmp_path):
    page = write_report(make_runs(tmp_path / "runs"), tmp_path / "report.html")
    differing = page[page.index("Options with different values") : page.index("Options that only some")]
    assert '<th scope="row" class="text">seed</th>' in differing
    assert '<th scope="row" class="text">note</th>' not in differing


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--method", "ties", "--density", "0.3"], ["--method", "dare_ties", "--seed", "4"]])
def test_the_settings_shown_repeat_the_run(flags, tiny_zoo, tmp_path, capsys):
    run = merged(tmp_path / "out", *flags, "--cache_dir", tiny_zoo, "--output_path", tmp_path / "out")
    write_report([run.folder], tmp_path / "report.html")
    from expert_merging.comparing.finished import read_runs
    from expert_merging.comparing.report import repeat

    (tmp_path / "run.yaml").write_text(repeat(read_runs([run.model])[0])["settings"])
    capsys.readouterr()
    place = ["--output_path", tmp_path / "out", "--run_name", run.name]
    assert merge("--config", tmp_path / "run.yaml", *place) == 0
    assert COMPLETE in "".join(capsys.readouterr())


def test_answers_of_models_stand_side_by_side(tmp_path):
    answers = [
        {"task": "Math", "question": "1+1?", "right": ["2"], "answers": {"base": {"text": "3"}, "r": {"text": "two"}}}
    ]
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    page = write_report(
        [make_run(tmp_path / "ties" / "r")], tmp_path / "report.html", "--answers", tmp_path / "answers.json"
    )
    assert "Math: answers of models" in page
    for text in ("question", "right", "base", "r"):
        assert f'<th scope="col">{text}</th>' in page
    assert '<td class="text">two</td>' in page
    assert len(page) < 20_000, "no charts, no library"


def refuse(capsys, *arguments):
    assert main(["report", *map(str, arguments)]) == 1
    return capsys.readouterr().err


def test_models_that_no_run_has_made_have_rows_too(tmp_path, capsys):
    run = make_run(tmp_path / "ties" / "r", scores={"Math": (60.0,), "Code": (10.0,)})
    measured = as_json(Scores({"test": SetScore({"Math": TaskScore(70.0)})}))
    content = {"Mistral-7B": {"folder": "/x", **measured}, "ties/r": {"folder": str(run / "model"), **measured}}
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"models": content, "paired": {}}))
    page = write_report([run], tmp_path / "r.html", "--scores", file)
    table = page[page.index("<table") : page.index("</table>")]
    assert re.findall(r'<th scope="row">(.*?)</th>', table) == ["Mistral-7B", "ties r"]
    assert re.findall(r'data-value="(.*?)"', table) == ["70.0", "", "70.0", "60.0", "10.0", "35.0"]
    again = refuse(capsys, run, "-o", tmp_path / "r.html", "--scores", file, "--scores", file)
    assert f"--scores {file}: another file has scores of a model called Mistral-7B, too; rename one" in again
    aligned = {"models": {"a": {"folder": "/x", "relative": {}}}}  # as align writes it
    for broken in ({"models": [1]}, {"models": {"a": 3}}, aligned, {}):
        file.write_text(json.dumps(broken))
        shown = refuse(capsys, run, "-o", tmp_path / "r.html", "--scores", file)
        assert f"{file} does not hold scores of models as evaluate --json writes them; move it away" in shown


def test_what_cannot_be_shown_is_refused_at_once(tmp_path, capsys):
    run, other = make_run(tmp_path / "ties" / "r"), make_run(tmp_path / "ties" / "s")
    (run / "analysis").mkdir()
    (run / "analysis" / "learning.csv").write_text("a\n1\n")
    (other / "scores.json").write_text("{}")
    shown = refuse(capsys, tmp_path, run, other, "-o", tmp_path / "report.html")
    assert f"{tmp_path} is no folder of a run (it has no config.json that a run has written)" in shown
    assert "learning.csv is not the table of curves that a run writes" in shown
    assert "scores.json has format None" in shown
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "answers.json").write_text('[{"task": "x"}]')
    shown = refuse(
        capsys, make_run(tmp_path / "a" / "b"), "--answers", tmp_path / "answers.json", "-o", tmp_path / "r.html"
    )
    assert "answers.json does not hold answers as evaluate --answers writes them" in shown


def test_only_a_report_is_replaced(tmp_path, capsys):
    run, file = make_run(tmp_path / "ties" / "r"), tmp_path / "notes.html"
    file.write_text("my notes")
    assert f"--output {file} exists and is no report; name another file" in refuse(capsys, run, "-o", file)
    assert file.read_text() == "my notes"
    assert f"--output {tmp_path} is a folder; name a file in it" in refuse(capsys, run, "-o", tmp_path)
    nowhere = tmp_path / "no" / "r.html"
    assert f"there is no folder {nowhere.parent}; make it first" in refuse(capsys, run, "-o", nowhere)
    write_report([run], tmp_path / "report.html")
    write_report([run], tmp_path / "report.html")


def test_without_plotly_it_says_so(tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments):
        if name.startswith("plotly"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    shown = refuse(capsys, make_run(tmp_path / "ties" / "r"), "-o", tmp_path / "report.html")
    assert "a report needs plotly, which draws its charts; pip install plotly" in shown


@contextmanager
def opened(file, **settings):
    """The page in a browser, and what it has complained of."""
    driver = pytest.importorskip("playwright.sync_api")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no browser here")
    with driver.sync_playwright() as play:
        started = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page, complaints = started.new_page(**settings), []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(file.as_uri())
        page.wait_for_function("[...document.querySelectorAll('.chart')].every(c => c.querySelector('.main-svg'))")
        yield page, complaints
        started.close()


@pytest.mark.slow
def test_a_browser_shows_every_chart_sorts_the_table_and_runs_nothing_of_the_names(tmp_path):
    runs = make_runs(tmp_path / "runs")
    write_report(runs, tmp_path / "report.html", "--title", "Mine")
    with opened(tmp_path / "report.html", color_scheme="dark", viewport={"width": 390, "height": 800}) as (page, found):
        assert page.title() == "Mine"
        assert page.locator(".chart").count() == 10
        for chart in page.locator(".chart").all():
            assert chart.locator("g.trace, g.hm, g.points").count() > 0, chart.get_attribute("id")
            assert chart.bounding_box()["width"] > 300
        assert page.evaluate("document.documentElement.scrollWidth") == 390, "nothing runs off a phone's side"
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
        assert PICTURE in page.locator("#bars-0 .legend").text_content()
        assert TEMPLATE in page.locator("#bars-0 .legend").text_content()
        assert SCRIPT in page.locator("#bars-0 .xaxislayer-above").text_content()

        names = page.locator(".sortable").first.locator("tbody th")
        before = names.all_inner_texts()
        button = page.locator(".sortable").first.get_by_role("button", name=SCRIPT)
        button.focus()
        page.keyboard.press("Enter")
        assert names.all_inner_texts() == before[::-1]
        assert button.locator("..").get_attribute("aria-sort") == "descending"
        page.keyboard.press("Enter")
        assert names.all_inner_texts() == before
        assert button.locator("..").get_attribute("aria-sort") == "ascending"

        page.get_by_label("x axis").first.select_option(label=SCRIPT)
        assert SCRIPT in page.locator("#trade-off-0 .xtitle").text_content()
        points = page.evaluate("document.getElementById('trade-off-0').data.map(trace => trace.x[0])")
        assert points == [30.0, 40.0]
        traces = "document.getElementById('front-0').data.map(trace => [trace.name, trace.x.slice(), trace.y.slice()])"
        merged, others, rest = page.evaluate(traces)
        assert merged == ["merged", [0.5], [0.25]]
        assert others == ["trade-offs", [1.0], [0.125]]
        assert rest == ["evaluated", [0.5, None], [0.75, None]]
        page.get_by_label("x axis").last.select_option(label=SCRIPT)
        assert [trace[1] for trace in page.evaluate(traces)] == [[0.25], [0.125], [0.75, None]]

        assert page.get_by_role("img", name="Losses while learning").count() == 1
        assert page.get_by_role("navigation", name="Sections").get_by_role("link").count() == 9
        assert page.get_by_role("row", name="70.0 (best)").count() == 1
        assert page.evaluate("document.title") == "Mine"
        assert found == []
