"""The router in Python: who answers, with what, and how much is in memory."""

from __future__ import annotations

import random
import re
import weakref
from collections import ChainMap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expert_merging.errors import InputError
from expert_merging.questions.calibration import Sample
from expert_merging.questions.labelled import Question
from expert_merging.routing.router import PerplexityRouter
from expert_merging.running.answers import Asker
from InternVL.backbone import BACKBONE as INTERNVL
from Mistral.backbone import BACKBONE
from Qwen2VL.backbone import BACKBONE as QWEN2VL
from tests import internvl, qwen2vl
from tests.checkpoints import BASE, EXPERTS, perturb, save_model

TEXTS = ["seven", "a much longer question than the others", "12 + 7", "why", "x", "(a)", "no!", "9-3="]


@pytest.fixture
def experts(tiny_zoo):
    return {name: tiny_zoo / folder for name, folder in EXPERTS.items()}


def question(text, kind="open", answers=(), choices=()):
    return Question(Sample.test(text), answers, kind, choices)


def router_of(experts, **settings):
    return PerplexityRouter.of(experts, device="cpu", max_new_tokens=6, **settings)


@pytest.mark.slow
def test_each_question_goes_to_the_expert_of_the_smallest_perplexity(experts):
    router = router_of(experts)
    routed = router.ask(TEXTS)
    for text, one in zip(TEXTS, routed, strict=True):
        best = min(one.perplexities, key=one.perplexities.__getitem__)
        assert one.weights == {best: 1.0}
        own = router.experts[best]
        model = BACKBONE.load_model(experts[best], torch.float32)
        asker = Asker(BACKBONE, own.processor, own.formats, max_new_tokens=6)
        assert one.text == next(iter(asker.answer(model, [question(text)]))).text
    assert len({*(name for one in routed for name in one.weights)}) > 1


@pytest.mark.slow
def test_the_example_of_the_docs_answers(experts, capsys):
    page = (Path(__file__).parents[2] / "docs" / "routing.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    folders = {name: experts[name] for name in ("Math", "Code")}
    for name, folder in folders.items():
        code = code.replace(f"/data/{name.lower()}", str(folder))
    exec(code, {})
    router = PerplexityRouter.of(folders, per_question=2, temperature=0.1)
    (expected,) = router.ask(["What is 12 + 30?"])
    assert len(expected.weights) == 2
    assert capsys.readouterr().out == f"{expected.text} {expected.weights} {expected.perplexities}\n"


@pytest.mark.slow
def test_copies_of_an_expert_answer_as_it_does(experts, tmp_path):
    alone = [one.text for one in router_of({"A": experts["Math"]}).ask(TEXTS)]
    copies = {name: tmp_path / name for name in "ABC"}
    for folder in copies.values():
        folder.symlink_to(experts["Math"])
    for count in (1, 2, 3):
        assert [one.text for one in router_of(copies, per_question=count).ask(TEXTS)] == alone


@pytest.mark.slow
def test_the_order_of_experts_changes_nothing(experts):
    turned = dict(reversed(experts.items()))
    one, other = (router_of(found, per_question=2).ask(TEXTS) for found in (experts, turned))
    assert [routed.text for routed in one] == [routed.text for routed in other]
    assert [routed.weights for routed in one] == [pytest.approx(routed.weights) for routed in other]


def test_every_expert_is_asked_in_its_own_words(experts, tmp_path):
    folder = tmp_path / "templated"
    perturb(experts["Math"], folder, 9)
    words = "{{ bos_token }}{% for one in messages %}Q {{ one.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(words + "{% if add_generation_prompt %} A {% endif %}")
    router = router_of({"Chat": experts["Chat"], "Math": folder}, words={"Chat": "Well, {question}"})
    assert {name: one.formats.default.example for name, one in router.experts.items()} == {
        "Chat": "Well, {question}{response}",
        "Math": "<s>Q {question} A {response}",
    }
    prompts = [router._asker(name).prompt(Sample.test("hi"))["input_ids"] for name in router.experts]
    tokenizer = router.experts["Chat"].processor
    assert [tokenizer.decode(one[0]) for one in prompts] == ["<s>Well, hi", "<s>Q hi A "]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "most"), [(1, 1), (2, 2)])
def test_no_more_experts_are_in_memory_than_answer(experts, monkeypatch, count, most):
    alive, seen = weakref.WeakSet(), []
    router = router_of(experts, per_question=count)

    def load(folder, dtype):
        model = BACKBONE.load_model(folder, dtype)
        alive.add(model)
        seen.append(len(alive))
        return model

    slow = {name: replace(one, backbone=replace(one.backbone, load_model=load)) for name, one in router.experts.items()}
    replace(router, experts=slow).ask(TEXTS)
    assert max(seen) == most
    assert len(seen) >= 6, "each is loaded for perplexities, and again for answers"


def test_choices_are_rated_by_the_mixture(experts):
    router, choices = router_of(experts, per_question=2), ("a", "?", "b", "7")
    questions = [question(text, "choice", ("b",), choices) for text in TEXTS]
    weights = torch.zeros(3, len(TEXTS), dtype=torch.float64)
    weights[0], weights[2] = 0.3, 0.7
    found = {}
    for numbers, answers in router.answer(questions, weights):
        found |= dict(zip(numbers, answers, strict=True))
    models = [BACKBONE.load_model(experts[name], torch.float32) for name in ("Chat", "Code")]
    tokenizer = router.experts["Chat"].processor
    for number, text in enumerate(TEXTS):
        scores = {}
        for choice in choices:
            prompt, answer = tokenizer(text)["input_ids"], tokenizer(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                made = [model(torch.tensor([prompt + answer])).logits[0].double().softmax(-1) for model in models]
            mixture = 0.3 * made[0] + 0.7 * made[1]
            scores[choice] = sum(
                float(mixture[len(prompt) - 1 + place, token].log()) for place, token in enumerate(answer)
            )
        assert found[number].text == max(scores, key=scores.__getitem__)
        assert found[number].points == (found[number].text == "b")
    assert len({one.text for one in found.values()}) > 1


@pytest.mark.slow
def test_answers_of_all_kinds_come_in_one_go(experts):
    router = router_of(experts, per_question=2)
    written = [one.text for one in router.ask(TEXTS)]
    asked = [question(text, "exact_match", (known,)) for text, known in zip(TEXTS, written, strict=True)]
    asked[1] = question(TEXTS[1], "choice", ("a",), ("a", "b"))
    asked[4] = question(TEXTS[4], "exact_match", ("no",))
    rows = {name: ChainMap(*router.perplexities(name, asked)) for name in experts}
    weights = router.weights({name: [row[number] for number in range(len(asked))] for name, row in rows.items()})
    found = {}
    for numbers, answers in router.answer(asked, weights):
        found |= dict(zip(numbers, answers, strict=True))
    assert sorted(found) == list(range(len(TEXTS)))
    assert found[1].text in ("a", "b")
    assert found[4].points == 0
    assert all(found[number].text.startswith(written[number]) for number in range(len(TEXTS)) if number != 1)


def test_experts_of_other_vocabularies_answer_alone(experts, tmp_path):
    other = tmp_path / "other"
    save_model(other, 5)
    tokenizer = BACKBONE.load_processor(other)
    tokenizer.add_tokens(["hello"])
    tokenizer.save_pretrained(other)
    mixed = {"Chat": experts["Chat"], "New": other}
    with pytest.raises(InputError) as error:
        router_of(mixed, per_question=2)
    assert str(error.value) == (
        "Chat and New have different vocabularies ('hello' is unknown and number 80), and what several experts predict "
        "can be mixed only of one vocabulary; give --experts_per_question 1, or experts of one tokenizer"
    )
    router = router_of(mixed)
    assert router.by_bytes
    (frame,) = router._frame("New").asked([Sample.test("so")])
    assert frame.size == 2
    assert not router_of(experts).by_bytes


def test_all_that_is_wrong_is_told_at_once(experts, tmp_path):
    with pytest.raises(InputError) as error:
        router_of({"Chat": tmp_path / "no", "Math": experts["Math"]}, per_question=3, words={"Math": "Well"})
    assert error.value.problems == (
        "--experts_per_question must be from 1 to the number of experts, 2, got 3",
        f"Chat: {tmp_path}/no holds no model: no .safetensors file is there",
        "--prompt_template must contain {question}, got 'Well'",
    )


@pytest.mark.slow
@pytest.mark.parametrize(("family", "zoo"), [(QWEN2VL, qwen2vl), (INTERNVL, internvl)])
def test_experts_that_see_pictures_write_together(family, zoo, tmp_path):
    """Copies answer as the expert alone, with pictures of two sizes in one batch; pictures do not count."""
    zoo.save_model(tmp_path / "A", 3)
    (tmp_path / "B").symlink_to(tmp_path / "A")
    picture = getattr(zoo, "save_picture", None) or (lambda file, *size: zoo.make_picture(file, size))
    files = [picture(tmp_path / f"{size}.png", size, 40) for size in (40, 90)]
    questions = [Question(Sample.test("why?", *own), (), "open") for own in ([files[0]], [files[1]], [])]
    copies = {name: tmp_path / name for name in "AB"}
    alone = router_of({"A": tmp_path / "A"}, family=family.name)
    router = router_of(copies, family=family.name, per_question=2)
    for frame in router._frame("A").asked([question.sample for question in questions]):
        assert len(frame.positions) <= 6, "the question has four characters"
    found, expected = {}, {}
    for made, own in ((found, router), (expected, alone)):
        for numbers, answers in own.answer(questions, torch.full((len(own.experts), 3), 1 / len(own.experts))):
            made |= dict(zip(numbers, answers, strict=True))
    assert found == expected


@pytest.mark.slow
def test_experts_that_have_learned_whole_texts_get_their_own_questions(tiny_zoo, tmp_path):
    """Numbers, small and capital letters; an expert that has learned answers alone says nothing of questions."""
    alphabets, folders = {"Numbers": "0123456789", "Small": "abcdefghij", "Capital": "ABCDEFGHIJ"}, {}
    draw = random.Random(0)

    def texts(alphabet, count):
        return ["".join(draw.choices(alphabet, k=12)) for _ in range(count)]

    for name, alphabet in alphabets.items():
        model = BACKBONE.load_model(tiny_zoo / BASE, torch.float32)
        tokenizer = BACKBONE.load_processor(tiny_zoo / BASE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(25):
            batch = torch.tensor(tokenizer(texts(alphabet, 16))["input_ids"])
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        folders[name] = tmp_path / name
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    questions = {name: texts(alphabet, 20) for name, alphabet in alphabets.items()}
    routed = router_of(folders).ask([text for own in questions.values() for text in own])
    owners = [name for name, own in questions.items() for _ in own]
    right = sum(one.weights == {owner: 1.0} for one, owner in zip(routed, owners, strict=True))
    assert right / len(owners) > 0.9
