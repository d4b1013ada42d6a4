"""Models that cannot be learned with are refused before any work."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expert_merging.errors import InputError
from Mistral.backbone import BACKBONE
from tests.checkpoints import BASE, EXPERTS, save_model, tensors_of, write_checkpoint, write_tasks
from tests.learned.training import make_trainer


def test_a_model_without_gradient_checkpointing_is_refused(answered_zoo, tmp_path, monkeypatch):
    from transformers import MistralForCausalLM

    def refuse(*_args, **_keywords):
        raise ValueError("MistralForCausalLM is not compatible with gradient checkpointing.")

    monkeypatch.setattr(MistralForCausalLM, "_set_gradient_checkpointing", refuse)
    trainer = make_trainer(answered_zoo, tmp_path, gradient_checkpointing=True)
    with pytest.raises(InputError, match="--gradient_checkpointing: MistralForCausalLM is not compatible"):
        trainer.train()


def test_what_is_merged_must_be_parameters_of_the_model(answered_zoo, tmp_path, monkeypatch):
    names = BACKBONE.parameter_names
    monkeypatch.setattr(
        "tests.learned.training.BACKBONE",
        replace(BACKBONE, parameter_names=lambda folder: [name.replace("q_proj", "query") for name in names(folder)]),
    )
    with pytest.raises(
        InputError, match=r"q_proj\.weight is in the checkpoint, and is neither a parameter of the model nor"
    ):
        make_trainer(answered_zoo, tmp_path)


@pytest.mark.parametrize(("directions", "default"), [("task_vectors", 0.3), ("iwudi", 1.0)])
def test_experts_without_a_coefficient_of_their_own_begin_with_the_default(answered_zoo, tmp_path, directions, default):
    trainer = make_trainer(answered_zoo, tmp_path, directions=directions, scaling_coefficient=[None, 0.5, None])
    assert trainer.settings.layout.initial == (default, 0.5, default)


def changed_config(source: Path, target: Path, **changes) -> Path:
    """A cache folder whose base has another ``config.json``."""
    for folder in EXPERTS.values():
        target.mkdir(exist_ok=True)
        (target / folder).symlink_to(source / folder)
    (target / "dataset").symlink_to(source / "dataset")
    (target / BASE).mkdir()
    for file in (source / BASE).iterdir():
        (target / BASE / file.name).write_bytes(file.read_bytes())
    config = {**json.loads((source / BASE / "config.json").read_text()), **changes}
    (target / BASE / "config.json").write_text(json.dumps(config))
    return target


def test_a_model_that_changes_its_logits_is_refused(answered_zoo, tmp_path):
    cache = changed_config(answered_zoo, tmp_path / "cache", final_logit_softcapping=30.0)
    with pytest.raises(InputError, match="changes its logits after the output head"):
        make_trainer(cache, tmp_path / "run")


def test_a_model_that_is_not_whole_is_refused(tmp_path):
    """Otherwise transformers would fill it up with random numbers."""
    save_model(tmp_path / "whole", 0, tie_word_embeddings=True)
    assert BACKBONE.load_model(tmp_path / "whole", torch.float32).lm_head.weight.any()
    tensors = tensors_of(tmp_path / "whole")
    folder = write_checkpoint(tmp_path / "part", {name: tensors[name] for name in sorted(tensors)[:-2]})
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        BACKBONE.load_model(folder, torch.float32)
    first = sorted(tensors)[-2]
    assert caught.value.problems == (
        f"{folder} lacks {first} and 1 more, which the model of its config.json has; download it again",
    )
    write_checkpoint(folder, tensors)
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(InputError) as caught:
        BACKBONE.load_model(folder, torch.float32)
    assert caught.value.problems == (
        f"{folder}: model.layers.0.mlp.down_proj.weight has shape [32, 48], and [32, 40] by config.json; "
        "download both again",
    )


def test_what_the_model_lacks_is_found_before_any_work(tiny_zoo, tmp_path):
    for folder in [BASE, *EXPERTS.values()]:
        tensors = tensors_of(tiny_zoo / folder)
        shutil.copytree(tiny_zoo / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        del tensors["model.norm.weight"]
        write_checkpoint(tmp_path / folder, tensors, config=json.loads((tiny_zoo / folder / "config.json").read_text()))
    write_tasks(tmp_path / "dataset")
    with pytest.raises(InputError) as caught:
        make_trainer(tmp_path, tmp_path / "run")
    assert caught.value.problems == tuple(
        f"{tmp_path / folder} lacks model.norm.weight, which the model of its config.json has; download it again"
        for folder in (BASE, *EXPERTS.values())
    )


def test_code_of_a_checkpoint_is_not_executed(answered_zoo, tmp_path):
    changes = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}}
    cache = changed_config(answered_zoo, tmp_path / "cache", **changes)
    (cache / BASE / "configuration_mine.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    with pytest.raises(
        InputError, match="no causal language model that transformers knows, and code of checkpoints is"
    ):
        make_trainer(cache, tmp_path / "run")
    assert not (tmp_path / "executed").exists()
