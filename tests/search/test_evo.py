"""The command that searches: its result, how it is interrupted and continued, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from expert_merging.cli import main
from expert_merging.commands.main import main as commands
from expert_merging.comparing.scores_file import read_scores
from expert_merging.errors import InputError
from expert_merging.learned.coefficients import load_coefficients
from expert_merging.run import Run
from expert_merging.search.front import Point, draw_front, load_front
from expert_merging.search.score import Judgement, Scorer
from Mistral.backbone import BACKBONE
from tests.checkpoints import BASE, EXPERTS, tensors_of
from tests.command import merge, merge_plainly, merged, refusal, refused
from tests.launching import run_together
from tests.search.searching import KilledError, check_same, evaluations_of, killed, killed_at, score_plainly

# A short search: three coefficients from a start that is not the best, in generations of four.
OPTIONS = {"scaling_coefficient": 0.2, "evaluations": 10, "population": 4, "samples_per_task": 2, "log_with": "none"}


@pytest.fixture(scope="session")
def command(tiny_zoo, answered):
    flags = [text for name, value in OPTIONS.items() for text in (f"--{name}", value)]
    return ["--method", "evo", "--cache_dir", tiny_zoo, "--data_dir", answered, *flags]


@pytest.fixture(scope="session")
def whole(command, tmp_path_factory):
    """A search that nothing has interrupted."""
    return merged(tmp_path_factory.mktemp("whole"), *command)


def check_best(run, cache, data):
    """Check that the written model has the best of the recorded scores, which is better than the start's."""
    evaluations = evaluations_of(run)
    assert len(evaluations) == 10
    assert set(evaluations[0]["coefficients"].values()) == {0.2}
    best = min(evaluations, key=lambda entry: entry["score"])
    assert best["score"] < evaluations[0]["score"]
    assert score_plainly(run.model, cache, data) == pytest.approx(best["score"], rel=1e-4)
    provenance = load_coefficients(run.folder).provenance
    assert provenance["score"] == best["score"]
    assert provenance["score_of_start"] == evaluations[0]["score"]
    assert provenance["evaluations"] == 10
    return best["coefficients"]


def test_the_written_model_has_the_best_score_and_is_better_than_the_start(whole, tiny_zoo, answered):
    best = check_best(whole, tiny_zoo, answered)
    weights = torch.tensor([best[name] for name in EXPERTS])
    for values in load_coefficients(whole.folder).values.values():
        assert values[:, 0].equal(weights)

    def rule(task_vectors):
        return (task_vectors * weights.view(-1, *[1] * (task_vectors.dim() - 1))).sum(0)

    expected = merge_plainly(tiny_zoo / BASE, [tiny_zoo / place for place in EXPERTS.values()], rule)
    for name, tensor in tensors_of(whole.model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_each_third_of_the_depth_has_coefficients_of_its_own(command, tiny_zoo, answered, tmp_path):
    run = merged(tmp_path / "out", *command, "--search_space", "depth")
    best = check_best(run, tiny_zoo, answered)
    stages = ["early", "middle", "late"]
    for name, values in load_coefficients(run.folder).values.items():
        stage = stages[int(name.split(".")[2])]
        assert values[:, 0].equal(torch.tensor([best[f"{expert}/{stage}"] for expert in EXPERTS]))


def test_coefficients_can_be_used_again(whole, tiny_zoo, tmp_path):
    given = ["--method", "coefficients", "--coefficients", whole.folder, "--cache_dir", tiny_zoo]
    again = merged(tmp_path / "again", *given)
    assert (again.model / "model.safetensors").read_bytes() == (whole.model / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_search_killed_within_a_generation_continues_to_the_same_bytes(command, whole, tmp_path, monkeypatch):
    command = [*command, "--output_path", tmp_path, "--log_with", "tensorboard"]
    asked = killed_at(monkeypatch, 8)
    with pytest.raises(KilledError):
        merge(*command)
    run = merged(tmp_path, *command)
    assert len(asked) == 8 + 3
    check_same(run, whole)
    log = run.log.read_text()
    assert "continuing after 7 evaluations" in log
    assert log.count("generation 1: best score") == log.count("generation 2: best score") == 1
    assert "after 9 of 10 evaluations; spread" in log
    check_board(run)


def check_board(run):
    """Check that the curves have every evaluation once."""
    board = EventAccumulator(str(run.board)).Reload()
    scores = [entry["score"] for entry in evaluations_of(run)]
    shown = board.Scalars("score/candidate")
    assert [point.step for point in shown] == list(range(1, 11))
    assert [point.value for point in shown] == pytest.approx(scores)
    assert board.Scalars("score/best")[-1].value == pytest.approx(min(scores))
    assert {"task_score/Math", "coefficient/Math"} <= set(board.Tags()["scalars"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("expert_merging.learned.coefficients.Coefficients.save", "continuing after 10 evaluations"),
        ("expert_merging.job.write", "coefficients are there already"),
    ],
)
def test_what_was_evaluated_is_not_evaluated_again(place, told, command, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(place, killed)
        with pytest.raises(KilledError):
            merge(*command, "--output_path", tmp_path)
    monkeypatch.setattr(Scorer, "score", killed)
    run = merged(tmp_path, *command)
    check_same(run, whole)
    assert told in run.log.read_text()


def test_the_plan_says_what_the_search_takes(command, tmp_path, capsys, monkeypatch):
    command = [*command, "--output_path", tmp_path / "out", "--dry_run"]
    assert merge(*command, "--search_space", "depth") == 0
    shown = capsys.readouterr().out
    assert (
        "9 coefficients (for each expert: early, middle, late) searched for in at most 10 evaluations on 6 samples, in "
        "generations of 4\n"
    ) in shown
    assert "searching needs about " in shown
    assert "read from the files for every evaluation" in shown
    monkeypatch.setattr("expert_merging.learned.estimates.free_memory", lambda _: 1 << 20)
    assert merge(*command, "--population", "12") == 0
    shown = capsys.readouterr().out
    assert "generations of 12, of which the budget has not one: it draws around the start alone\n" in shown
    assert "which does not fit, as 1.0 MiB are free" in shown
    assert not (tmp_path / "out").exists()


def test_values_that_no_search_can_use_are_refused(command, tmp_path, capsys):
    command = [*command, "--output_path", tmp_path / "out"]
    wrong = {"evaluations": 0, "population": 1, "initial_spread": 0, "search_space": "layers"}
    given = [text for name, value in wrong.items() for text in (f"--{name}", value)]
    assert refused(capsys, *command, *given) == [
        "--evaluations must be a whole number in [1, inf), got 0",
        "--population must be a whole number in [2, inf), got 1",
        "--initial_spread must be a number in (0, inf), got 0",
        "--search_space must be 'experts' or 'depth', got layers",
    ]
    tracker, template = refused(capsys, *command, "--log_with", "tensorbord", "--prompt_template", "x")
    assert "tracker is not available" in tracker
    assert "--prompt_template must contain" in template
    assert not (tmp_path / "out").exists()


def test_an_expert_that_is_the_base_is_refused(command, tiny_zoo, tmp_path, capsys):
    given = [*command, "--output_path", tmp_path / "out", "--base_model_path", tiny_zoo / BASE]
    for name, place in {**EXPERTS, "Math": BASE}.items():
        given += ["--expert", f"{name}={tiny_zoo / place}"]
    assert refusal(capsys, *given) == ("the base and the expert of Math predict the same; there is nothing to measure")


def test_candidates_without_numbers_are_refused(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Scorer, "score", lambda *_: Judgement({"Chat": float("nan")}))
    assert refusal(capsys, *command, "--output_path", tmp_path / "out").startswith(
        "no candidate's predictions are numbers; lower --scaling_coefficient and --initial_spread"
    )


def test_a_candidate_without_numbers_is_never_the_best(command, tmp_path, monkeypatch):
    scores = iter([0.9, 0.5, float("nan"), 0.8, 0.7, 0.6, 0.6, 0.6, 0.6, 0.6])
    monkeypatch.setattr(Scorer, "score", lambda *_: Judgement({"Chat": next(scores)}))
    run = merged(tmp_path, *command)
    assert "generation 1: best score 0.5, best so far 0.5 after 5 of 10 evaluations" in run.log.read_text()
    assert load_coefficients(run.folder).provenance["score"] == 0.5


TRADING = ["--algorithm", "nsga2", "--evaluations", 14, "--population", 6]


@pytest.fixture(scope="session")
def traded(command, tmp_path_factory):
    """A search for trade-offs that nothing has interrupted."""
    return merged(tmp_path_factory.mktemp("traded"), *command, *TRADING)


def test_of_the_trade_offs_the_one_with_the_best_score_is_merged(traded, tiny_zoo, answered):
    evaluations = evaluations_of(traded)
    assert len(evaluations) == 14
    assert set(evaluations[0]["coefficients"].values()) == {0.2}
    assert all(0 <= value <= 1 for entry in evaluations for value in entry["coefficients"].values())
    best = min(evaluations, key=lambda entry: entry["score"])
    assert score_plainly(traded.model, tiny_zoo, answered) == pytest.approx(best["score"], rel=1e-4)
    points = load_front(traded.analysis / "front.csv")
    assert [(point.tasks, point.coefficients) for point in points] == [
        (entry["tasks"], entry["coefficients"]) for entry in evaluations
    ]
    front = sorted((point for point in points if point.number), key=lambda point: point.number)
    assert front[0].coefficients == best["coefficients"]
    assert len(front) == len([*traded.front.iterdir()]) > 1
    for point in points:
        beaten = [other for other in points if all(other.tasks[task] <= point.tasks[task] for task in point.tasks)]
        assert (beaten == [point]) == bool(point.number)
    log = traded.log.read_text()
    assert "generation 1, best so far " in log
    assert f"{len(front)} trade-offs between tasks: {traded.front}" in log


@pytest.mark.slow
def test_every_trade_off_can_be_merged_later(traded, tiny_zoo, tmp_path):
    place = traded.front / "2"
    (point,) = [point for point in load_front(traded.analysis / "front.csv") if point.number == 2]
    given = ["--method", "coefficients", "--coefficients", place, "--cache_dir", tiny_zoo]
    other = merged(tmp_path / "other", *given)
    assert load_coefficients(place).provenance["found"] == point.coefficients
    plain = ["--method", "task_arithmetic", "--cache_dir", tiny_zoo]
    wanted = merged(tmp_path / "wanted", *plain, "--scaling_coefficient", json.dumps(point.coefficients))
    for name, tensor in tensors_of(wanted.model).items():
        torch.testing.assert_close(tensors_of(other.model)[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
def test_trade_offs_are_drawn_and_found_again_after_an_interruption(command, traded, tmp_path, monkeypatch):
    command = [*command, *TRADING, "--output_path", tmp_path, "--log_with", "tensorboard"]
    asked = killed_at(monkeypatch, 10)
    with pytest.raises(KilledError):
        merge(*command)
    run = merged(tmp_path, *command)
    assert len(asked) == 10 + 5
    check_same(run, traded)
    assert (run.analysis / "front.csv").read_bytes() == (traded.analysis / "front.csv").read_bytes()
    board = EventAccumulator(str(run.board)).Reload()
    assert [picture.step for picture in board.Images("front")] == [14]
    before = (run.analysis / "front.png").read_bytes()
    assert len(before) > 5000
    (run.analysis / "front.png").unlink()
    assert commands(["analyse", str(run.folder)]) == 0
    assert (run.analysis / "front.png").read_bytes() == before


@pytest.mark.slow
def test_names_of_tasks_are_drawn_as_they_are(tmp_path, pictures):
    points = [Point(number, dict.fromkeys(("$x^$", "b", "c", "d"), 0.1 * number), {}) for number in (0, 1, 2)]
    picture = draw_front(points, tmp_path / "front.png", "$run_{")
    assert picture.shape[2] == 3
    assert picture.std() > 0


@pytest.mark.parametrize("content", ["", "front\n", "front,task A\nx,1\n", "front,task A\n1,x\n", "front,task A\n1\n"])
def test_a_damaged_table_of_trade_offs_is_refused(content, tmp_path):
    (tmp_path / "front.csv").write_text(content)
    if "\n" in content[:-1]:
        with pytest.raises(InputError, match=r"front.csv is not the table of trade-offs that a search writes"):
            load_front(tmp_path / "front.csv")
    else:
        assert load_front(tmp_path / "front.csv") == []


@pytest.mark.slow
def test_the_worst_task_can_be_what_counts(command, tmp_path):
    run = merged(tmp_path, *command, "--over_tasks", "worst")
    evaluations = evaluations_of(run)
    assert all(entry["score"] == max(entry["tasks"].values()) for entry in evaluations)
    provenance = load_coefficients(run.folder).provenance
    assert provenance["score"] == min(entry["score"] for entry in evaluations)


def one_task(answered, folder):
    """Questions of a single task."""
    (folder / "one").mkdir()
    (folder / "one" / "Math.json").write_text((answered / "Math.json").read_text())
    return folder / "one"


def test_trade_offs_that_cannot_be_searched_for_are_refused(command, answered, tmp_path, capsys):
    given = [*command, *TRADING, "--output_path", tmp_path / "out", "--questions", one_task(answered, tmp_path)]
    assert refused(capsys, *given, "--scaling_coefficient", "[0.3, -0.1, 0.9]", "--highest_coefficient", 0.8) == [
        "--algorithm nsga2 looks for trade-offs between tasks, and there is one alone, Math; give files of more tasks, "
        "or use --algorithm cma",
        "--algorithm nsga2 has coefficients from 0 to --highest_coefficient 0.8, and --scaling_coefficient "
        "0.3, -0.1, 0.9 is not among them",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_where_there_is_one_task_no_trade_offs_are_left(command, answered, tmp_path):
    given = [*command, "--evaluations", 3, "--questions", one_task(answered, tmp_path)]
    run = merged(tmp_path / "out", *given)
    assert not run.front.exists()
    assert not run.analysis.exists()


def test_options_without_effect_are_told(command, questions, tmp_path, capsys):
    given = [*command, "--output_path", tmp_path / "out", "--dry_run"]
    assert merge(*given, "--highest_coefficient", 0.9, "--question_samples", 1) == 0
    shown = capsys.readouterr().out
    assert "ignored with --algorithm cma: --highest_coefficient" in shown
    assert "ignored without --questions: --question_samples" in shown
    assert merge(*given, "--questions", questions, "--loss_tokens", "response") == 0
    assert "ignored with --questions: --data_dir, --samples_per_task, --loss_tokens" in capsys.readouterr().out


@pytest.fixture(scope="session")
def questions(tiny_zoo, tmp_path_factory):
    """Questions that the experts answer in their own ways, and a merge of them in others: a choice of two letters."""
    folder = tmp_path_factory.mktemp("questions")
    for task in ("Chat", "Math"):
        entries = [
            {"question": f"{task} question {number}?", "choices": ["a", "b"], "answer": "ab"[number % 4 == 3]}
            for number in range(8)
        ]
        (folder / f"{task}.json").write_text(json.dumps(entries))
    return folder


def test_labelled_questions_are_scored_by_their_answers(command, questions, tiny_zoo, tmp_path, capsys):
    without = [text for text in command if text not in ("--data_dir", "--samples_per_task", 2)]
    del without[without.index(command[command.index("--data_dir") + 1])]
    run = merged(tmp_path / "out", *without, "--questions", questions)
    assert "on 16 labelled questions" in run.log.read_text()
    assert "the share of wrong answers" in run.log.read_text()
    best = min(evaluations_of(run), key=lambda entry: entry["score"])
    assert set(best["tasks"]) == {"Chat", "Math"}
    assert load_coefficients(run.folder).provenance["questions"] == 16
    assert json.loads(run.config.read_text())["inputs"].keys() >= {"questions", "precision", "formats"}
    given = ["evaluate", run.folder, "--questions", questions, "--device", "cpu"]
    assert commands(list(map(str, given))) == 0
    (measured,) = read_scores(run.scores).sets.values()
    found = {task: score.mean for task, score in measured.tasks.items()}
    assert found == pytest.approx({task: 100 * (1 - share) for task, share in best["tasks"].items()})


def test_questions_that_cannot_be_asked_are_refused(command, questions, tmp_path, capsys):
    given = [*command, "--output_path", tmp_path / "out"]
    assert refused(capsys, *given, "--questions", tmp_path / "none", "--mixed_precision", "fp16") == [
        "--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no",
        f"--questions {tmp_path / 'none'} is no folder; give one with a file of labelled questions a task",
    ]
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "picture.png")
    entry = {"question": "<image>What?", "image_path": "picture.png", "answer": "a"}
    (tmp_path / "pictures" / "Math.json").write_text(json.dumps([entry]))
    assert "has a picture, and Mistral is a language model" in refusal(
        capsys, *given, "--questions", tmp_path / "pictures"
    )


@pytest.mark.slow
def test_a_search_ends_when_its_time_is_over_and_does_not_go_on_later(command, tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 25))  # an evaluation takes 25 seconds
    monkeypatch.setattr("expert_merging.search.search.time.monotonic", lambda: next(clock))
    command = [*command, "--minutes", 1.2, "--output_path", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr("expert_merging.learned.coefficients.Coefficients.save", killed)
        with pytest.raises(KilledError):
            merge(*command)
    run = merged(tmp_path, *command)
    assert [entry["seconds"] for entry in evaluations_of(run)] == [25.0] * 3
    log = run.log.read_text()
    assert "in at most 10 evaluations or 1.2 minutes on 6 samples" in log
    assert log.count("1.2 minutes are over") == 2
    assert "continuing after 3 evaluations" in log


@pytest.mark.slow
def test_two_processes_find_what_one_finds(command, whole, tmp_path):
    """Each scores its share: the start is one candidate for two processes, generations are four."""
    given = [*map(str, command), "--device", "cpu", "--output_path", str(tmp_path)]
    done = run_together(2, main, BACKBONE, given, folder=tmp_path)
    assert done.codes == (0, 0), done.stderr
    (folder,) = (tmp_path / "evo").iterdir()
    check_same(Run(folder), whole)
