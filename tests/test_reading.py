"""Whatever is wrong with files that transformers reads is one sentence that names the folder, and the file if known."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import InternVL.backbone
import Mistral.backbone
import Qwen2VL.backbone
from expert_merging.checkpoints.reading import MODEL_FILES, damaged_files, reading
from expert_merging.errors import InputError
from tests import checkpoints, internvl, qwen2vl

FAMILIES = {
    "Mistral": (Mistral.backbone.BACKBONE, checkpoints.save_model),
    "Qwen2VL": (Qwen2VL.backbone.BACKBONE, qwen2vl.save_model),
    "InternVL": (InternVL.backbone.BACKBONE, internvl.save_model),
}
READ = {
    "Mistral": ["tokenizer.json", "tokenizer_config.json"],  # its config.json is opened with its tensors
    "Qwen2VL": [
        *("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.json"),
    ],
    "InternVL": ["config.json", "tokenizer_config.json", "vocab.json"],
}
# Not JSON, or not an object.
DAMAGES = ("", "{", "[]", "null", '"x"', "\xff")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("models")
    for name, (_, save) in FAMILIES.items():
        save(made / name, 0)
    return made


@pytest.mark.parametrize(("family", "file"), [(family, file) for family, files in READ.items() for file in files])
@pytest.mark.parametrize("content", DAMAGES)
def test_a_damaged_file_of_the_processor_is_named(family, file, content, folders, tmp_path):
    folder = shutil.copytree(folders / family, tmp_path / "base")
    (folder / file).write_bytes(content.encode("latin-1"))
    backbone = FAMILIES[family][0]
    functions = [backbone.load_processor]
    if file == "config.json":
        functions = [backbone.parameter_names, *([backbone.load_processor] if family == "InternVL" else [])]
    if content == "null" and file == "preprocessor_config.json":
        functions = []  # which transformers takes for a missing one
    for function in functions:
        with pytest.raises(InputError) as caught:
            function(folder)
        (problem,) = caught.value.problems
        endings = (" is not valid JSON (", " holds ")
        assert problem.startswith(tuple(f"{folder / file}{ending}" for ending in endings))
        assert problem.endswith("; download it again")


@pytest.mark.parametrize(
    ("family", "file", "content"),
    [
        *((family, "tokenizer_config.json", {"tokenizer_class": 3}) for family in FAMILIES),
        *((family, "tokenizer_config.json", {"added_tokens_decoder": 3}) for family in FAMILIES),
        *((family, "tokenizer.json", {}) for family in ("Mistral", "Qwen2VL")),
        ("InternVL", "merges.txt", "x"),
    ],
)
def test_files_that_hold_something_else_are_told_by_what_transformers_says(family, file, content, folders, tmp_path):
    folder = shutil.copytree(folders / family, tmp_path / "base")
    (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError) as caught:
        FAMILIES[family][0].load_processor(folder)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{folder} has no ")
    assert " that transformers reads: " in problem
    assert "\n" not in problem


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_a_thousand_million_layers_is_not_begun(family, folders, tmp_path):
    folder = shutil.copytree(folders / family, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    part = config.get("llm_config", config)
    part["num_hidden_layers"] = 10**9
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        FAMILIES[family][0].parameter_names(folder)
    assert caught.value.problems == (
        f"{folder / 'config.json'} has num_hidden_layers 1000000000, and no model has more than 10000; download it "
        "again",
    )


@pytest.mark.parametrize(
    ("name", "value"), [("hidden_size", 0), ("vocab_size", 0), ("num_attention_heads", -1), ("num_hidden_layers", 0)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_nothing_is_refused(family, name, value, folders, tmp_path):
    """Which torch would make, with a warning of its own."""
    folder = shutil.copytree(folders / family, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config.get("llm_config", config)[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        FAMILIES[family][0].parameter_names(folder)
    assert caught.value.problems == (
        f"{folder / 'config.json'} has {name} {value}, and every model has at least 1; download it again",
    )


@pytest.mark.parametrize("change", [{"num_attention_heads": "x"}, {"hidden_size": None}, {"rms_norm_eps": []}])
def test_settings_of_the_wrong_type_are_told_by_what_transformers_says(change, folders, tmp_path):
    folder = shutil.copytree(folders / "Mistral", tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=rf"^{folder} has no configuration that transformers reads: .*|code of checkp"):
        Mistral.backbone.BACKBONE.parameter_names(folder)


def test_a_tokenizer_that_fails_at_its_first_text_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders / "Mistral", tmp_path / "base")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": ""}))
    with pytest.raises(InputError, match=rf"^{folder} has no tokenizer that transformers reads: TypeError: .*"):
        Mistral.backbone.BACKBONE.load_processor(folder)


def test_damaged_settings_of_generation_are_named(folders, tmp_path):
    folder = shutil.copytree(folders / "Mistral", tmp_path / "base")
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(InputError) as caught:
        Mistral.backbone.load_model(folder, torch.float32)
    problem = f"{folder / 'generation_config.json'} holds list, not a JSON object; download it again"
    assert caught.value.problems == (problem,)


@pytest.mark.parametrize("error", [InputError("as it is"), RuntimeError("a mistake here"), MemoryError()], ids=repr)
def test_other_errors_pass(error, tmp_path):
    with pytest.raises(type(error)) as caught, reading(tmp_path, "tokenizer"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("first:\nsecond"), "first"),
        (ImportError("needs sentencepiece"), "needs sentencepiece"),
        (KeyError("added_tokens"), "KeyError: 'added_tokens'"),
        (ZeroDivisionError(), "ZeroDivisionError: ZeroDivisionError"),
        (Exception("from the tokenizers"), "Exception: from the tokenizers"),
    ],
    ids=repr,
)
def test_the_reason_is_the_first_line(error, reason, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError) as caught, reading(tmp_path, "tokenizer"):
        raise error
    assert caught.value.problems == (f"{tmp_path} has no tokenizer that transformers reads: {reason}",)


@pytest.mark.parametrize("family", ["Mistral", "Qwen2VL"])
def test_a_folder_without_a_tokenizer_is_told_what_it_lacks(family, folders, tmp_path, monkeypatch):
    folder = shutil.copytree(folders / family, tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    found = []
    for content, there in ((None, None), (b"pieces", None), (b"pieces", "there")):
        if content is not None:
            (folder / "tokenizer.model").write_bytes(content)
        monkeypatch.setattr("expert_merging.checkpoints.reading.find_spec", lambda _, there=there: there)
        with pytest.raises(InputError) as caught:
            FAMILIES[family][0].load_processor(folder)
        found += caught.value.problems
    none, one, odd = found
    assert none == (
        f"{folder} has no tokenizer: no tokenizer.json, tokenizer.model or vocab.json is there; download them"
    )
    assert one == (
        f"{folder} has its tokenizer as tokenizer.model alone; to read it, pip install sentencepiece, or put the "
        "tokenizer.json of the same tokenizer beside it"
    )
    assert " that transformers reads: " in odd


def test_all_damaged_files_are_found(tmp_path):
    for name in ("config.json", "vocab.json"):
        (tmp_path / name).write_text("{")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert [problem.split(" ")[0] for problem in damaged_files(tmp_path)] == [
        str(tmp_path / "config.json"),
        str(tmp_path / "vocab.json"),
    ]
    assert len(damaged_files(tmp_path, MODEL_FILES)) == 1
