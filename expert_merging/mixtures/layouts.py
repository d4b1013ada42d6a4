"""How mixtures of experts are stored: names of tensors, and config.json, by the kind of dense model that they are of.

Tensors have the classic names, one for each expert, which transformers 4 and 5, vLLM and converters read. Transformers
5 stacks the experts in memory, and nothing else reads files with its stacked names.

A mixture computes what its experts compute only if its config.json says everything that theirs leave to a default,
since the mixture's defaults are others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from expert_merging.errors import InputError

PARTS = ("gate", "down", "up")
# Code that is not the mixture's, and what training alone asked for.
_STALE = ("auto_map", "pretraining_tp")
_SHARED = r"(model\.embed_tokens|model\.norm|lm_head|model\.layers\.\d+\.(input_layernorm|post_attention_layernorm))"
_IN_LAYER = r"model\.layers\.\d+\.self_attn\."


@dataclass(frozen=True)
class Names:
    """What a mixture's tensors are called, and what its config.json says how many experts there are by.

    Args:
        block: name of what takes the place of a layer's ``mlp``.
        parts: names of an expert's matrices, by `PARTS`.
        count: the setting with the number of experts.
        usual_per_token: how many of them work on a token where ``num_experts_per_tok`` does not say it.
    """

    block: str
    parts: Mapping[str, str]
    count: str = field(default="num_experts", kw_only=True)
    usual_per_token: int = field(default=8, kw_only=True)

    def expert(self, layer: int, number: int, part: str) -> str:
        """Name of an expert's matrix."""
        return f"model.layers.{layer}.{self.block}.experts.{number}.{self.parts[part]}.weight"

    def router(self, layer: int) -> str:
        """Name of a layer's router, ``(experts, hidden size)``."""
        return f"model.layers.{layer}.{self.block}.gate.weight"


@dataclass(frozen=True)
class Layout(Names):
    """How a mixture of models of one kind is stored.

    Args:
        title: what it is called.
        model_type: transformers' name of it.
        architecture: transformers' class.
        homes: pattern of the other tensors that it has a place for.
        implied: what the dense config.json means that does not say it, where the mixture's would mean something else.
        replaced: what is said there and must be said otherwise here.
        stale: settings that it does not have.
        said: what its config.json says of experts, given their number, how many work on a token, and the columns of
            their matrices.
        settle: changes what takes more than a table, and refuses what the mixture cannot compute.
        has_shared_expert: every layer has one more expert, which works on all tokens.
    """

    title: str
    model_type: str
    architecture: str
    homes: re.Pattern[str]
    implied: Mapping[str, Any]
    said: Callable[[int, int, int], Mapping[str, Any]]
    replaced: Mapping[str, Any] = field(default_factory=dict)
    stale: tuple[str, ...] = ()
    settle: Callable[[dict[str, Any]], None] = lambda _: None
    has_shared_expert: bool = False

    def shared_expert(self, layer: int, part: str) -> str:
        """Name of a matrix of the expert that works on all tokens."""
        return f"model.layers.{layer}.{self.block}.shared_expert.{self.parts[part]}.weight"

    def shared_gate(self, layer: int) -> str:
        """Name of that expert's gate, ``(1, hidden size)``."""
        return f"model.layers.{layer}.{self.block}.shared_expert_gate.weight"

    def config(
        self, dense: Mapping[str, Any], *, experts: int, per_token: int, shared_columns: int = 0
    ) -> dict[str, Any]:
        """``config.json`` of the mixture, from that of a dense model.

        Args:
            dense: the model's.
            experts: how many experts the mixture has.
            per_token: how many of them work on each token.
            shared_columns: columns of the shared expert's last matrix.

        Raises:
            InputError: it says something that the mixture cannot compute.
        """
        stale = {*_STALE, *self.stale}
        config = {**self.implied, **{name: value for name, value in dense.items() if name not in stale}}
        config |= self.replaced
        if config.get("num_key_value_heads", 0) is None:  # which mixtures do not understand
            config["num_key_value_heads"] = config.get("num_attention_heads", 32)
        # Transformers 5 writes it in a table that older readers do not look into.
        table = config.get("rope_parameters")
        if isinstance(table, Mapping) and "rope_theta" in table:
            config["rope_theta"] = table["rope_theta"]
        config |= {"architectures": [self.architecture], "model_type": self.model_type, "output_router_logits": False}
        config |= {"router_aux_loss_coef": 0.001, **self.said(experts, per_token, shared_columns)}
        self.settle(config)
        return dict(sorted(config.items()))


def _of_mixtral(experts: int, per_token: int, _shared: int) -> dict[str, Any]:
    return {"num_local_experts": experts, "num_experts_per_tok": per_token, "router_jitter_noise": 0.0}


def _of_qwen(experts: int, per_token: int, _shared: int) -> dict[str, Any]:
    # Without norm_topk_prob the weights of a token's experts would not sum to one.
    own = {"num_experts": experts, "num_experts_per_tok": per_token, "norm_topk_prob": True}
    return {**own, "decoder_sparse_step": 1, "mlp_only_layers": []}


def _of_qwen2(experts: int, per_token: int, shared: int) -> dict[str, Any]:
    return {**_of_qwen(experts, per_token, shared), "shared_expert_intermediate_size": shared}


def _settle_qwen2(config: dict[str, Any]) -> None:
    """Width of the experts; which layers have a window, where Qwen2-MoE would choose others than Qwen2."""
    config["moe_intermediate_size"] = config["intermediate_size"]
    if config["use_sliding_window"] and not config.get("layer_types"):
        kinds = ("full_attention", "sliding_attention")
        first, layers = _count(config, "max_window_layers"), _count(config, "num_hidden_layers")
        config["layer_types"] = [kinds[layer >= first] for layer in range(layers)]


def _settle_qwen3(config: dict[str, Any]) -> None:
    """Width of the experts; a window, which Qwen3-MoE has in all layers or in none.

    Raises:
        InputError: some layers alone have one.
    """
    config["moe_intermediate_size"] = config["intermediate_size"]
    layers, given = _count(config, "num_hidden_layers"), config.pop("layer_types", None)
    full = _count(config, "max_window_layers")
    with_window = given.count("sliding_attention") if isinstance(given, list) else max(0, layers - full)
    if config["use_sliding_window"] and config["sliding_window"] is not None and with_window not in (0, layers):
        raise InputError(
            f"{with_window} of {layers} layers attend to a window of {config['sliding_window']} tokens, and in a "
            "Qwen3-MoE all do or none; give a base whose config.json has use_sliding_window false"
        )
    config["use_sliding_window"] = bool(config["use_sliding_window"] and with_window)
    del config["max_window_layers"]


def _count(config: Mapping[str, Any], name: str) -> int:
    value = config[name]
    if type(value) is not int or value < 0:
        raise InputError(f"config.json of the base has the {name} {value!r}, which is no number of layers; correct it")
    return value


_mixtral = partial(
    Layout,
    title="Mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    block="block_sparse_moe",
    parts={"gate": "w1", "down": "w2", "up": "w3"},
    count="num_local_experts",
    usual_per_token=2,
    homes=re.compile(rf"({_SHARED}|{_IN_LAYER}[qkvo]_proj)\.weight"),
    said=_of_mixtral,
    stale=("attention_bias", "mlp_bias"),
)
_IN_MLP = Names("mlp", {part: f"{part}_proj" for part in PARTS})
_qwen = partial(Layout, block=_IN_MLP.block, parts=_IN_MLP.parts)
_QWEN_IMPLIED = {
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}

# By the model_type of the dense model.
LAYOUTS: Mapping[str, Layout] = {
    "mistral": _mixtral(
        implied={"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "sliding_window": 4096},
    ),
    "llama": _mixtral(
        implied={
            "intermediate_size": 11_008,
            "max_position_embeddings": 2048,
            "num_key_value_heads": None,  # as many as attention heads
            "rms_norm_eps": 1e-6,
            "rope_theta": 10_000.0,
        },
        replaced={"sliding_window": None},  # Llama takes no notice of it
    ),
    "qwen2": _qwen(
        title="Qwen2-MoE",
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        usual_per_token=4,
        homes=re.compile(rf"({_SHARED}|{_IN_LAYER}[qkvo]_proj)\.weight|{_IN_LAYER}[qkv]_proj\.bias"),
        implied=_QWEN_IMPLIED,
        said=_of_qwen2,
        settle=_settle_qwen2,
        has_shared_expert=True,
    ),
    "qwen3": _qwen(
        title="Qwen3-MoE",
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        homes=re.compile(rf"({_SHARED}|{_IN_LAYER}([qkvo]_proj|[qk]_norm))\.weight|{_IN_LAYER}[qkvo]_proj\.bias"),
        implied={**_QWEN_IMPLIED, "head_dim": 128},
        said=_of_qwen,
        settle=_settle_qwen3,
    ),
}

# How mixtures are stored whose routers are linear with a softmax, by their own model_type.
MIXTURES: Mapping[str, Names] = {**{layout.model_type: layout for layout in LAYOUTS.values()}, "olmoe": _IN_MLP}


def layout_of(folder: object, model_type: str) -> Layout:
    """How a mixture of such models is stored.

    Args:
        folder: the base's, for the message.
        model_type: the base's.

    Raises:
        InputError: there is no mixture of such models.
    """
    if model_type in LAYOUTS:
        return LAYOUTS[model_type]
    known = ", ".join(f"{kind} ({layout.title})" for kind, layout in LAYOUTS.items())
    raise InputError(
        f"{folder} has the model_type {model_type!r}, and transformers has no class for a mixture of such models; "
        f"there are classes for {known}"
    )
