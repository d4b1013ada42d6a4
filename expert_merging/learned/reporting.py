"""What is told of training while it runs, and the result that it leaves in the run's folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeAlias

from torch import Tensor

from expert_merging.context import Context
from expert_merging.learned.coefficients import Coefficients
from expert_merging.learned.figures import draw_all
from expert_merging.learned.importance import describe_layers
from expert_merging.learned.parametrisations import CoefficientVector
from expert_merging.learned.settings import Settings
from expert_merging.learned.state import TrainingState
from expert_merging.running.accelerator import finish_trackers, start_tracker

logger = logging.getLogger(__name__)

Result: TypeAlias = Coefficients


class Report:
    """Curves for the experiment tracker, lines for the log, and files.

    Args:
        context: the run.
        settings: checked options.
        accelerator: knows trackers and processes.
    """

    def __init__(self, context: Context, settings: Settings, accelerator: Any) -> None:
        self.context, self.settings, self.accelerator = context, settings, accelerator
        self.tasks = settings.asked.tasks

    def start(self, coefficients: int, updates: int) -> None:
        """Open the tracker and say what begins.

        Args:
            coefficients: number of what is learned.
            updates: those that an earlier part of the run has made; points past them are replaced.
        """
        options = {
            name: value for name, value in asdict(self.settings.options).items() if isinstance(value, str | int | float)
        }
        start_tracker(self.accelerator, self.context, first=updates + 1 if updates else None, options=options)
        count = self.accelerator.num_processes
        samples = len(self.settings.asked.samples)
        processes = f"{count} process{'es' if count > 1 else ''}"
        logger.info("learning %d coefficients from %d samples in %s", coefficients, samples, processes)

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
        report = {f"loss/{name}": loss for name, loss in means.items()}
        report |= {"learning_rate": rate, "skipped_updates": float(state.skipped)}
        names = self.settings.objective.names
        for task, (*losses, count) in zip(self.tasks, sums.tolist(), strict=True):
            if count:
                report |= {f"task_{name}/{task}": loss / count for name, loss in zip(names, losses, strict=True)}
        for expert, row in zip(self.context.plan.experts, values, strict=True):
            report[f"coefficient_mean/{expert}"] = float(row.mean())
            report[f"coefficient_spread/{expert}"] = float(row.std(correction=0))
        self.accelerator.log(report, step=state.updates)

    def epoch(self, state: TrainingState, coefficient: float, held_out: float | None = None) -> None:
        """One line with the mean losses of the epoch that ends, and the mean coefficient.

        Args:
            state: how far training is.
            coefficient: mean coefficient.
            held_out: loss on the samples that were held out, as a share of that at the start, if there are any.
        """
        total, *parts = (f"{name} {loss:.4g}" for name, loss in state.epoch_means.items())
        epoch, epochs = state.epochs + 1, self.settings.options.num_epochs
        line = "epoch %d of %d: mean losses: %s (%s); mean coefficient %.4g"
        if held_out is not None:
            line += f"; held-out samples: {held_out:.4g} of the loss at the start"
            self.accelerator.log({"held_out/loss": held_out}, step=state.updates)
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
        )

    def save(self, coefficients: Coefficients, magnitudes: Mapping[str, tuple[float, ...]], updates: int) -> None:
        """Write the coefficients, last of all under the name that says that training is done, and their pictures."""
        plan, run = self.context.plan, self.context.run
        coefficients.save_published(run.weight_coeffs)
        sizes = {name: plan.base.entries[name].elements for name in plan.merged}
        pictures = draw_all(describe_layers(coefficients, magnitudes, sizes), run.analysis)
        if self.context.log_with == "tensorboard":
            tracker = self.accelerator.get_tracker("tensorboard")
            for name, picture in pictures.items():
                tracker.log_images({name: picture[None]}, step=updates, dataformats="NHWC")
        coefficients.save(run.coefficients, run.kept)

    def finish(self) -> None:
        """Close the trackers."""
        finish_trackers(self.accelerator)
