"""A merge in memory is the one that would be written."""

from __future__ import annotations

import pytest
import torch

from expert_merging.catalogue import find_method
from expert_merging.errors import InputError
from expert_merging.plan import make_plan
from expert_merging.running.in_memory import InMemory
from Mistral.backbone import BACKBONE
from tests.checkpoints import BASE, EXPERTS, make_zoo, tensors_of
from tests.command import merged


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def zoo(request, tmp_path_factory):
    return make_zoo(tmp_path_factory.mktemp("zoo"), dtype=request.param)


def live(zoo, excluded=BACKBONE.exclude_params):
    experts = {name: zoo / folder for name, folder in EXPERTS.items()}
    plan = make_plan(zoo / BASE, experts, list(excluded), BACKBONE.file_name, BACKBONE.landmark)
    model = BACKBONE.load_model(zoo / BASE, torch.float32)
    return InMemory(model, plan, BACKBONE.file_name, torch.device("cpu"))


@pytest.mark.parametrize("name", ["task_arithmetic", "dare_ta", "sce", "svd", "iwudi"])
def test_weights_are_those_of_the_files(zoo, tmp_path, name):
    """Rules of entries, random ones, ones of whole tensors and of matrices, one after the other in the same model."""
    method, options = find_method(name), dict[str, object](scaling_coefficient=0.4)
    if name == "dare_ta":
        options["dare_rescale"] = "probability"
    given = [text for option, value in options.items() for text in (f"--{option}", value)]
    run = merged(tmp_path, "--cache_dir", zoo, "--method", name, *given)
    memory = live(zoo)
    known = {"seed": 0, "experts": tuple(EXPERTS), "factors": {}}
    values = {**method.defaults(BACKBONE.defaults), **options}
    memory.merge(find_method("task_arithmetic").rule(known, {"scaling_coefficient": 3.0}), "entries")
    model = memory.merge(method.rule(known, values), method.unit)
    written = {name: tensor.float() for name, tensor in tensors_of(run.model).items()}
    own = dict(model.named_parameters())
    assert own.keys() == written.keys()
    for name, weight in own.items():
        torch.testing.assert_close(weight.detach(), written[name], rtol=0, atol=0, msg=name)


def test_a_tensor_that_is_no_parameter_is_refused(zoo):
    memory = live(zoo)
    with pytest.raises(InputError, match="is in the checkpoint but is no parameter of the loaded model; exclude it"):
        InMemory(torch.nn.Linear(2, 2), memory.plan, BACKBONE.file_name, torch.device("cpu"))
