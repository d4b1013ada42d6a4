"""What befalls the commands of several methods alike: an interrupt, and models that compute NaN."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_merging.backbone import Backbone
from expert_merging.running import samples
from expert_merging.statistics import layer_by_layer
from Mistral.backbone import BACKBONE
from tests.checkpoints import EXPERTS
from tests.command import merge, refusal


def stop_at_the_last_layer(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> list[str]:
    """Run a command that is interrupted when the last of three layers has been found.

    Returns:
        The layers that are written from now on; none yet.
    """
    write, layers = layer_by_layer.write_tensors, list[str]()

    def note(file: Path, *given: Any) -> None:
        layers.append(file.stem)
        write(file, *given)

    def stop(file: Path, *given: Any) -> None:
        if file.stem == "layer-0002":
            raise KeyboardInterrupt
        note(file, *given)

    monkeypatch.setattr(layer_by_layer, "write_tensors", stop)
    merge(*arguments)
    assert layers == ["layer-0000", "layer-0001"]
    layers.clear()
    monkeypatch.setattr(layer_by_layer, "write_tensors", note)
    return layers


def spoiled(folder: str, module: str, value: float = math.inf) -> Backbone:
    """The family, where the weights of a module of one checkpoint become what no file has once it is loaded."""

    def load(place: Path, dtype: torch.dtype) -> Any:
        model = BACKBONE.load_model(place, dtype)
        if place.name == folder:
            with torch.no_grad():
                model.get_submodule(module).weight.fill_(value)
        return model

    return replace(BACKBONE, load_model=load)


def refusal_of_nan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], precision: str, *arguments: object
) -> str:
    """What is told of an expert, Math, that computes NaN from its second layer on, but for the hint in float16."""
    monkeypatch.setattr(samples, "_precision", lambda *_: precision)
    monkeypatch.setitem(samples.DTYPES, "fp16", torch.float32)  # a CPU computes little in float16
    family = spoiled(EXPERTS["Math"], "model.layers.1.input_layernorm")
    told, _, hint = refusal(capsys, *arguments, family=family).partition("; ")
    assert hint == ("in bf16 there is room for larger numbers (--mixed_precision)" if precision == "fp16" else "")
    return told
