"""Models that write together, against a plain loop without caches, threads and batches."""

from __future__ import annotations

import pytest
import torch

from expert_merging.questions.calibration import Sample
from expert_merging.questions.formats import Format
from expert_merging.routing.lockstep import Writer, mixed, write_together
from expert_merging.running.generating import generate
from Mistral.backbone import BACKBONE
from tests.checkpoints import EXPERTS

TEXTS = ["seven", "a much longer question than the others", "12 + 7", "why"]
WORDS = {"Chat": "{question}=", "Math": "Problem: {question}\n", "Code": "### {question}"}
COUNT = 7


@pytest.fixture(scope="module")
def models(tiny_zoo):
    return {name: BACKBONE.load_model(tiny_zoo / folder, torch.float32) for name, folder in EXPERTS.items()}


def prompt(processor, name, text):
    return BACKBONE.encode_prompt(processor, Sample.test(text), Format("given", WORDS[name]))


def writers(models, processor, names):
    return [Writer(models[name], processor, [prompt(processor, name, text) for text in TEXTS]) for name in names]


def plain(models, processor, text, weights, stops):
    """The likeliest token of ``sum_i alpha_i p_i``, again and again, each model over its whole text every time."""
    written = []
    while len(written) < COUNT and not stops & {*written}:
        mixture = 0.0
        for name, weight in weights.items():
            tokens = prompt(processor, name, text)["input_ids"][0].tolist() + written
            with torch.no_grad():
                mixture += weight * models[name](torch.tensor([tokens])).logits[0, -1].double().softmax(-1)
        written.append(int(mixture.argmax()))
    return processor.decode(written, skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize("names", [["Chat", "Math"], ["Math", "Chat"], ["Chat", "Math", "Code"]])
def test_several_write_what_their_mixture_says(models, processor, names):
    weights = torch.rand(len(names), len(TEXTS), generator=torch.Generator().manual_seed(3)).double()
    weights /= weights.sum(0)
    found = write_together(writers(models, processor, names), weights, COUNT)
    expected = [
        plain(models, processor, text, dict(zip(names, weights[:, number].tolist(), strict=True)), {1})
        for number, text in enumerate(TEXTS)
    ]
    assert found == expected
    alone = [plain(models, processor, text, {names[0]: 1.0}, {1}) for text in TEXTS]
    assert found != alone, "the others count"


@pytest.mark.slow
def test_an_end_of_any_of_them_ends_the_answer(models, processor, monkeypatch):
    weights = torch.full((2, len(TEXTS)), 0.5, dtype=torch.float64)
    free = write_together(writers(models, processor, ["Chat", "Math"]), weights, COUNT)
    (end,) = processor(free[0][2], add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(models["Math"].generation_config, "eos_token_id", [1, end])
    found = write_together(writers(models, processor, ["Chat", "Math"]), weights, COUNT)
    both = {"Chat": 0.5, "Math": 0.5}
    assert found == [plain(models, processor, text, both, {1, end}) for text in TEXTS]
    assert len(found[0]) <= 3


def test_the_same_model_twice_writes_what_it_writes_alone(models, processor):
    own = models["Chat"]
    prompts = [prompt(processor, "Chat", text) for text in TEXTS]
    weights = torch.tensor([[0.3], [0.7]], dtype=torch.float64).expand(2, len(TEXTS))
    twice = [Writer(own, processor, prompts)] * 2
    assert write_together(twice, weights, COUNT) == [text for text, _ in generate(own, processor, prompts, COUNT)]


@pytest.mark.slow
def test_rows_that_pad_one_vocabulary_are_never_written(models, processor, tiny_zoo):
    wider = BACKBONE.load_model(tiny_zoo / EXPERTS["Math"], torch.float32)
    wider.resize_token_embeddings(wider.config.vocab_size + 3, mean_resizing=False)
    with torch.no_grad():  # which would win
        wider.lm_head.weight[-3:] = 9 * wider.lm_head.weight[:3].abs()
    names, weights = ["Chat", "Math"], torch.full((2, len(TEXTS)), 0.5, dtype=torch.float64)
    expected = write_together(writers(models, processor, names), weights, COUNT)
    for order in (names, names[::-1]):
        assert write_together(writers({**models, "Math": wider}, processor, order), weights, COUNT) == expected


def test_one_that_fails_ends_the_others(models, processor, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(models["Math"], "forward", fail)
    for names in (["Chat", "Math"], ["Math", "Chat"]):
        with pytest.raises(RuntimeError, match="no memory left"):
            write_together(writers(models, processor, names), torch.full((2, len(TEXTS)), 0.5), COUNT)


def test_a_mixture_is_that_of_probabilities():
    probabilities = torch.tensor([[[0.2, 0.8]], [[0.9, 0.1]]])
    weights = torch.tensor([[0.25], [0.75]])
    expected = torch.tensor([[0.25 * 0.2 + 0.75 * 0.9, 0.25 * 0.8 + 0.75 * 0.1]], dtype=torch.float64)
    torch.testing.assert_close(mixed(list(probabilities.log()), weights).exp(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        mixed(list(probabilities.log()), torch.tensor([[0.0], [1.0]])).exp(), probabilities[1].double()
    )
