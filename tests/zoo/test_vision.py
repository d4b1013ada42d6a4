"""Zoos of picture models: what is trained is what the merge command will see."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from expert_merging.options import ROOT
from expert_merging.questions.calibration import Sample, load_samples
from expert_merging.questions.formats import Format
from tests.command import merge, merged
from tests.zoo.conftest import BRIEF
from zoo import internvl, qwen2vl, tasks, vision
from zoo.build import build
from zoo.commands import main
from zoo.evaluate import cached_exact_match
from zoo.family import Family
from zoo.pictures import TASKS

MODULES = {"internvl": internvl, "qwen2vl": qwen2vl}
FAMILIES = {name: module.FAMILY for name, module in MODULES.items()}


@pytest.fixture(scope="module")
def zoos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Zoos with few questions that are hardly trained; tests must not write to them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "TEST_QUESTIONS", 6)
        patch.setattr(tasks, "CALIBRATION_QUESTIONS", 3)
        zoos = {}
        for name, family in FAMILIES.items():
            schedules = dict.fromkeys(TASKS, replace(BRIEF, frozen=family.backbone.exclude_params))
            brief = replace(family, base_schedule=BRIEF, expert_schedules=schedules)
            zoos[name] = tmp_path_factory.mktemp(name) / "zoo"
            build(brief, zoos[name], workers=0)
        yield zoos


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def zoo(zoos: dict[str, Path], family: Family) -> Path:
    return zoos[family.name]


def base(zoo: Path, family: Family) -> Path:
    return zoo / family.backbone.base_folder


@pytest.mark.slow
def test_training_sees_what_the_merge_command_will(zoo: Path, family: Family, tmp_path: Path) -> None:
    draw = random.Random(0)
    examples = {name: task.hard(draw) for name, task in TASKS.items()}
    batch = MODULES[family.name].new_collate()([*examples.values()])
    processor = family.backbone.load_processor(base(zoo, family))
    pixels = []
    for row, (name, example) in enumerate(examples.items()):
        file = tmp_path / f"{name}.png"
        example.picture.save(file)
        sample = Sample(name, name, example.question, None, "0", (file,))
        prompt = family.backbone.encode_prompt(processor, sample, None)
        pixels.append(prompt.pop("pixel_values"))
        length = prompt["input_ids"].shape[1]
        for key in ("input_ids", "mm_token_type_ids"):
            if key in prompt:
                assert batch[key][row, :length].equal(prompt[key][0]), (name, key)
        answer = batch["labels"][row][batch["labels"][row] != -100]
        assert batch["input_ids"][row, length : length + len(answer)].equal(answer)
        assert (batch["labels"][row, :length] == -100).all()
        assert processor.tokenizer.decode(answer) == example.response + vision.END
    assert torch.cat(pixels).equal(batch["pixel_values"])


def test_the_configuration_asks_as_the_zoo_was_trained(zoo: Path, family: Family, tmp_path: Path) -> None:
    """The prompt is that of the checkpoint's own words; the turn ends with the end token alone."""
    config = yaml.safe_load((ROOT / "zoo" / f"{family.name}.yaml").read_text(encoding="utf-8"))
    asked = Format.of_text("given", config["prompt_template"], None)
    assert asked.end == vision.END
    file = tmp_path / "a.png"
    TASKS["VQA"].hard(random.Random(0)).picture.save(file)
    processor = family.backbone.load_processor(base(zoo, family))
    for images in ((), (file,)):
        sample = Sample("VQA", "VQA", "What is it?", None, "0", images)
        given, own = (family.backbone.encode_prompt(processor, sample, form) for form in (asked, None))
        assert given["input_ids"].equal(own["input_ids"])


def test_words_are_tokens(family: Family) -> None:
    tokenizer = MODULES[family.name].new_tokenizer()
    draw = random.Random(1)
    for version in (version for task in TASKS.values() for version in (task.easy, task.hard)):
        for example in (version(draw) for _ in range(50)):
            for text in (example.question, example.response):
                tokens = tokenizer(text)["input_ids"]
                assert len(tokens) == len(re.findall(r"[A-Za-z]+|[^A-Za-z ]", text)), text
                assert tokenizer.decode(tokens) == text


def test_other_text_survives_as_well(zoo: Path, family: Family) -> None:
    tokenizer = family.backbone.load_processor(base(zoo, family)).tokenizer
    text = "Überraschung: 3 \N{MULTIPLICATION SIGN} 4 = 12 \N{GRINNING FACE}\n\n  <tag>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_saved_model_is_the_trained_one(family: Family, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = MODULES[family.name]
    model = module.new_model().eval()
    module.save(model, tmp_path / "model")
    loaded = family.backbone.load_model(tmp_path / "model", torch.float32)
    draw = random.Random(0)
    batch = module.new_collate()([TASKS["VQA"].hard(draw), TASKS["Geometry"].easy(draw)])
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).loss, model(**batch).loss, rtol=1e-6, atol=0)
    assert model.num_parameters() < 2_000_000


def test_padding_does_not_change_the_loss(family: Family) -> None:
    torch.manual_seed(0)
    module = MODULES[family.name]
    model, collate, draw = module.new_model().eval(), module.new_collate(), random.Random(0)
    examples = [TASKS["Grounding"].hard(draw), TASKS["OCR"].easy(draw)]
    with torch.no_grad():
        together = model(**collate(examples)).loss
        alone = [model(**collate([example])).loss for example in examples]
    counts = [sum(int(label != -100) for label in collate([example])["labels"][0]) for example in examples]
    assert counts[0] > counts[1]
    torch.testing.assert_close(together, (counts[0] * alone[0] + counts[1] * alone[1]) / sum(counts))


def test_experts_keep_what_the_merge_command_excludes(zoo: Path, family: Family) -> None:
    before = load_file(base(zoo, family) / "model.safetensors")
    for folder in family.backbone.expert_folders.values():
        after = load_file(zoo / folder / "model.safetensors")
        assert after.keys() == before.keys()
        for name in before:
            excluded = any(re.match(pattern, name) for pattern in family.backbone.exclude_params)
            assert after[name].equal(before[name]) == excluded, name
    assert all(schedule.frozen == family.backbone.exclude_params for schedule in family.expert_schedules.values())


def test_zoo_is_a_cache_dir_and_a_data_dir(zoo: Path, family: Family, tmp_path: Path) -> None:
    folders = {family.backbone.base_folder, *family.backbone.expert_folders.values()}
    assert {path.name for path in zoo.iterdir()} == {*folders, "dataset", "known", "test", "zoo.json"}
    samples = load_samples(zoo / "dataset", tuple(TASKS), default_count=9, counts={}, task_expert={})
    assert len(samples) == 15
    assert all(len(sample.images) == 1 for sample in samples)


def test_held_out_questions_are_asked(zoo: Path, family: Family, tmp_path: Path) -> None:
    (tmp_path / "test").symlink_to(zoo / "test")
    scores = cached_exact_match(family.backbone, base(zoo, family), tmp_path)
    assert scores.keys() == TASKS.keys()
    assert all(0 <= score <= 100 for score in scores.values())


def test_settings_of_the_zoo_are_accepted(
    zoo: Path, family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", ROOT / "zoo" / f"{family.name}.yaml", "--cache_dir", zoo, "--data_dir", zoo / "dataset"]
    arguments += ["--method", "expert_merging", "--output_path", tmp_path, "--dry_run"]
    assert merge(*arguments, family=family.backbone) == 0, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_a_run_is_evaluated_on_its_own_zoo(
    family: Family, zoos: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = tmp_path / "zoo"
    shutil.copytree(zoos[family.name], zoo)
    run = merged(tmp_path / "out", "--method", "weight_average", "--cache_dir", zoo, family=family.backbone)
    assert main(["evaluate", str(run.folder), "--json", str(tmp_path / "numbers.json")]) == 0
    assert list(json.loads((tmp_path / "numbers.json").read_text())) == [
        "base",
        *(f"{task} expert" for task in TASKS),
        "weight_average",
    ]
    (other,) = zoos.keys() - {family.name}
    capsys.readouterr()
    assert main(["evaluate", str(run.folder), "--zoo", str(zoos[other])]) == 1
    assert capsys.readouterr().err == (
        f"error: {run.folder} is of {family.backbone.name}, and the zoo in {zoos[other]} is of "
        f"{FAMILIES[other].backbone.name}\n"
    )
