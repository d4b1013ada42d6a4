"""Public benchmarks through lm-evaluation-harness, with local tasks and without the network."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest

from expert_merging.comparing.columns import BENCHMARKS
from expert_merging.comparing.harness import NEEDED
from expert_merging.comparing.scores_file import read_scores
from expert_merging.run import Run
from tests.comparing.test_evaluate import evaluate, refusal, runs

__all__ = ["runs"]
ROOT = Path(__file__).resolve().parents[2]

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WRITE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: {tokens}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
{more}
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with tasks of the harness."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "questions.jsonl"
    lines = [{"question": f"{number} is odd?", "answer": "yes" if number % 2 else "no"} for number in range(5)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "tiny_odd.yaml").write_text(CHOICE.format(name="tiny_odd", data=data))
    (folder / "tiny_say.yaml").write_text(WRITE.format(name="tiny_say", data=data, tokens=4, more=""))
    (folder / "tiny_long.yaml").write_text(WRITE.format(name="tiny_long", data=data, tokens=500, more=""))
    return folder


def test_tasks_are_scored_kept_and_compared(runs, tasks, tmp_path, capsys):
    given = ["--tasks", "tiny_odd,tiny_say", "--tasks_dir", tasks, "--json", tmp_path / "s.json"]
    assert evaluate(*runs, *given) == 0
    shown = capsys.readouterr().out
    assert "benchmarks: score in %, with 95 % intervals" in shown
    assert "(McNemar's exact test)" in shown
    first, second = (read_scores(Run(run).scores).sets[BENCHMARKS].tasks for run in runs)
    assert list(first) == ["tiny_odd", "tiny_say"]
    assert first["tiny_odd"].count == 5
    assert first["tiny_odd"].mean == 20 * sum(first["tiny_odd"].correct)
    assert first["tiny_odd"].questions == second["tiny_odd"].questions != ""
    (pair,) = json.loads((tmp_path / "s.json").read_text())["paired"][BENCHMARKS]
    assert pair["count"] == 10


@pytest.fixture
def asked(tasks, monkeypatch):
    """What models are asked to write; all say no."""
    from lm_eval.models.huggingface import HFLM

    found = []

    def generate(self, requests, disable_tqdm=False):
        found.extend((request.args, self.add_bos_token) for request in requests)
        return ["no"] * len(requests)

    monkeypatch.setattr(HFLM, "generate_until", generate)
    return found


def test_models_are_asked_in_their_words(runs, tasks, asked):
    more = "description: 'Numbers.'\nfewshot_split: test\ngen_prefix: 'It is'"
    file = tasks / "questions.jsonl"
    (tasks / "tiny_led.yaml").write_text(WRITE.format(name="tiny_led", data=file, tokens=4, more=more))
    common = ["--tasks_dir", tasks, "--samples", 2]
    assert evaluate(runs[0], "--tasks", "tiny_say", *common) == 0
    assert [context for (context, _), _ in asked] == ["0 is odd?", "1 is odd?"]
    assert read_scores(Run(runs[0]).scores).sets[BENCHMARKS].tasks["tiny_say"].correct == (1, 0)
    asked.clear()
    words = "Q: {question} A:{response}END"
    assert evaluate(runs[0], "--tasks", "tiny_led", *common, "--prompt_template", words, "--num_fewshot", 1) == 0
    (((context, settings), adds_start), *_) = asked
    assert context.startswith("Q: Numbers.")
    assert context.endswith("0 is odd? A:It is")
    assert context.count("is odd?") == 2
    assert settings["until"] == ["\n", "END"]
    assert adds_start is None
    asked.clear()
    words = {"tiny_led": "Say {question}"}
    assert evaluate(runs[0], "--tasks", "tiny_say,tiny_led", *common, "--prompt_template", json.dumps(words)) == 0
    assert [context for (context, _), _ in asked if context.startswith("Say")] == [
        "Say Numbers.\n\n0 is odd?It is",
        "Say Numbers.\n\n1 is odd?It is",
    ]
    assert asked[0][0][0] == "0 is odd?"


def test_a_chat_template_writes_its_own_special_tokens(runs, tasks, asked):
    template = "{{ bos_token }}{% for one in messages %}[{{ one.role }}] {{ one.content }}"
    template += "{% if one.role == 'assistant' %}<stop>{% endif %}{% endfor %}"
    template += "{% if add_generation_prompt %} [assistant]{% endif %}"
    (Run(runs[0]).model / "chat_template.jinja").write_text(template)
    assert evaluate(runs[0], "--tasks", "tiny_say", "--tasks_dir", tasks, "--samples", 1) == 0
    [((context, settings), adds_start)] = asked
    assert context == "<s>[user] 0 is odd? [assistant]"
    assert settings["until"] == ["\n", "<stop>"]
    assert adds_start is False


def test_tasks_that_cannot_be_asked_are_refused(runs, tasks, tmp_path, capsys, monkeypatch):
    given = ["--tasks_dir", tasks]
    lines = refusal(capsys, runs[0], *given, "--tasks", "tiny_long")
    assert lines == [
        "task_arithmetic/r1: answers of tiny_long may have 500 tokens, and the model takes 128 with the question; set "
        "max_gen_toks in the task's generation_kwargs"
    ]
    assert refusal(capsys, runs[0], *given, "--tasks", "tiny_odd", "--metric", "acc_norm") == [
        "--metric acc_norm: no task has it; they have acc, none"
    ]
    assert refusal(capsys, runs[0], *given, "--tasks", " , ") == [
        "--tasks names no task; give names with commas between them, such as gsm8k,arc_easy"
    ]
    assert refusal(capsys, runs[0], "--tasks", "x", "--tasks_dir", tmp_path / "no") == [
        f"--tasks_dir {tmp_path / 'no'}: there is no such folder"
    ]
    assert refusal(
        capsys, runs[0], *given, "--tasks", "tiny_odd", "--prompt_template", '{"tiny_od": "{question}"}'
    ) == ["--prompt_template names the task 'tiny_od'. Did you mean 'tiny_odd'?"]
    (Run(runs[1]).scores).write_text("[]")
    (line,) = refusal(capsys, runs[1], *given, "--tasks", "tiny_odd")
    assert line.startswith(f"task_arithmetic/r2: {Run(runs[1]).scores} holds list, not a JSON object")


def test_tasks_that_cannot_be_loaded_are_told_together(runs, tasks, capsys):
    file = tasks / "questions.jsonl"
    (tasks / "tiny_code.yaml").write_text(WRITE.format(name="tiny_code", data=file, tokens=4, more="unsafe_code: true"))
    (tasks / "tiny_gone.yaml").write_text(CHOICE.format(name="tiny_gone", data=tasks / "gone.jsonl"))
    away = CHOICE.format(name="tiny_away", data=file).replace("dataset_path: json", "dataset_path: nobody/nothing")
    (tasks / "tiny_away.yaml").write_text(away)
    names = "tiny_code,tiny_gone,tiny_away"
    code, gone, away = refusal(capsys, runs[0], "--tasks_dir", tasks, "--tasks", names)
    assert code == (
        "tiny_code runs code that the model writes; give --confirm_run_unsafe_code where that can do no harm, as in a "
        "container"
    )
    assert gone.startswith("the task tiny_gone cannot be loaded (Unable to find ")
    assert away.startswith("the task tiny_away cannot be loaded (")


def test_code_runs_where_that_is_allowed(runs, tasks, asked, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    file = tasks / "questions.jsonl"
    (tasks / "tiny_code.yaml").write_text(WRITE.format(name="tiny_code", data=file, tokens=4, more="unsafe_code: true"))
    assert evaluate(runs[0], "--tasks_dir", tasks, "--tasks", "tiny_code", "--confirm_run_unsafe_code") == 0
    assert asked
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"


@pytest.fixture
def few_tasks(tasks, monkeypatch):
    """The harness does not read its own tasks, which takes long."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))


@pytest.mark.usefixtures("few_tasks")
def test_names_near_those_of_tasks_are_offered(runs, tasks, capsys):
    assert refusal(capsys, runs[0], "--tasks_dir", tasks, "--tasks", "tiny_od,zzzzzzzzzz") == [
        "--tasks names 'tiny_od', which is no task of the harness. Did you mean 'tiny_odd'?",
        "--tasks names 'zzzzzzzzzz', which is no task of the harness. `lm_eval ls tasks` lists all",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("few_tasks")
def test_the_harness_s_own_command_finds_the_same_and_is_imported(runs, tasks, tmp_path, monkeypatch):
    """As docs/comparing.md shows it."""
    from lm_eval.__main__ import cli_evaluate

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # which asks every tool of the machine
    command = f"lm_eval run --model hf --model_args pretrained={Run(runs[0]).model},dtype=float32 --device cpu"
    more = f"--include_path {tasks} --tasks tiny_odd,tiny_say --log_samples --output_path {tmp_path / 'found'}"
    monkeypatch.setattr(sys, "argv", f"{command} {more}".split())
    cli_evaluate()
    assert evaluate(runs[0], "--tasks", "tiny_odd,tiny_say", "--tasks_dir", tasks) == 0
    own = read_scores(Run(runs[0]).scores)
    Run(runs[0]).scores.unlink()
    assert evaluate(runs[0], "--import", tmp_path / "found") == 0
    assert read_scores(Run(runs[0]).scores) == own


def test_what_is_needed_is_said_alike_everywhere():
    for name in ("pyproject.toml", "requirements-benchmarks.txt"):
        text = (ROOT / name).read_text()
        assert NEEDED in text
        assert "openpyxl>=3.1,<4" in text


def test_without_the_harness_it_is_said_what_to_install(runs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    (line,) = refusal(capsys, runs[0], "--tasks", "gsm8k")
    assert line.startswith("--tasks needs lm-evaluation-harness (")
    assert line.endswith(f"; pip install '{NEEDED}'")


def test_families_with_pictures_are_measured_elsewhere(tmp_path, capsys):
    folder = tmp_path / "seeing"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2_vl"}')
    (folder / "model.safetensors").write_bytes(b"")
    assert refusal(capsys, folder, "--tasks", "gsm8k") == [
        "--tasks are for language models; measure Qwen2VL with VLMEvalKit or lmms-eval and give --import"
    ]


def test_what_was_measured_before_something_broke_is_kept(runs, tasks, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(HFLM, "generate_until", fail)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*runs, "--tasks", "tiny_odd,tiny_say", "--tasks_dir", tasks, "--samples", 2)
    assert list(read_scores(Run(runs[0]).scores).sets[BENCHMARKS].tasks) == ["tiny_odd"]
