"""What is told of training while it runs, and the result that it leaves in the run's folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor

from expert_merging.context import Context
from expert_merging.learned.coefficients import Coefficients
from expert_merging.learned.figures import draw_all
from expert_merging.learned.history import Depths, add_snapshot, add_update, save_history
from expert_merging.learned.importance import describe_layers
from expert_merging.learned.parametrisations import CoefficientVector
from expert_merging.learned.settings import Settings
from expert_merging.learned.state import TrainingState
from expert_merging.running.accelerator import board_of, finish_trackers, start_tracker
from expert_merging.running.board import add_final, lay_out_losses

logger = logging.getLogger(__name__)

Result: TypeAlias = Coefficients


class Report:
    """Curves for the experiment tracker, lines for the log, and files.

    Args:
        context: the run.
        settings: checked options.
        accelerator: knows trackers and processes.
        before: updates of an earlier stage, whose curves this one's go on from.
    """

    def __init__(self, context: Context, settings: Settings, accelerator: Any, before: int = 0) -> None:
        self.context, self.settings, self.accelerator, self.before = context, settings, accelerator, before
        self.tasks = settings.asked.tasks
        self.depths = Depths(settings.layout.chunks)

    def start(self, state: TrainingState, values: Tensor) -> None:
        """Open the tracker, say what begins and, in a new run, note the first values.

        Args:
            state: how far an earlier part of the run has come; points past it are replaced.
            values: coefficients, ``(experts, coefficients per expert)``.
        """
        # At its number of updates, an earlier stage has left a point.
        first = self.before + state.updates + (1 if self.before or state.updates else 0)
        start_tracker(self.accelerator, self.context, first=first)
        self.board = board_of(self.accelerator)
        if self.board is not None:
            lay_out_losses(self.board, {name: f"loss/{name}" for name in self._losses})
        if not state.updates:
            self._show_coefficients(state, values)
        count = self.accelerator.num_processes
        samples = len(self.settings.asked.samples)
        processes = f"{count} process{'es' if count > 1 else ''}"
        trained = self.settings.layout.trained
        logger.info("learning %d coefficients from %d samples in %s", trained, samples, processes)

    @property
    def _losses(self) -> tuple[str, ...]:
        """Names of the losses, as `means` has them."""
        return "total", *self.settings.objective.names, "regularisation"

    def _step(self, state: TrainingState) -> int:
        """Where on the curves training is."""
        return self.before + state.updates

    def means(self, sums: Tensor, penalty: float) -> dict[str, float]:
        """Mean losses of an update's samples, the regularisation, and their ``total``.

        Args:
            sums: per task, the sum of each of the objective's losses, and the number of samples:
                ``(tasks, losses + 1)``.
            penalty: the weighted regularisation.
        """
        *losses, count = sums.sum(0).tolist()
        means = {name: loss / count for name, loss in zip(self.settings.objective.names, losses, strict=True)}
        return {"total": sum(losses) / count + penalty, **means, "regularisation": penalty}

    def update(
        self, state: TrainingState, means: Mapping[str, float], sums: Tensor, rate: float, values: Tensor
    ) -> None:
        """Add a point to every curve.

        Args:
            state: how far training is.
            means: as `means` gives them.
            sums: as `means` takes them.
            rate: the learning rate.
            values: coefficients, ``(experts, coefficients per expert)``.
        """
        step = self._step(state)
        numbers = {"update": step, "epoch": state.epochs + 1, "learning_rate": rate}
        row = add_update(state.rows, state.updates, numbers, means)
        report = {f"loss/{name}": row[name] for name in row if name not in numbers}
        report |= {"learning_rate": rate, "skipped_updates": float(state.skipped)}
        names = self.settings.objective.names
        for task, (*losses, count) in zip(self.tasks, sums.tolist(), strict=True):
            if count:
                report |= {f"task_{name}/{task}": loss / count for name, loss in zip(names, losses, strict=True)}
        for expert, row_of_values in zip(self.context.plan.experts, values, strict=True):
            report[f"coefficient_mean/{expert}"] = float(row_of_values.mean())
            report[f"coefficient_spread/{expert}"] = float(row_of_values.std(correction=0))
        self.accelerator.log(report, step=step)
        self._show_coefficients(state, values)

    def _show_coefficients(self, state: TrainingState, values: Tensor) -> None:
        """Note the coefficients by depth, and show how they are distributed."""
        add_snapshot(state.snapshots, self._step(state), self.depths.means(values))
        if self.board is not None:
            for expert, row in zip(self.context.plan.experts, values, strict=True):
                self.board.add_histogram(f"coefficients/{expert}", row.cpu(), self._step(state))

    def held_out(self, state: TrainingState, divergence: Mapping[str, float]) -> None:
        """Add how far the model is from the experts on the samples that were held out.

        Args:
            state: how far training is.
            divergence: KL(expert || model) per token in nats, by task.
        """
        mean = sum(divergence.values()) / len(divergence)
        if not state.rows:
            state.rows.append({"update": self._step(state), "epoch": 0, "held_out_loss": 1.0})
        state.rows[-1]["held_out_divergence"] = mean
        report = {f"held_out_divergence/{task}": number for task, number in divergence.items()}
        self.accelerator.log({"held_out/divergence": mean, **report}, step=self._step(state))

    def epoch(self, state: TrainingState, coefficient: float, held_out: float | None = None) -> None:
        """One line with the mean losses of the epoch that ends, and the mean coefficient.

        Args:
            state: how far training is.
            coefficient: mean coefficient.
            held_out: loss on the samples that were held out, as a share of that at the start, if there are any.
        """
        means = {f"{name}_epoch_mean": loss for name, loss in state.epoch_means.items()}
        state.rows[-1].update(means)
        report = {f"loss/{name}": loss for name, loss in means.items()}
        total, *parts = (f"{name} {loss:.4g}" for name, loss in state.epoch_means.items())
        epoch, epochs = state.epochs + 1, self.settings.options.num_epochs
        line = "epoch %d of %d: mean losses: %s (%s); mean coefficient %.4g"
        if held_out is not None:
            line += f"; held-out samples: {held_out:.4g} of the loss at the start"
            state.rows[-1]["held_out_loss"] = report["held_out/loss"] = held_out
        self.accelerator.log(report, step=self._step(state))
        logger.info(line, epoch, epochs, total, ", ".join(parts), coefficient)

    def result(self, vector: CoefficientVector, updates: int) -> Coefficients:
        """The learned coefficients, with what they belong to."""
        plan, values = self.context.plan, vector.by_name()
        return Coefficients(
            experts=tuple(plan.experts),
            values={name: values[name].cpu() for name in self.settings.layout.chunks},
            task_vector_scale=self.settings.scale,
            fixed=vector.fixed,
            provenance={
                "base": str(plan.base.folder),
                "experts": {name: str(checkpoint.folder) for name, checkpoint in plan.experts.items()},
                "updates": updates,
            },
            directions=self.settings.directions.record,
            checkpoints=plan.contents,
            axes=self.settings.layout.axes,
        )

    def save(
        self, coefficients: Coefficients, magnitudes: Mapping[str, tuple[float, ...]], state: TrainingState
    ) -> None:
        """Write the coefficients, last of all under the name that says that training is done, and their pictures."""
        plan, run = self.context.plan, self.context.run
        coefficients.save_published(run.weight_coeffs)
        sizes = {name: plan.base.entries[name].elements for name in plan.merged}
        save_history(state.rows, state.snapshots, tuple(plan.experts), self.depths.names, run.analysis)
        pictures = draw_all(describe_layers(coefficients, magnitudes, sizes), run.analysis, run.title)
        if self.board is not None:
            for name, picture in pictures.items():
                self.board.add_image(name, picture, self._step(state), dataformats="HWC")
            add_final(self.board, self._final(state), self._step(state))
        coefficients.save(run.coefficients, run.kept)

    def _final(self, state: TrainingState) -> dict[str, float]:
        """The numbers of the epoch that is kept: the best on held-out samples, or else the last."""
        names = ("total_epoch_mean", "held_out_loss", "held_out_divergence")
        ends = [row for row in state.rows if any(name in row for name in names)]
        kept = min(ends, key=lambda row: row.get("held_out_loss", -row["update"]))
        return {name: kept[name] for name in names if name in kept}

    def finish(self) -> None:
        """Close the trackers."""
        finish_trackers(self.accelerator)
