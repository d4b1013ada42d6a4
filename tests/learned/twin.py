"""The plain way to learn coefficients, written for clarity alone: what the trainer must equal.

All experts stay in memory, every forward pass merges all weights again through `functional_call`, logits are whole,
and torch's autograd does the rest.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import torch
from torch.func import functional_call
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class Example:
    expert: str
    task: str
    prompt: str
    response: str


@dataclass
class Twin:
    base: Path
    experts: dict[str, Path]
    merged: list[str]
    initial: list[float]
    layers: list[int]
    scale: list[float] | None = None
    chunks: dict[str, int] = field(default_factory=dict)
    temperature: float = 1.0
    logits_weight: float = 1.0
    hidden_weight: float = 1.0
    regularisation: float = 0.0
    task_weights: dict[str, float] = field(default_factory=dict)
    response_only: bool = False
    learning_rate: float = 0.5
    accumulation: int = 8
    # Where training starts, and what coefficients without a chunk stay at, if not at the initial values.
    first: dict[str, torch.Tensor] | None = None
    # Coefficients per expert that the regularisation counts, if not those that are trained.
    budget: float | None = None
    entropy: bool = False
    # Makes answers likely, with coefficients that are hyperbolic tangents.
    likelihood: bool = False
    signed: bool = False
    density: float | None = None
    sam: float = 0.0
    confident: bool = False
    symmetric: bool = False
    # Coefficients are free instead of a sigmoid's values; those of a matrix are its columns'; they multiply whole
    # weights; and what two experts' of a parameter have in common is held small.
    free: bool = False
    columns: bool = False
    # Those of a matrix are its singular directions', or each direction counts or not, at first so many of them.
    singular: bool = False
    gates: float | None = None
    whole: bool = False
    similarity: float = 0.0
    overlap: float = 0.0

    def load(self, folder: Path) -> torch.nn.Module:
        """A model of the family."""
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def in_memory(self, name: str) -> str:
        """What the model calls the parameter of a name in the base's files."""
        return name

    def inputs(self, example: Example) -> tuple[dict[str, torch.Tensor], int]:
        """Model inputs of prompt, response and end token, and the number of prompt tokens."""
        prompt = self.tokenizer(example.prompt)["input_ids"]
        response = self.tokenizer(example.response, add_special_tokens=False)["input_ids"]
        return {"input_ids": torch.tensor([[*prompt, *response, self.tokenizer.eos_token_id]])}, len(prompt)

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.model = self.load(self.base).eval()
        self.teachers = [self.load(folder).eval() for folder in self.experts.values()]
        self.base_weights = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        scale = self.scale or [1.0] * len(self.teachers)
        self.task_vectors = {
            name: [
                factor
                * (teacher.get_parameter(self.in_memory(name)).detach() - self.base_weights[self.in_memory(name)])
                for factor, teacher in zip(scale, self.teachers, strict=True)
            ]
            for name in self.merged
        }
        if self.density is not None:
            self.trim_like_ties(self.density)
        # One raw coefficient per expert and chunk, each a parameter of its own; 0 chunks: a constant.
        self.raw = {
            name: torch.nn.Parameter(self.first_raw(name)) for name in self.merged if self.chunks.get(name, 1) > 0
        }
        self.start = {
            name: self.value(self.to_raw(torch.tensor(self.initial)))[:, None].expand_as(raw)
            for name, raw in self.raw.items()
        }
        self.optimizer = torch.optim.AdamW(
            list(self.raw.values()), lr=self.learning_rate, weight_decay=1e-5, betas=(0.9, 0.999)
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
            self.optimizer, T_0=50, T_mult=2, eta_min=0.1 * self.learning_rate
        )

    def first_raw(self, name: str) -> torch.Tensor:
        raw = self.to_raw(self.beginning(name))[:, None].repeat(1, self.chunks.get(name, 1))
        if self.gates is None or self.chunks.get(name, 1) == 1:
            return raw
        logits = torch.full_like(raw, -0.1)
        logits[:, : int(self.gates * raw.shape[1])] = 0.1
        return torch.cat([logits, raw[:, :1]], dim=1)

    def to_raw(self, value: torch.Tensor) -> torch.Tensor:
        if self.signed:
            return torch.atanh(value)
        return value.clone() if self.free else torch.logit(value)

    def value(self, raw: torch.Tensor) -> torch.Tensor:
        if self.signed:
            return torch.tanh(raw)
        return raw if self.free else torch.sigmoid(raw)

    def beginning(self, name: str) -> torch.Tensor:
        return torch.tensor(self.initial) if self.first is None else self.first[name]

    def trim_like_ties(self, density: float) -> None:
        """Keep the largest entries of each expert, then those that agree with the sign of their sum."""
        whole = [
            torch.cat([self.task_vectors[name][k].flatten() for name in self.merged]) for k in range(len(self.teachers))
        ]
        kept = [
            torch.where(vector.abs() >= vector.abs().kthvalue(int((1 - density) * len(vector))).values, vector, 0.0)
            for vector in whole
        ]
        signs = torch.stack(kept).sum(0).sign()
        majority = signs.sum().sign()
        signs = torch.where(signs == 0, majority, signs)
        for k, vector in enumerate(kept):
            agreeing = torch.where(vector.sign() == signs, vector, 0.0)
            sizes = [self.task_vectors[name][k].numel() for name in self.merged]
            for name, part in zip(self.merged, agreeing.split(sizes), strict=True):
                self.task_vectors[name][k] = part.view_as(self.task_vectors[name][k])

    def coefficients(self, name: str) -> torch.Tensor:
        if name not in self.raw:
            return self.beginning(name)[:, None]
        raw = self.raw[name]
        if self.gates is None or raw.shape[1] == 1:
            return self.value(raw)
        gates = torch.sigmoid(raw[:, :-1] / 10)
        return (gates + ((gates > 0.5).float() - gates).detach()) * self.value(raw[:, -1:])

    def merged_weights(self) -> dict[str, torch.Tensor]:
        weights = dict(self.base_weights)
        for name in self.merged:
            place = self.in_memory(name)
            base = self.base_weights[place]
            if self.whole:
                weights[place] = torch.zeros_like(base)
            for coefficients, task_vector in zip(self.coefficients(name), self.task_vectors[name], strict=True):
                direction = task_vector + base if self.whole else task_vector
                weights[place] = weights[place] + self.scaled(coefficients, direction)
        return weights

    def scaled(self, coefficients: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        if self.columns and direction.dim() == 2:
            return direction @ torch.diag(coefficients)
        if self.singular and direction.dim() == 2:
            left, values, right = torch.linalg.svd(direction.double(), full_matrices=False)
            return (left @ torch.diag(values * coefficients.double()) @ right).float()
        chunks = torch.chunk(direction.flatten(), len(coefficients))
        assert len(chunks) == len(coefficients)
        scaled = [value * chunk for value, chunk in zip(coefficients, chunks, strict=True)]
        return torch.cat(scaled).view_as(direction)

    def losses(self, example: Example) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, prompt_tokens = self.inputs(example)
        with torch.no_grad():
            teacher = self.teachers[list(self.experts).index(example.expert)](**inputs, output_hidden_states=True)
        student = functional_call(self.model, self.merged_weights(), (), {**inputs, "output_hidden_states": True})
        where = slice(prompt_tokens - 1, -1) if self.response_only else slice(None)
        if self.entropy:
            distribution = torch.distributions.Categorical(logits=student.logits[0, where])
            return distribution.entropy().mean(), torch.zeros(())
        if self.likelihood:
            words = inputs["input_ids"][0, prompt_tokens if self.response_only else 1 :]
            logits = student.logits[0, prompt_tokens - 1 if self.response_only else 0 : -1]
            return functional.cross_entropy(logits, words), torch.zeros(())
        soft_targets = functional.softmax(teacher.logits[0, where] / self.temperature, dim=-1)
        log_student = functional.log_softmax(student.logits[0, where] / self.temperature, dim=-1)
        kl = (soft_targets * (soft_targets.log() - log_student)).sum(-1)
        if self.symmetric:
            middle = (soft_targets + log_student.exp()).div(2).log()
            kl = (soft_targets * (soft_targets.log() - middle)).sum(-1)
            kl = (kl + (log_student.exp() * (log_student - middle)).sum(-1)) / 2
        if self.confident:
            sure, own = soft_targets.max(-1), log_student.exp().max(-1)
            kl = kl * ((sure.indices == own.indices) | (sure.values >= own.values))
        kl = kl.mean() * self.temperature**2
        hidden = torch.zeros(())
        for layer in self.layers:
            difference = student.hidden_states[layer][0, where] - teacher.hidden_states[layer][0, where]
            hidden = hidden + (difference**2).mean() / len(self.layers)
        return self.logits_weight * kl, self.hidden_weight * hidden

    def penalty(self) -> torch.Tensor:
        distance = sum((self.value(raw) - self.start[name]).abs().sum() for name, raw in self.raw.items())
        count = self.budget or sum(raw.numel() for raw in self.raw.values()) / len(self.experts)
        return self.regularisation * distance / count + self.shared_by_pairs()

    def shared_by_pairs(self) -> torch.Tensor:
        total = torch.zeros(())
        for raw in self.raw.values() if self.similarity or self.overlap else ():
            pairs = list(combinations(self.value(raw), 2))
            for one, other in pairs:
                cosine = one @ other / (one.norm() * other.norm())
                smaller = torch.min(one.abs(), other.abs()).sum()
                total = total + (self.similarity * cosine + self.overlap * smaller) / len(pairs)
        return total

    def backward(self, group: list[Example]) -> None:
        """Gradients of a group's losses."""
        self.optimizer.zero_grad()
        for example in group:
            kl, hidden = self.losses(example)
            weight = self.task_weights.get(example.task, 1.0)
            ((weight * (kl + hidden) + self.penalty()) / self.accumulation).backward()

    def update(self, group: list[Example]) -> dict[str, torch.Tensor]:
        """One optimizer step; the gradient of every raw coefficient before clipping."""
        self.backward(group)
        if self.sam:
            before = {name: raw.detach().clone() for name, raw in self.raw.items()}
            norm = sum((raw.grad**2).sum() for raw in self.raw.values()).sqrt()
            with torch.no_grad():
                for raw in self.raw.values():
                    raw += self.sam * raw.grad / norm
            self.backward(group)
            with torch.no_grad():
                for name, raw in self.raw.items():
                    raw.copy_(before[name])
        gradients = {name: raw.grad.clone() for name, raw in self.raw.items()}
        torch.nn.utils.clip_grad_norm_(list(self.raw.values()), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        return gradients

    def train(self, examples: list[Example], epochs: int, seed: int) -> None:
        for epoch in range(epochs):
            own: dict[str, list[Example]] = {}
            for example in examples:
                own.setdefault(example.expert, []).append(example)
            longest = max(map(len, own.values()))
            order = [group[turn % len(group)] for turn in range(longest) for group in own.values()]
            random.Random(f"{seed}/{epoch}").shuffle(order)
            for first in range(0, len(order), self.accumulation):
                self.update(order[first : first + self.accumulation])
