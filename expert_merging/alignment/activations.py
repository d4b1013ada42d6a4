"""Units matched by what they say: activation matching (Li et al., 2015, arXiv 1511.07543; Git Re-Basin, section 3.1).

Base and expert run on the same tokens. Two units are as alike as their activations correlate,
``C = Z_A^T Z_B / tokens`` with each unit's activations ``Z`` at mean 0 and variance 1, and the order with the largest
sum is a linear assignment problem. That is how ZipIt (Stoica et al., 2024, arXiv 2305.03053) matches units of two
models; its merging of units inside of one model is left out, which would change what a model computes.

Looked at are inputs of down (feed-forward units), inputs of o (query heads and value units; queries and keys follow
their heads), and what goes into and comes out of the blocks (the residual stream, by the sum over all of them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expert_merging.alignment.matching import HeadSimilarity, match, match_heads
from expert_merging.alignment.units import BlockOrder, Layout
from expert_merging.context import Context
from expert_merging.errors import InputError
from expert_merging.progress import Advance
from expert_merging.running.samples import Samples
from expert_merging.running.sharding import decoder_layers, load_on
from expert_merging.running.targets import Asked
from expert_merging.stored import stored_tensors

# Tokens that are looked at, of all samples together.
TOKENS = 1024
_OUTPUTS, _FEED = "o.weight", "down.weight"


@dataclass
class Activations:
    """What a model's units say, each at mean 0 and variance 1; what never changes is 0.

    Args:
        outputs: of each block, ``(tokens, heads * width)`` what goes into o.
        feed: of each block, ``(tokens, feed-forward units)`` what goes into down.
        stream: ``(tokens, hidden)`` what goes into each block, and what comes out of the last one.
    """

    outputs: list[Tensor] = field(default_factory=list)
    feed: list[Tensor] = field(default_factory=list)
    stream: list[Tensor] = field(default_factory=list)


def match_by_activations(
    layout: Layout, base: Activations, expert: Activations, advance: Advance
) -> tuple[list[BlockOrder], Tensor | None]:
    """The order of an expert's units that brings what they say nearest to what the base's say.

    Args:
        layout: where the units are.
        base: of the base.
        expert: of the expert, on the same tokens.
        advance: told of each block that was matched.

    Returns:
        The order in each block, and of the residual stream; None where that keeps its order.
    """
    blocks = []
    for number in range(len(layout.blocks)):
        current = BlockOrder.as_stored(layout, number)
        similar = HeadSimilarity(
            keys=torch.zeros(layout.groups, layout.groups),
            queries=torch.zeros(layout.heads, layout.heads),
            values=torch.zeros(layout.groups * layout.width, layout.groups * layout.width),
            outputs=correlation(base.outputs[number], expert.outputs[number]),
        )
        heads, values = match_heads(similar, layout, current)
        blocks.append(BlockOrder(heads, values, match(correlation(base.feed[number], expert.feed[number]))))
        advance(1)
    if not layout.moves_stream:
        return blocks, None
    return blocks, match(sum(map(correlation, base.stream, expert.stream), torch.zeros(())))


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Correlations ``(units, units)`` of standardised activations ``(tokens, units)``."""
    return first.T @ second / len(first)


def standardised(activations: Tensor) -> Tensor:
    """Activations ``(tokens, units)`` of any type at mean 0 and variance 1, in float32; constant ones are 0."""
    centred = activations.float() - activations.float().mean(0)
    deviation = centred.square().mean(0).sqrt()
    # What differs in the last digits alone is constant.
    is_constant = deviation <= 1e-6 * activations.float().abs().amax(0)
    return torch.where(is_constant, 0.0, centred / deviation)


def asked_samples(context: Context, samples: Samples) -> list[Asked]:
    """The samples with their experts' answers, as all models are shown them."""
    return list(samples.target_maker(context, (), torch.device(context.device)).answered(samples.samples))


@torch.no_grad()
def activations_of(
    context: Context, layout: Layout, name: str, samples: Samples, asked: Sequence[Asked]
) -> Activations:
    """What a model's units say about samples; it is loaded for that.

    Args:
        context: the run.
        layout: where the units are.
        name: ``base`` or an expert's name.
        samples: say in which type models run.
        asked: the samples.

    Raises:
        InputError: the model is no stack of layers, or computes NaN.
    """
    checkpoint, device = context.plan.checkpoints[name], torch.device(context.device)
    model = load_on(device, context.backbone, checkpoint, samples.dtype, sharded=False)
    watch = _Watch(model, layout, context.backbone.file_name, quota=-(-TOKENS // len(asked)))
    try:
        for one in asked:
            watch.run(one)
    finally:
        watch.close()
    found = watch.result()
    if not all(bool(one.isfinite().all()) for kind in (found.outputs, found.feed, found.stream) for one in kind):
        who = "the base" if name == "base" else f"expert {name}"
        raise InputError(f"{who} computes NaN or infinite values on the samples; give --mixed_precision no")
    return found


class _Watch:
    """Keeps what goes into layers at some tokens of each sample.

    Args:
        model: the model.
        layout: where the units are.
        file_name: published name of a parameter in memory.
        quota: tokens of each sample.

    Raises:
        InputError: the model has other layers.
    """

    def __init__(self, model: Any, layout: Layout, file_name: Callable[[str], str], quota: int) -> None:
        self.model, self.quota = model, quota
        self.positions = torch.zeros(0, dtype=torch.long)
        blocks = decoder_layers(model)[1]
        stored = stored_tensors(model, file_name)
        if len(blocks) != len(layout.blocks):
            raise InputError(
                f"{type(model).__name__} has {len(blocks)} layers in memory, and {len(layout.blocks)} in its files; "
                "use --align_experts weight_matching"
            )
        self.outputs, self.feed = (
            [self._layer(stored, file_name(block[kind])) for block in layout.blocks] for kind in (_OUTPUTS, _FEED)
        )
        self.blocks = list(blocks)
        self.seen: dict[torch.nn.Module, list[Tensor]] = {}
        self.last: list[Tensor] = []
        watched = dict.fromkeys([*self.outputs, *self.feed, *self.blocks])
        self.hooks = [one.register_forward_pre_hook(self._before, with_kwargs=True) for one in watched]
        self.hooks.append(self.blocks[-1].register_forward_hook(self._after))

    def _layer(self, stored: Mapping[str, Sequence[Any]], name: str) -> torch.nn.Module:
        """The linear layer with a tensor."""
        layer: torch.nn.Module = self.model.get_submodule(stored[name][0].parameter.removesuffix(".weight"))
        return layer

    def run(self, asked: Asked) -> None:
        """Run the model over a sample."""
        count = len(asked.tokens)
        some = torch.linspace(0, count - 1, min(self.quota, count)).round().long()
        self.positions = asked.tokens[some.to(asked.tokens.device)]
        self.model.base_model(**asked.inputs, use_cache=False)

    def result(self) -> Activations:
        """What was seen, standardised over all tokens."""

        def all_of(layers: Iterable[torch.nn.Module]) -> list[Tensor]:
            return [standardised(torch.cat(self.seen[layer])) for layer in layers]

        stream = [*all_of(self.blocks), standardised(torch.cat(self.last))]
        return Activations(all_of(self.outputs), all_of(self.feed), stream)

    def close(self) -> None:
        """Let go of the model."""
        while self.hooks:
            self.hooks.pop().remove()

    def _before(self, layer: torch.nn.Module, positional: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        inputs = positional[0] if positional else next(iter(named.values()))
        self.seen.setdefault(layer, []).append(inputs[0, self.positions].cpu())

    def _after(self, _layer: torch.nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self.last.append(hidden[0, self.positions].cpu())
