"""Perplexities against single forward passes, which tokens count, and the weights made of them."""

from __future__ import annotations

import math
from collections import ChainMap

import pytest
import torch

from expert_merging.errors import InputError
from expert_merging.questions.calibration import Sample
from expert_merging.questions.formats import Format
from expert_merging.routing.perplexity import Frame, mixing_weights, perplexities
from Mistral.backbone import BACKBONE
from tests.checkpoints import BASE

TEXTS = ["seven", "a much longer question than the others", "12 + 7", "why", "x0Z"]


def frame(processor, words, *, by_bytes=False):
    def encode(sample):
        return BACKBONE.encode_prompt(processor, sample, Format("given", words))

    return Frame(encode, frozenset(processor.all_special_ids), by_bytes)


def plain(model, processor, before, text, after, size):
    """``exp(-1/t sum log p)`` over the question's own tokens, one after the other."""
    tokens = processor(f"{before}{text}{after}")["input_ids"]
    start = len(processor(before)["input_ids"])
    with torch.no_grad():
        logarithms = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    loss = 0.0
    for number in range(start, start + len(text)):
        loss -= float(logarithms[number - 1, tokens[number]])
    return math.exp(loss / size)


@pytest.mark.parametrize(("before", "after"), [("", ""), ("Ask: ", "="), ("0", "Z")])
@pytest.mark.parametrize("tokens", [1, 4096])
def test_perplexity_is_that_of_the_question_alone(model, processor, before, after, tokens):
    asked = frame(processor, f"{before}{{question}}{after}").asked([Sample.test(text) for text in TEXTS])
    found = ChainMap(*perplexities(model, asked, tokens))
    expected = [plain(model, processor, before, text, after, len(text)) for text in TEXTS]
    assert [found[number] for number in range(len(TEXTS))] == pytest.approx(expected, rel=1e-4)


def test_perplexity_of_bytes_does_not_depend_on_the_number_of_tokens(model, processor):
    asked = frame(processor, "{question}", by_bytes=True).asked([Sample.test("so é")])
    ((found,),) = (batch.values() for batch in perplexities(model, asked))
    assert asked[0].size == 5, "four characters, and five bytes"
    assert len(asked[0].positions) == 3, "one is unknown to the tokenizer, and its token is special"
    tokens = processor("so é")["input_ids"]
    with torch.no_grad():
        logarithms = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    loss = -sum(float(logarithms[number - 1, tokens[number]]) for number in (1, 2, 3))
    assert found == pytest.approx(math.exp(loss / 5), rel=1e-4)


def test_special_tokens_do_not_count_nor_does_what_nothing_comes_before():
    """As pictures are, whose tokens stand inside the question."""

    def encode(sample):
        tokens = {"0": [5, 8], "Z": [6, 8], "cat?": [7, 1, 1, 9, 8]}[sample.question]
        return {"input_ids": torch.tensor([tokens])}

    (asked,) = Frame(encode, frozenset({1})).asked([Sample.test("cat?")])
    assert asked.positions.tolist() == [3]
    assert asked.size == 1


def test_a_question_without_perplexity_is_refused():
    def encode(sample):
        return {"input_ids": torch.tensor([[{"0": 5, "Z": 6, "a": 7}[sample.question]]])}

    with pytest.raises(InputError) as error:
        Frame(encode, frozenset()).asked([Sample.test("a")])
    assert str(error.value) == (
        'the question "a": no token of the question comes after another, so that it has no perplexity; give a longer '
        "one, or --prompt_template with a word before {question}"
    )


def test_an_expert_that_computes_nan_is_refused(tiny_zoo, processor):
    model = BACKBONE.load_model(tiny_zoo / BASE, torch.float32)
    model.model.norm.weight.data.fill_(math.nan)
    asked = frame(processor, "{question}").asked([Sample.test("why")])
    with pytest.raises(InputError) as error:
        list(perplexities(model, asked))
    assert str(error.value) == "the expert computes NaN; its weights are damaged, or not those of config.json"


def test_a_perplexity_beyond_all_numbers_is_still_one(tiny_zoo, processor):
    model = BACKBONE.load_model(tiny_zoo / BASE, torch.float32)
    model.model.norm.weight.data.mul_(1e6)
    asked = frame(processor, "{question}").asked([Sample.test("why")])
    assert math.isfinite(ChainMap(*perplexities(model, asked))[0])


def test_weights_are_a_softmax_of_inverse_perplexities():
    perplexity = torch.tensor([[2.0, 4.0], [10.0, 4.0], [50.0, 1.0]])
    exact = torch.exp(1 / perplexity[:2, 0].double())
    weights = mixing_weights(perplexity, 2, 1.0)
    torch.testing.assert_close(weights[:, 0], torch.cat([exact / exact.sum(), torch.zeros(1)]))
    assert weights[0, 0] == pytest.approx(0.599, abs=1e-3), "as MergeME's are"
    assert weights[:, 1].nonzero()[:, 0].tolist() == [0, 2], "of equal ones the first"
    assert mixing_weights(perplexity, 1, 1.0)[:, 1].tolist() == [0, 0, 1]
    torch.testing.assert_close(mixing_weights(perplexity, 3, 1.0).sum(0), torch.ones(2, dtype=torch.float64))


def test_a_low_temperature_lets_the_best_count_alone():
    perplexity = torch.tensor([[2.0], [10.0]])
    assert mixing_weights(perplexity, 2, 0.01)[0, 0] > 0.999
    assert mixing_weights(perplexity, 2, 100.0)[0, 0] == pytest.approx(0.5, abs=2e-3)
