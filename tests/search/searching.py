"""What tests of searches do to them and ask of them: a record, a score by plain means, and an interruption."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from expert_merging.search.score import Scorer
from tests.checkpoints import BASE, EXPERTS
from tests.command import contents


def evaluations_of(run):
    return json.loads(run.evaluations.read_text(encoding="utf-8"))


def divergences_plainly(folder, cache, data):
    """Mean KL(expert || model) over all tokens, by task, with whole logits."""
    tokenizer = AutoTokenizer.from_pretrained(cache / BASE)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = {}
    for task, place in EXPERTS.items():
        expert = AutoModelForCausalLM.from_pretrained(cache / place, dtype=torch.float32)
        values = []
        for entry in json.loads((data / f"{task}.json").read_text()):
            prompt = tokenizer(entry["question"])["input_ids"]
            response = tokenizer(entry["response"], add_special_tokens=False)["input_ids"]
            tokens = torch.tensor([[*prompt, *response, tokenizer.eos_token_id]])
            with torch.no_grad():
                wanted, given = (functional.log_softmax(net(tokens).logits[0], -1) for net in (expert, model))
            values.append((wanted.exp() * (wanted - given)).sum(-1).mean())
        found[task] = torch.stack(values).mean().item()
    return found


def score_plainly(folder, cache, data):
    base, own = (divergences_plainly(place, cache, data) for place in (cache / BASE, folder))
    return sum(own[task] / base[task] for task in base) / len(base)


class KilledError(Exception):
    pass


def killed(*_: object) -> NoReturn:
    raise KilledError


def killed_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[Any]:
    """Kill the search at the scoring of that number, 1 for the first; all coefficients that were to be scored."""
    score, asked = Scorer.score, list[Any]()

    def score_or_die(scorer, coefficients):
        asked.append(coefficients)
        return killed() if len(asked) == number else score(scorer, coefficients)

    monkeypatch.setattr(Scorer, "score", score_or_die)
    return asked


def check_same(run, whole):
    """Check that two runs have left the same bytes; cards tell their names."""
    assert run.evaluations.read_bytes() == whole.evaluations.read_bytes()
    assert run.coefficients.read_bytes() == whole.coefficients.read_bytes()
    first, second = (contents(one.model) for one in (run, whole))
    assert first.pop("README.md")
    assert second.pop("README.md")
    assert first == second
