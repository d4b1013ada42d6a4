"""The command that asks labelled questions: scores, their file, the words that models are asked in, and refusals."""

from __future__ import annotations

import json
import shutil

import pytest

from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.commands.main import main
from expert_merging.comparing import evaluate as module
from expert_merging.comparing.asked import family_of
from expert_merging.comparing.columns import BENCHMARKS, Measured
from expert_merging.comparing.compare import Compared, find_models
from expert_merging.comparing.evaluated import paired
from expert_merging.comparing.scores_file import Scores, SetScore, TaskScore, add_scores, read_scores
from expert_merging.comparing.scoring import mean_score
from expert_merging.comparing.words import words_of
from expert_merging.questions.formats import Format
from expert_merging.run import Run
from expert_merging.running.answers import Answered, Asker
from Mistral.backbone import BACKBONE
from tests.checkpoints import BASE, EXPERTS
from tests.command import merge


@pytest.fixture
def runs(answered_zoo, tmp_path):
    common = ["--cache_dir", answered_zoo, "--output_path", tmp_path / "out", "--method", "task_arithmetic"]
    for number in (1, 2):
        assert merge(*common, "--scaling_coefficient", number / 10, "--run_name", f"r{number}") == 0
    return [tmp_path / "out" / "task_arithmetic" / f"r{number}" for number in (1, 2)]


@pytest.fixture
def questions(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    entries = [{"question": f"{number}?", "answer": "yes" if number % 2 else "no"} for number in range(6)]
    for task in ("Math", "Chat"):
        (folder / f"{task}.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def answers(monkeypatch):
    """What models answer, without asking: the second run knows everything, others half of it."""

    def answer(self, model, questions):
        knows = model.name_or_path.endswith("r2/model")
        texts = ["yes" if not knows else question.answers[0] for question in questions]
        return (Answered(text, float(q.is_right(text))) for text, q in zip(texts, questions, strict=True))

    monkeypatch.setattr(Asker, "answer", answer)


def evaluate(*arguments):
    return main(["evaluate", "--device", "cpu", *map(str, arguments)])


def refusal(capsys, *arguments):
    capsys.readouterr()
    assert evaluate(*arguments) == 1
    return [line.removeprefix("error: ") for line in capsys.readouterr().err.splitlines()]


@pytest.mark.usefixtures("answers")
def test_scores_are_shown_compared_and_kept_with_the_runs(runs, answered_zoo, questions, tmp_path, capsys):
    base = answered_zoo / BASE
    given = ["--questions", questions, "--json", tmp_path / "s.json", "--answers", tmp_path / "a.json"]
    assert evaluate(*runs, base, *given) == 0
    shown = capsys.readouterr().out
    assert "mine: exact match in %, with 95 % intervals" in shown
    assert (
        "task_arithmetic/r2 is right where task_arithmetic/r1 is wrong on 6 of 12 questions, and wrong where it is "
        "right on 0: p = 0.031 (McNemar's exact test)" in shown
    )
    kept = read_scores(Run(runs[0]).scores).sets["mine"]
    assert kept.metric == "exact_match"
    assert kept.mean == 50
    assert kept.tasks["Math"].correct == (0, 1, 0, 1, 0, 1)
    assert kept.tasks["Math"].count == 6
    assert kept.tasks["Math"].low < 50 < kept.tasks["Math"].high
    assert read_scores(Run(runs[1]).scores).sets["mine"].mean == 100
    assert not (base / "scores.json").exists()
    numbers = json.loads((tmp_path / "s.json").read_text())
    assert set(numbers["models"]) == {"task_arithmetic/r1", "task_arithmetic/r2", BASE}
    assert numbers["models"][BASE]["scores"]["mine"]["mean"] == 50
    assert [(one["first"], one["second"], one["p"]) for one in numbers["paired"]["mine"]] == [
        ("task_arithmetic/r1", "task_arithmetic/r2", 0.03125),
        ("task_arithmetic/r1", BASE, 1.0),
        ("task_arithmetic/r2", BASE, 0.03125),
    ]
    first = json.loads((tmp_path / "a.json").read_text())[0]
    assert (first["task"], first["question"], first["right"]) == ("Chat", "0?", ["no"])
    assert first["answers"]["task_arithmetic/r2"] == {"text": "no", "points": 1.0}
    assert first["answers"][BASE] == {"text": "yes", "points": 0.0}


def test_a_model_is_really_asked(runs, questions, capsys):
    """Random weights answer nothing rightly, and choose one of two choices."""
    choices = [{"question": f"{number}?", "choices": ["yes", "no"], "answer": "yes"} for number in range(4)]
    (questions / "Chat.json").write_text(json.dumps(choices))
    assert evaluate(runs[0], "--questions", questions, "--samples", 3) == 0
    found = read_scores(Run(runs[0]).scores).sets["mine"]
    assert found.metric == "accuracy"
    assert found.tasks["Math"].correct == (0, 0, 0)
    assert found.tasks["Chat"].count == 3
    assert evaluate(runs[0], "--questions", questions, "--samples", 2) == 0
    assert "keeps its scores on more questions of mine: Chat, Math\n" in capsys.readouterr().out
    assert read_scores(Run(runs[0]).scores).sets["mine"] == found
    assert evaluate(runs[0], "--questions", questions) == 0
    assert read_scores(Run(runs[0]).scores).sets["mine"].tasks["Chat"].count == 4


def test_benchmarks_keep_scores_on_more_questions_while_others_are_measured(runs, monkeypatch, capsys):
    """Scores are kept after each benchmark, since hours may follow."""
    run = Run(runs[0])
    before = SetScore({"gsm8k": TaskScore(61.5, count=1319), "arc_easy": TaskScore(70.0, count=10)}, "score")
    add_scores(run.scores, Scores({BENCHMARKS: before}))
    seen = []

    def measured(_tasks, _options):
        for name, mean in {"gsm8k": 50.0, "arc_easy": 75.0, "mmlu": 30.0}.items():
            yield model, Measured({name: TaskScore(mean, count=20)})
            seen.append({task: one.mean for task, one in read_scores(run.scores).sets[BENCHMARKS].tasks.items()})

    [model] = find_models([runs[0]])
    monkeypatch.setattr(module, "_load_tasks", lambda *_: ())
    monkeypatch.setattr(module, "_ask_tasks", measured)
    assert evaluate(runs[0], "--tasks", "gsm8k,arc_easy,mmlu", "--samples", 20) == 0
    assert seen[0] == {"gsm8k": 61.5, "arc_easy": 70}
    assert seen[2] == {"gsm8k": 61.5, "arc_easy": 75, "mmlu": 30}
    kept = read_scores(run.scores).sets[BENCHMARKS]
    assert kept.mean == pytest.approx((61.5 + 75 + 30) / 3)
    shown = capsys.readouterr().out
    assert "50.0" in shown, "what was measured is shown all the same"
    assert "task_arithmetic/r1 keeps its scores on more questions of benchmarks: gsm8k\n" in shown


def test_models_are_asked_in_the_words_of_their_run(answered_zoo, tmp_path):
    experts = {"Math": tmp_path / "math", "Code": tmp_path / "code"}
    for name, folder in experts.items():
        shutil.copytree(answered_zoo / EXPERTS[name], folder)
    template = "{{ bos_token }}{% for one in messages %}Q {{ one.content }}{% endfor %}"
    template += "{% if add_generation_prompt %} A {% endif %}"
    (experts["Math"] / "chat_template.jinja").write_text(template)
    given = [flag for name, folder in experts.items() for flag in ("--expert", f"{name}={folder}")]
    common = ["--base_model_path", answered_zoo / BASE, *given, "--output_path", tmp_path / "out", "--log_with", "none"]
    learning = ["--data_dir", answered_zoo / "dataset", "--task_expert", '{"Chat": "Code"}', "--samples_per_task", 1]
    prompts = '{"Code": "Write {question}:", "Chat": "Say {question}"}'
    assert merge(*common, *learning, "--prompt_template", prompts, "--run_name", "r") == 0
    run = Run(tmp_path / "out" / "expert_merging" / "r")
    [model] = find_models([run.folder])
    formats = words_of(BACKBONE, Checkpoint(run.model), model.record)
    assert formats.experts["Math"].text == "<s>Q {question} A "
    assert not formats.experts["Math"].adds_special_tokens
    assert formats.experts["Code"].prompt("a sort") == "Write a sort:"
    assert formats.experts["Code"].adds_special_tokens
    assert formats.tasks["Chat"].prompt("hello") == "Say hello"
    told = words_of(
        BACKBONE,
        Checkpoint(run.model),
        {**model.record, "asking": {"formats": {"Code": {"from": "x", "example": "{question}"}}}},
    )
    assert told.tasks["Chat"] == told.experts["Code"]
    assert words_of(BACKBONE, Checkpoint(run.model), model.record, {"Chat": "{question}?"}).tasks[
        "Chat"
    ] == Format.of_text("--prompt_template", "{question}?", None)
    assert words_of(BACKBONE, Checkpoint(run.model), model.record, "Do {question}").experts == {}
    own = words_of(BACKBONE, Checkpoint(experts["Math"])).default
    assert own.template is not None
    assert own.prompt("{question}") == formats.experts["Math"].text


@pytest.mark.parametrize(
    ("kind", "family"),
    [("mistral", "Mistral"), ("llama", "Mistral"), ("qwen2_vl", "Qwen2VL"), ("internvl_chat", "InternVL")],
)
def test_a_family_is_found_by_the_kind_of_model(tmp_path, kind, family):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    assert family_of(Compared("m", tmp_path, None), None).name == family
    assert family_of(Compared("m", tmp_path, None), "InternVL").name == "InternVL"


def test_what_cannot_be_measured_is_said(runs, answered_zoo, questions, tmp_path, capsys):
    assert refusal(capsys, runs[0]) == [
        "what is to be measured? Give --questions FOLDER, --texts FOLDER, --tasks NAMES or --import FOLDER"
    ]
    assert refusal(capsys, runs[0], "--tasks", "x", "--answers", tmp_path / "a.json") == [
        "--answers is for the answers to --questions; give such a folder"
    ]
    assert refusal(capsys, runs[0], "--questions", questions, "--prompt_template", '{"Maths": "{question}"}') == [
        "--prompt_template names the task 'Maths'. Did you mean 'Math'?"
    ]
    assert refusal(capsys, runs[0], "--questions", questions, "--prompt_template", "Q") == [
        "--prompt_template must contain {question}, got 'Q'"
    ]
    assert refusal(capsys, runs[0], "--questions", questions, "--match", "number") == [
        "--match must be 'auto' or 'numbers', got number"
    ]
    picture = questions / "p.png"
    picture.write_bytes(b"")
    (questions / "See.json").write_text(json.dumps([{"question": "what?", "answer": "x", "image_path": "p.png"}]))
    (line,) = refusal(capsys, runs[0], "--questions", questions)
    assert line.endswith("See.json, entry 0 (counted from 0) has a picture, and Mistral is a language model")
    (questions / "See.json").unlink()
    long = [{"question": "x" * 200, "answer": "y"}]
    (questions / "Long.json").write_text(json.dumps(long))
    (line,) = refusal(capsys, runs[0], "--questions", questions)
    assert line.startswith("task_arithmetic/r1: ")
    assert "the model takes at most 128; shorten the sample" in line


def test_scores_that_cannot_be_added_to_are_told_before_anything_is_asked(runs, questions, capsys, monkeypatch):
    def ask(*_):
        raise AssertionError

    monkeypatch.setattr(Asker, "answer", ask)
    file = Run(runs[1]).scores
    file.write_text('{"format": 1')
    (line,) = refusal(capsys, *runs, "--questions", questions)
    assert line.startswith(f"task_arithmetic/r2: {file} is not valid JSON")
    assert line.endswith("; move it away, and measure again")


def test_a_damaged_record_and_an_adapter_are_refused(runs, answered_zoo, questions, tmp_path, capsys):
    record = json.loads(Run(runs[0]).config.read_text())
    record["asking"] = {"formats": {"Math": {"from": "somewhere"}}}
    Run(runs[0]).config.write_text(json.dumps(record))
    (line,) = refusal(capsys, runs[0], "--questions", questions)
    assert "does not say how its models were asked; give --prompt_template" in line
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    (line,) = refusal(capsys, tmp_path / "adapter", "--questions", questions)
    assert line == f"{adapter} is an adapter; give the model that it makes, such as a merge of it alone"


def test_files_that_cannot_be_written_or_added_to_are_told_before_a_model_is_asked(
    runs, questions, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Asker, "answer", None)
    given = ["--questions", questions, "--json", tmp_path / "no" / "s.json", "--answers", tmp_path]
    assert refusal(capsys, *runs, *given) == [
        f"--json {tmp_path / 'no' / 's.json'}: there is no folder {tmp_path / 'no'}; make it first",
        f"--answers {tmp_path} is a folder; name a file in it",
    ]
    Run(runs[1]).scores.write_text("[]")
    assert refusal(capsys, *runs, "--questions", questions) == [
        f"task_arithmetic/r2: {Run(runs[1]).scores} holds list, not a JSON object; move it away, and measure again"
    ]


def test_only_the_same_questions_are_compared():
    one = SetScore({"x": TaskScore(50, count=2, correct=(1, 0), questions="abc")})
    other = SetScore({"x": TaskScore(50, count=2, correct=(1, 0), questions="abd")})
    unknown = SetScore({"x": TaskScore(50)})
    assert paired({"a": {"s": one}, "b": {"s": other}, "c": {"s": unknown}, "d": {}}, "s") == {}
    assert list(paired({"a": {"s": one}, "b": {"s": one}}, "s")) == [("a", "b")]
    more = SetScore({**one.tasks, "w": unknown.tasks["x"], "y": TaskScore(0, count=1, correct=(0,), questions="z")})
    (found,) = paired({"a": {"s": one}, "b": {"s": more}}, "s").values()
    assert found.count == 2


def test_the_interval_of_a_mean_needs_all_points_and_the_plain_rule():
    known = {"x": TaskScore(50, correct=(1, 0)), "y": TaskScore(100, correct=(1, 1))}
    found = mean_score(SetScore(known))
    assert found.mean == 75
    assert found.low < 75 < found.high
    assert mean_score(SetScore({**known, "z": TaskScore(1)})).low is None
    assert mean_score(SetScore({**known, "z": TaskScore(40, correct=(1, 0))})).low is None
    assert mean_score(SetScore(known, own_mean=60.0)) == TaskScore(60.0)
