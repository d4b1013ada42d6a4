from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expert_merging.errors import InputError
from expert_merging.questions.calibration import Sample
from Mistral.backbone import BACKBONE
from zoo import evaluate
from zoo.evaluate import answers_exactly, cached_exact_match, exact_match
from zoo.mistral import new_model, save


def write_test(folder: Path, task: str, **responses: str) -> None:
    folder.mkdir(exist_ok=True)
    entries = [{"question": question, "response": response} for question, response in responses.items()]
    (folder / f"{task}.json").write_text(json.dumps(entries))


def test_answers_are_counted_with_their_task(built_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(_backbone: object, _processor: object, _model: object, samples: Sequence[Sample]) -> list[bool]:
        return [sample.question.startswith("known") == (sample.response == "right") for sample in samples]

    monkeypatch.setattr(evaluate, "answers_exactly", answers)
    write_test(tmp_path / "test", "Math", known1="right", other1="right", known2="right", known3="right")
    write_test(tmp_path / "test", "Code", other2="right", known4="right")
    write_test(tmp_path / "test", "Chat", known5="else")
    threads = torch.get_num_threads()
    scores = exact_match(BACKBONE, built_zoo / BACKBONE.base_folder, tmp_path / "test")
    assert scores == {"Math": 75, "Code": 50, "Chat": 0}
    assert torch.get_num_threads() == threads


@pytest.fixture(scope="module")
def talkative_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with weights so large that every question gets an answer of its own."""
    torch.manual_seed(0)
    model = new_model()
    for parameter in model.parameters():
        parameter.data.mul_(5)
    folder = tmp_path_factory.mktemp("talkative") / "model"
    save(model, folder)
    return folder


def test_an_answer_is_right_if_the_model_writes_it_and_ends(
    talkative_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against what the model writes by itself, whatever its neighbours in a batch."""
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 4)
    questions = ["<add>12+07=", "<uni>ab=", "<idx>kcqhwzb:05316=", "<uni>abcdefghabcde=", "<idx>abc:0=", "<add>01+02="]
    processor, model = BACKBONE.load_processor(talkative_model), BACKBONE.load_model(talkative_model, torch.float32)
    written = []
    for question in questions:
        prompt = processor(question, return_tensors="pt")
        tokens = model.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=3)[0]
        written.append(tokens[prompt["input_ids"].shape[1] :])
    assert len({tuple(tokens.tolist()) for tokens in written}) == len(questions)

    def right(responses: Sequence[str], ends: Sequence[int]) -> list[bool]:
        samples = [Sample("Math", "Math", *pair, "0") for pair in zip(questions, responses, strict=True)]
        model.generation_config.eos_token_id = list(ends)
        return answers_exactly(BACKBONE, processor, model, samples)

    begun = [processor.decode(tokens[:3]) for tokens in written]
    ends = [int(tokens[3]) for tokens in written]
    goes_on = [[not set(tokens[:count].tolist()) & set(ends) for tokens in written] for count in range(4)]
    assert right(begun, ends) == goes_on[3]
    assert sum(goes_on[3]) > 3
    assert right(begun, [token for token in range(20) if token not in ends]) == [False] * 6, "they go on"
    assert right([text[:-1] for text in begun], ends) == [
        go and int(tokens[2]) in ends for go, tokens in zip(goes_on[2], written, strict=True)
    ]
    others = [*begun[1:], begun[0]]
    assert right(others, ends) == [False] * 6


def test_models_of_the_zoo_are_asked_once(own_zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answers(_backbone: object, _processor: object, model: Any, samples: Sequence[Sample]) -> list[bool]:
        asked.append(Path(model.name_or_path).name)
        return [True for _ in samples]

    monkeypatch.setattr(evaluate, "answers_exactly", answers)
    base, expert = own_zoo / BACKBONE.base_folder, own_zoo / BACKBONE.expert_folders["Math"]
    for folder in (base, base, expert, base):
        assert cached_exact_match(BACKBONE, folder, own_zoo) == {"Chat": 100, "Code": 100, "Math": 100}
    assert asked == [base.name, expert.name]
    (base / "model.safetensors").write_bytes((expert / "model.safetensors").read_bytes())
    cached_exact_match(BACKBONE, base, own_zoo)
    assert asked == [base.name, expert.name, base.name]


def test_the_first_questions_alone_are_asked(own_zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def answers(_backbone: object, _processor: object, _model: object, samples: Sequence[Sample]) -> list[bool]:
        asked.append(len(samples))
        return [sample.number == 0 for sample in samples]

    monkeypatch.setattr(evaluate, "answers_exactly", answers)
    base = own_zoo / BACKBONE.base_folder
    assert cached_exact_match(BACKBONE, base, own_zoo, questions=4) == dict.fromkeys(("Chat", "Code", "Math"), 25)
    assert cached_exact_match(BACKBONE, base, own_zoo) == dict.fromkeys(("Chat", "Code", "Math"), 5)
    assert cached_exact_match(BACKBONE, base, own_zoo, questions=4)["Chat"] == 25
    assert asked == [12, 60]


def test_a_model_answers_in_the_precision_of_its_files(own_zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.dtype] = []

    def answers(_backbone: object, _processor: object, model: Any, samples: Sequence[Sample]) -> list[bool]:
        used.append(model.dtype)
        return [False for _ in samples]

    monkeypatch.setattr(evaluate, "answers_exactly", answers)
    base = own_zoo / BACKBONE.base_folder
    exact_match(BACKBONE, base, own_zoo / "test")
    weights = {name: weight.to(torch.bfloat16) for name, weight in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors")
    exact_match(BACKBONE, base, own_zoo / "test")
    assert used == [torch.float32, torch.bfloat16]


def test_folders_without_a_model_or_questions_are_refused(built_zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent is not a folder; give a run \(a folder with model/ in it\)"):
        exact_match(BACKBONE, tmp_path / "absent", built_zoo / "test")
    with pytest.raises(InputError, match=r"holds no model: config.json or \*.safetensors is missing"):
        exact_match(BACKBONE, tmp_path, built_zoo / "test")
    with pytest.raises(InputError, match=r"holds no test questions \(no <task>.json there\)"):
        exact_match(BACKBONE, built_zoo / BACKBONE.base_folder, tmp_path)
