"""The model card says what the model was made of."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml

from expert_merging.backbone import Evaluation
from expert_merging.card import model_card, vlmeval_config
from expert_merging.commands.main import main
from expert_merging.repeating import command_of
from tests.checkpoints import write_checkpoint
from tests.command import TENSORS, flags, merged

DESCRIPTION = {
    "method": "task_arithmetic",
    "options": {
        "base_model_path": "/home/someone/models/Mistral-7B-v0.1",
        "expert": {"Chat": "/home/someone/models/Chat-7B/", "Math": "/home/someone/models/Math-7B"},
        "scaling_coefficient": [0.2, 0.3],
        "loss_alphas": None,
        "seed": -1,
    },
    "seed": 77,
}

LOADING = ('AutoModelForCausalLM.from_pretrained("{model}", dtype="auto")', 'AutoTokenizer.from_pretrained("{model}")')


@pytest.fixture(scope="module")
def card():
    return model_card(DESCRIPTION, title="my-run", loading=LOADING, merged=21, tensors=30)


def test_the_front_matter_names_all_sources(card):
    _, front, _ = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model_relation": "merge",
        "base_model": ["Mistral-7B-v0.1", "Chat-7B", "Math-7B"],
        "tags": ["merge", "expert-merging"],
    }


@pytest.mark.parametrize("name", ["7", "a: b", "#1", "[x]", "- y", "Zoë", "'q'", "no", '"quoted"'])
def test_any_folder_name_can_stand_in_the_front_matter(name):
    description = {**DESCRIPTION, "options": {"base_model_path": "/b", "expert": {"A": f"/x/{name}"}}}
    _, front, _ = model_card(description, title="t", loading=LOADING, merged=1, tensors=1).split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == ["b", name]


def test_the_text_says_what_was_merged_and_how(card):
    assert "# my-run" in card
    assert "`Mistral-7B-v0.1` merged with 2 experts by `task_arithmetic`." in card
    assert "| base | `Mistral-7B-v0.1` |\n| Chat | `Chat-7B` |\n| Math | `Math-7B` |" in card
    assert "21 of 30 tensors were merged" in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "\ntokenizer = AutoTokenizer.from_pretrained" in card


@pytest.mark.parametrize(
    ("front", "shown"),
    [
        ("license: apache-2.0", " (licence apache-2.0)"),
        ("license: other\nlicense_name: research  only", " (licence research only)"),
        ("license: [a, b]", ""),
        ("tags: [x]", ""),
        ("license: 'x", ""),
        ("- a", ""),
    ],
)
def test_licences_are_those_of_the_model_cards(tmp_path, front, shown):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# Model\n")
    options = {"base_model_path": str(tmp_path), "expert": {"A": "/x/a"}}
    text = model_card({**DESCRIPTION, "options": options}, title="t", loading=LOADING, merged=1, tensors=1)
    assert f"| base | `{tmp_path.name}`{shown} |\n| A | `a` |\n" in text


@pytest.mark.parametrize(
    ("licences", "licence"),
    [
        (("apache-2.0", "apache-2.0"), "apache-2.0"),
        (("apache-2.0", "mit"), "other"),
        (("apache-2.0", None), None),
        (("apache-2.0", "[a]"), None),
        ((None, None), None),
    ],
)
def test_the_licence_is_the_one_that_all_sources_have(tmp_path, licences, licence):
    for name, text in zip(("base", "a"), licences, strict=True):
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "README.md").write_text(f"---\nlicense: {text}\n---\n")
    options = {"base_model_path": str(tmp_path / "base"), "expert": {"A": str(tmp_path / "a")}}
    text = model_card({**DESCRIPTION, "options": options}, title="t", loading=LOADING, merged=1, tensors=1)
    assert yaml.safe_load(text.split("---\n")[1]).get("license") == licence


def test_what_the_model_does_is_said_to_the_hub():
    text = model_card(DESCRIPTION, title="t", loading=LOADING, merged=1, tensors=1, task="image-text-to-text")
    assert yaml.safe_load(text.split("---\n")[1])["pipeline_tag"] == "image-text-to-text"


def test_the_command_makes_the_same_again_and_names_no_place_of_the_machine(tmp_path):
    """Run what the card says, with the checkpoints below the folder that they are named in."""
    base = write_checkpoint(tmp_path / "base", TENSORS)
    experts = {
        name: write_checkpoint(tmp_path / name, {key: tensor + shift for key, tensor in TENSORS.items()})
        for name, shift in {"a b": 0.5, "B": -2.0}.items()
    }
    given = (*flags(base, **experts), "--method", "ties", "--density", 0.5, "--ties_weights", "[1, 2]", "--seed", 7)
    patterns = ("--exclude_params", ".*norm.*", "embed.*")
    run = merged(tmp_path / "out", *given, *patterns)
    card = (run.model / "README.md").read_text()
    command = card.split("This command made it")[1].split("```\n")[1].strip()
    assert str(tmp_path) not in command
    program, verb, *words = shlex.split(command)
    assert (program, verb) == ("expert-merging", "merge")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert main(["merge", *words, "--output_path", "again", "--device", "cpu"]) == 0
    (again,) = (tmp_path / "again" / "ties").iterdir()
    assert again.name == run.name
    assert (again / "model" / "model.safetensors").read_bytes() == (run.model / "model.safetensors").read_bytes()


def test_the_command_has_commits_and_leaves_out_what_is_default_or_a_place():
    snapshot = "/c/models--org--base/snapshots/abc"
    description = {
        "family": "Mistral",
        "method": "dare_ta",
        "seed": 5,
        "options": {"base_model_path": snapshot, "expert": {"A": "/x/a"}},
    }
    changed = {"data_dir": str(Path(__file__).resolve().parent), "density": 0.5, "ties_normalize": False,
               "force": True, "post": ["svc"], "exclude_params": [], "prompt_template": None}  # fmt: skip
    assert command_of(description, changed) == (
        "expert-merging merge dare_ta --family Mistral --base_model_path org/base@abc --expert A=a --density 0.5 "
        "--ties_normalize false --force --post svc --exclude_params none --seed 5"
    )


def test_the_options_are_those_that_were_used(card):
    options = json.loads(card.split("```json\n")[1].split("```")[0])
    assert options == {"scaling_coefficient": [0.2, 0.3], "seed": 77}


def test_the_folders_of_the_machine_stay_private(card):
    assert "someone" not in card


def test_places_on_this_machine_are_left_out():
    options = {**DESCRIPTION["options"], "data_dir": "/home/me/dataset", "coefficients": "/home/me/run"}
    assert "/home/me" not in model_card(
        {**DESCRIPTION, "options": options}, title="t", loading=LOADING, merged=1, tensors=1
    )


def test_vlmevalkit_gets_the_model_and_its_benchmarks(tmp_path):
    settings = {"class": "Qwen2VLChat", "min_pixels": 784}
    evaluation = Evaluation(vlmeval=settings, benchmarks={"MathVista_MINI": "MathVista"})
    config = json.loads(vlmeval_config(evaluation, "run-7", tmp_path))
    assert config["model"] == {
        "run-7": {"class": "Qwen2VLChat", "min_pixels": 784, "model_path": str(tmp_path)},
    }
    assert config["data"] == {"MathVista_MINI": {"class": "MathVista", "dataset": "MathVista_MINI"}}
