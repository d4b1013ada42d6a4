"""The accelerate loop that learns coefficients with the published optimizer, schedule, clipping and accumulation."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from expert_merging.context import Context
from expert_merging.errors import InputError
from expert_merging.learned.coefficients import Coefficients, Trimming
from expert_merging.learned.live import LiveModel
from expert_merging.learned.memory import arrange
from expert_merging.learned.settings import Settings
from expert_merging.learned.state import StateFolder, TrainingState
from expert_merging.learned.task_vectors import TaskVectors
from expert_merging.methods.sparse import first_pass, unchanged
from expert_merging.plan import Plan
from expert_merging.processes import forget_fsdp
from expert_merging.progress import Advance, no_advance
from expert_merging.running.losses import regularisation
from expert_merging.running.sharding import load_on
from expert_merging.running.targets import Target
from expert_merging.streaming import Passes
from expert_merging.workers import SMALL_MODEL

logger = logging.getLogger(__name__)

PATIENCE = 3
# Attempts at an update in float16; each overflow halves the loss scale, which starts at 2 ** 16.
_OVERFLOWS = 24
_PUBLISHED_ADAMW = {"weight_decay": 1e-5, "betas": (0.9, 0.999)}
_PUBLISHED_CYCLE = {"T_0": 50, "T_mult": 2}


def epoch_order(experts: Sequence[str], seed: int, epoch: int) -> list[int]:
    """Order of the samples in one epoch.

    Every expert comes equally often, its samples repeated where it has fewer; then all are shuffled.

    Args:
        experts: the expert of each sample.
        seed: seed of the run.
        epoch: number of the epoch.

    Returns:
        Indices into the samples.
    """
    own: dict[str, list[int]] = {}
    for index, expert in enumerate(experts):
        own.setdefault(expert, []).append(index)
    rounds = max(len(indices) for indices in own.values())
    order = [indices[turn % len(indices)] for turn in range(rounds) for indices in own.values()]
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


@dataclass(frozen=True)
class Material:
    """What is read and computed before training, and shared by the stages of a method.

    Args:
        targets: the samples, with what their experts say about them.
        task_vectors: base weights and task vectors.
        model: the base model, whose merged parameters are overwritten.
    """

    targets: list[Target]
    task_vectors: TaskVectors
    model: Any


class Trainer:
    """The accelerate loop: AdamW on the coefficients with the published schedule, clipping and accumulation.

    With several processes each takes its share of every update's samples, and gradients are summed, so the
    coefficients are those of one process.

    Args:
        context: the run.
        settings: checked options.
        material: what an earlier stage has gathered.
    """

    def __init__(self, context: Context, settings: Settings, material: Material | None = None) -> None:
        from accelerate import Accelerator
        from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

        self.context, self.settings, self.material = context, settings, material
        self.plan = context.plan
        if torch.device(context.device).index is not None:
            torch.cuda.set_device(context.device)
        options = settings.options
        # Models are split here; accelerate's own way splits those that it prepares for an optimizer of their weights.
        forget_fsdp()
        self.accelerator = Accelerator(
            cpu=context.device == "cpu",
            mixed_precision=settings.asked.precision,
            # As a plugin, since a launcher's environment variable would win over the plain argument.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=options.gradient_accumulation_steps),
            step_scheduler_with_optimizer=False,
            log_with=None if context.log_with == "none" else context.log_with,
            project_config=ProjectConfiguration(
                project_dir=str(context.run.folder), logging_dir=str(context.run.folder)
            ),
        )
        self.state = TrainingState()
        self.states = StateFolder(context.run.state)
        self.tasks = settings.asked.tasks

    def train(self) -> Coefficients:
        """Learn the coefficients, save them in the run folder and return them."""
        with _fitting_threads(self.plan):
            material = self.gather()
            device = self.accelerator.device
            self.vector = self.settings.make_vector(device)
            self._make_optimizer()
            self.live = LiveModel(material.model, material.task_vectors, self.vector, self.context.backbone.file_name)
            try:
                if self.settings.options.gradient_checkpointing:
                    self.live.checkpoint_activations()
                arrange(
                    self.live,
                    self.settings.options,
                    lambda: self._warm_up(material.targets),
                    self.accelerator.wait_for_everyone,
                )
                return self._learn(material.targets)
            finally:
                self.live.close()

    def gather(self) -> Material:
        """Task vectors, the experts' targets and the base model, from the files or from an earlier stage."""
        if self.material is None:
            device, sharded = self.accelerator.device, self.settings.options.shard
            dtype = self.settings.asked.dtype
            with _fitting_threads(self.plan):
                trimming = self._trimming()
                task_vectors = TaskVectors(self.plan, self.settings.scale, device, trimming)
                # The others find the responses that the main process has written, but split models need them all.
                with nullcontext() if sharded else self.accelerator.main_process_first():
                    targets = self._make_targets(device)
                model = load_on(device, self.context.backbone, self.plan.base, dtype, sharded=sharded)
                self.material = Material(targets, task_vectors, model)
        return self.material

    def _trimming(self) -> Trimming | None:
        """What TIES needs to know of all task vectors, where they are to be trimmed."""
        if self.settings.density is None:
            return None
        passes = Passes(self.plan, torch.device("cpu"), self.context.progress)
        found = first_pass(passes, unchanged, density=self.settings.density, ties_scope="global")
        name = self.plan.merged[0]  # the same for all of them
        return Trimming(tuple(found["thresholds"][name].tolist()), found["majorities"][name])

    def _learn(self, targets: list[Target]) -> Coefficients:
        self._resume()
        self._start_tracker()
        count = self.accelerator.num_processes
        logger.info(
            "learning %d coefficients from %d samples in %d process%s",
            self.vector.raw.numel(),
            len(targets),
            count,
            "es" if count > 1 else "",
        )
        self._run_epochs(targets)
        coefficients = self._result()
        if self.accelerator.is_main_process:
            self._save(coefficients)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return coefficients

    def _warm_up(self, targets: list[Target]) -> None:
        """Forward and backward passes over the longest sample and that with the largest pictures."""
        longest = max(targets, key=lambda target: target.inputs["input_ids"].numel())
        largest = max(targets, key=lambda target: sum(map(Tensor.numel, target.inputs.values())))
        for target in {id(target): target for target in (longest, largest)}.values():
            losses = torch.stack(self.settings.objective.losses(self.live.model, target))
            if losses.requires_grad:
                losses.sum().backward()  # type: ignore[no-untyped-call]

    def _make_targets(self, device: torch.device) -> list[Target]:
        asked, layers = self.settings.asked, self.settings.objective.layers
        maker = asked.target_maker(self.context, layers, device, sharded=self.settings.options.shard)
        return maker.make(asked.samples)

    def _make_optimizer(self) -> None:
        rate = self.settings.options.learning_rate
        optimizer = torch.optim.AdamW(self.vector.parameters(), lr=rate, **_PUBLISHED_ADAMW)  # type: ignore[arg-type]
        scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
            optimizer, eta_min=0.1 * rate, **_PUBLISHED_CYCLE
        )
        self.optimizer, self.scheduler = self.accelerator.prepare(optimizer, scheduler)

    def _run_epochs(self, targets: list[Target]) -> None:
        options = self.settings.options
        step = options.gradient_accumulation_steps
        experts = [target.sample.expert for target in targets]
        per_epoch = len(epoch_order(experts, self.context.seed, 0))
        resumed = self.state.updates
        update = 0
        with self.context.progress("learning", per_epoch * options.num_epochs, "sample") as advance:
            for epoch in range(options.num_epochs):
                order = epoch_order(experts, self.context.seed, epoch)
                for first in range(0, per_epoch, step):
                    group = [targets[index] for index in order[first : first + step]]
                    update += 1
                    if update > resumed:
                        self._update(group, advance, last=first + step >= per_epoch)
                    else:
                        advance(len(group))
                if update >= self.state.updates and self.state.epochs_without_better >= PATIENCE:
                    logger.info("stopped early: %d epochs without a better mean loss", PATIENCE)
                    return

    def _update(self, group: list[Target], advance: Advance, *, last: bool) -> None:
        """One optimizer step on a group of samples; the last of an epoch closes it.

        Where float16 overflowed, the step is tried again with the smaller loss scale that the scaler has chosen.

        Raises:
            InputError: no loss scale avoids the overflow, or the loss is not a number.
        """
        rate = self.scheduler.get_last_lr()[0]
        for _ in range(_OVERFLOWS):
            sums, penalty = self._step(group, advance)
            advance = no_advance
            if not self.accelerator.optimizer_step_was_skipped:
                self.scheduler.step()
                self._note(sums, penalty, rate, last=last)
                return
            self.state.skipped += 1
        raise InputError("float16 overflows at every loss scale; use --mixed_precision bf16 or no")

    def _step(self, group: list[Target], advance: Advance) -> tuple[Tensor, float]:
        """Backward passes and one attempt at an optimizer step.

        Returns:
            Sums of losses as `_collect` gives them, and the weighted regularisation.
        """
        accelerator = self.accelerator
        self.live.rebuild()
        sums = self._collect(group, advance)
        gradient = accelerator.reduce(self.live.gradient, "sum")
        sums = accelerator.reduce(sums, "sum").cpu()
        share = len(group) / self.settings.options.gradient_accumulation_steps
        values = self.vector()
        counted = self.settings.budget or values.numel() / self.vector.experts
        penalty = self.settings.regularisation_weight * regularisation(values, self.vector.anchor, counted)
        scaled = penalty * share if accelerator.scaler is None else accelerator.scaler.scale(penalty * share)
        torch.autograd.backward([values, scaled], [gradient, None])
        accelerator.clip_grad_norm_(self.vector.parameters(), max_norm=1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sums, penalty.item()

    def _collect(self, group: list[Target], advance: Advance) -> Tensor:
        """Backward passes over this process's share of the samples.

        Returns:
            Per task, the sum of each of the objective's losses and the number of samples, ``(tasks, losses + 1)``.
        """
        accelerator, objective = self.accelerator, self.settings.objective
        sums = torch.zeros(len(self.tasks), len(objective.names) + 1, device=accelerator.device)
        for target, counts in self._share(group):
            weight = (self.settings.options.loss_alphas or {}).get(target.sample.task, 1.0)
            losses = counts * weight * torch.stack(objective.losses(self.live.model, target))
            if losses.requires_grad:  # where only a vision tower is merged, a question without pictures changes nothing
                accelerator.backward(losses.sum())
            sums[self.tasks.index(target.sample.task)] += torch.cat([losses.detach(), losses.new_full((1,), counts)])
            advance(counts * accelerator.num_processes, target.sample.task)
        self.live.finish()
        return sums

    def _share(self, group: list[Target]) -> Iterator[tuple[Target, int]]:
        """This process's share of the samples, each with how often it counts.

        A split model needs all processes in every pass: where there are not enough samples, one is used for nothing.
        """
        own, count = self.accelerator.process_index, self.accelerator.num_processes
        yield from ((target, 1) for target in group[own::count])
        if self.settings.options.shard and own >= len(group) % count > 0:
            yield group[-1], 0

    def _note(self, sums: Tensor, penalty: float, rate: float, *, last: bool) -> None:
        """Count the update, close the epoch if it was its last, report, and save what a restart needs."""
        *losses, count = sums.sum(0).tolist()
        total = sum(losses) / count + penalty
        if not (math.isfinite(total) and self.vector.raw.isfinite().all()):
            raise InputError(
                f"the loss is not a number after {self.state.updates} updates; lower --learning_rate, or use "
                "--mixed_precision no"
            )
        names = self.settings.objective.names
        means = {name: loss / count for name, loss in zip(names, losses, strict=True)}
        means = {"total": total, **means, "regularisation": penalty}
        self.state.updates += 1
        self.state.add(means, int(count))
        report = {f"loss/{name}": loss for name, loss in means.items()}
        report |= {"learning_rate": rate, "skipped_updates": float(self.state.skipped)}
        for task, (*task_losses, task_count) in zip(self.tasks, sums.tolist(), strict=True):
            if task_count:
                report |= {
                    f"task_{name}/{task}": loss / task_count for name, loss in zip(names, task_losses, strict=True)
                }
        values = self._by_expert()
        for expert, row in zip(self.plan.experts, values, strict=True):
            report[f"coefficient_mean/{expert}"] = float(row.mean())
            report[f"coefficient_spread/{expert}"] = float(row.std(correction=0))
        self.accelerator.log(report, step=self.state.updates)
        if last:
            self._log_epoch(float(values.mean()))
            self.state.end_epoch()
        self._save_state()

    def _log_epoch(self, coefficient: float) -> None:
        """One line with the epoch's mean losses."""
        total, *parts = (f"{name} {loss:.4g}" for name, loss in self.state.epoch_means.items())
        logger.info(
            "epoch %d of %d: mean losses: %s (%s); mean coefficient %.4g",
            self.state.epochs + 1,
            self.settings.options.num_epochs,
            total,
            ", ".join(parts),
            coefficient,
        )

    @torch.no_grad()
    def _by_expert(self) -> Tensor:
        """All trainable coefficients, ``(experts, coefficients per expert)``."""
        values = self.vector()
        return torch.cat([self.vector.view(values, name) for name in self.vector.places], dim=1)

    def _save_state(self) -> None:
        if self.accelerator.is_main_process:
            self.states.replace(self._write_state)

    def _write_state(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))
        save_file(self.vector.state_dict(), folder / "coefficients.safetensors")
        (folder / "training.json").write_text(json.dumps(vars(self.state)), encoding="utf-8")

    def _resume(self) -> None:
        """Take up the last saved state; what is damaged is passed over.

        Raises:
            InputError: the processes have not found the same.
        """
        for place in self.states.found:
            try:
                training = json.loads((place / "training.json").read_text(encoding="utf-8"))
                if training.keys() != vars(self.state).keys():
                    raise ValueError("it is of another version")
                saved = load_file(place / "coefficients.safetensors")
                self.accelerator.load_state(str(place))
            except (OSError, EOFError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
                logger.warning("the saved state in %s cannot be read (%s)", place, str(error).split("\n")[0])
                continue
            self.vector.load_state_dict(saved)
            vars(self.state).update(training)
            logger.info("continuing after update %d", self.state.updates)
            break
        own = torch.tensor([self.state.updates], device=self.accelerator.device)
        if len(updates := set(self.accelerator.gather(own).tolist())) > 1:
            raise InputError(
                f"some processes continue after update {min(updates)}, others after {max(updates)}; all of them must "
                f"be able to read {self.states.folder}, or move it away"
            )

    def _start_tracker(self) -> None:
        """Open the tracker; after a restart, points past the last saved update are replaced."""
        folder = self.context.run.folder
        arguments = {
            "tensorboard": {"purge_step": self.state.updates + 1} if self.state.updates else {},
            "wandb": {"dir": str(folder), "name": folder.name},
        }
        options = {
            name: value for name, value in asdict(self.settings.options).items() if isinstance(value, str | int | float)
        }
        tensorboard = self.context.log_with == "tensorboard"
        # TensorBoard takes the project's name for a folder, and would show the options of every start as another run.
        project = self.context.run.board.name if tensorboard else "expert_merging"
        config = None if tensorboard and any(self.context.run.board.glob("*/hparams.yml")) else options
        self.accelerator.init_trackers(project, config=config, init_kwargs=arguments)

    def _result(self) -> Coefficients:
        values = self.vector.by_name()
        return Coefficients(
            experts=tuple(self.plan.experts),
            values={name: values[name].cpu() for name in self.settings.chunks},
            task_vector_scale=self.settings.scale,
            fixed=self.vector.fixed,
            provenance={
                "base": str(self.plan.base.folder),
                "experts": {name: str(checkpoint.folder) for name, checkpoint in self.plan.experts.items()},
                "updates": self.state.updates,
            },
            trimming=self.gather().task_vectors.trimming,
        )

    def _save(self, coefficients: Coefficients) -> None:
        """Write the coefficients, last of all under the name that says that training is done, and their pictures."""
        from expert_merging.learned.figures import draw_all
        from expert_merging.learned.importance import describe_layers

        run, material = self.context.run, self.gather()
        coefficients.save_published(run.weight_coeffs)
        sizes = {name: self.plan.base.entries[name].elements for name in self.plan.merged}
        pictures = draw_all(describe_layers(coefficients, material.task_vectors.magnitudes, sizes), run.analysis)
        if self.context.log_with == "tensorboard":
            tracker = self.accelerator.get_tracker("tensorboard")
            for name, picture in pictures.items():
                tracker.log_images({name: picture[None]}, step=self.state.updates, dataformats="NHWC")
        coefficients.save(run.coefficients)
        self.states.remove()


@contextmanager
def _fitting_threads(plan: Plan) -> Iterator[None]:
    """One thread for a small model, which more would slow down; as many as before afterwards."""
    threads = torch.get_num_threads()
    if plan.base_elements < SMALL_MODEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
