"""The accelerate loop that learns coefficients with the published optimizer, schedule, clipping and accumulation.

What it does not do itself: the order of samples is in `epochs`, what is gathered before in `material`, accelerate and
the optimizer in `optimizer`, curves, log and files in `reporting`, and what a restart needs in `state`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from expert_merging.context import Context
from expert_merging.learned.epochs import epoch_order, hold_out, updates
from expert_merging.learned.material import Material, Targets, batches_of, gather, open_live_model, targets_of
from expert_merging.learned.optimizer import (
    PUBLISHED_CLIPPING,
    attempts,
    make_optimizer,
    training_accelerator,
    uphill,
)
from expert_merging.learned.reporting import Report, Result
from expert_merging.learned.settings import Settings
from expert_merging.learned.state import StateFolder, TrainingState
from expert_merging.progress import Advance, no_advance
from expert_merging.running.objectives import with_divergence
from expert_merging.running.scores import relative_mean, score_by_task

logger = logging.getLogger(__name__)


class Trainer:
    """The accelerate loop: AdamW on the coefficients with the published schedule, clipping and accumulation.

    With several processes each takes its share of every update's samples, and gradients are summed, so the
    coefficients are those of one process.

    Args:
        context: the run.
        settings: checked options.
        material: what an earlier stage has gathered.
        before: updates of an earlier stage.
        goes_on: where a finished run learns longer, begin with the state in which it has ended.
    """

    def __init__(
        self,
        context: Context,
        settings: Settings,
        material: Material | None = None,
        before: int = 0,
        *,
        goes_on: bool = True,
    ) -> None:
        self.context, self.settings, self.material = context, settings, material
        self.plan = context.plan
        self.accelerator = training_accelerator(context, settings)
        self.report = Report(context, settings, self.accelerator, before)
        self.state = TrainingState()
        self.held_out: Targets = []
        self.states = StateFolder(context.run.state, context.run.last_state if goes_on else None)

    def train(self) -> Result:
        """Learn the coefficients, save them in the run folder and return them."""
        material = self.gather()
        self.vector = self.settings.options.vector(self.settings.layout, self.accelerator.device)
        self.optimizer, self.scheduler = self._make_optimizer()
        self.live = open_live_model(self.context, self.settings, material, self.vector, self.accelerator)
        try:
            return self._learn(material.targets)
        finally:
            self.live.close()

    def _make_optimizer(self) -> tuple[Any, Any]:
        return make_optimizer(self.accelerator, self.vector.parameters(), self.settings.options.learning_rate)

    def gather(self) -> Material:
        """Task vectors, the experts' targets and the base model, from the files or from an earlier stage."""
        if self.material is None:
            self.material = gather(self.context, self.settings, self.accelerator, self._make_targets)
        return self.material

    def _make_targets(self, device: torch.device) -> Targets:
        return targets_of(self.context, self.settings, device)

    def _learn(self, targets: Targets) -> Result:
        learned, self.held_out = hold_out(targets, self.settings.options.held_out)
        if self.held_out:
            self.vector.register_buffer("best", self.vector.raw.detach().clone())
        if self.accelerator.is_main_process:
            self.states.begin()
        self.states.resume(self.accelerator, self.vector, self.state)
        self.report.start(self.state, self.vector.by_expert())
        if self.held_out and not self.state.first_losses:
            self.state.first_losses, self.state.best_loss = self._losses_held_out(), 1.0
        self._run_epochs(learned)
        if self.held_out:
            self._go_back()
        coefficients = self.report.result(self.vector, self.state.updates)
        if self.accelerator.is_main_process:
            self._save(coefficients)
        self.report.finish()
        return coefficients

    def _run_epochs(self, targets: Targets) -> None:
        options, seed = self.settings.options, self.context.seed
        experts = [target.sample.expert for target in targets]
        planned = updates(experts, seed, epochs=options.num_epochs, size=options.gradient_accumulation_steps)
        resumed = self.state.updates
        total = len(epoch_order(experts, seed, 0)) * options.num_epochs
        with self.context.progress("learning", total, "sample") as advance:
            for update in planned:
                if update.number > resumed:
                    group = [targets[index] for index in update.samples]
                    self._update(group, advance, last=update.ends_epoch)
                else:
                    advance(len(update.samples))
                waited = self.state.epochs_without_better
                if update.ends_epoch and update.number >= resumed and waited >= options.patience:
                    loss = "loss on the held-out samples" if self.held_out else "mean loss"
                    logger.info("stopped early: %d epoch%s without a better %s", waited, "s"[: waited - 1], loss)
                    return

    def _update(self, group: Targets, advance: Advance, *, last: bool) -> None:
        """One optimizer step on a group of samples; the last of an epoch closes it.

        Where float16 overflowed, the step is tried again with the smaller loss scale that the scaler has chosen.

        Raises:
            InputError: no loss scale avoids the overflow, or the loss is not a number.
        """
        rate = self.scheduler.get_last_lr()[0]
        for _ in attempts():
            self.vector.draw(f"{self.context.seed}/{self.state.updates}")
            sums, penalty = self._step(group, advance)
            self.vector.draw(None)
            advance = no_advance
            if not self.accelerator.optimizer_step_was_skipped:
                self.scheduler.step()
                self._note(sums, penalty, rate, last=last)
                return
            self.state.skipped += 1

    def _step(self, group: Targets, advance: Advance) -> tuple[Tensor, float]:
        """Backward passes and one attempt at an optimizer step.

        Returns:
            Sums of losses as `_collect` gives them, and the weighted regularisation.
        """
        sums, penalty = self._backward(group, advance)
        if self.settings.options.sam:
            with uphill(self.vector.parameters(), self.settings.options.sam):
                self._backward(group, no_advance)
        self.accelerator.clip_grad_norm_(self.vector.parameters(), max_norm=PUBLISHED_CLIPPING)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sums, penalty

    def _backward(self, group: Targets, advance: Advance) -> tuple[Tensor, float]:
        """Backward passes over all processes' samples and the regularisation, from the coefficients as they are.

        Returns:
            What `_step` does.
        """
        accelerator = self.accelerator
        self.live.rebuild()
        sums = self._collect(group, advance)
        gradient = accelerator.reduce(self.live.gradient, "sum")
        sums = accelerator.reduce(sums, "sum").cpu()
        share = len(group) / self.settings.options.gradient_accumulation_steps
        values = self.vector()
        penalty = self.settings.penalty(values, self.vector)
        scaled = penalty * share if accelerator.scaler is None else accelerator.scaler.scale(penalty * share)
        torch.autograd.backward([values, scaled], [gradient, None])
        return sums, penalty.item()

    def _collect(self, group: Targets, advance: Advance) -> Tensor:
        """Backward passes over this process's share of the samples.

        Returns:
            Per task, the sum of each of the objective's losses and the number of samples, ``(tasks, losses + 1)``.
        """
        accelerator, objective, tasks = self.accelerator, self.settings.objective, self.report.tasks
        alphas = self.settings.options.loss_alphas or {}
        sums = torch.zeros(len(tasks), len(objective.names) + 1, device=accelerator.device)
        for batch, counts, together in self._share(group):
            weights = sums.new_tensor([[counts * alphas.get(target.task, 1.0)] for target in batch])
            losses = weights * objective.losses(self.live.model, batch)
            if losses.requires_grad:  # where only a vision tower is merged, a question without pictures changes nothing
                accelerator.backward(losses.sum())
            for target, own in zip(batch, losses.detach(), strict=True):
                sums[tasks.index(target.task)] += torch.cat([own, own.new_full((1,), counts)])
            advance(together, batch[0].task)
        self.live.finish()
        return sums

    def _share(self, group: Targets) -> Iterator[tuple[Targets, int, int]]:
        """This process's share of the samples, in batches, each with how often it counts.

        A split model needs all processes in every pass: where there are not enough batches, one is used for nothing.

        Yields:
            Samples that go through the model together, 1 or 0, and how many go through the models of all processes.
        """
        own, count = self.accelerator.process_index, self.accelerator.num_processes
        batches = batches_of(self.settings, group, -(-len(group) // count))
        for first in range(0, len(batches), count):
            side_by_side = batches[first : first + count]
            together = sum(map(len, side_by_side))
            if own < len(side_by_side):
                yield side_by_side[own], 1, together
            elif self.settings.options.shard:
                yield side_by_side[-1][:1], 0, together

    def _note(self, sums: Tensor, penalty: float, rate: float, *, last: bool) -> None:
        """Count the update, close the epoch if it was its last, report, and save what a restart needs."""
        means = self.report.means(sums, penalty)
        self.state.count(means, samples=float(sums[:, -1].sum()), numbers=self.vector.raw)
        values = self.vector.by_expert()
        self.report.update(self.state, means, sums, rate, values)
        if last:
            self._end_epoch(float(values.mean()))
        self._save_state()

    def _end_epoch(self, coefficient: float) -> None:
        """Report the epoch, and keep its numbers if they are the best on the samples that were held out."""
        if not self.held_out:
            self.report.epoch(self.state, coefficient)
            self.state.end_epoch()
            return
        score = relative_mean(self._losses_held_out(), self.state.first_losses)
        self.report.epoch(self.state, coefficient, score)
        if self.state.end_epoch(score):
            self.vector.get_buffer("best").copy_(self.vector.raw.detach())

    def _losses_held_out(self) -> dict[str, float]:
        """Mean loss on the samples of each task that were held out; their divergence is reported."""
        self.live.rebuild()
        found = score_by_task(with_divergence(self.settings.objective), self.live.model, self.held_out)
        self.report.held_out(self.state, {task: numbers.pop("divergence") for task, numbers in found.items()})
        return {task: sum(losses.values()) for task, losses in found.items()}

    @torch.no_grad()
    def _go_back(self) -> None:
        """Take the numbers that were the best on the samples that were held out."""
        self.vector.raw.copy_(self.vector.get_buffer("best"))
        share = self.state.best_loss
        logger.info("held-out samples: the best coefficients have %.4g of the loss at the start", share)

    def _save_state(self) -> None:
        if self.accelerator.is_main_process:
            self.states.save(self.accelerator, self.vector, self.state)

    def _save(self, coefficients: Result) -> None:
        """Write the result; the last state stays there for a run that learns longer."""
        self.report.save(coefficients, self.gather().task_vectors.magnitudes, self.state)
