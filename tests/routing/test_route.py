"""The command that routes questions: its file, its table, how it goes on, and refusals."""

from __future__ import annotations

import errno
import json
from functools import partial

import pytest
import torch
from rich.console import Console

from expert_merging.__main__ import CONTINUING
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.commands.main import COMMANDS, main
from expert_merging.errors import InputError
from expert_merging.questions.calibration import Sample
from expert_merging.questions.labelled import Question
from expert_merging.routing import route as routing
from expert_merging.routing import router
from expert_merging.routing.perplexity import perplexities
from expert_merging.routing.record import Record
from expert_merging.routing.router import PerplexityRouter
from expert_merging.routing.telling import tell
from expert_merging.running.answers import Answered
from Mistral.backbone import BACKBONE
from tests.adapters import save_adapter
from tests.checkpoints import BASE, EXPERTS
from tests.internvl import make_picture


@pytest.fixture
def questions(tmp_path):
    """Questions without answers, and some with."""
    folder = tmp_path / "mine"
    folder.mkdir()
    open_ones = [{"question": f"what is {number}?"} for number in range(3)]
    open_ones.append({"question": "which?", "choices": ["this", "that"]})
    (folder / "Chat.json").write_text(json.dumps(open_ones))
    known = [{"question": f"{number}+1=", "answer": str(number + 1)} for number in range(3)]
    (folder / "Math.json").write_text(json.dumps([*known, {"question": "b?", "choices": ["b"] * 2, "answer": "b"}]))
    return folder


@pytest.fixture
def given(tiny_zoo, questions, tmp_path):
    experts = [f"--expert={name}={tiny_zoo / folder}" for name, folder in EXPERTS.items()]
    return [*experts, f"--questions={questions}", f"--answers={tmp_path / 'answers.json'}", "--max_new_tokens=4"]


def route(*arguments):
    return main(["route", "--device", "cpu", *map(str, arguments)])


def refusal(capsys, *arguments):
    capsys.readouterr()
    assert route(*arguments) == 1
    return [line.removeprefix("error: ") for line in capsys.readouterr().err.splitlines()]


@pytest.mark.slow
def test_answers_and_who_has_given_them_are_kept_and_shown(given, tmp_path, capsys):
    assert route(*given) == 0
    shown = capsys.readouterr().out
    assert "one expert is in memory at a time, at most 0.1 MB of weights\n" in shown
    assert 'Math: asked with the bare question, `"{question}{response}"`\n' in shown
    kept = json.loads((tmp_path / "answers.json").read_text())
    entries = kept["questions"]
    assert [entry["task"] for entry in entries] == ["Chat"] * 4 + ["Math"] * 4
    for entry in entries:
        best = min(entry["perplexity"], key=entry["perplexity"].__getitem__)
        assert entry["experts"] == {best: 1.0}
        assert isinstance(entry["answer"], str)
        assert ("points" in entry) == (entry["task"] == "Math")
    assert entries[3]["answer"] in ("this", "that")
    assert entries[-1]["points"] == 1
    assert entries[-1]["answer"] == "b"
    counted = sum("Chat" in entry["experts"] for entry in entries[:4]) / 4
    assert kept["shares"]["Chat"]["Chat"] == counted
    assert list(kept["scores"]) == ["Math"]
    assert kept["scores"]["Math"]["mean"] == 25
    head, *rows = [line.split() for line in shown.splitlines() if "by Chat" in line or line[1:5] in ("Chat", "Math")]
    assert head == ["by", "Chat", "by", "Math", "by", "Code", "right"]
    assert rows[-2][:4] == ["Chat", *(f"{100 * share:.1f}" for share in kept["shares"]["Chat"].values())]
    assert rows[-1][4] == "25.0"


@pytest.mark.slow
def test_several_experts_share_in_answers(given, tmp_path):
    assert route(*given, "--experts_per_question", 2, "--temperature", 0.5) == 0
    kept = json.loads((tmp_path / "answers.json").read_text())
    for entry in kept["questions"]:
        assert len(entry["experts"]) == 2
        assert sum(entry["experts"].values()) == pytest.approx(1)
        left_out = min(entry["perplexity"][name] for name in EXPERTS if name not in entry["experts"])
        assert left_out >= max(entry["perplexity"][name] for name in entry["experts"])
    for own in kept["shares"].values():
        assert sum(own.values()) == pytest.approx(1)


@pytest.mark.slow
def test_the_same_command_goes_on_where_it_was_stopped(given, tmp_path, monkeypatch):
    assert route(*given) == 0
    file = tmp_path / "answers.json"
    expected = file.read_bytes()
    file.unlink()
    answer = PerplexityRouter.answer

    def stops(self, questions, weights):
        for number, made in enumerate(answer(self, questions, weights)):
            if number:
                raise KeyboardInterrupt
            yield made

    monkeypatch.setattr(PerplexityRouter, "answer", stops)
    with pytest.raises(KeyboardInterrupt):
        route(*given)
    half = json.loads(file.read_text())
    answered = sum("answer" in entry for entry in half["questions"])
    assert 0 < answered < 8

    asked = []

    def counted(self, questions, weights):
        asked.append(len(questions))
        return answer(self, questions, weights)

    def no_perplexities(*_):
        raise AssertionError("they are known")

    monkeypatch.setattr(PerplexityRouter, "answer", counted)
    monkeypatch.setattr(PerplexityRouter, "perplexities", no_perplexities)
    assert route(*given) == 0
    assert asked == [8 - answered]
    assert file.read_bytes() == expected


@pytest.mark.slow
def test_perplexities_go_on_with_the_batches_that_a_whole_run_has(given, tmp_path, monkeypatch):
    """A question's last digits depend on what goes through the model beside it."""
    batches, added, add = [], [], Record.add_perplexity

    def noted(model, asked):
        for found in perplexities(model, asked, batch_tokens=40):
            batches.append([asked[number].inputs["input_ids"].tolist() for number in found])
            yield found

    def stops(*given):
        if len(added) == len(batches[0]) + 1:
            raise KeyboardInterrupt
        added.append(given)
        add(*given)

    monkeypatch.setattr(routing, "_KEPT", 1)
    monkeypatch.setattr(router, "perplexities", noted)
    assert route(*given) == 0
    expected, whole = (tmp_path / "answers.json").read_bytes(), batches.copy()
    assert len(whole[1]) > 1
    (tmp_path / "answers.json").unlink()
    batches.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Record, "add_perplexity", stops)
        with pytest.raises(KeyboardInterrupt):
            route(*given)
    assert batches == whole[:2], "in the middle of the second"
    batches.clear()
    assert route(*given) == 0
    assert batches == whole[1:]
    assert (tmp_path / "answers.json").read_bytes() == expected


@pytest.mark.slow
def test_a_complete_file_is_shown_and_no_expert_loaded(given, monkeypatch, capsys):
    assert route(*given) == 0
    shown = capsys.readouterr().out.partition("Who has answered")[2]
    monkeypatch.setattr(PerplexityRouter, "perplexities", None)
    monkeypatch.setattr(PerplexityRouter, "answer", None)
    assert route(*given) == 0
    assert capsys.readouterr().out.partition("Who has answered")[2] == shown


def test_a_full_disk_does_not_begin_again(given, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(Record, "save", full)
    monkeypatch.setattr(PerplexityRouter, "perplexities", lambda *_: iter([{0: 1.0}]))
    assert (
        refusal(capsys, *given)[-1] == "the disk is full; make room, then the same command continues where it stopped"
    )


def test_what_an_interrupt_says_is_what_the_command_does():
    assert [*CONTINUING] == sorted(name for name, command in COMMANDS.items() if command.continues)


def test_nothing_is_said_of_right_answers_where_none_is_known(tmp_path, capsys):
    questions = [Question(Sample.test("why"), (), "open")]
    record = Record(tmp_path / "answers.json", {"experts": {"A": ["digest"]}}, questions)
    record.add_perplexity(0, "A", 2.5)
    record.add_answer(0, {"A": 1.0}, Answered("so", 0.0))
    tell(record, Console())
    shown = capsys.readouterr().out
    assert "Who has answered, in %" in " ".join(shown.split())
    assert "right" not in shown


@pytest.mark.slow
def test_answers_of_other_settings_are_not_mixed(given, tmp_path, capsys):
    assert route(*given) == 0
    before = (tmp_path / "answers.json").read_bytes()
    changed = [*given, "--temperature", 2, "--experts_per_question", 2]
    assert refusal(capsys, *changed) == [
        f"--answers {tmp_path}/answers.json has answers of a command that differs in experts_per_question and "
        "temperature; move it away, or give another --answers"
    ]
    assert "differs in questions;" in refusal(capsys, *given, "--samples", 2)[0]
    assert "differs in experts;" in refusal(capsys, *given, "--prompt_template", "Well: {question}")[0]
    assert (tmp_path / "answers.json").read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda found: found.update(format="other"), "is no file of answers by route"),
        (lambda found: found.update(settings=[1]), "is no file of answers by route"),
        (lambda found: found.update(questions={}), "is no file of answers by route"),
        (lambda found: found["questions"].pop(), "is damaged"),
        (lambda found: found["questions"][0].update(perplexity={"A": "low"}), "is damaged"),
        (lambda found: found["questions"][0].update(perplexity={"A": -1.0}), "is damaged"),
        (lambda found: found["questions"][0].update(perplexity=None), "is damaged"),
        (lambda found: found["questions"][0].update(experts={"Other": 1.0}), "is damaged"),
        (lambda found: found["questions"][0].update(experts=None), "is damaged"),
        (lambda found: found["questions"][0].update(answer=7), "is damaged"),
        (lambda found: found["questions"][0].update(points=7), "is damaged"),
        (lambda found: found["questions"].__setitem__(0, 7), "is damaged"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage, told):
    file, settings = tmp_path / "answers.json", {"experts": {"A": ["digest"], "B": ["other"]}, "device": "cpu"}
    questions = [Question(Sample.test(text), ("7",), "exact_match") for text in ("why", "how")]
    record = Record(file, settings, questions)
    record.add_perplexity(0, "A", 2.5)
    record.add_answer(0, {"A": 1.0}, Answered("7", 1.0))
    record.save()
    assert Record(file, settings, questions).entries == record.entries
    found = json.loads(file.read_text())
    damage(found)
    file.write_text(json.dumps(found))
    with pytest.raises(InputError) as error:
        Record(file, settings, questions)
    assert str(error.value) == f"--answers {file} {told}; move it away, or give another --answers"


def test_what_is_missing_is_told_at_once(capsys, tmp_path):
    assert refusal(capsys, "--prompt_template", '{"Maths": "Q {question}"}') == [
        "which experts? Give --expert NAME=PATH for each",
        "--questions FOLDER is needed",
        "--answers FILE is needed",
        "--prompt_template names the expert 'Maths'. None is known.",
    ]
    taken = tmp_path / "taken"
    taken.mkdir()
    assert "--answers" in refusal(capsys, "--expert", "A=/no", "--questions", "/no", "--answers", taken)[0]


def test_what_does_not_fit_is_told_before_an_expert_is_loaded(
    given, questions, tiny_zoo, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("expert_merging.comparing.asked.load", None)
    assert refusal(capsys, *given, "--experts_per_question", 4) == [
        "--experts_per_question must be from 1 to the number of experts, 3, got 4"
    ]
    save_adapter(partial(BACKBONE.load_model, tiny_zoo / BASE, torch.float32), tmp_path / "adapter")
    assert refusal(capsys, *given, f"--expert=Law={tmp_path / 'adapter'}") == [
        f"Law: {tmp_path}/adapter is an adapter; give the model that it makes, such as a merge of it alone"
    ]
    assert "--temperature must be" in refusal(capsys, *given, "--temperature", 0)[0]
    make_picture(tmp_path / "cat.png")
    (questions / "Math.json").write_text(json.dumps([{"question": "cat?", "image_path": str(tmp_path / "cat.png")}]))
    (problem, *_) = refusal(capsys, *given)
    assert problem.endswith("has a picture, and Mistral is a language model")


def test_an_expert_that_computes_nan_is_named(given, tiny_zoo, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    folder.mkdir()
    for file in (tiny_zoo / EXPERTS["Math"]).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (weights,) = Checkpoint(folder).files
    tensors = load_file(weights)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], torch.nan)
    save_file(tensors, weights, metadata={"format": "pt"})
    assert refusal(capsys, *given, f"--expert=Broken={folder}") == [
        "Broken: the expert computes NaN; its weights are damaged, or not those of config.json"
    ]
