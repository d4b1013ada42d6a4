from __future__ import annotations

import io
import json
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from expert_merging.errors import InputError
from expert_merging.questions.calibration import load_samples
from Mistral.backbone import BACKBONE
from tests.command import contents, snapshot
from tests.zoo.conftest import BRIEF, brief_family
from zoo import build as build_module
from zoo.build import Job, build, train_model, work
from zoo.family import Family, Schedule
from zoo.progress import progress
from zoo.train import learning_rate_factor, train

MODELS = (BACKBONE.base_folder, *BACKBONE.expert_folders.values())


def unusable_model() -> object:
    raise SystemExit(3)


def test_same_seed_gives_the_same_bytes(built_zoo: Path, tmp_path: Path) -> None:
    build(brief_family(), tmp_path / "again", workers=0)
    assert contents(tmp_path / "again") == contents(built_zoo)


def test_another_seed_gives_another_zoo(built_zoo: Path, tmp_path: Path) -> None:
    build(brief_family(), tmp_path / "other", seed=1, workers=0)
    files, others = contents(built_zoo), contents(tmp_path / "other")
    same = {name for name in files if files[name] == others[name]}
    assert all("token" in name or name.endswith("config.json") for name in same), same


def test_zoo_is_a_cache_dir_and_a_data_dir(built_zoo: Path) -> None:
    assert {path.name for path in built_zoo.iterdir()} == {*MODELS, "dataset", "known", "test", "zoo.json"}
    for name in MODELS:
        files = {path.name for path in (built_zoo / name).iterdir()}
        assert files >= {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"}
    experts = tuple(BACKBONE.expert_folders)
    samples = load_samples(built_zoo / "dataset", experts, default_count=100, counts={}, task_expert={})
    assert len(samples) == 300
    assert all(sample.response is None for sample in samples)


def test_expert_differs_from_the_base_where_it_is_trained(built_zoo: Path) -> None:
    base = load_file(built_zoo / BACKBONE.base_folder / "model.safetensors")
    for name in BACKBONE.expert_folders.values():
        expert = load_file(built_zoo / name / "model.safetensors")
        assert expert.keys() == base.keys()
        for tensor in base:
            assert expert[tensor].equal(base[tensor]) == ("norm" in tensor), tensor


def test_finished_models_are_left_alone(own_zoo: Path) -> None:
    before = snapshot(own_zoo)
    build(brief_family(), own_zoo, workers=0)
    assert snapshot(own_zoo) == before


def test_interrupted_build_continues_with_what_is_missing(
    built_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo, expert = tmp_path / "zoo", BACKBONE.expert_folders["Math"]

    def interrupted(job: Job, report: object) -> None:
        if job.tasks == ("Math",):
            half = zoo / f"{expert}.partial"
            half.mkdir()
            (half / "half").write_text("half")
            raise KeyboardInterrupt
        train_model(job, report)  # type: ignore[arg-type]

    monkeypatch.setattr(build_module, "train_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(brief_family(), zoo, workers=0)
    monkeypatch.undo()
    assert not (zoo / expert).exists()
    finished = snapshot(zoo / BACKBONE.base_folder)

    (zoo / "test" / "Code.json").unlink()
    build(brief_family(), zoo, workers=0)
    assert snapshot(zoo / BACKBONE.base_folder) == finished
    assert contents(zoo) == contents(built_zoo)


def large_family(steps: int) -> Family:
    """Trained as large models are, and long enough to keep a state on the way."""
    schedule = replace(BRIEF, steps=steps, decay_steps=10)
    family = brief_family()
    return replace(family, large=True, expert_schedules=dict.fromkeys(family.expert_schedules, schedule))


@pytest.mark.slow
def test_interrupted_training_of_a_large_model_goes_on_within_it(tmp_path: Path) -> None:
    family = large_family(steps=14)
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    build(family, whole, workers=0)
    shown: list[int] = []

    @contextmanager
    def stopped(title: str, *_: object) -> Iterator[Callable[[int], None]]:
        def advance(count: int) -> None:
            shown.append(count)
            if "Math" in title and sum(shown) == 12:
                raise KeyboardInterrupt

        shown.clear()
        yield advance

    with pytest.raises(KeyboardInterrupt):
        build(family, halved, workers=0, progress=stopped)
    assert (halved / f"{BACKBONE.expert_folders['Math']}.state").is_file()

    @contextmanager
    def recorded(title: str, *_: object) -> Iterator[Callable[[int], None]]:
        shown.clear()
        yield shown.append
        if "Math" in title:
            assert shown == [10, 1, 1, 1, 1]

    build(family, halved, workers=0, progress=recorded)
    assert contents(halved) == contents(whole)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # when peft loads an adapter
def test_adapters_are_trained_for_what_whole_experts_change(own_zoo: Path) -> None:
    before = contents(own_zoo)
    build(brief_family(), own_zoo, adapters=True, workers=0)
    base = load_file(own_zoo / BACKBONE.base_folder / "model.safetensors")
    for folder in BACKBONE.expert_folders.values():
        adapter = own_zoo / "adapters" / folder
        assert {path.name for path in adapter.iterdir()} == {
            *("adapter_config.json", "adapter_model.safetensors", "README.md")
        }
        model = AutoModelForCausalLM.from_pretrained(own_zoo / BACKBONE.base_folder)
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
        changed = {name for name in base if not merged[name].equal(base[name])}
        assert changed == {name for name in base if "_proj" in name}
    assert {name: kept for name, kept in contents(own_zoo).items() if "adapters" not in str(name)} == before


def test_mixture_is_the_base_trained_on_all_tasks_in_turn(own_zoo: Path) -> None:
    before, family = contents(own_zoo), brief_family()
    build(family, own_zoo, mixture=True, workers=0)
    mixture = load_file(own_zoo / "mixture" / "model.safetensors")
    schedules = family.expert_schedules
    steps = sum(schedule.steps for schedule in schedules.values())
    schedule = replace(BRIEF, steps=steps, decay_steps=sum(schedule.decay_steps for schedule in schedules.values()))
    model = AutoModelForCausalLM.from_pretrained(own_zoo / BACKBONE.base_folder, dtype=torch.float32)
    own = [family.batches(task, 0, schedule.batch_size) for task in schedules]
    torch.manual_seed(0)
    train(model, (next(own[step % len(own)]) for step in range(steps)), schedule, lambda _: None, file_name=str)
    assert all(mixture[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert {name: kept for name, kept in contents(own_zoo).items() if "mixture" not in str(name)} == before


def test_folder_of_another_zoo_is_refused(own_zoo: Path) -> None:
    for family, seed in ((brief_family(), 1), (replace(brief_family(), base_schedule=replace(BRIEF, steps=4)), 0)):
        with pytest.raises(InputError, match=r"holds a zoo of another family, seed or recipe .*; remove it, or choose"):
            build(family, own_zoo, seed=seed, workers=0)


@pytest.mark.slow
def test_workers_train_the_same_models(built_zoo: Path, own_zoo: Path) -> None:
    removed = own_zoo / BACKBONE.expert_folders["Code"]
    removed.rename(own_zoo.with_name("removed"))
    shown: list[object] = []

    @contextmanager
    def recorded(*work: object) -> Iterator[Callable[..., None]]:
        shown.append(work)
        yield shown.append
        shown.append("done")

    build(brief_family(), own_zoo, workers=2, progress=recorded)
    assert shown == [("training the Code expert", 3, "step"), 0, 1, 1, 1, "done"]
    assert contents(own_zoo) == contents(built_zoo)


@pytest.mark.slow
def test_worker_that_fails_ends_the_build(tmp_path: Path) -> None:
    family = replace(brief_family(), new_model=unusable_model)
    with pytest.raises(InputError, match="training the base stopped with exit code 3; the same command goes on"):
        build(family, tmp_path / "zoo")
    assert not (tmp_path / "zoo" / BACKBONE.base_folder).exists()


def test_worker_stops_when_its_build_is_gone(tmp_path: Path) -> None:
    reports, sender = multiprocessing.Pipe(duplex=False)
    reports.close()
    work(Job(brief_family(), tmp_path, 0), sender)
    assert list(tmp_path.iterdir()) == []


def test_description_names_the_models(built_zoo: Path) -> None:
    description = json.loads((built_zoo / "zoo.json").read_text())
    assert description["family"] == "mistral"
    assert description["seed"] == 0
    assert [description["base"], *description["experts"].values()] == list(MODELS)


def test_learning_rate_rises_and_falls() -> None:
    schedule = Schedule(steps=10, learning_rate=1, warmup_steps=3, decay_steps=4)
    factors = [learning_rate_factor(schedule, step) for step in range(10)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_plain_where_there_is_no_terminal(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    with progress(console) as show, show("training the base", 2, "step") as base:
        with show("training the Code expert", 3, "step") as expert:
            expert(1)
            expert(2)
        base(1)
    shown = console.file.getvalue()
    if terminal:
        assert all(text in shown for text in ("training the base", "1/2", "training the Code expert", "3/3"))
    else:
        assert shown == (
            "training the base: 2 steps\ntraining the Code expert: 3 steps\n"
            "training the Code expert took 0 s\ntraining the base took 0 s\n"
        )
