"""A merge in memory is the one that would be written."""

from __future__ import annotations

import json

import pytest
import torch

from expert_merging.catalogue import find_method
from expert_merging.errors import InputError
from expert_merging.plan import make_plan
from expert_merging.running.in_memory import InMemory
from expert_merging.running.sharding import load_on
from Mistral.backbone import BACKBONE
from tests.checkpoints import BASE, EXPERTS, make_zoo, tensors_of, write_checkpoint
from tests.command import merged


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def zoo(request, tmp_path_factory):
    return make_zoo(tmp_path_factory.mktemp("zoo"), dtype=request.param)


def live(zoo, excluded=BACKBONE.exclude_params):
    experts = {name: zoo / folder for name, folder in EXPERTS.items()}
    plan = make_plan(zoo / BASE, experts, list(excluded), BACKBONE.file_name, BACKBONE.landmark)
    model = load_on(torch.device("cpu"), BACKBONE, plan.base, torch.float32, sharded=False)
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


def test_a_head_that_the_files_have_as_the_embedding_goes_with_it(tmp_path):
    """Also where config.json does not say so, for which transformers has two parameters."""
    zoo = make_zoo(tmp_path / "zoo", tie_word_embeddings=True)
    for folder in (BASE, *EXPERTS.values()):
        stored = tensors_of(zoo / folder)
        config = json.loads((zoo / folder / "config.json").read_text())
        del config["tie_word_embeddings"]
        table = stored["model.embed_tokens.weight"]
        write_checkpoint(zoo / folder, {**stored, "lm_head.weight": table.clone()}, config=config)
    method = find_method("task_arithmetic")
    given = ["--method", method.name, "--scaling_coefficient", 0.4, "--exclude_params", "none"]
    written = tensors_of(merged(tmp_path / "out", "--cache_dir", zoo, *given).model)
    assert not written["lm_head.weight"].equal(tensors_of(zoo / BASE)["lm_head.weight"])
    memory = live(zoo, [])
    model = memory.merge(method.rule({"seed": 0, "experts": tuple(EXPERTS)}, {"scaling_coefficient": 0.4}), method.unit)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert model.get_parameter(name).equal(written[name])


def test_a_tensor_that_is_no_parameter_is_refused(zoo):
    memory = live(zoo)
    with pytest.raises(InputError, match="is in the checkpoint but is no parameter of the loaded model; exclude it"):
        InMemory(torch.nn.Linear(2, 2), memory.plan, BACKBONE.file_name, torch.device("cpu"))
