"""Sweeps over a hardly trained zoo: where models and questions are found, and which are learned from."""

from __future__ import annotations

import json

import pytest

from expert_merging.commands import main as command
from zoo import sweep as module
from zoo.commands import main
from zoo.family import default_folder, load_family


@pytest.fixture
def zoo(own_zoo, monkeypatch):
    monkeypatch.setattr(module, "default_folder", lambda name, seed: own_zoo)
    return own_zoo


def questions(file):
    return [entry["question"] for entry in json.loads(file.read_text())]


def test_a_sweep_finds_the_zoo_and_learns_from_the_questions_of_a_draw(zoo, tmp_path, capsys):
    asked = tmp_path / "sweep.yaml"
    asked.write_text("write: none\nsweep:\n  - method: [weight_average]\n  - method: [regmean]\n")
    more = ["--output_path", tmp_path / "logs", "--question_samples", 3, "--sweep_name", "own", "--device", "cpu"]
    assert main(["sweep", "mistral", "--draw", "1", *map(str, [asked, *more])]) == 0
    assert "regmean" in capsys.readouterr().out
    record = json.loads((tmp_path / "logs" / "sweeps" / "own" / "sweep.json").read_text())
    assert [point["point"]["method"] for point in record["points"]] == ["weight_average", "regmean"]
    assert {task: len(own) for task, own in record["points"][0]["correct"].items()} == {"Chat": 3, "Math": 3, "Code": 3}
    for task in ("Chat", "Math", "Code"):
        every = questions(zoo / "dataset" / f"{task}.json")
        assert questions(zoo / "draws" / "1" / f"{task}.json") == every[10:20]
        assert module.questions_of(zoo, 0) == zoo / "dataset"


@pytest.mark.parametrize(("family", "seed"), [("mistral", 0), ("smollm2", 3)])
def test_the_flags_are_those_of_the_family(family, seed, own_zoo, monkeypatch):
    """The folders of published names are found in one, others are named one by one."""
    given, place = [], default_folder(family, seed)
    monkeypatch.setattr(module, "read_description", lambda *_: None)
    monkeypatch.setattr(command, "main", lambda arguments: given.extend(arguments) or 0)
    assert main(["sweep", family, "--seed", str(seed), "--sweep", "method=ties"]) == 0
    flags = dict(zip(given[1::2], given[2::2], strict=True))
    assert given[0] == "sweep"
    assert flags["--sweep"] == "method=ties"
    assert (flags["--family"], flags["--seed"]) == ("Mistral", str(seed))
    assert flags["--config"].endswith(f"zoo/{family}.yaml")
    assert (flags["--data_dir"], flags["--questions"]) == (str(place / "dataset"), str(place / "test"))
    folders = load_family(family).backbone.expert_folders
    named = [place / folder for folder in folders.values()] if family == "smollm2" else []
    assert [given[at + 1].split("=")[1] for at, flag in enumerate(given) if flag == "--expert"] == [*map(str, named)]
    assert flags.get("--cache_dir", str(place)) == str(place)


def test_pictures_are_found_from_a_draw(zoo):
    for file in (zoo / "dataset").glob("*.json"):
        entries = [{"question": str(number), "image_path": f"images/{number}.png"} for number in range(25)]
        file.write_text(json.dumps(entries))
    folder = module.questions_of(zoo, 1)
    entries = json.loads((folder / "Math.json").read_text())
    assert [entry["image_path"] for entry in entries][:2] == [
        str((zoo / "dataset" / "images" / f"{number}.png").resolve()) for number in (10, 11)
    ]


def test_what_is_missing_is_told(zoo, tmp_path, monkeypatch, capsys):
    file = sorted((zoo / "dataset").glob("*.json"))[0]
    file.write_text(json.dumps([{"question": str(number)} for number in range(19)]))
    assert main(["sweep", "mistral", "--draw", "1"]) == 1
    assert capsys.readouterr().err == (
        f"error: --draw 1: {file} has 19 questions, 10 for a draw; give --draw 0 at most\n"
    )
    monkeypatch.setattr(module, "default_folder", lambda name, seed: tmp_path / "none")
    assert main(["sweep", "smollm2", "--seed", "7"]) == 1
    assert capsys.readouterr().err == (
        f"error: there is no zoo in {tmp_path / 'none'}; build it with: python -m zoo build smollm2 --seed 7 --output "
        f"{tmp_path / 'none'}\n"
    )


def test_other_commands_take_no_further_flags(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["build", "mistral", "--draw", "1"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --draw 1" in capsys.readouterr().err
