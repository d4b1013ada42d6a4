"""Prompts are made once, kept until they are asked for, and checked once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expert_merging.asking import Formats
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.errors import InputError
from expert_merging.questions.calibration import Sample
from expert_merging.questions.formats import Format
from expert_merging.questions.picture_sources import HeldPicture
from expert_merging.running import targets
from expert_merging.running.options import SampleOptions
from expert_merging.running.prompts import Prompts
from expert_merging.running.samples import Samples
from Mistral.backbone import BACKBONE
from tests.checkpoints import BASE
from tests.learned.training import make_trainer

AS_IT_IS = Format("the bare question")
SAMPLES = [Sample("Math", "Math", f"question {number}", "42", str(number)) for number in range(3)]


@pytest.fixture
def base(tiny_zoo):
    return Checkpoint(tiny_zoo / BASE)


@pytest.fixture
def made(monkeypatch):
    """The questions whose prompts were made."""
    questions = []
    encode = BACKBONE.encode_prompt
    monkeypatch.setattr(
        Prompts,
        "_make",
        lambda prompts, sample: questions.append(sample.question) or encode(prompts.processor, sample, None),
    )
    return questions


@pytest.mark.parametrize("keeps", [True, False])
def test_a_prompt_is_kept_until_it_is_taken(keeps, base, made):
    prompts = Prompts(BACKBONE, base, Formats(AS_IT_IS), keeps=keeps)
    lengths = prompts.check(SAMPLES)
    assert len(made) == 3
    for sample, length in zip(SAMPLES, lengths, strict=True):
        inputs = prompts.get(sample)
        assert prompts.take(sample) is inputs
        assert inputs["input_ids"].shape[1] + len("42") + 1 == length
    assert made == [sample.question for sample in SAMPLES] * (1 if keeps else 2)
    prompts.take(SAMPLES[0])
    assert len(made) == (4 if keeps else 7)


def test_the_digest_changes_with_questions_responses_and_pictures(tmp_path):
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    for number, picture in enumerate(pictures):
        picture.write_bytes(bytes([number]))
    first = replace(SAMPLES[0], images=(pictures[0],))
    changed = (
        {"question": "?"},
        {"response": "43"},
        {"expert": "Chat"},
        {"images": (pictures[1],)},
        {"images": ()},
        {"images": (HeldPicture(b"picture"),)},
    )
    digests = {
        Samples((sample, *SAMPLES[1:]), 0, "no", 1, SampleOptions()).digest
        for sample in (first, *(replace(first, **change) for change in changed))
    }
    assert len(digests) == 1 + len(changed)


def test_lengths_are_checked_once(tiny_zoo, tmp_path, monkeypatch):
    """With the samples where the response is given, and where an expert writes it, as soon as it is written."""
    checked = []
    monkeypatch.setattr(targets, "check_lengths", lambda base, family, lengths: checked.extend(lengths))
    trainer = make_trainer(tiny_zoo, tmp_path, samples_per_task=1)
    found = trainer._make_targets(torch.device("cpu"))
    assert [sample.tokens is not None for sample, _ in checked] == [True] * len(found)
    assert all(
        tokens == target.inputs["input_ids"].shape[1] for (_, tokens), target in zip(checked, found, strict=True)
    )


def test_samples_that_nobody_has_checked_are_checked_before_an_expert_is_loaded(answered_zoo, tmp_path, monkeypatch):
    """As by `align`, which needs no method."""
    trainer = make_trainer(answered_zoo, tmp_path)
    maker = trainer.settings.asked.target_maker(trainer.context, (), torch.device("cpu"))
    monkeypatch.setattr(targets, "load_on", lambda *_, **__: pytest.fail("an expert was loaded"))
    long = [Sample("Math", "Math", "?" * 200, "42", str(number)) for number in range(2)]
    with pytest.raises(InputError) as caught:
        replace(maker, prompts=None).make(long)
    assert len(caught.value.problems) == 1
