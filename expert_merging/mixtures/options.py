"""The options of mixtures of experts; read by the command line before torch is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from expert_merging.flags import BelowOne, Count, NotNegative, Positive
from expert_merging.mixtures.tensors import Mixture
from expert_merging.plan import Plan
from expert_merging.running.options import SampleOptions

# Routers that are made of samples, and those of them for which models run.
OF_SAMPLES = ("ridge", "task_vectors", "prompts", "embedding")
OF_STATES = ("ridge", "task_vectors", "prompts")
# Those that are fitted by least squares.
FITTED = ("ridge", "task_vectors")
DESCRIBED = {
    "random": "Routers are random numbers: train them before anything is expected of the model.",
    "zeros": "Routers are zero: all experts have the same share in every token.",
    "ridge": "Routers are fitted by least squares to which expert a calibration sample is of.",
    "task_vectors": "Routers are fitted by least squares to which expert's task vector the gradient of a calibration "
    "sample asks for.",
    "prompts": "Routers are directions of the hidden states of each expert's calibration samples.",
    "embedding": "Routers are directions of the embeddings of each expert's calibration samples.",
}
_TRAINED = "They were then trained against the experts' own predictions."
# What a router's logits are divided by.
_TEMPERATURES = {"ridge": 0.1, "task_vectors": 0.1, "prompts": 1.0, "embedding": 1.0}


@dataclass(frozen=True, kw_only=True)
class MixtureOptions(SampleOptions):
    """Options of mixtures.

    Args:
        router: what chooses a token's experts, of samples, least squares to whose samples they are (ridge) or to whose
            task vector is likest to the gradient of the base's loss on them (task_vectors), directions of hidden states
            (prompts) or of embeddings (embedding); random numbers, to be trained; or zeros, which mix all experts
            alike. auto is ridge where --data_dir is given, and random elsewhere.
        router_temperature: what the logits of a router that is made of samples are divided by; the lower, the more the
            best expert counts.
        ridge: how strongly the least squares are pulled towards zero, as a share of the mean square of the inputs.
        negative_prompts: what is subtracted from directions, the mean of the others' samples, none, or that of samples
            that an expert is not for, from a folder of EXPERT.json as --data_dir is one.
        held_out: share of each task's samples that no router is made of, and on which the load of experts is measured;
            none for embedding, with which no model runs.
        shared: closed form that merges everything but feed-forward layers, with options that differ from its defaults,
            such as 'ties density=0.2'.
        shared_expert: what works on all tokens in a mixture that has a place for it (Qwen2-MoE); none adds nothing, and
            base adds a half of the base's feed-forward layers, to be trained.
        experts_per_token: how many experts work on each token.
        include_base: the base's feed-forward layers are one more expert, the last one.
        train_router: train the routers, however they were made, on the samples against the experts' own predictions;
            nothing else of the mixture changes.
        router_epochs: how often training goes through the samples; the routers are taken that are best on what
            --held_out leaves out, those before training included.
        router_learning_rate: AdamW's, for training.
        router_balance: weight of the load-balancing loss while training; 0 lets experts idle.
    """

    router: Literal["auto", "ridge", "task_vectors", "prompts", "embedding", "random", "zeros"] = "auto"
    router_temperature: Positive | None = None
    ridge: Positive = 0.01
    negative_prompts: str = "others"
    held_out: BelowOne = 0.2
    shared: str = "weight_average"
    shared_expert: Literal["none", "base"] = "none"
    experts_per_token: Count = 2
    include_base: bool = False
    train_router: bool = False
    router_epochs: Count = 10
    router_learning_rate: Positive = 0.01
    router_balance: NotNegative = 0.01

    @property
    def kind(self) -> str:
        """What routers are."""
        return router_of(vars(self))

    @property
    def described(self) -> str:
        """What the routers are, as sentences."""
        if not self.train_router:
            return DESCRIBED[self.kind]
        begun = "Routers began as random numbers." if self.kind == "random" else DESCRIBED[self.kind]
        return f"{begun} {_TRAINED}"

    @property
    def temperature(self) -> float:
        """What logits are divided by."""
        return self.router_temperature or _TEMPERATURES[self.kind]

    @property
    def negatives(self) -> str | None:
        """Folder of the samples that experts are not for, if there is one."""
        return None if self.negative_prompts in ("others", "none") or self.kind in FITTED else self.negative_prompts

    def members(self, plan: Plan) -> dict[str, str | None]:
        """The mixture's experts."""
        members: dict[str, str | None] = {name: name for name in plan.experts}
        return {**members, "base": None} if self.include_base else members

    def mixture(self, plan: Plan) -> Mixture:
        """What is made of these checkpoints.

        Raises:
            InputError: there is no mixture of them.
        """
        with_shared = self.shared_expert == "base"
        return Mixture.of(plan, self.members(plan), self.experts_per_token, shared_expert=with_shared)


def router_of(options: Mapping[str, Any]) -> str:
    """What routers are with these options."""
    if options["router"] == "auto":
        return "random" if options["data_dir"] is None else "ridge"
    return str(options["router"])


def reads_samples(options: Mapping[str, Any]) -> bool:
    """Whether routers are made of samples, or trained on some, with these options."""
    return bool(options.get("train_router")) or router_of(options) in OF_SAMPLES
