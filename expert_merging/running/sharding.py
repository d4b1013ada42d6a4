"""Models split over the processes of a run, where no device has memory for a whole one.

FSDP2 keeps an equal share of the rows of every weight in the decoder's layers in each process, and puts a layer
together just while it runs. Everything else stays whole in every process: the output head, which is used outside the
model's own forward pass, embeddings, which may be the head, and vision towers, which not every sample needs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from expert_merging.backbone import Backbone
from expert_merging.checkpoints.adapter import Adapter
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.checkpoints.configurations import language_setting
from expert_merging.checkpoints.tying import SETTING, is_tied
from expert_merging.errors import InputError
from expert_merging.running.adapted import changed_weights


def load_on(
    device: torch.device, backbone: Backbone, checkpoint: Checkpoint, dtype: torch.dtype, *, sharded: bool
) -> Any:
    """A checkpoint's model on a device, or each layer on this process's and the other processes' together.

    An adapter's is the base's, whose changed weights are made one after the other on their way, as are those of an
    expert whose units have another order than its files. A head that is the embedding in the files is so in memory, and
    changes with it.

    Where that makes no difference to the model, it is loaded in the files' own type, so that its weights are the files'
    pages, which all processes of a machine share and which need not stay in memory; each is converted on its way to
    where it belongs.

    Args:
        device: this process's device.
        backbone: the model family.
        checkpoint: the checkpoint.
        dtype: type of the weights in memory.
        sharded: split it.

    Raises:
        InputError: it cannot be split.
    """
    adapter = checkpoint if isinstance(checkpoint, Adapter) else None
    model, own = _loaded(backbone, adapter.base if adapter else checkpoint, dtype)
    if adapter is None:
        _tie(model, checkpoint)
    changed = changed_weights(model, checkpoint, backbone.file_name) if checkpoint.changed else {}

    def bring(module: torch.nn.Module) -> None:
        """Bring weights to the device, in the wanted type but where the model keeps one of its own choice."""
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor):
                values = changed[parameter]() if parameter in changed else parameter.data
                there = values.to(device)  # before the conversion, which a GPU does faster
                parameter.data = there.to(dtype if parameter.dtype == own else parameter.dtype)

    if sharded:
        gc.collect()  # an earlier model, which FSDP2 has tied into circles
        _shard(model, device, bring)
    bring(model)
    return model.to(device)


def _loaded(backbone: Backbone, checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[Any, torch.dtype]:
    """The model and the type of its weights: the files' own if nothing but weights depends on it, or the wanted one."""
    stored = {entry.torch_dtype for entry in checkpoint.entries.values() if entry.is_float}
    if len(stored) == 1 and stored <= {torch.float16, torch.bfloat16} - {dtype}:
        (own,) = stored
        model = backbone.load_model(checkpoint.folder, own)
        tables = [buffer.dtype for buffer in model.buffers() if buffer.is_floating_point()]
        if own not in tables and {parameter.dtype for parameter in model.parameters()} == {own}:
            return model, own
        del model  # such as Gemma, whose scale of embeddings is rounded to the type that it is loaded in
    return backbone.load_model(checkpoint.folder, dtype), dtype


def decoder_layers(model: Any) -> tuple[torch.nn.Module, Sequence[torch.nn.Module]]:
    """A model's decoder, and its list of layers; empty where it has none."""
    decoder = model.get_decoder().get_decoder()  # the first may be a language model with its head
    lists = [list(part) for part in decoder.modules() if isinstance(part, torch.nn.ModuleList)]
    return decoder, max(lists, key=len, default=[])


def _tie(model: Any, checkpoint: Checkpoint) -> None:
    """Make head and embedding one where they are in the files, and ``config.json`` does not tell transformers so."""
    if language_setting(checkpoint.config, SETTING) is None and is_tied(checkpoint):
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if head is not None:
            head.weight = embedding.weight


def _shard(model: Any, device: torch.device, bring: Callable[[torch.nn.Module], None]) -> None:
    """Split the layers, bringing one at a time to the device."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    decoder, layers = decoder_layers(model)
    if not layers:
        raise InputError(
            f"--shard splits a decoder's list of layers, and {type(decoder).__name__} has none; leave it away"
        )
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    whole = set(decoder.parameters()) - {parameter for layer in layers for parameter in layer.parameters()}
    for layer in layers:
        bring(layer)
        split: Any = fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        # Gradients of the processes' samples are added up, not averaged.
        split.set_gradient_divide_factor(1.0)
        split.set_force_sum_reduction_for_comms(True)
    kind = type(decoder)
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    decoder.__class__ = kind  # FSDP2 replaces it, and transformers looks up by it which hidden states there are
    layers[0].register_forward_pre_hook(_want_gradient, prepend=True)


def _want_gradient(_layer: Any, inputs: tuple[Any, ...]) -> None:
    """Let every backward pass go through all layers, whatever is merged and whether or not a sample has pictures.

    Each layer is put together by all processes at once, so all of them must come by.
    """
    if torch.is_grad_enabled():
        inputs[0].requires_grad_(True)


def own_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_entries(parameter: Tensor) -> tuple[int, int]:
    """The run of entries of a flattened parameter that this process has, which may be empty: its start and end."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.numel()
    rows, mesh = parameter.shape[0], parameter.device_mesh
    before = min(rows, -(-rows // mesh.size()) * mesh.get_local_rank())
    start = before * (parameter.numel() // rows)
    return start, start + own_part(parameter).numel()


@contextmanager
def beside_the_model(gradient: Tensor) -> Iterator[None]:
    """Use a gradient on the stream that the model runs on; FSDP2 hands it over on one of its own."""
    if not (isinstance(gradient, DTensor) and gradient.is_cuda):
        yield
        return
    stream = torch.cuda.default_stream(gradient.device)
    stream.wait_stream(torch.cuda.current_stream(gradient.device))
    own_part(gradient).record_stream(stream)
    with torch.cuda.stream(stream):
        yield
