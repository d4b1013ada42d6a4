"""What the experts answer, and which samples are refused."""

from __future__ import annotations

import json

import pytest
import torch

from expert_merging.errors import InputError
from expert_merging.learned.coefficients import kept_or_made
from tests.checkpoints import BASE, EXPERTS, perturb, write_tasks
from tests.learned.training import answering, make_trainer


def test_experts_write_missing_responses_once(tiny_zoo, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_zoo, tmp_path, samples_per_task=2)
    first = trainer._make_targets(torch.device("cpu"))
    written = json.loads(trainer.context.run.responses.read_text())
    assert written.pop("formats") == {
        expert: {"from": "the bare question", "example": "{question}{response}"} for expert in EXPERTS
    }
    assert len(written) == 6

    def refuse(*_):
        raise AssertionError("a kept response must not be written again")

    monkeypatch.setattr("expert_merging.running.targets.generate", refuse)
    second = trainer._make_targets(torch.device("cpu"))
    assert [target.sample for target in first] == [target.sample for target in second]


def test_how_experts_are_asked_is_kept_where_all_responses_are_given_too(tiny_zoo, tmp_path):
    write_tasks(tmp_path / "dataset", responses=dict.fromkeys(EXPERTS, "42"))
    trainer = make_trainer(tiny_zoo, tmp_path, data_dir=str(tmp_path / "dataset"))
    trainer._make_targets(torch.device("cpu"))
    assert set(json.loads(trainer.context.run.responses.read_text())) == {"formats"}


def test_an_expert_is_matched_on_the_tokens_that_it_wrote(tiny_zoo, tmp_path, monkeypatch):
    """With its end token if it came to one, without if it was cut off; tokens that the base lacks end the answer."""
    for written, kept in {(5, 6, 1): [5, 6, 1], (5, 6): [5, 6], (5, 6, 80, 7): [5, 6]}.items():
        monkeypatch.setattr("expert_merging.running.targets.generate", answering(*written))
        trainer = make_trainer(tiny_zoo, tmp_path / str(written), samples_per_task=1)
        for target in trainer._make_targets(torch.device("cpu")):
            prompt = len(target.sample.question) + 1
            assert target.inputs["input_ids"][0, prompt:].tolist() == kept


def test_an_empty_answer_is_refused_with_its_sample(tiny_zoo, tmp_path, monkeypatch):
    monkeypatch.setattr("expert_merging.running.targets.generate", answering())
    trainer = make_trainer(tiny_zoo, tmp_path)
    with pytest.raises(
        InputError, match=r"Chat\.json, entry 0 \(counted from 0\): expert Chat answered with nothing; "
    ):
        trainer.train()


def test_a_sample_longer_than_the_models_context_is_refused_before_any_expert_is_asked(tiny_zoo, tmp_path):
    folder = tmp_path / "dataset"
    write_tasks(folder, count=8, responses={"Math": "4" * 200})
    for count, places in ((8, "entries 0, 1, 2, 3, 4 and 3 more"), (5, "entries 0, 1, 2, 3, 4"), (1, "entry 0")):
        with pytest.raises(InputError) as caught:
            make_trainer(tiny_zoo, tmp_path / "run", data_dir=str(folder), samples_per_task=count)
        (problem,) = caught.value.problems
        up_to, samples = ("", "sample") if count == 1 else ("up to ", "samples")
        assert problem == (
            f"{folder / 'Math.json'}, {places} (counted from 0): prompt and response have {up_to}218 tokens and the "
            f"model takes at most 128; shorten the {samples}"
        )


def test_an_answer_longer_than_the_models_context_is_refused(tiny_zoo, tmp_path, monkeypatch):
    monkeypatch.setattr("expert_merging.running.targets.generate", answering(*[5] * 200))
    told = r"entry 0 \(counted from 0\): .* have 2\d\d tokens .* 128; shorten the sample or lower --max_new_tokens$"
    with pytest.raises(InputError, match=told):
        make_trainer(tiny_zoo, tmp_path).train()


def test_a_nan_in_an_expert_is_found_before_it_is_asked(tiny_zoo, tmp_path):
    for folder in (BASE, EXPERTS["Chat"], EXPERTS["Code"]):
        (tmp_path / folder).symlink_to(tiny_zoo / folder)
    perturb(tiny_zoo / BASE, tmp_path / EXPERTS["Math"], 3, change=float("nan"))
    trainer = make_trainer(tmp_path, tmp_path / "run", data_dir=str(tiny_zoo / "dataset"))
    torch.set_num_threads(2)
    with pytest.raises(InputError, match=r"expert Math has \d+ NaN or infinite values in model\.layers"):
        kept_or_made(trainer.context, trainer.train)
    assert not list((tmp_path / "run").iterdir())
    assert torch.get_num_threads() == 2, "an error must not leave the caller with one thread"
    torch.set_num_threads(1)
