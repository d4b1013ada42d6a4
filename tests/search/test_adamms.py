"""The most stable point between two models: its result by plain means, its record, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from expert_merging.running.targets import TargetMaker
from expert_merging.search.stable import changes, most_stable
from tests.checkpoints import BASE, EXPERTS, tensors_of, write_tasks
from tests.command import assert_same_bytes, flags, merge, merged, refusal, refused

GRID = ["0", "0.1", "0.2", "0.3", "0.4"]


@pytest.fixture(scope="module")
def command(tiny_zoo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, count=4)
    (folder / "Code.json").unlink()
    experts = {name: tiny_zoo / EXPERTS[name] for name in ("Chat", "Math")}
    given = [*flags(tiny_zoo / BASE, **experts), "--data_dir", folder, "--max_new_tokens", 1]
    return ["--method", "adamms", *given, "--largest_t", 0.4, "--prompt_template", "{question}"]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    return merged(tmp_path_factory.mktemp("whole"), *command)


def test_a_question_counts_once_if_either_neighbour_answers_otherwise():
    answers = [["a", "b", "c"], ["A", "x", "c"], ["a", "y", "c"], ["a", "y", "d"], ["a", "y", "d"]]
    assert changes(answers) == [1, 2, 1]


@pytest.mark.parametrize(
    ("changed", "place"), [([3, 1, 2], 1), ([1, 1, 1], 1), ([1, 5, 1, 1, 1], 2), ([2, 0, 0], 1), ([4], 0)]
)
def test_of_equally_stable_points_the_middle_one_is_taken(changed, place):
    assert most_stable(changed) == place


@pytest.mark.slow
def test_the_point_is_that_of_a_plain_loop(whole, command, tiny_zoo):
    """Every merge is a model of its own, and is asked one question at a time."""
    base, chat, math = (tensors_of(tiny_zoo / folder) for folder in (BASE, EXPERTS["Chat"], EXPERTS["Math"]))
    record = json.loads(whole.stability.read_text())
    merged_names = [name for name in base if "proj" in name]
    tokenizer = AutoTokenizer.from_pretrained(tiny_zoo / BASE)
    model = AutoModelForCausalLM.from_pretrained(tiny_zoo / BASE, dtype=torch.float32).eval()
    folder = command[command.index("--data_dir") + 1]
    questions = [
        entry["question"] for task in ("Chat", "Math") for entry in json.loads((folder / f"{task}.json").read_text())
    ]
    written = []
    for point in map(float, GRID):
        weights = {name: (1 - point) * chat[name] + point * math[name] for name in merged_names}
        model.load_state_dict({**base, **weights}, strict=False)
        own = []
        for question in questions:
            tokens = tokenizer(question, return_tensors="pt")["input_ids"]
            mask = torch.ones_like(tokens)
            found = model.generate(tokens, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0)
            own.append(tokenizer.decode(found[0, tokens.shape[1] :], skip_special_tokens=True))
        written.append(own)
    assert [record["answers"][point] for point in GRID] == written
    expected = []
    for place in (1, 2, 3):
        texts = [[text.lower() for text in own] for own in written]
        expected.append(
            sum(texts[place - 1][n] != texts[place][n] or texts[place][n] != texts[place + 1][n] for n in range(8))
        )
    assert list(record["changes"].values()) == expected
    assert len(set(expected)) > 1, "the test says little otherwise"
    assert record["chosen"] == float(GRID[1 + expected.index(min(expected))])
    point, result = record["chosen"], tensors_of(whole.model)
    assert f"It is {point:g} of the way from the first model to the last." in (whole.model / "README.md").read_text()
    for name in merged_names:
        torch.testing.assert_close(result[name], (1 - point) * chat[name] + point * math[name], rtol=1e-5, atol=1e-6)


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """Numbers of questions that merges have answered; the interruption comes instead of the fourth."""
    found: list[int] = []
    plainly = TargetMaker.written

    def written(maker, model, samples):
        found.append(len(samples))
        if len(found) == 4:
            raise KeyboardInterrupt
        return plainly(maker, model, samples)

    monkeypatch.setattr(TargetMaker, "written", written)
    return found


@pytest.mark.slow
def test_an_interrupted_search_goes_on_with_the_next_point(asked, whole, command, tmp_path):
    """What was answered is not asked again; what is damaged is."""
    assert merge(*command, "--output_path", tmp_path) == 130
    (file,) = tmp_path.glob("*/*/stability.json")
    record = json.loads(file.read_text())
    assert list(record["answers"]) == GRID[:3]
    record["answers"]["0.2"].pop()
    file.write_text(json.dumps(record))
    run = merged(tmp_path, *command)
    assert asked == [8] * (4 + 3)
    assert "continuing after 2 of 5 points" in run.log.read_text()
    assert run.stability.read_bytes() == whole.stability.read_bytes()
    assert_same_bytes(tensors_of(run.model), tensors_of(whole.model))


def test_the_base_and_one_expert_are_two_models(tiny_zoo, tmp_path):
    write_tasks(tmp_path / "tasks", count=1)
    given = [*flags(tiny_zoo / BASE, Math=tiny_zoo / EXPERTS["Math"]), "--data_dir", tmp_path / "tasks"]
    run = merged(tmp_path / "out", "--method", "adamms", *given, "--max_new_tokens", 2, "--t_step", 0.3)
    assert json.loads(run.stability.read_text())["chosen"] == 0.3


def test_what_cannot_be_searched_is_refused(command, tiny_zoo, tmp_path, capsys):
    problem = refusal(capsys, *command, "--t_step", 0.3, "--output_path", tmp_path)
    assert problem.startswith("--t_step 0.3 leaves no point between 0 and --largest_t 0.4 that has a neighbour")
    assert refusal(capsys, *command, "--t_step", 1e-7, "--output_path", tmp_path) == (
        "--t_step 1e-07 makes 4000001 points up to --largest_t 0.4, each a merge that answers all questions; "
        "give a step that makes at most 1000"
    )
    three = [*command, "--expert", f"Code={tiny_zoo / EXPERTS['Code']}", "--output_path", tmp_path]
    problems = refused(capsys, *three, "--t_step", 0.9)
    assert problems[0].startswith("interpolation is between two experts, or between the base and one, and there are 3")
    assert problems[1].startswith("--t_step 0.9 leaves no point")


@pytest.mark.parametrize(
    ("step", "told"), [(0.1, "5 points (0, 0.1, 0.2, 0.3, 0.4)"), (0.01, "41 points (0, 0.01, 0.02, ..., 0.4)")]
)
def test_the_plan_tells_the_points(step, told, command, tmp_path, capsys):
    assert merge(*command, "--t_step", step, "--output_path", tmp_path, "--dry_run") == 0
    line = f"the way from the first model to the last is cut at {told}, and each answers 8 questions"
    assert line in capsys.readouterr().out
