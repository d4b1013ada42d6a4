"""Expert Merging++ and AdaMerging against the plain twin, and what connects their stages."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from expert_merging.catalogue import find_method
from expert_merging.context import Context
from expert_merging.errors import InputError
from expert_merging.learned import stages
from expert_merging.learned.coefficients import load_coefficients
from expert_merging.learned.directions import find_directions
from expert_merging.learned.history import load_over_time
from expert_merging.learned.importance import load_layers
from expert_merging.learned.options import ChunkingOptions, LearningOptions, TrainingOptions, TrimmingOptions
from expert_merging.learned.stages import one_stage, two_stages
from expert_merging.learned.trainer import Trainer
from expert_merging.plan import make_plan
from expert_merging.run import Run
from Mistral.backbone import BACKBONE
from tests.checkpoints import BASE, EXPERTS
from tests.command import merge
from tests.learned.training import EXCLUDED, no_progress, read_task_vectors
from tests.learned.twin import Example, Twin

RESPONSES = {"Chat": "Certainly", "Math": "42", "Code": "def f():"}


def prepare(cache, folder):
    """The plan, and a context whose run folder exists."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = make_plan(cache / BASE, {name: cache / path for name, path in EXPERTS.items()}, EXCLUDED)
    return plan, Context(plan, BACKBONE, Run(folder), 3, "cpu", "none", no_progress, find_method=find_method)


def learn(method, kind, cache, folder, *, shared=None, **options):
    """Coefficients that a method learns, without merging."""
    _, context = prepare(cache, folder)
    given = kind(**{"data_dir": str(cache / "dataset"), **options})
    more = {} if shared is None else {"shared": shared}
    return method(context, given, **more).run()["coefficients"]


def twin_of(plan, **options):
    """The twin and its samples, as `write_tasks` makes them."""
    twin = Twin(
        base=plan.base.folder,
        experts={name: checkpoint.folder for name, checkpoint in plan.experts.items()},
        merged=list(plan.merged),
        initial=[0.3] * 3,
        **options,
    )
    samples = [
        Example(task, task, f"{task} question {number}?", RESPONSES[task])
        for task in sorted(EXPERTS)
        for number in range(5)
    ]
    return twin, samples


def assert_like_twin(coefficients, twin):
    for name, values in coefficients.values.items():
        torch.testing.assert_close(values, twin.coefficients(name).detach(), rtol=1e-4, atol=2e-5)


def same(one, other):
    return all(torch.equal(one.values[name], other.values[name]) for name in one.values)


def allocate_plainly(twin, *, budget, kappa):
    """Eq. 4 with the paper's importance, written out."""
    importance = {}
    totals = [sum(float(twin.task_vectors[name][k].abs().mean()) for name in twin.merged) for k in range(3)]
    for name in twin.merged:
        values = twin.coefficients(name)[:, 0].tolist()
        shares = [float(twin.task_vectors[name][k].abs().mean()) / totals[k] for k in range(3)]
        importance[name] = twin.task_vectors[name][0].numel() * sum(a * s for a, s in zip(values, shares, strict=True))
    powers = {name: value**kappa for name, value in importance.items()}
    return {name: int(budget * len(powers) * power / sum(powers.values())) for name, power in powers.items()}


@pytest.mark.slow
@pytest.mark.parametrize("init", ["learned", "initial"])
def test_both_stages_are_those_of_the_plain_twin(init, answered_zoo, tmp_path):
    options = {"budget": 1.1, "kappa": 1.2, "stage2_init": init, "sparsity_reg_weight": 0.4}
    coefficients = learn(two_stages, ChunkingOptions, answered_zoo, tmp_path, **options)
    plan, _ = prepare(answered_zoo, tmp_path)
    first, samples = twin_of(plan, layers=[1], regularisation=0.4)
    first.train(samples, 1, seed=3)
    assert_like_twin(load_coefficients(tmp_path / "stage1"), first)
    chunks = allocate_plainly(first, budget=1.1, kappa=1.2)
    assert 0 in chunks.values()
    assert max(chunks.values()) > 1
    start = {name: first.coefficients(name).detach()[:, 0] for name in plan.merged} if init == "learned" else None
    second, _ = twin_of(plan, layers=[1], regularisation=0.4, chunks=chunks, first=start, budget=1.1 * len(plan.merged))
    second.train(samples, 1, seed=3)
    assert_like_twin(coefficients, second)
    assert set(coefficients.fixed) == {name for name, count in chunks.items() if count == 0}


@pytest.mark.slow
def test_one_chunk_each_from_the_initial_value_is_expert_merging_again(answered_zoo, tmp_path):
    plain = learn(one_stage, LearningOptions, answered_zoo, tmp_path / "plain")
    options = {"chunking": "none", "stage2_init": "initial"}
    assert same(learn(two_stages, ChunkingOptions, answered_zoo, tmp_path / "again", **options), plain)
    assert same(load_coefficients(tmp_path / "again" / "stage1"), plain)


def test_chunking_all_gives_two_coefficients_each(answered_zoo, tmp_path):
    coefficients = learn(two_stages, ChunkingOptions, answered_zoo, tmp_path, chunking="all")
    assert {value.shape for value in coefficients.values.values()} == {(3, 2)}
    assert coefficients.fixed == ()


@pytest.mark.parametrize("init", ["learned", "initial"])
def test_what_gets_no_chunk_keeps_its_value(init, answered_zoo, tmp_path):
    coefficients = learn(two_stages, ChunkingOptions, answered_zoo, tmp_path, stage2_init=init, kappa=3.0)
    first = load_coefficients(tmp_path / "stage1")
    assert coefficients.fixed
    for name in coefficients.fixed:
        expected = first.values[name] if init == "learned" else torch.full((3, 1), 0.3)
        assert torch.equal(coefficients.values[name], expected)


@pytest.mark.slow
def test_the_first_stage_may_come_from_an_earlier_run(answered_zoo, tmp_path, monkeypatch):
    whole = learn(two_stages, ChunkingOptions, answered_zoo, tmp_path / "whole")
    learn(one_stage, LearningOptions, answered_zoo, tmp_path / "first")
    trained = count_training(monkeypatch)
    given = {"coefficients": str(tmp_path / "first")}
    assert same(learn(two_stages, ChunkingOptions, answered_zoo, tmp_path / "second", **given), whole)
    assert trained == [tmp_path / "second"]
    assert not (tmp_path / "second" / "stage1").exists()


def count_training(monkeypatch):
    """The folders of what is trained from now on."""
    trained = []
    train = Trainer.train
    monkeypatch.setattr(stages.Trainer, "train", lambda self: (trained.append(self.context.run.folder), train(self))[1])
    return trained


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_an_interrupted_run_goes_on_in_its_stage(stage, answered_zoo, tmp_path, monkeypatch):
    options = {"num_epochs": 2}
    whole = learn(two_stages, ChunkingOptions, answered_zoo, tmp_path / "whole", **options)
    save = Trainer._save_state
    where = tmp_path / "run" / "stage1" if stage == "stage1" else tmp_path / "run"

    def stop(self):
        save(self)
        if self.context.run.folder == where and self.state.updates == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_save_state", stop)
        with pytest.raises(KeyboardInterrupt):
            learn(two_stages, ChunkingOptions, answered_zoo, tmp_path / "run", **options)
    trained = count_training(monkeypatch)
    assert same(learn(two_stages, ChunkingOptions, answered_zoo, tmp_path / "run", **options), whole)
    assert [folder.name for folder in trained] == (["stage1", "run"] if stage == "stage1" else ["run"])
    assert not (tmp_path / "run" / "stage1" / "model").exists()


def test_experts_are_asked_once_for_both_stages(answered_zoo, tmp_path, monkeypatch):
    asked = []
    make = stages.Trainer._make_targets
    monkeypatch.setattr(stages.Trainer, "_make_targets", lambda *given: (asked.append(1), make(*given))[1])
    learn(two_stages, ChunkingOptions, answered_zoo, tmp_path)
    assert len(asked) == 1


def test_a_budget_too_thin_for_any_chunk_is_told_after_the_first_stage(answered_zoo, tmp_path):
    with pytest.raises(InputError, match=r"a budget of 1\.05 coefficients per expert, spread by importance over 21"):
        learn(two_stages, ChunkingOptions, answered_zoo, tmp_path, budget=0.05, kappa=0.01)
    assert load_coefficients(tmp_path / "stage1")


def test_a_budget_that_can_give_no_chunk_is_told_before_anything(answered_zoo, tmp_path):
    with pytest.raises(InputError, match=r"--budget 0\.9 is less than one coefficient for each parameter, so none"):
        learn(two_stages, ChunkingOptions, answered_zoo, tmp_path, budget=0.9, kappa=0)
    assert not (tmp_path / "stage1").exists()


def test_coefficients_that_no_first_stage_can_have_are_refused(answered_zoo, tmp_path):
    coefficients = learn(one_stage, LearningOptions, answered_zoo, tmp_path / "first")
    file = tmp_path / "first" / "coefficients.json"
    good = file.read_text()
    file.write_text(json.dumps({**json.loads(good), "task_vector_scale": [1.0, 2.0, 1.0]}))
    given = {"coefficients": str(tmp_path / "first")}
    with pytest.raises(InputError, match="task vectors that were scaled otherwise; give the --task_vector_coeffs_"):
        learn(two_stages, ChunkingOptions, answered_zoo, tmp_path / "second", **given)
    trimmed = {"thresholds": [0.0, 0.0, 0.0], "majority": 1.0}
    file.write_text(json.dumps({**json.loads(good), "trimming": trimmed}))
    with pytest.raises(InputError, match="were learned on trimmed and this run learns on task_vectors"):
        learn(two_stages, ChunkingOptions, answered_zoo, tmp_path / "second", **given)
    file.write_text(json.dumps({**json.loads(good), "checkpoints": {"Math": "other"}}))
    with pytest.raises(
        InputError, match=r"were learned with other weights of Math than those in .*, or --force to use"
    ):
        learn(two_stages, ChunkingOptions, answered_zoo, tmp_path / "second", **given)
    file.write_text(json.dumps({**json.loads(good), "experts": ["Chat", "Math", "Law"]}))
    with pytest.raises(InputError, match=r"belong to the experts Chat, Math, Law, given are Chat, Math, Code"):
        learn(two_stages, ChunkingOptions, answered_zoo, tmp_path / "second", force=True, **given)
    file.write_text(good)
    next(iter(coefficients.values.values())).fill_(1.5)
    coefficients.save(tmp_path / "first" / "coefficients.safetensors")
    with pytest.raises(InputError, match=r"values outside \[0, 1\] for model\.layers\.0"):
        learn(two_stages, ChunkingOptions, answered_zoo, tmp_path / "second", **given)


def test_adamerging_is_the_twin_with_entropies(answered_zoo, tmp_path):
    coefficients = learn(one_stage, TrainingOptions, answered_zoo, tmp_path)
    plan, _ = prepare(answered_zoo, tmp_path)
    twin, samples = twin_of(plan, layers=[], entropy=True)
    twin.train(samples, 1, seed=3)
    assert_like_twin(coefficients, twin)
    assert max(float((value - 0.3).abs().max()) for value in coefficients.values.values()) > 0.01


@pytest.mark.slow
def test_adamerging_pp_is_the_twin_on_trimmed_task_vectors(answered_zoo, tmp_path):
    coefficients = learn(one_stage, TrimmingOptions, answered_zoo, tmp_path, density=0.25, learning_rate=0.05)
    plan, context = prepare(answered_zoo, tmp_path)
    assert coefficients.directions == {"name": "trimmed", "options": {"density": 0.25}}
    rule = find_directions(context, **coefficients.directions).prepare()
    twin, samples = twin_of(plan, layers=[], entropy=True, density=0.25, learning_rate=0.05)
    for name in plan.merged:
        _, task_vectors = read_task_vectors(plan, plan.part(name))
        expected = torch.stack([vector.flatten() for vector in twin.task_vectors[name]])
        assert torch.equal(rule(task_vectors, plan.part(name), None), expected)
        assert 0 < expected.count_nonzero() < 0.25 * expected.numel()
    twin.train(samples, 1, seed=3)
    assert_like_twin(coefficients, twin)


@pytest.mark.slow
def test_adamerging_task_has_one_coefficient_per_expert(answered_zoo, tmp_path):
    """Its gradient is the sum over parameters: learning with one parameter tied over all of them."""
    coefficients = learn(one_stage, TrainingOptions, answered_zoo, tmp_path, shared=True)
    plan, _ = prepare(answered_zoo, tmp_path)
    twin, samples = twin_of(plan, layers=[], entropy=True)
    tied = twin.raw[plan.merged[0]]
    twin.raw = dict.fromkeys(plan.merged, tied)
    twin.optimizer = torch.optim.AdamW([tied], lr=0.5, weight_decay=1e-5, betas=(0.9, 0.999))
    twin.scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        twin.optimizer, T_0=50, T_mult=2, eta_min=0.05
    )
    twin.train(samples, 1, seed=3)
    assert_like_twin(coefficients, twin)


@pytest.mark.parametrize("method", ["expert_merging_pp", "adamerging_pp", "adamerging_task"])
def test_saved_coefficients_write_the_checkpoint_that_learning_wrote(method, answered_zoo, tmp_path):
    arguments = ["--cache_dir", str(answered_zoo), "--output_path", str(tmp_path), "--log_with", "none"]
    learning = ["--method", method, "--data_dir", str(answered_zoo / "dataset"), "--run_name", "learned"]
    assert merge(*arguments, *learning) == 0
    (run,) = tmp_path.glob("*/learned")
    again = ["--method", "coefficients", "--coefficients", str(run), "--run_name", "again"]
    assert merge(*arguments, *again) == 0
    written = (tmp_path / "coefficients" / "again" / "model" / "model.safetensors").read_bytes()
    assert written == (run / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
def test_both_stages_leave_curves_pictures_and_coefficients(answered_zoo, tmp_path):
    _, context = prepare(answered_zoo, tmp_path)
    options = ChunkingOptions(data_dir=str(answered_zoo / "dataset"))
    two_stages(replace(context, log_with="tensorboard"), options).run()
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [point.step for point in events.Scalars("loss/total")] == [1, 2, 3, 4], "one run, both stages"
    assert [image.step for image in events.Images("importance")] == [2, 4]
    assert [entry for entry in (tmp_path / "board").iterdir() if entry.is_dir()] == []
    assert not (tmp_path / "stage1" / "board").exists()
    for folder, steps in ((tmp_path / "stage1", [0, 1, 2]), (tmp_path, [2, 3, 4])):
        assert load_over_time(folder / "analysis" / "over_time.csv").updates == steps
        assert (folder / "weight_coeffs.json").exists()
    chunks = {layer.name: layer.chunks for layer in load_layers(tmp_path / "analysis" / "layers.csv")}
    learned = load_coefficients(tmp_path)
    assert chunks == {name: 0 if name in learned.fixed else value.shape[1] for name, value in learned.values.items()}


def test_the_dry_run_tells_of_both_stages(answered_zoo, capsys):
    arguments = ["--cache_dir", str(answered_zoo), "--data_dir", str(answered_zoo / "dataset"), "--dry_run"]
    assert merge(*arguments, "--method", "expert_merging++", "--budget", "1.2") == 0
    shown = capsys.readouterr().out
    assert "stage 1: 63 coefficients learned from 15 samples in 1 epoch" in shown
    assert "stage 2: at most 25.2 coefficients per expert, shared out by importance (kappa 1.2), from what" in shown
    assert merge(*arguments, "--method", "expert_merging++", "--chunking", "all") == 0
    assert "stage 2: 2 chunks for every parameter (42 coefficients per expert)" in capsys.readouterr().out
