"""RegMean the plain way: all models in memory, all inputs of a layer at once, and torch's least squares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

# What every question of an expert is answered with.
RESPONSES = {"Chat": "Certainly", "Math": "42", "Code": "def f():"}
# Of an input's mean square, what the pull towards the mean weighs.
RIDGE = 1e-4


def least_squares(given: torch.Tensor, inputs: list[torch.Tensor], ratio: float, ridge: float = RIDGE) -> torch.Tensor:
    """One system of equations for all that the merged matrix should do, solved by torch.

    Each expert's inputs must give the expert's outputs, each of its inputs alone too (what the reduction of entries
    beside the diagonal comes to), and the mean's weakly.
    """
    left, right, mean = [], [], given.double().mean(0)
    total = torch.zeros(given.shape[-1], dtype=torch.float64)
    for weight, vectors in zip(given.double(), inputs, strict=True):
        rows = vectors.double() / len(vectors) ** 0.5
        squares = rows.square().sum(0)
        total += squares
        for weighted in (ratio**0.5 * rows, (1 - ratio) ** 0.5 * torch.diag(squares.sqrt())):
            left.append(weighted)
            right.append(weighted @ (weight - mean).T)
    anchor = ridge**0.5 * torch.diag(total.sqrt())
    equations, outputs = torch.cat([*left, anchor]), torch.cat([*right, torch.zeros(len(anchor), len(mean))])
    return (mean + torch.linalg.lstsq(equations, outputs, driver="gelsd").solution.T).float()


def answered(
    tokenizer: Any, expert: str, response: str, numbers: Iterable[int]
) -> list[tuple[Mapping[str, torch.Tensor], int]]:
    """An expert's questions of `tests.checkpoints.write_tasks` with the response and the turn's end.

    Args:
        tokenizer: makes tokens of them.
        expert: its name.
        response: the answer to every question.
        numbers: of the questions.

    Returns:
        Model inputs, and the number of the prompt's tokens.
    """
    found = []
    for number in numbers:
        prompt = tokenizer(f"{expert} question {number}?")["input_ids"]
        end = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        found.append(({"input_ids": torch.tensor([prompt + end])}, len(prompt)))
    return found


@torch.no_grad()
def inputs_of_layers(
    model: Any, questions: Iterable[tuple[Mapping[str, torch.Tensor], int]], *, response_only: bool = False
) -> dict[str, torch.Tensor]:
    """What goes into each linear layer, ``(tokens, inputs)``, by the name of its weight in memory.

    Args:
        model: one expert.
        questions: model inputs of prompt and response, and the number of the prompt's tokens.
        response_only: the tokens that predict the response alone.
    """
    seen: dict[str, list[torch.Tensor]] = {}
    for inputs, prompt in questions:
        chosen = slice(prompt - 1, -1) if response_only else slice(None)

        def see(name, chosen=chosen):
            return lambda _layer, given: seen.setdefault(name, []).append(given[0].flatten(0, -2)[chosen].clone())

        layers = [(name, part) for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
        hooks = [part.register_forward_pre_hook(see(f"{name}.weight")) for name, part in layers]
        model(**inputs)
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}
