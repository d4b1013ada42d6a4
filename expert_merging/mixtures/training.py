"""A mixture's routers trained against the experts' own distributions; nothing else of it changes.

The loss is the logit alignment of Expert Merging: on each expert's samples, the divergence of the mixture's predictions
from that expert's. To it comes the load-balancing loss with which such mixtures are trained (Branch-Train-Mix,
arXiv 2403.07816): experts times the sum over them of their share of the choices times their mean probability.

The trainer of coefficients makes weights of task vectors in every update. Routers are weights of their own in a model
that is no merge, so they have a short loop here, as layers have one in `expert_merging.statistics.distilling`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from expert_merging.context import Context
from expert_merging.errors import InputError
from expert_merging.learned.epochs import hold_out, updates
from expert_merging.learned.optimizer import PUBLISHED_CLIPPING
from expert_merging.machine import show_size
from expert_merging.mixtures.in_memory import live_mixture
from expert_merging.mixtures.options import MixtureOptions
from expert_merging.mixtures.tensors import Mixture
from expert_merging.plan import Rule
from expert_merging.running.objectives import Objective, alignment
from expert_merging.running.samples import Samples, check_samples
from expert_merging.running.targets import Target
from expert_merging.running.tensor_files import write_tensors
from expert_merging.stored import stored_tensors

logger = logging.getLogger(__name__)
# Samples in an update, as for coefficients.
_GROUP = 8
_FOLDER, _FILE = "routers", "trained.safetensors"


@dataclass(frozen=True)
class RouterTrainer:
    """Trains routers.

    Args:
        context: the run.
        mixture: the mixture.
        options: its options.
        samples: what the experts and the mixture are asked, checked.
    """

    context: Context
    mixture: Mixture
    options: MixtureOptions
    samples: Samples

    @classmethod
    def check(cls, context: Context, mixture: Mixture, options: MixtureOptions) -> RouterTrainer:
        """Check that the experts' predictions can be had.

        Raises:
            InputError: they cannot, or calibration files cannot be used.
        """
        samples = check_samples(context, options)
        if samples.precision == "fp16":
            raise InputError(
                "--train_router needs gradients, which overflow in float16; give --mixed_precision bf16 or no"
            )
        return cls(context, mixture, options, samples)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the plan says of the work."""
        size = sum(math.prod(slot.shape) for slot in self.mixture.slots()) * self.samples.dtype.itemsize
        return (
            f"routers are trained on {len(self.samples.samples)} samples, {self.options.router_epochs} times, against "
            f"the experts' own predictions; for that the mixture is in memory, {show_size(size)}, and what it computes "
            "of a sample",
        )

    def train(self, made: Mapping[str, Tensor], rule: Rule, unit: str) -> dict[str, Tensor]:
        """The trained routers by name, float32; those of an earlier part of the run are taken.

        Args:
            made: the tensors of the mixture that are made, with the routers to begin with.
            rule: what merges the shared tensors.
            unit: what it is fed.

        Raises:
            InputError: an expert answers with nothing or computes NaN, or the loss becomes NaN.
        """
        folder = self.context.run.calibrated / _FOLDER
        kept = self.context.run.kept.within(f"{folder.parent.name}/{_FOLDER}", self.context.plan.opened)
        file: Path = folder / _FILE
        if not (file.exists() and kept.has(file)):
            folder.mkdir(parents=True, exist_ok=True)
            targets = self.samples.target_maker(self.context, (), torch.device(self.context.device)).make(
                self.samples.samples
            )
            model = live_mixture(self.context, self.mixture, made, self.samples.dtype, rule, unit)
            write_tensors(file, self._train(model, targets), kept)
        return load_file(file)

    def _train(self, model: Any, targets: Sequence[Target]) -> dict[str, Tensor]:
        stored = stored_tensors(model)
        names = list(self.mixture.inputs.values())
        modules = [model.get_submodule(stored[name][0].parameter.rpartition(".")[0]) for name in names]
        routers = [module.weight.requires_grad_() for module in modules]
        # In float32 whatever the model's type is: an update may be less than what bfloat16 can tell.
        values = [router.detach().float().clone() for router in routers]
        optimizer = torch.optim.AdamW(values, lr=self.options.router_learning_rate, weight_decay=0.0)
        objective = alignment((), temperature=1.0, logits_weight=1.0, hidden_states_weight=0.0)
        learned, tried = hold_out(targets, self.options.held_out)
        best = first = self._held_out(model, objective, tried)
        chosen = [value.clone() for value in values]
        experts, epochs = [target.sample.expert for target in learned], self.options.router_epochs
        planned = list(updates(experts, self.context.seed, epochs=epochs, size=_GROUP))
        with self.context.progress("training routers", len(planned), "update") as advance:
            for update in planned:
                group = [learned[number] for number in update.samples]
                with _Balance(modules, self.mixture) as balance:
                    self._backward(model, objective, balance, group)
                self._update(routers, values, optimizer)
                if update.ends_epoch and (loss := self._held_out(model, objective, tried)) <= best:
                    best, chosen = loss, [value.clone() for value in values]
                advance(1)
        if tried:
            logger.info(
                "divergence from the experts on held-out samples: %.4g with trained routers, %.4g before", best, first
            )
        return dict(zip(names, chosen, strict=True))

    def _backward(self, model: Any, objective: Objective, balance: _Balance, group: Sequence[Target]) -> None:
        """Gradients of the routers by the mean loss of a group of samples."""
        for target in group:
            loss = objective.losses(model, [target]).sum() + self.options.router_balance * balance.loss()
            if not bool(torch.isfinite(loss)):
                raise InputError("training routers: the loss is NaN or infinite; give a lower --router_learning_rate")
            torch.autograd.backward(loss / len(group))

    @torch.no_grad()
    def _update(self, routers: Sequence[Tensor], values: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
        """One step of the values, by the gradients of the routers, which become the values."""
        for value, router in zip(values, routers, strict=True):
            value.grad = torch.zeros_like(value) if router.grad is None else router.grad.float()
            router.grad = None
        torch.nn.utils.clip_grad_norm_(values, PUBLISHED_CLIPPING)
        optimizer.step()
        for value, router in zip(values, routers, strict=True):
            router.copy_(value)

    @torch.no_grad()
    def _held_out(self, model: Any, objective: Objective, tried: Sequence[Target]) -> float:
        """Mean loss on the samples that nothing is trained on; 0 without any, so that the last routers are taken."""
        losses = [float(objective.losses(model, [target]).sum()) for target in tried]
        return sum(losses) / len(losses) if losses else 0.0


class _Balance:
    """The load-balancing loss of what routers say while a model runs.

    Args:
        routers: the routers' modules, whose first output is their logits.
        mixture: the mixture.
    """

    def __init__(self, routers: Sequence[torch.nn.Module], mixture: Mixture) -> None:
        self.per_token, self.experts = mixture.per_token, len(mixture.members)
        self._logits: list[Tensor] = []
        self._hooks = [router.register_forward_hook(self._see) for router in routers]

    def _see(self, _router: torch.nn.Module, _given: object, output: tuple[Tensor, ...]) -> None:
        self._logits.append(output[0])

    def __enter__(self) -> _Balance:
        return self

    def __exit__(self, *_error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def loss(self) -> Tensor:
        """Of all tokens since it was asked for last, over all layers."""
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        logits, self._logits = tuple(self._logits), []
        found: Tensor = load_balancing_loss_func(logits, self.experts, self.per_token)
        return found
