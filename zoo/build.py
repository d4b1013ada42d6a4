"""Build a zoo: write its questions, train the base, then the experts, each in a process of its own.

A folder appears under its final name only when it is complete, so that a build that was stopped goes on with what is
missing. A worker ends with its build.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from expert_merging.errors import InputError
from expert_merging.libraries import import_transformers
from expert_merging.machine import cores
from expert_merging.progress import Advance, Progress, no_progress
from expert_merging.signals import leave_signals_to, signals_held_back
from expert_merging.writing import partial_name, write_atomically
from zoo.family import Batch, Family, Schedule

DESCRIPTION = "zoo.json"
WORKERS = 2
# Adapters lie in a folder of their own, where the merge command does not look for experts unasked.
ADAPTERS = "adapters"
# The base trained on the tasks of all experts at once: what a merge could at best be.
MIXTURE = "mixture"
RANK = 16
# An adapter has fewer weights, and they start at zero.
ADAPTER_RATE = 10


@dataclass(frozen=True)
class Job:
    """One model to train.

    Args:
        family: What it belongs to.
        zoo: Folder of the zoo.
        seed: Decides initial weights and order of training.
        tasks: What is learned: nothing by the base, which learns easy versions of everything; one task by an expert;
            all of them by the mixture, in turn.
        adapter: The expert is an adapter of the base.
    """

    family: Family
    zoo: Path
    seed: int
    tasks: tuple[str, ...] = ()
    adapter: bool = False

    @property
    def base_folder(self) -> Path:
        """Where the base is."""
        return self.zoo / self.family.backbone.base_folder

    @property
    def folder(self) -> Path:
        """Where the model is when it is complete."""
        if not self.tasks:
            return self.base_folder
        if len(self.tasks) > 1:
            return self.zoo / MIXTURE
        return (self.zoo / ADAPTERS if self.adapter else self.zoo) / self.family.backbone.expert_folders[self.tasks[0]]

    @property
    def schedule(self) -> Schedule:
        """How it is trained."""
        if not self.tasks:
            return self.family.base_schedule
        schedule = together(self.family.expert_schedules[task] for task in self.tasks)
        return adapter_schedule(schedule) if self.adapter else schedule

    @property
    def label(self) -> str:
        """What the user is told."""
        if len(self.tasks) != 1:
            return "mixture" if self.tasks else "base"
        return f"{self.tasks[0]} {'adapter' if self.adapter else 'expert'}"

    def batches(self) -> Iterator[Batch]:
        """What it is trained on, without end; each batch is of one task."""
        size = self.schedule.batch_size
        own = [self.family.batches(task, self.seed, size) for task in self.tasks or (None,)]
        return itertools.chain.from_iterable(zip(*own, strict=False))

    def shown_by(self, progress: Progress) -> AbstractContextManager[Advance]:
        """Show how far its training is."""
        work = "training" if self.schedule.steps else "making"
        return progress(f"{work} the {self.label}", self.schedule.steps, "step")


def build(
    family: Family,
    zoo: Path,
    *,
    seed: int = 0,
    adapters: bool = False,
    mixture: bool = False,
    workers: int = WORKERS,
    progress: Progress = no_progress,
) -> None:
    """Make what is missing of the zoo in folder ``zoo``.

    Args:
        family: What to build.
        zoo: Folder of the zoo, made if needed.
        seed: Decides the questions, the initial weights and the order of training.
        adapters: Train an adapter for every task as well.
        mixture: Train the base on all tasks together as well, for as many steps as all experts have.
        workers: Processes that train at once, one thread each unless models are large; 0 trains in this process.
        progress: Shows how far every model is.

    Raises:
        InputError: The folder holds another zoo, or a worker failed.
    """
    zoo.mkdir(parents=True, exist_ok=True)
    describe(family, zoo, seed)
    family.write_data(zoo, seed)
    base, tasks = Job(family, zoo, seed), tuple(family.backbone.expert_folders)
    experts = [replace(base, tasks=(task,)) for task in tasks]
    more = [replace(job, adapter=True) for job in experts if adapters]
    for jobs in ([base], experts, [*more, *([replace(base, tasks=tasks)] if mixture else [])]):
        train_all([job for job in jobs if not job.folder.is_dir()], workers, progress)


def describe(family: Family, zoo: Path, seed: int) -> None:
    """Write what the folder holds, or check that it is the same.

    Raises:
        InputError: The folder holds another zoo.
    """
    description = {
        "family": family.name,
        "seed": seed,
        "base": family.backbone.base_folder,
        "experts": dict(family.backbone.expert_folders),
        "base_schedule": asdict(family.base_schedule),
        "expert_schedules": {task: asdict(schedule) for task, schedule in family.expert_schedules.items()},
    }
    text = json.dumps(description, indent=2) + "\n"
    path = zoo / DESCRIPTION
    if not path.exists():
        write_atomically(path, text.encode())
    elif path.read_text(encoding="utf-8") != text:
        raise InputError(
            f"{zoo} holds a zoo of another family, seed or recipe (see {path.name} there); "
            "remove it, or choose another folder with --output"
        )


def train_all(jobs: Sequence[Job], workers: int, progress: Progress) -> None:
    """Train the models of ``jobs``, ``workers`` at once, or one after another in this process for 0 workers.

    Raises:
        InputError: A worker failed; what it had to say is on standard error.
    """
    if workers == 0:
        for job in jobs:
            with job.shown_by(progress) as advance:
                train_model(job, advance)
        return
    waiting = list(jobs)
    running: list[Worker] = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(Worker(waiting.pop(0), progress))
            ready = wait([worker.reports for worker in running])
            for worker in [worker for worker in running if worker.reports in ready]:
                if not worker.has_reported():
                    running.remove(worker)
    finally:
        for worker in running:
            worker.end()


class Worker:
    """A process that trains one model and reports its steps."""

    def __init__(self, job: Job, progress: Progress) -> None:
        context = multiprocessing.get_context("spawn")
        self.job = job
        self.reports, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_work_for, args=(os.getpid(), job, sender), name=job.label)
        resource_tracker.ensure_running()  # which would let signals through if it started below
        with signals_held_back():
            self.process.start()
        # Only the worker may hold the sending end, or its death would not be seen.
        sender.close()
        self.shown = ExitStack()
        self.advance = self.shown.enter_context(job.shown_by(progress))

    def has_reported(self) -> bool:
        """Show what the worker reports; whether it goes on.

        Raises:
            InputError: The worker ended without its model.
        """
        try:
            self.advance(self.reports.recv())
        except EOFError:
            self.process.join()
            if self.process.exitcode:
                raise InputError(
                    f"training the {self.job.label} stopped with exit code {self.process.exitcode}; "
                    "the same command goes on from there"
                ) from None
            self.shown.close()
            return False
        return True

    def end(self) -> None:
        """End the worker, whatever it is doing; its model begins again, or at its last saved state."""
        self.process.kill()
        self.process.join()


def _work_for(build: int, job: Job, reports: Connection) -> None:
    """The life of a worker, which ends with the process that has started it."""
    leave_signals_to(build)
    work(job, reports)


def work(job: Job, reports: Connection) -> None:
    """Train on one thread until done or until the build is gone."""
    import torch

    torch.set_num_threads(max(1, cores() // WORKERS) if job.family.large else 1)
    with suppress(BrokenPipeError):
        train_model(job, reports.send)


def train_model(job: Job, report: Callable[[int], object]) -> None:
    """Train the model of ``job`` and save it under its name."""
    import torch

    from zoo.train import Saved, train

    torch.manual_seed(job.seed)
    family = job.family
    model = family.backbone.load_model(job.base_folder, torch.float32) if job.tasks else family.new_model()
    if job.adapter:
        model = with_adapter(model, job)
    if family.large and torch.cuda.is_available():
        model = model.to("cuda")
    state = job.folder.with_name(f"{job.folder.name}.state")
    job.folder.parent.mkdir(exist_ok=True)
    train(
        model,
        job.batches(),
        job.schedule,
        report,
        file_name=str if job.adapter else family.backbone.file_name,
        large=family.large,
        saved=Saved(state) if family.large else None,
    )
    # Under a temporary name first, so that a folder of its name is a whole model.
    unfinished = partial_name(job.folder)
    if unfinished.exists():
        shutil.rmtree(unfinished)
    import_transformers()  # which turns its progress bars off
    if job.adapter:
        model.save_pretrained(unfinished)
    else:
        family.save(model, unfinished)
    unfinished.rename(job.folder)
    state.unlink(missing_ok=True)


def together(schedules: Iterable[Schedule]) -> Schedule:
    """How all tasks are learned at once that have these schedules: as fast as the first, as long as all of them."""
    own = list(schedules)
    return replace(own[0], steps=sum(one.steps for one in own), decay_steps=sum(one.decay_steps for one in own))


def adapter_schedule(schedule: Schedule) -> Schedule:
    """How an adapter is trained for which the whole expert has ``schedule``: faster, and nothing but the adapter."""
    return replace(schedule, learning_rate=ADAPTER_RATE * schedule.learning_rate, frozen=("(?!.*lora_)",))


def with_adapter(model: Any, job: Job) -> Any:
    """The model with an adapter for the linear layers that the whole expert trains, except the head."""
    import peft
    import torch

    frozen = job.family.expert_schedules[job.tasks[0]].frozen
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module is not model.get_output_embeddings()
        and not any(re.match(pattern, job.family.backbone.file_name(f"{name}.weight")) for pattern in frozen)
    ]
    settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=layers, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls things of transformers' by their former names
        return peft.get_peft_model(model, settings)
