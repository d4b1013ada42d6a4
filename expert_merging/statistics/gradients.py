"""What gradients of a model's own likelihood say of each entry, added up over samples.

A sample's gradient is whole before it is squared, so samples go through the model one by one. A tensor's gradient is
used and freed as soon as the backward pass is done with it, so a model, the statistic and one gradient are in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from expert_merging.context import Context
from expert_merging.errors import InputError
from expert_merging.kept import Kept
from expert_merging.parts import Part
from expert_merging.processes import while_others_wait
from expert_merging.running.samples import Samples
from expert_merging.running.sharding import load_on
from expert_merging.running.targets import Asked
from expert_merging.statistics.entrywise import Entries, EntrySums
from expert_merging.statistics.inputs import files_of, gather_files, place_of
from expert_merging.stored import stored_tensors

# Tokens whose logits are in memory together.
_SLICE = 64

# ``(gradient, weights)`` of the same entries to what is added up of them.
Score: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def _squares(gradient: Tensor, _weights: Tensor) -> Tensor:
    """Squared gradients: their mean is the diagonal of the Fisher information."""
    return gradient.float().square_()


def salience(gradient: Tensor, weights: Tensor) -> Tensor:
    """How much the loss would change, to first order, if a weight became 0."""
    return gradient.float().mul_(weights).abs_()


def gather_gradients(
    context: Context, samples: Samples, score: Score, *, drawn: bool = False, per_token: bool = False
) -> None:
    """Keep the mean over an expert's samples of a score of its gradients, for each entry of the merged tensors.

    Args:
        context: the run.
        samples: what the experts are asked.
        score: what is added up.
        drawn: the likelihood is that of tokens drawn from the expert's own predictions, not of the samples' tokens.
        per_token: a sample's log-likelihood is the mean over its tokens, not their sum.

    Raises:
        InputError: an expert answers with nothing or computes NaN.
    """

    def keep(expert: str, model: Any, own: Iterator[Asked], file: Path, kept: Kept) -> None:
        def drawing(number: int) -> torch.Generator | None:
            return _drawing(f"{context.seed}/{expert}/{number}") if drawn else None

        with GradientWatch(model, context, EntrySums(file, _parts(context)), score, per_token=per_token) as watch:
            for number, asked in enumerate(own):
                watch.run(asked, drawing(number))
            watch.finish(f"expert {expert}", samples.precision, kept)

    gather_files(context, samples, lambda expert: context.plan.only([expert]).opened, keep)


def squared_gradients(context: Context, samples: Samples, *, drawn: bool = False) -> Entries:
    """The mean over each expert's samples of its squared gradients, of the root of their mean square.

    The main process takes them, and the others wait.

    Args:
        context: the run.
        samples: what the experts are asked.
        drawn: as for `gather_gradients`.

    Raises:
        InputError: an expert answers with nothing or computes NaN.
    """
    while_others_wait(lambda: gather_gradients(context, samples, _squares, drawn=drawn))
    return Entries(files_of(context), relative=True)


def gather_base_gradients(context: Context, samples: Samples, score: Score, folder: Path) -> None:
    """Keep the same of the base's gradients on each expert's samples, in a folder; the experts have answered before.

    Args:
        context: the run.
        samples: what the experts were asked.
        score: what is added up; a sample's log-likelihood is the mean over its tokens.
        folder: where the files are kept.

    Raises:
        InputError: the base computes NaN.
    """
    place, files = place_of(context, folder), files_of(context, folder)
    kept = {expert: context.run.kept.within(place, context.plan.only([expert]).opened) for expert in files}
    left = [expert for expert, file in files.items() if not (file.exists() and kept[expert].has(file))]
    if not left:
        return
    folder.mkdir(parents=True, exist_ok=True)
    device, asked = torch.device(context.device), dict[str, Iterator[Asked]]()
    for expert in left:  # before the base is loaded: an expert may have to be for its answers
        own = [sample for sample in samples.samples if sample.expert == expert]
        asked[expert] = samples.target_maker(context, (), device).answered(own)
    model = load_on(device, context.backbone, context.plan.base, samples.dtype, sharded=False)
    with context.progress("running the base", len(samples.samples), "sample") as advance:
        for expert in left:
            with GradientWatch(
                model, context, EntrySums(files[expert], _parts(context)), score, per_token=True
            ) as watch:
                for one in asked[expert]:
                    watch.run(one)
                    advance(1)
                watch.finish("the base", samples.precision, kept[expert])


def _parts(context: Context) -> dict[str, Part]:
    """The merged tensors by name."""
    return {name: context.plan.part(name) for name in context.plan.merged}


def _drawing(key: str) -> torch.Generator:
    """Random numbers that depend on a text alone."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7]))


class GradientWatch:
    """Adds up a score of a model's gradients; what is not finished when it is left is removed.

    Args:
        model: the model.
        context: the run.
        sums: where they are added up.
        score: what is.
        per_token: a sample's log-likelihood is the mean over its tokens, not their sum.
    """

    def __init__(self, model: Any, context: Context, sums: EntrySums, score: Score, *, per_token: bool) -> None:
        self.model, self.sums = model.eval().requires_grad_(False), sums
        self.score, self.per_token, self.count = score, per_token, 0
        parameters, stored = dict(model.named_parameters()), stored_tensors(model, context.backbone.file_name)
        # Of each parameter: name of a tensor, where in that its run begins, and the run.
        self.held: dict[Any, list[tuple[str, int, slice]]] = {}
        for name in sums.values:
            before = 0
            for run in stored[context.backbone.file_name(name)]:
                held = self.held.setdefault(parameters[run.parameter], [])
                held.append((name, before, slice(run.start, run.stop)))
                before += run.stop - run.start
        self.hooks = [
            parameter.requires_grad_(True).register_post_accumulate_grad_hook(self._take) for parameter in self.held
        ]

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the model and of what is not finished."""
        while self.hooks:
            self.hooks.pop().remove()
        self.sums.abandon()

    def finish(self, who: str, precision: str, kept: Kept) -> None:
        """Give the file of the means its name.

        Args:
            who: whose gradients they are, for messages.
            precision: type of the weights.
            kept: notes what is written.

        Raises:
            InputError: some are NaN or infinite.
        """
        faulty = next((name for name, own in self.sums.values.items() if not bool(own.isfinite().all())), None)
        if faulty is not None:
            hint = "; in bf16 there is room for larger numbers (--mixed_precision)" if precision == "fp16" else ""
            raise InputError(f"{who} computes NaN or infinite gradients of {faulty}{hint}")
        self.sums.finish(self.count, kept)

    @torch.enable_grad()
    def run(self, asked: Asked, drawing: torch.Generator | None = None) -> None:
        """Add what a sample's gradients say.

        Args:
            asked: the sample.
            drawing: draws the tokens whose likelihood it is; None for the sample's own.
        """
        ids = asked.inputs["input_ids"][0]
        places = asked.tokens[asked.tokens < len(ids) - 1]  # nothing follows the last one
        hidden = self.model.base_model(**asked.inputs, use_cache=False).last_hidden_state[0, places]
        head = self.model.get_output_embeddings()
        losses = []
        for states, following in zip(torch.split(hidden, _SLICE), torch.split(ids[places + 1], _SLICE), strict=True):
            tokens = following if drawing is None else _draw(head, states, drawing)
            losses.append(checkpoint(_loss, head, states, tokens, use_reentrant=False))
        loss = torch.stack(losses).sum() / (len(places) if self.per_token else 1)
        self.count += 1
        if loss.requires_grad:  # not where a vision tower alone is merged, and the sample has no picture
            loss.backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _take(self, parameter: Tensor) -> None:
        """Use a gradient that is complete, and free it."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None  # noqa: S101  (the hook of a gradient)
        flat, weights = gradient.reshape(-1), parameter.detach().reshape(-1)
        for name, before, run in self.held[parameter]:
            score = self.score(flat[run], weights[run])
            self.sums.values[name][before : before + len(score)].add_(score.cpu())


def _loss(head: Any, states: Tensor, tokens: Tensor) -> Tensor:
    """Minus the log-likelihood of tokens, summed, in float32."""
    return functional.cross_entropy(head(states).float(), tokens, reduction="sum")


@torch.no_grad()
def _draw(head: Any, states: Tensor, drawing: torch.Generator) -> Tensor:
    """A token for each state, from what the model predicts there; drawn on the CPU, so that devices agree."""
    probabilities = head(states).float().softmax(dim=-1).cpu()
    return torch.multinomial(probabilities, 1, generator=drawing)[:, 0].to(states.device)
