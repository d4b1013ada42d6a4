"""Samples that go through a model together give what each gives alone."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from expert_merging.plan import make_plan
from expert_merging.progress import no_progress
from expert_merging.questions.calibration import Sample
from expert_merging.running.batches import fitting_tokens, kept_bytes, pack, together
from expert_merging.running.generating import generate
from expert_merging.running.objectives import alignment, answer_likelihood, prediction_entropy
from expert_merging.running.targets import TargetMaker
from InternVL.backbone import BACKBONE as INTERNVL
from Mistral.backbone import BACKBONE as MISTRAL
from Qwen2VL.backbone import BACKBONE as QWEN2VL
from tests import checkpoints, internvl, qwen2vl

CPU = torch.device("cpu")
# Every token of prompt and response, and hidden states of the last layer too, where padding would show first.
LAYERS = (0, 2)


def test_items_of_like_length_are_put_together():
    lengths = [10, 3, 9, 8, 10, 2, 2]

    def packed(tokens, most=None):
        return [
            [lengths[item] for item in batch] for batch in pack(range(len(lengths)), lengths.__getitem__, tokens, most)
        ]

    assert packed(1) == [[length] for length in sorted(lengths, reverse=True)]
    assert packed(1000) == [[10, 10, 9, 8], [3, 2, 2]]
    assert packed(20) == [[10, 10], [9, 8], [3, 2, 2]]
    assert packed(1000, most=3) == [[10, 10, 9], [8], [3, 2, 2]]
    assert pack([], len, 5) == []
    assert sorted(item for batch in pack(range(7), lengths.__getitem__, 20) for item in batch) == list(range(7))


def test_inputs_are_padded_and_pictures_follow_one_another():
    picture = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    text = {"input_ids": torch.tensor([[8, 9]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    picture |= {"mm_token_type_ids": torch.tensor([[0, 1, 0]]), "pixel_values": torch.zeros(2, 3)}
    found = together([text, picture, {**picture, "pixel_values": torch.ones(1, 3)}], padding=4)
    assert found["input_ids"].tolist() == [[8, 9, 4], [5, 6, 7], [5, 6, 7]]
    assert found["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert found["mm_token_type_ids"].tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 0]]
    assert found["pixel_values"].tolist() == [[0] * 3, [0] * 3, [1] * 3]
    left = together([text, picture], padding=4, side="left")
    assert left["input_ids"].tolist() == [[4, 8, 9], [5, 6, 7]]
    assert left["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


def test_as_many_tokens_as_a_tenth_of_the_memory_holds(monkeypatch):
    config = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    token = 32 * kept_bytes(config, 2)
    for size in (16, 80):
        monkeypatch.setattr("expert_merging.running.batches.memory_of", lambda _, size=size: size * 2**30)
        tokens = fitting_tokens(config, 2, CPU)
        assert tokens * token <= 0.1 * size * 2**30 < (tokens + 1) * token
    monkeypatch.setattr("expert_merging.running.batches.memory_of", lambda _: 2**41)
    assert fitting_tokens(config, 2, CPU) == 2048
    assert fitting_tokens({}, 2, CPU) == 2048


ZOOS = {"mistral": (MISTRAL, checkpoints), "internvl": (INTERNVL, internvl), "qwen2vl": (QWEN2VL, qwen2vl)}


@pytest.fixture(scope="module", params=ZOOS)
def asked(request, tmp_path_factory):
    """How two experts of a family are asked, and short and long samples, with and without pictures."""
    backbone, files = ZOOS[request.param]
    cache = files.make_zoo(tmp_path_factory.mktemp(request.param))
    experts = {name: cache / folder for name, folder in list(files.EXPERTS.items())[:2]}
    plan = make_plan(cache / files.BASE, experts, list(backbone.exclude_params), backbone.file_name)
    pictures = sorted((cache / "dataset").rglob("*.png"))[:2]
    seen = [(), tuple(pictures[:1]), (), tuple(pictures[1:]), (), tuple(pictures)]
    names = [*experts] * 3
    samples = [
        Sample(name, name, "ab" * (3 + number), "yes" * (1 + number % 3), str(number), images)
        for number, (name, images) in enumerate(zip(names, seen, strict=True))
    ]
    maker = TargetMaker(
        backbone=backbone,
        plan=plan,
        layers=LAYERS,
        response_only=False,
        max_new_tokens=1,
        prompt_template="{question}" if backbone is MISTRAL else None,
        dtype=torch.float32,
        device=CPU,
        responses=cache / "responses.json",
        progress=no_progress,
    )
    return maker, samples


def test_an_expert_answers_questions_together_as_it_answers_each(asked):
    maker, samples = asked
    open_ones = [replace(sample, response=None, identity=f"open {sample.identity}") for sample in samples]
    longer = replace(maker, max_new_tokens=12, response_only=True)
    answers = []
    for tokens in (1, 10**6):
        kept = maker.responses.with_name(f"answers{tokens}.json")
        answers.append(
            [target.sample for target in replace(longer, batch_tokens=tokens, responses=kept).make(open_ones)]
        )
    assert answers[0] == answers[1]
    assert all(answer.tokens and len(answer.tokens) <= 12 for answer in answers[0])


def test_an_answer_ends_where_it_ends_also_where_others_go_on():
    class Model:
        generation_config = SimpleNamespace(eos_token_id=1)

        def generate(self, input_ids, **_):
            written = torch.tensor([[7, 1, 0, 0], [8, 8, 9, 1], [5, 5, 5, 5]])
            return torch.cat([input_ids, written], dim=1)

    class Tokenizer:
        all_special_ids, pad_token_id, eos_token_id = (0, 1), 0, 1

        def decode(self, tokens, skip_special_tokens):
            return "".join(map(str, tokens))

    prompts = [{"input_ids": torch.tensor([[2] * length])} for length in (3, 5, 4)]
    found = generate(Model(), Tokenizer(), prompts, 4)
    assert found == [("71", [7, 1]), ("8891", [8, 8, 9, 1]), ("5555", [5, 5, 5, 5])]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_an_expert_says_of_samples_together_what_it_says_of_each(asked):
    maker, samples = asked
    for own, alone in zip(replace(maker, batch_tokens=10**6).make(samples), maker.make(samples), strict=True):
        assert own.sample == alone.sample
        close((own.last_hidden, *own.layers), (alone.last_hidden, *alone.layers))


def test_losses_and_gradients_of_samples_together_are_those_of_each(asked):
    maker, samples = asked
    targets = maker.make(samples)
    model = maker.backbone.load_model(maker.plan.base.folder, torch.float32)
    weights = {maker.backbone.file_name(name): weight for name, weight in model.named_parameters()}
    merged = [weights[maker.backbone.file_name(name)] for name in maker.plan.merged]
    aligned = alignment(LAYERS, temperature=2.0, logits_weight=1.0, hidden_states_weight=0.5)
    for objective in (aligned, prediction_entropy(), answer_likelihood()):
        losses = objective.losses(model, targets)
        alone = torch.cat([objective.losses(model, [target]) for target in targets])
        close(losses, alone)
        found, wanted = (
            torch.autograd.grad(some.sum(), merged, allow_unused=True, retain_graph=True) for some in (losses, alone)
        )
        assert sum(gradient is not None for gradient in wanted) > len(merged) / 2
        for own, other in zip(found, wanted, strict=True):
            assert (own is None) == (other is None)
            if own is not None and other is not None:
                torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
        with torch.no_grad():
            measured = [list(replace(objective, batch_tokens=size).measure(model, targets)) for size in (1, 100, 10**6)]
        for found in measured:
            close(torch.tensor(found), alone.detach())
