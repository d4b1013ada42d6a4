"""The command that searches: its result, how it is interrupted and continued, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from expert_merging.cli import main
from expert_merging.learned.coefficients import load_coefficients
from expert_merging.run import Run
from expert_merging.search.score import Scorer
from Mistral.backbone import BACKBONE
from tests.checkpoints import BASE, EXPERTS, tensors_of
from tests.command import contents, merge, merge_plainly, merged, refusal, refused
from tests.launching import run_together

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


def evaluations_of(run):
    return json.loads(run.evaluations.read_text(encoding="utf-8"))


def divergences_plainly(folder, cache, data):
    """Mean KL(expert || model) over all tokens, by task, with whole logits."""
    tokenizer = AutoTokenizer.from_pretrained(cache / BASE)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = {}
    for task, place in EXPERTS.items():
        expert = AutoModelForCausalLM.from_pretrained(cache / place, dtype=torch.float32)
        values = []
        for entry in json.loads((data / f"{task}.json").read_text()):
            prompt = tokenizer(entry["question"])["input_ids"]
            response = tokenizer(entry["response"], add_special_tokens=False)["input_ids"]
            tokens = torch.tensor([[*prompt, *response, tokenizer.eos_token_id]])
            with torch.no_grad():
                wanted, given = (functional.log_softmax(net(tokens).logits[0], -1) for net in (expert, model))
            values.append((wanted.exp() * (wanted - given)).sum(-1).mean())
        found[task] = torch.stack(values).mean().item()
    return found


def score_plainly(folder, cache, data):
    base, own = (divergences_plainly(place, cache, data) for place in (cache / BASE, folder))
    return sum(own[task] / base[task] for task in base) / len(base)


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


class KilledError(Exception):
    pass


def killed(*_):
    raise KilledError


def check_same(run, whole):
    """Check that two runs have left the same bytes; cards tell their names."""
    assert run.evaluations.read_bytes() == whole.evaluations.read_bytes()
    assert run.coefficients.read_bytes() == whole.coefficients.read_bytes()
    first, second = (contents(one.model) for one in (run, whole))
    assert first.pop("README.md")
    assert second.pop("README.md")
    assert first == second


@pytest.mark.slow
def test_a_search_killed_within_a_generation_continues_to_the_same_bytes(command, whole, tmp_path, monkeypatch):
    command = [*command, "--output_path", tmp_path, "--log_with", "tensorboard"]
    score, asked = Scorer.score, []

    def score_or_die(self, coefficients):
        asked.append(coefficients)
        return killed() if len(asked) == 8 else score(self, coefficients)

    monkeypatch.setattr(Scorer, "score", score_or_die)
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
    monkeypatch.setattr(Scorer, "score", lambda *_: {"Chat": float("nan")})
    assert refusal(capsys, *command, "--output_path", tmp_path / "out").startswith(
        "no candidate's predictions are numbers; lower --scaling_coefficient and --initial_spread"
    )


def test_a_candidate_without_numbers_is_never_the_best(command, tmp_path, monkeypatch):
    scores = iter([0.9, 0.5, float("nan"), 0.8, 0.7, 0.6, 0.6, 0.6, 0.6, 0.6])
    monkeypatch.setattr(Scorer, "score", lambda *_: {"Chat": next(scores)})
    run = merged(tmp_path, *command)
    assert "generation 1: best score 0.5, best so far 0.5 after 5 of 10 evaluations" in run.log.read_text()
    assert load_coefficients(run.folder).provenance["score"] == 0.5


@pytest.mark.slow
def test_two_processes_find_what_one_finds(command, whole, tmp_path):
    """Each scores its share: the start is one candidate for two processes, generations are four."""
    given = [*map(str, command), "--device", "cpu", "--output_path", str(tmp_path)]
    done = run_together(2, main, BACKBONE, given, folder=tmp_path)
    assert done.codes == (0, 0), done.stderr
    (folder,) = (tmp_path / "evo").iterdir()
    check_same(Run(folder), whole)
