"""What a model answers, against what it writes and what its own forward pass gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expert_merging.asking import Formats
from expert_merging.questions.calibration import Sample
from expert_merging.questions.formats import Format
from expert_merging.questions.labelled import Question
from expert_merging.running.answers import Asker, Row, final_logits, likelihoods
from expert_merging.running.generating import generate
from expert_merging.running.scores import score_by_task
from Mistral.backbone import BACKBONE

FORMAT = Format("given", "{question}=")
TEXTS = ["seven", "a much longer question than the others", "12 + 7", "why", "x"]


@pytest.fixture
def asker(processor):
    return Asker(BACKBONE, processor, Formats(FORMAT), max_new_tokens=6)


def sample(text: str) -> Sample:
    return Sample("Math", "Math", text, None, "0")


def written(model, processor, text: str, count: int) -> str:
    prompt = BACKBONE.encode_prompt(processor, sample(text), FORMAT)
    ((answer, _),) = generate(model, processor, [prompt], count)
    return answer


def test_an_exact_answer_is_what_the_model_writes(model, processor, asker, monkeypatch):
    """Where the model ends after three tokens, each question has an answer of its own, seen in one pass or written."""
    tokens = {text: written(model, processor, text, 4) for text in TEXTS}
    assert len(set(tokens.values())) > 2
    last = [processor(text[3:4], add_special_tokens=False)["input_ids"] for text in tokens.values()]
    monkeypatch.setattr(model.generation_config, "eos_token_id", sorted({one for ids in last for one in ids}))
    answers = {text: written(model, processor, text, 6) for text in TEXTS}
    right = [
        Question(sample(text), ("no", answer), "exact_match") for text, answer in answers.items() if answer.strip()
    ]
    wrong = [replace(question, answers=("no", question.answers[1] + "z")) for question in right]
    padded = [replace(question, answers=(f" {question.answers[1].strip()}\n",)) for question in right]
    questions = [*right, *wrong, *padded]
    found = list(asker.answer(model, questions))
    assert right
    assert [one.points for one in found] == [1.0] * len(right) + [0.0] * len(right) + [1.0] * len(right)
    assert [one.text.strip() for one in found[len(right) :]] == [question.answers[1].strip() for question in right] * 2
    assert score_by_task(asker, model, questions) == {"Math": {"accuracy": pytest.approx(200 / 3)}}


def test_what_has_begun_wrongly_is_not_written_where_only_points_count(model, processor, asker, monkeypatch):
    """Points are the same as those of answers written in full."""
    answers = {text: written(model, processor, text, 12) for text in TEXTS}
    wishes = {
        *answers.values(),
        *(f"{answer}z" for answer in answers.values()),
        *(f"{one[0]}~" for one in answers.values()),
    }
    questions = [Question(sample(text), (wish, "~"), "exact_match") for text in TEXTS for wish in sorted(wishes)]
    plain = [one.points for one in asker.answer(model, questions)]
    asked = []
    monkeypatch.setattr(
        Asker, "_write", lambda self, _, own, write=Asker._write: asked.extend(own) or write(self, _, own)
    )
    quick = list(replace(asker, only_points=True).answer(model, questions))
    assert [one.points for one in quick] == plain
    assert 0 < len(asked) < len(questions) / 2


def test_a_number_is_looked_for_in_what_the_model_writes(model, processor, asker, monkeypatch):
    texts = {text: written(model, processor, text, 6) for text in TEXTS}
    monkeypatch.setattr(Question, "is_right", lambda self, text: text == self.answers[0])
    questions = [Question(sample(text), (answer,), "numbers") for text, answer in texts.items()]
    found = list(asker.answer(model, questions))
    assert [one.text for one in found] == list(texts.values())
    assert [one.points for one in found] == [1.0] * len(texts)


@pytest.mark.parametrize("by_length", [False, True])
def test_the_likeliest_choice_is_that_of_the_whole_forward_pass(model, processor, asker, by_length):
    asker = replace(asker, by_length=by_length, batch_tokens=64)
    choices = ("yes", "no, not at all", "b")
    questions = [Question(sample(text), ("b",), "choice", choices) for text in TEXTS]
    for question, found in zip(questions, asker.answer(model, questions), strict=True):
        scores = {}
        for choice in choices:
            prompt = processor(f"{question.sample.question}=")["input_ids"]
            answer = processor(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            likelihood = sum(float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))
            scores[choice] = likelihood / (len(choice.encode()) if by_length else 1)
        assert found.text == max(scores, key=scores.__getitem__)
        assert found.points == (found.text == "b")


def test_a_likelihood_does_not_depend_on_the_batch(model, processor):
    def row(text: str) -> Row:
        prompt = BACKBONE.encode_prompt(processor, sample(text), FORMAT)
        return Row(prompt, processor("maybe", add_special_tokens=False)["input_ids"])

    rows = {text: row(text) for text in TEXTS}
    together, alone = dict(likelihoods(model, rows, 1000)), dict(likelihoods(model, rows, 1))
    assert together == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 3.0}),
    ],
)
def test_logits_are_those_of_the_model_also_where_it_changes_its_heads(kind, settings):
    import transformers

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads, **settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    tokens = torch.tensor([[1, 5, 7, 9]])
    with torch.no_grad():
        own = model(tokens).logits
        made = model.get_output_embeddings()(model.base_model(tokens).last_hidden_state)
        assert not torch.allclose(made, own)
        torch.testing.assert_close(final_logits(model, made), own)
