"""The accelerate loop that learns coefficients with the published optimizer, schedule, clipping and accumulation."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from expert_merging.backbone import import_transformers
from expert_merging.errors import InputError
from expert_merging.learned import Context, Work
from expert_merging.learned.coefficients import Coefficients, CoefficientVector, load_coefficients
from expert_merging.learned.live import LiveModel, TaskVectors, alignment_losses
from expert_merging.learned.losses import regularisation
from expert_merging.learned.options import LearningOptions
from expert_merging.learned.settings import Settings, check
from expert_merging.learned.targets import Target, TargetMaker
from expert_merging.plan import Advance, Plan
from expert_merging.streaming import SMALL_MODEL, no_advance
from expert_merging.writing import sync_files

logger = logging.getLogger(__name__)

PATIENCE = 3
# Attempts at an update in float16; each overflow halves the loss scale, which starts at 2 ** 16.
_OVERFLOWS = 24
_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_PUBLISHED_ADAMW = {"weight_decay": 1e-5, "betas": (0.9, 0.999)}
_PUBLISHED_CYCLE = {"T_0": 50, "T_mult": 2}


def prepare(plan: Plan, context: Context, options: LearningOptions) -> Work:
    """Check everything that training needs and return the training.

    Raises:
        InputError: all problems found.
    """
    settings = check(plan, context, options)

    def learn() -> Coefficients:
        if context.run.coefficients.exists():
            logger.info("coefficients were learned already: %s", context.run.coefficients)
            return load_coefficients(context.run.folder)
        import_transformers()
        return Trainer(plan, context, settings).train()

    contents = [(sample.task, sample.expert, sample.question, sample.response) for sample in settings.samples]
    pictures = [picture.read_bytes() for sample in settings.samples for picture in sample.images]
    digest = hashlib.sha256(b"".join([json.dumps(contents).encode(), *pictures])).hexdigest()[:16]
    trained = len(plan.experts) * sum(settings.chunks.values())
    epochs = "1 epoch" if options.num_epochs == 1 else f"{options.num_epochs} epochs"
    notes = (
        f"{trained} coefficients learned from {len(settings.samples)} samples in {epochs}",
        f"hidden states aligned: {', '.join(map(str, settings.layers)) or 'none'}; precision: {settings.precision}",
    )
    # What decides the result beside the options: `auto` and `middle` are other things elsewhere.
    inputs = {"calibration": digest, "precision": settings.precision, "layers": ",".join(map(str, settings.layers))}
    return Work(learn, inputs, notes)


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


class TrainingState:
    """How far training is; its numbers are saved with every update."""

    def __init__(self) -> None:
        self.updates = 0
        self.skipped = 0
        self.epoch_loss = 0.0
        self.epoch_samples = 0
        self.best_loss = math.inf
        self.epochs_without_better = 0

    def end_epoch(self) -> None:
        """Compare the epoch's mean loss with the best so far."""
        mean = self.epoch_loss / self.epoch_samples
        better = mean < self.best_loss
        self.best_loss = min(mean, self.best_loss)
        self.epochs_without_better = 0 if better else self.epochs_without_better + 1
        self.epoch_loss, self.epoch_samples = 0.0, 0


class Trainer:
    """The accelerate loop: AdamW on the coefficients with the published schedule, clipping and accumulation.

    With several processes each takes its share of every update's samples, and gradients are summed, so the
    coefficients are those of one process.

    Args:
        plan: checkpoints and parameters.
        context: run folder, seed, device.
        settings: checked options.
    """

    def __init__(self, plan: Plan, context: Context, settings: Settings) -> None:
        from accelerate import Accelerator
        from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

        self.plan, self.context, self.settings = plan, context, settings
        if torch.device(context.device).index is not None:
            torch.cuda.set_device(context.device)
        options = settings.options
        self.accelerator = Accelerator(
            cpu=context.device == "cpu",
            mixed_precision=settings.precision,
            # As a plugin, since a launcher's environment variable would win over the plain argument.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=options.gradient_accumulation_steps),
            step_scheduler_with_optimizer=False,
            log_with=None if context.log_with == "none" else context.log_with,
            project_config=ProjectConfiguration(
                project_dir=str(context.run.folder), logging_dir=str(context.run.folder)
            ),
        )
        self.state = TrainingState()
        self.tasks = sorted({sample.task for sample in settings.samples})

    def train(self) -> Coefficients:
        """Learn the coefficients, save them in the run folder and return them."""
        threads = torch.get_num_threads()
        if self.plan.base_elements < SMALL_MODEL:
            torch.set_num_threads(1)
        try:
            return self._prepare_and_learn()
        finally:
            torch.set_num_threads(threads)

    def _prepare_and_learn(self) -> Coefficients:
        device = self.accelerator.device
        task_vectors = TaskVectors(self.plan, self.settings.scale, device, self.accelerator.num_processes)
        with self.accelerator.main_process_first():
            targets = self._make_targets(device)
        self.vector = CoefficientVector(self.settings.chunks, self.settings.initial, device)
        self._make_optimizer()
        base = self.context.backbone.load_model(self.plan.base.folder, _DTYPES[self.settings.precision]).to(device)
        self.live = LiveModel(base, task_vectors, self.vector, self.context.backbone.file_name)
        try:
            return self._learn(targets)
        finally:
            self.live.close()

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
        self.accelerator.end_training()
        return coefficients

    def _make_targets(self, device: torch.device) -> list[Target]:
        options = self.settings.options
        return TargetMaker(
            backbone=self.context.backbone,
            plan=self.plan,
            layers=self.settings.layers,
            response_only=options.loss_tokens == "response",
            max_new_tokens=options.max_new_tokens,
            prompt_template=options.prompt_template,
            dtype=_DTYPES[self.settings.precision],
            device=device,
            responses=self.context.run.responses,
            progress=self.context.progress,
        ).make(self.settings.samples)

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
        penalty = self.settings.options.sparsity_reg_weight * regularisation(
            values, self.vector.start, self.vector.experts
        )
        scaled = penalty * share if accelerator.scaler is None else accelerator.scaler.scale(penalty * share)
        torch.autograd.backward([values, scaled], [gradient, None])
        accelerator.clip_grad_norm_(self.vector.parameters(), max_norm=1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sums, penalty.item()

    def _collect(self, group: list[Target], advance: Advance) -> Tensor:
        """Backward passes over this process's share of the samples.

        Returns:
            Sums of logit losses, hidden-state losses and samples per task, ``(tasks, 3)``.
        """
        accelerator, options = self.accelerator, self.settings.options
        sums = torch.zeros(len(self.tasks), 3, device=accelerator.device)
        for target in group[accelerator.process_index :: accelerator.num_processes]:
            logits, hidden = alignment_losses(self.live, target, self.settings.layers, options.temperature)
            hidden = hidden * options.hidden_states_weight
            weight = (options.loss_alphas or {}).get(target.sample.task, 1.0)
            accelerator.backward(weight * (logits + hidden))
            row = torch.stack([weight * logits.detach(), weight * hidden.detach(), torch.ones_like(logits)])
            sums[self.tasks.index(target.sample.task)] += row
            advance(accelerator.num_processes, target.sample.task)
        return sums

    def _note(self, sums: Tensor, penalty: float, rate: float, *, last: bool) -> None:
        """Count the update, close the epoch if it was its last, report, and save what a restart needs."""
        logits, hidden, count = sums.sum(0).tolist()
        total = (logits + hidden) / count + penalty
        if not (math.isfinite(total) and self.vector.raw.isfinite().all()):
            raise InputError(
                f"the loss is not a number after {self.state.updates} updates; lower --learning_rate, or use "
                "--mixed_precision no"
            )
        self.state.updates += 1
        self.state.epoch_loss += total * count
        self.state.epoch_samples += int(count)
        report = {
            "loss/total": total,
            "loss/logits": logits / count,
            "loss/hidden_states": hidden / count,
            "loss/regularisation": penalty,
            "learning_rate": rate,
            "skipped_updates": float(self.state.skipped),
        }
        for task, (task_logits, task_hidden, task_count) in zip(self.tasks, sums.tolist(), strict=True):
            if task_count:
                report[f"task_logits/{task}"] = task_logits / task_count
                report[f"task_hidden_states/{task}"] = task_hidden / task_count
        for expert, row in zip(self.plan.experts, self._by_expert(), strict=True):
            report[f"coefficient_mean/{expert}"] = float(row.mean())
            report[f"coefficient_spread/{expert}"] = float(row.std(correction=0))
        self.accelerator.log(report, step=self.state.updates)
        if last:
            self.state.end_epoch()
        self._save_state()

    @torch.no_grad()
    def _by_expert(self) -> Tensor:
        """All trainable coefficients, ``(experts, coefficients per expert)``."""
        values = self.vector()
        return torch.cat([self.vector.view(values, name) for name in self.vector.places], dim=1)

    def _save_state(self) -> None:
        """Save under a temporary name, then swap, so that there is always one complete state."""
        if not self.accelerator.is_main_process:
            return
        target = self.context.run.state
        temporary, old = self._other_states()
        shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.save_state(str(temporary))
        save_file(self.vector.state_dict(), temporary / "coefficients.safetensors")
        (temporary / "training.json").write_text(json.dumps(vars(self.state)), encoding="utf-8")
        sync_files(temporary)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(target, old)
        os.rename(temporary, target)
        shutil.rmtree(old, ignore_errors=True)

    def _other_states(self) -> tuple[Path, Path]:
        """Where the state is written, and where the last one waits until the new one has its name."""
        state = self.context.run.state
        return state.with_name("state.partial"), state.with_name("state.old")

    def _resume(self) -> None:
        """Take up the last saved state; what is damaged is passed over."""
        for place in (self.context.run.state, self._other_states()[1]):
            if not place.exists():
                continue
            try:
                training = json.loads((place / "training.json").read_text(encoding="utf-8"))
                saved = load_file(place / "coefficients.safetensors", device=str(self.accelerator.device))
                self.accelerator.load_state(str(place))
            except (OSError, EOFError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
                logger.warning("the saved state in %s cannot be read (%s)", place, str(error).split("\n")[0])
                continue
            self.vector.load_state_dict(saved)
            vars(self.state).update(training)
            logger.info("continuing after update %d", self.state.updates)
            return

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
        # TensorBoard takes the project's name for a folder.
        project = self.context.run.board.name if self.context.log_with == "tensorboard" else "expert_merging"
        self.accelerator.init_trackers(project, config=options, init_kwargs=arguments)

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
        )

    def _save(self, coefficients: Coefficients) -> None:
        from expert_merging.learned.figures import coefficient_map

        run = self.context.run
        coefficients.save_published(run.weight_coeffs)
        image = coefficient_map(coefficients, run.coefficient_map)
        if self.context.log_with == "tensorboard":
            tracker = self.accelerator.get_tracker("tensorboard")
            tracker.log_images({"coefficients": image[None]}, step=self.state.updates, dataformats="NHWC")
        coefficients.save(run.coefficients)
        for folder in (run.state, *self._other_states()):
            shutil.rmtree(folder, ignore_errors=True)
