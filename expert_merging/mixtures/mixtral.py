"""Mixtral, as files have it: the tensors of a mixture of Mistral or Llama models, and its config.json.

Tensors have the classic names, one for each expert, which transformers 4 and 5, vLLM and converters read. Transformers
5 stacks the experts in memory, and nothing else reads files with its stacked names.

A mixture computes what its experts compute only if its config.json says everything that theirs leave to a default,
since Mixtral's defaults are others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from expert_merging.checkpoints.checkpoint import Checkpoint, Entry
from expert_merging.errors import InputError, Problems
from expert_merging.outputs import Copied, Made, Merged, Slot
from expert_merging.plan import BASE, Plan

# A mixture's experts: the checkpoint whose feed-forward layers each one is, None for the base.
Members = Mapping[str, str | None]

_PARTS = {"gate": "w1", "down": "w2", "up": "w3"}
_FEED_FORWARD = re.compile(rf"model\.layers\.(\d+)\.mlp\.({'|'.join(_PARTS)})_proj\.weight")
_SHARED = re.compile(
    r"(model\.embed_tokens|model\.norm|lm_head"
    r"|model\.layers\.\d+\.(self_attn\.[qkvo]_proj|input_layernorm|post_attention_layernorm))\.weight"
)
# Tables that older files hold and that follow from config.json.
_COMPUTED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

# What a config.json means that does not say it, where a Mixtral's would mean something else.
_IMPLIED: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "sliding_window": 4096},
    "llama": {
        "intermediate_size": 11_008,
        "max_position_embeddings": 2048,
        "num_key_value_heads": None,  # as many as attention heads
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
    },
}
# What is ignored there and would not be here.
_IGNORED: Mapping[str, Mapping[str, Any]] = {"mistral": {}, "llama": {"sliding_window": None}}
# Code that is not a Mixtral's, and settings that it does not have.
_STALE = ("auto_map", "attention_bias", "mlp_bias", "pretraining_tp")


class FeedForward(NamedTuple):
    """A feed-forward tensor of a dense model.

    Args:
        layer: number of its layer.
        part: ``gate``, ``up`` or ``down``.
    """

    layer: int
    part: str

    @classmethod
    def named(cls, name: str) -> FeedForward | None:
        """The feed-forward tensor of that name; None if it names something else."""
        match = _FEED_FORWARD.fullmatch(name)
        return cls(int(match[1]), match[2]) if match else None

    @property
    def name(self) -> str:
        """Its name in the dense model."""
        return f"model.layers.{self.layer}.mlp.{self.part}_proj.weight"

    def of_expert(self, number: int) -> str:
        """Its name in a Mixtral."""
        return f"model.layers.{self.layer}.block_sparse_moe.experts.{number}.{_PARTS[self.part]}.weight"

    @property
    def router(self) -> str:
        """Name of the layer's router, ``(experts, hidden size)``."""
        return f"model.layers.{self.layer}.block_sparse_moe.gate.weight"


def check_base(plan: Plan) -> None:
    """Check that a Mixtral can be made of these checkpoints.

    Raises:
        InputError: the base is of another kind, has tensors that a Mixtral has no place for, or lacks some; or
            feed-forward tensors are excluded.
    """
    base, problems = plan.base, Problems()
    if base.model_type not in _IMPLIED:
        raise InputError(
            f"{base.folder} has the model_type {base.model_type!r}, and mixtures can be made of "
            f"{' and '.join(_IMPLIED)} models, which become a Mixtral"
        )
    if BASE in plan.contained:
        problems.add(
            f"a Mixtral has fixed names, and those of {base.folder} are read {plan.contained[BASE]}; save it without "
            "its container, or use another method"
        )
        problems.check()
    feed_forward = _feed_forward_of(base)
    layers = sorted({found.layer for found in feed_forward}) or [0]
    wanted = [FeedForward(layer, part).name for layer in layers for part in _PARTS]
    merged = set(plan.merged)
    missing = [name for name in wanted if name not in base.entries]
    homeless = [entry.name for entry in base.entries.values() if not _has_place(entry)]
    excluded = [found.name for found in feed_forward if found.name not in merged]
    if missing:
        problems.add(f"{base.folder} lacks {_first(missing)}; download it again")
    if homeless:
        problems.add(f"{base.folder} has {_first(homeless)}, for which a Mixtral has no place")
    if excluded:
        problems.add(
            f"--exclude_params leaves out {_first(excluded)}, and feed-forward layers are what a mixture has of its "
            "experts; exclude other parameters"
        )
    problems.check()


def _feed_forward_of(base: Checkpoint) -> list[FeedForward]:
    return [found for name in base.entries if (found := FeedForward.named(name))]


def _has_place(entry: Entry) -> bool:
    if FeedForward.named(entry.name):
        return len(entry.shape) == 2
    return bool(_SHARED.fullmatch(entry.name) or _COMPUTED.fullmatch(entry.name))


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 1} more tensors" if names[2:] else f" and {names[1]}" if names[1:] else ""
    return names[0] + more


def shared_of(plan: Plan) -> tuple[str, ...]:
    """Names of the tensors that are merged: all that would be in a dense model but for feed-forward ones."""
    return tuple(name for name in plan.merged if not FeedForward.named(name))


def routers_of(base: Checkpoint) -> dict[str, int]:
    """Names of the routers, with the number of their columns."""
    return {found.router: base.entries[found.name].shape[1] for found in _feed_forward_of(base) if found.part == "gate"}


def feed_forward_elements(base: Checkpoint) -> int:
    """Number of parameters of one expert."""
    return sum(base.entries[found.name].elements for found in _feed_forward_of(base))


def slots_of(plan: Plan, members: Members) -> list[Slot]:
    """The tensors of a Mixtral, in the order of the base's files and with the base's types.

    Args:
        plan: checkpoints that `check_base` has passed.
        members: the mixture's experts.
    """

    def become(entry: Entry) -> Iterator[Slot]:
        found = FeedForward.named(entry.name)
        if not found:
            merged = plan.merged_as(entry.name)
            source = Copied(entry.name) if merged is None else Merged(merged)
            yield Slot(entry.name, entry.dtype, entry.shape, entry.size, source)
            return
        if found.part == "gate":
            yield Slot.of(found.router, entry.dtype, (len(members), entry.shape[1]), Made(found.router))
        for number, expert in enumerate(members.values()):
            yield Slot.of(found.of_expert(number), entry.dtype, entry.shape, Copied(entry.name, expert))

    base = plan.base
    entries = [entry for file in base.files for entry in base.in_file(file) if not _COMPUTED.fullmatch(entry.name)]
    return [slot for entry in entries for slot in become(entry)]


def config_of(dense: Mapping[str, Any], experts: int, experts_per_token: int) -> dict[str, Any]:
    """``config.json`` of a Mixtral, from that of a dense model.

    Args:
        dense: the model's.
        experts: how many experts the Mixtral has.
        experts_per_token: how many of them work on each token.
    """
    kind = dense["model_type"]
    said = {name: value for name, value in dense.items() if name not in _STALE}
    config = {**_IMPLIED[kind], **said, **_IGNORED[kind]}
    if config.get("num_key_value_heads", 0) is None:  # which a Mixtral does not understand
        config["num_key_value_heads"] = config.get("num_attention_heads", 32)
    # Transformers 5 writes it in a table that older readers do not look into.
    table = config.get("rope_parameters")
    if isinstance(table, Mapping) and "rope_theta" in table:
        config["rope_theta"] = table["rope_theta"]
    config |= {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_experts_per_tok": experts_per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    }
    return dict(sorted(config.items()))
