"""The calibration files that come with the project are complete and fit the families."""

from __future__ import annotations

import json

import numpy
import pytest
from PIL import Image

from dataset.draw.__main__ import TASKS, main
from expert_merging.options import ROOT
from expert_merging.questions.calibration import load_samples
from Mistral.backbone import BACKBONE as MISTRAL
from Qwen2VL.backbone import BACKBONE as QWEN2VL

DATASET = ROOT / "dataset"


@pytest.mark.parametrize("backbone", [MISTRAL, QWEN2VL])
def test_every_expert_of_a_family_has_samples(backbone):
    experts = tuple(backbone.expert_folders)
    samples = load_samples(
        DATASET, experts, default_count=10, counts={}, task_expert={}, family_tasks=backbone.task_experts
    )
    assert {sample.expert for sample in samples} == set(experts)
    assert len({(sample.task, sample.question) for sample in samples}) == len(samples)
    assert all(len(sample.images) == backbone.takes_images for sample in samples)


def test_every_picture_is_asked_about_and_small():
    entries = [entry for task in TASKS for entry in json.loads((DATASET / f"{task}.json").read_text())]
    pictures = {DATASET / entry["image_path"] for entry in entries}
    assert pictures == set((DATASET / "images").iterdir())
    assert sum(picture.stat().st_size for picture in pictures) < 1_500_000


def coarse(picture: Image.Image) -> numpy.ndarray:
    """Means of blocks of 8 x 8 pixels."""
    return numpy.asarray(picture.reduce(8), dtype=int)


@pytest.mark.slow
def test_drawing_again_gives_the_same(tmp_path):
    """Coarsely: other versions of matplotlib and Pillow smooth edges and place text a little differently.

    With those tried, a picture is at most a sixth as far from its kept one as from any other.
    """
    main(tmp_path)
    for task in TASKS:
        assert (tmp_path / f"{task}.json").read_bytes() == (DATASET / f"{task}.json").read_bytes()
    pictures = {file.name: Image.open(file).convert("RGB") for file in (DATASET / "images").iterdir()}
    kept = {name: coarse(picture) for name, picture in pictures.items()}
    for name, picture in pictures.items():
        assert picture.size == (448, 336)
        drawn = coarse(Image.open(tmp_path / "images" / name).convert("RGB"))
        others = min(abs(kept[other] - drawn).mean() for other in kept if other != name)
        assert abs(kept[name] - drawn).mean() < others / 2, name
        assert len(picture.getcolors(picture.width * picture.height)) > 4, f"{name} is empty"
