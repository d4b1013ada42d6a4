"""A merged folder in the hands of other programs: they find every weight where they look for it."""

from __future__ import annotations

import pytest
import torch
from gguf import MODEL_ARCH, get_tensor_name_map
from transformers import AutoConfig, AutoModelForCausalLM

from tests.checkpoints import SIZES, perturb, save_tokenizer, tensors_of
from tests.command import flags, merged

# How llama.cpp's converter calls what transformers calls so.
ARCHITECTURES = {"mistral": MODEL_ARCH.LLAMA, "llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_merge_is_loaded_whole_and_its_names_are_those_of_converters(kind, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES)).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    experts = {name: tmp_path / name for name in "AB"}
    for seed, folder in enumerate(experts.values(), 1):
        perturb(tmp_path / "base", folder, seed)
    run = merged(tmp_path / "out", "--method", "ties", *flags(tmp_path / "base", **experts))
    model, found = AutoModelForCausalLM.from_pretrained(run.model, output_loading_info=True)
    assert not any(found.values()), found
    tensors = tensors_of(run.model)
    assert not tensors["model.layers.0.mlp.up_proj.weight"].equal(
        tensors_of(tmp_path / "base")["model.layers.0.mlp.up_proj.weight"]
    )
    for name, tensor in tensors.items():
        assert model.state_dict()[name].equal(tensor), name
    names = get_tensor_name_map(ARCHITECTURES[kind], model.config.num_hidden_layers)
    unknown = [name for name in tensors if names.get_name(name, try_suffixes=(".weight", ".bias")) is None]
    assert unknown == []
