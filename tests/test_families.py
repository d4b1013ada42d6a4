"""The family is that of the base, wherever it is named."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import constants

from expert_merging import options
from expert_merging.errors import InputError
from expert_merging.families import family_names, find_family, general_family, load_family
from tests.checkpoints import write_checkpoint
from tests.command import TENSORS, merged
from tests.hub import serving


def found(environment=None, **given):
    return find_family({name: str(value) for name, value in given.items()}, environment or {}).name


def refusal(environment=None, **given):
    with pytest.raises(InputError) as caught:
        found(environment, **given)
    return str(caught.value)


@pytest.fixture
def no_dotenv(tmp_path, monkeypatch):
    monkeypatch.setattr(options, "ROOT", tmp_path)


def test_every_folder_with_a_backbone_is_a_family():
    assert family_names() == ["InternVL", "Mistral", "Qwen2VL"]
    assert [load_family(name).name for name in family_names()] == family_names()
    assert general_family().name == "Mistral"


@pytest.mark.parametrize(
    ("model_type", "family"),
    [
        ("mistral", "Mistral"),
        ("llama", "Mistral"),
        (None, "Mistral"),
        ("internvl_chat", "InternVL"),
        ("qwen2_vl", "Qwen2VL"),
    ],
)
def test_the_base_s_kind_tells(tmp_path, model_type, family):
    config = {} if model_type is None else {"model_type": model_type}
    base = write_checkpoint(tmp_path / "base", TENSORS, config={**config, "other": 1})
    assert found(base_model_path=base) == family
    assert found(base_model_path=base, family="InternVL") == "InternVL"


def test_a_run_as_base_is_its_model(command, tmp_path):
    run = merged(tmp_path / "out", *command)
    assert found(base_model_path=run.folder) == "Mistral"


def test_a_configuration_names_the_base_or_is_a_run_s(tmp_path, command):
    base = write_checkpoint(tmp_path / "base", TENSORS, config={"model_type": "qwen2_vl"})
    file = tmp_path / "options.yaml"
    file.write_text(f"base_model_path: {base}\n")
    assert found(config=file) == "Qwen2VL"
    file.write_text(json.dumps({"family": "InternVL", "options": {"base_model_path": str(base)}}))
    assert found(config=file) == "InternVL"
    assert refusal(config=tmp_path / "none.yaml").startswith("--config: ")


def test_the_cache_folder_tells_by_the_base_in_it(tmp_path, no_dotenv):
    (tmp_path / "Qwen2-VL-7B").mkdir()
    assert found(cache_dir=tmp_path) == "Qwen2VL"
    assert found({"CACHE_DIR": str(tmp_path)}) == "Qwen2VL"
    (tmp_path / "models--mistralai--Mistral-7B-v0.1" / "snapshots").mkdir(parents=True)
    assert refusal(cache_dir=tmp_path) == (
        f"{tmp_path} has the bases of Mistral and Qwen2VL; give the --family that is meant"
    )
    assert refusal(cache_dir=tmp_path / "none") == f"--cache_dir {tmp_path}/none: there is no such folder"
    (tmp_path / "empty").mkdir()
    assert refusal(cache_dir=tmp_path / "empty") == (
        f"{tmp_path}/empty has the base of no family: InternVL2_5-1B (InternVL), Mistral-7B-v0.1 (Mistral), "
        "Qwen2-VL-7B (Qwen2VL); give --base_model_path, or another --cache_dir"
    )


def test_the_hub_tells_of_a_repository(tmp_path, monkeypatch):
    base = write_checkpoint(tmp_path / "base", TENSORS, config={"model_type": "qwen2_vl"})
    with serving(monkeypatch, tmp_path / "cache") as hub:
        hub.add("org/base", base)
        assert found(base_model_path="org/base") == "Qwen2VL"
        assert hub.sent == ["config.json"]
        assert refusal(base_model_path="org/none").startswith("org/none is neither a folder here nor a repository")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert found(base_model_path="org/base") == "Qwen2VL"  # from the cache
        assert "org/other is no folder here and not in the Hub's cache" in refusal(base_model_path="org/other")


def test_what_tells_nothing_is_refused(tmp_path, no_dotenv):
    assert refusal() == (
        "which models are merged? Give --base_model_path PATH and --expert NAME=PATH for each expert, or --cache_dir "
        "DIR with the checkpoints of one family (InternVL, Mistral, Qwen2VL)"
    )
    assert refusal(family="Llama") == "--family must be one of InternVL, Mistral, Qwen2VL, got Llama"
    (tmp_path / "folder").mkdir()
    assert refusal(base_model_path=tmp_path / "folder") == (
        f"--base_model_path: {tmp_path}/folder has no config.json that tells the family; is it the folder of a model?"
    )
