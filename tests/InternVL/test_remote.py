"""Checkpoints that run their own code because the user said so."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch

from expert_merging.errors import InputError
from expert_merging.learned.coefficients import load_coefficients
from InternVL import remote
from InternVL.backbone import BACKBONE, encode_prompt, load_model, load_processor, parameter_names
from tests.checkpoints import tensors_of
from tests.command import merged
from tests.internvl import BASE, EXPERTS, TOKENS, make_picture, make_zoo, save_model
from tests.internvl import CODE as PUBLISHED_CODE

# The original class in its form, small: parameters under the files' names, `extract_feature`, `language_model`,
# `generate` that gives the new tokens alone. The pictures' features differ from those of the native classes.
CODE = """
from torch import nn
from transformers import PreTrainedModel, Qwen2ForCausalLM
from .configuration_internvl_chat import InternVLChatConfig
{extra}

class Vision(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, width, 14, 14)

class InternVLChatModel(PreTrainedModel):
    config_class = InternVLChatConfig

    def __init__(self, config):
        super().__init__(config)
        width, hidden = 8, config.llm_config.hidden_size
        self.vision_model = Vision(width)
        self.mlp1 = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.language_model = Qwen2ForCausalLM(config.llm_config)
        self.img_context_token_id = None
        self.post_init()

    def extract_feature(self, pixel_values):
        return self.mlp1(self.vision_model.patch_embedding(pixel_values).flatten(2).transpose(1, 2))

    def generate(self, pixel_values=None, input_ids=None, attention_mask=None, **options):
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            selected = input_ids == self.img_context_token_id
            embeddings[selected] = self.extract_feature(pixel_values).flatten(0, 1)
        return self.language_model.generate(inputs_embeds=embeddings, attention_mask=attention_mask, **options)
"""
CONFIGURATION = """
from transformers import PretrainedConfig, Qwen2Config
{extra}

class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, llm_config=None, vision_config=None, **rest):
        super().__init__(**rest)
        self.llm_config = Qwen2Config(**{{**(llm_config or {{}}), "attn_implementation": "sdpa"}})
"""


def give_code(folder: Path, *, model: str = "", configuration: str = "") -> Path:
    """Put the code above into a checkpoint folder, and the weights that belong to it."""
    from safetensors.torch import save_file

    (folder / "modeling_internvl_chat.py").write_text(CODE.format(extra=model))
    (folder / "configuration_internvl_chat.py").write_text(CONFIGURATION.format(extra=configuration))
    config = json.loads((folder / "config.json").read_text())
    del config["llm_config"]["_attn_implementation"]
    (folder / "config.json").write_text(json.dumps({**config, "ps_version": "v1"}))
    tensors = {name: tensor for name, tensor in tensors_of(folder).items() if name.startswith("language_model")}
    generator = torch.Generator().manual_seed(len(str(folder)))
    sizes = {
        "0.weight": (8,),
        "0.bias": (8,),
        "1.weight": (32, 8),
        "1.bias": (32,),
        "3.weight": (32, 32),
        "3.bias": (32,),
    }
    tensors |= {f"mlp1.{name}": torch.randn(size, generator=generator) for name, size in sizes.items()}
    tensors["vision_model.patch_embedding.weight"] = 0.1 * torch.randn(8, 3, 14, 14, generator=generator)
    tensors["vision_model.patch_embedding.bias"] = torch.randn(8, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(autouse=True, scope="module")
def own_modules(tmp_path_factory):
    """transformers copies the code that it runs to a folder that becomes a package of the process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture
def folder(tmp_path) -> Path:
    return give_code(save_model(tmp_path / "model", 1))


def inputs_of(folder: Path, *pictures: Path):
    from expert_merging.questions.calibration import Sample

    processor = load_processor(folder, trust_remote_code=True)
    return encode_prompt(processor, Sample("t", "VQA", "Why?", None, "0", images=pictures), None)


def test_the_own_class_is_used_as_the_core_uses_models(folder, tmp_path):
    model = load_model(folder, torch.float32, trust_remote_code=True)
    assert not model.training
    assert {name for name, _ in model.named_parameters()} == set(tensors_of(folder))
    assert set(parameter_names(folder, trust_remote_code=True)) == set(tensors_of(folder))
    for pictures in ([], [make_picture(tmp_path / "a.png")]):
        inputs = inputs_of(folder, *pictures)
        with torch.no_grad():
            found = model.base_model(**inputs, output_hidden_states=True, use_cache=False)
            embeddings = model.language_model.get_input_embeddings()(inputs["input_ids"])
            if pictures:
                places = inputs["input_ids"] == TOKENS["<IMG_CONTEXT>"]
                embeddings[places] = model.extract_feature(inputs["pixel_values"]).flatten(0, 1)
            expected = model.language_model(inputs_embeds=embeddings, output_hidden_states=True)
        torch.testing.assert_close(model.get_output_embeddings()(found.last_hidden_state), expected.logits)
        torch.testing.assert_close(found.hidden_states, expected.hidden_states)
        written = model.generate(**inputs, do_sample=False, max_new_tokens=3, pad_token_id=256)
        prompt = inputs["input_ids"].shape[1]
        assert torch.equal(written[:, :prompt], inputs["input_ids"])
        assert written[0, prompt] == expected.logits[0, -1].argmax()


@pytest.mark.slow
def test_learning_with_the_own_class(tmp_path):
    cache = make_zoo(tmp_path / "cache")
    for name in (BASE, *EXPERTS.values()):
        give_code(cache / name)
    flags = ["--method", "expert_merging", "--log_with", "none", "--max_new_tokens", 3, "--trust_remote_code"]
    run = merged(
        tmp_path / "out", *flags, "--cache_dir", cache, "--data_dir", cache / "dataset", "--run_tests", family=BACKBONE
    )
    learned = load_coefficients(run.folder)
    assert {"mlp1.0.weight", "mlp1.1.weight", "mlp1.3.weight"} <= set(learned.values)
    assert all((values != 0.1).any() for values in learned.values.values())
    executed = [line for line in run.log.read_text().splitlines() if "--trust_remote_code: executing" in line]
    assert len(executed) == len({*executed}) > 0


def test_what_is_executed_is_said_once(folder, caplog):
    with caplog.at_level(logging.WARNING):
        load_model(folder, torch.float32, trust_remote_code=True)
        load_processor(folder, trust_remote_code=True)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "expert_merging.InternVL.remote"]
    names = ", ".join(PUBLISHED_CODE)
    assert line == f"--trust_remote_code: executing {names} of {folder}"


def test_missing_code_is_told_before_anything_is_executed(folder):
    (folder / "configuration_internvl_chat.py").unlink()
    with pytest.raises(InputError) as caught:
        parameter_names(folder, trust_remote_code=True)
    assert caught.value.problems == (
        f"{folder} lacks configuration_internvl_chat.py, which its config.json names as the model's code; download it "
        "again",
    )
    config = json.loads((folder / "config.json").read_text())
    elsewhere = {"AutoConfig": "OpenGVLab/InternVL2_5-1B--configuration_internvl_chat.InternVLChatConfig"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": elsewhere}))
    assert parameter_names(folder, trust_remote_code=True)


def test_without_the_flag_nothing_is_executed(folder):
    with pytest.raises(InputError, match="has ps_version 'v1'"):
        load_model(folder, torch.float32)


def test_packages_that_do_not_import_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    folder = give_code(save_model(tmp_path / "needs_timm", 1), model="import timm")
    monkeypatch.setattr(remote, "_imports", lambda name: name == "einops")
    message = r"its code does not import: \w+Error: .*timm.*\. Not installed or not working here: torchvision, timm; "
    with pytest.raises(InputError, match=message):
        load_model(folder, torch.float32, trust_remote_code=True)


def test_code_that_does_not_run_is_told_from_an_error_here(tmp_path):
    folder = give_code(save_model(tmp_path / "older", 1), configuration="raise TypeError('made for transformers 4')")
    message = r"its code does not run with transformers \d.*: TypeError: made for transformers 4"
    with pytest.raises(InputError, match=message):
        load_model(folder, torch.float32, trust_remote_code=True)
