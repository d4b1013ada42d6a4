"""Mixtures merged with one another: what every closed form makes of their tensors, and the order of their experts."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from expert_merging.mixtures.order import order_warnings
from expert_merging.plan import make_plan
from tests.checkpoints import BASE, EXPERTS, SINGLE, tensors_of
from tests.command import merged
from tests.mixtures.merging import save_zoo

KINDS = ("mixtral", "qwen3_moe")
EXCLUDED = re.compile(r".*norm.*|.*lm_head.*|.*embed_tokens.*")


@pytest.fixture(scope="module")
def zoos(tmp_path_factory):
    """A mixture and three fine-tunes of each kind."""
    return {kind: save_zoo(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def dense_twin(cache, zoo):
    """The same tensors under names of which nothing is known but that they are a layer's matrices."""
    for folder in (BASE, *EXPERTS.values()):
        (cache / folder).mkdir(parents=True)
        tensors = {plain_name(name): tensor for name, tensor in tensors_of(zoo / folder).items()}
        save_file(tensors, cache / folder / SINGLE, metadata={"format": "pt"})
        (cache / folder / "config.json").write_text('{"model_type": "mistral"}')
    return cache


def plain_name(name):
    """Experts' matrices and routers as further layers' projections; the rest keeps its name."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.\w+\.experts\.(\d+)\.(\w+)\.weight", name)
    if match:
        return f"model.layers.{match[1]}.dense.{match[2]}.{match[3]}.weight"
    return re.sub(r"layers\.(\d+)\.\w+\.gate\.", r"layers.\1.dense.router.", name)


# Of each kind of closed form one: of entries, with thresholds over the whole model, of matrices, of whole tensors.
METHODS = ("task_arithmetic", "weight_average", "ties", "sce", "breadcrumbs", "svd", "iso", "swudi", "ace", "cart")
METHODS += ("karcher", "model_stock", "varm", "widen", "opcm", "consensus")
CASES = [("mixtral", name) for name in METHODS] + [("qwen3_moe", name) for name in ("ties", "svd")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "method"), CASES)
def test_closed_forms_merge_each_tensor_of_the_files_as_any_other(kind, method, zoos, tmp_path):
    """Experts' matrices and routers are merged by their numbers alone."""
    arguments = ["--run_name", "r", "--method", method]
    if method == "consensus":
        arguments[-1:] = ["task_arithmetic", "--post", method]
    run = merged(tmp_path / "out", *arguments, "--cache_dir", zoos[kind])
    twin = merged(tmp_path / "twin", *arguments, "--cache_dir", dense_twin(tmp_path / "zoo", zoos[kind]))
    before, found, other = tensors_of(zoos[kind] / BASE), tensors_of(run.model), tensors_of(twin.model)
    assert before.keys() == found.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, other[plain_name(name)], rtol=0, atol=1e-5, msg=name)
        assert not EXCLUDED.match(name) or torch.equal(tensor, before[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dare_ta", "dare_ties", "della"])
def test_what_is_drawn_is_drawn_in_experts_and_routers_too(method, zoos, tmp_path):
    zoo = zoos["mixtral"]
    before, found = tensors_of(zoo / BASE), tensors_of(merged(tmp_path, "--method", method, "--cache_dir", zoo).model)

    def changed(kind):
        differs = [(found[name] != before[name]).flatten() for name in found if kind in name]
        return float(torch.cat(differs).float().mean())

    assert changed(".experts.") == pytest.approx(changed(".self_attn."), abs=0.02)
    assert changed(".gate.") == pytest.approx(changed(".self_attn."), abs=0.1)
    assert 0.2 < changed(".experts.") < 1


@pytest.mark.parametrize("kind", KINDS)
def test_merged_mixtures_load(kind, zoos, tmp_path):
    run = merged(tmp_path, "--method", "weight_average", "--cache_dir", zoos[kind])
    report = AutoModelForCausalLM.from_pretrained(run.model, output_loading_info=True)[1]
    assert not any(report.values()), report


def swapped(source, target, order, layers):
    """A copy of a Mixtral with the experts of some layers in another order: for each place, the expert's number."""
    shutil.copytree(source, target)
    tensors = tensors_of(source)
    moved = dict(tensors)
    for layer in layers:
        stem = f"model.layers.{layer}.block_sparse_moe"
        moved[f"{stem}.gate.weight"] = tensors[f"{stem}.gate.weight"][order].contiguous()
        for place, number in enumerate(order):
            for part in ("w1", "w2", "w3"):
                moved[f"{stem}.experts.{place}.{part}.weight"] = tensors[f"{stem}.experts.{number}.{part}.weight"]
    save_file(moved, target / SINGLE, metadata={"format": "pt"})
    return target


def test_experts_in_another_order_are_warned_of(zoos, tmp_path, capsys):
    zoo, order = zoos["mixtral"], [1, 2, 0, 3]
    other = swapped(zoo / EXPERTS["Math"], tmp_path / "swapped", order, (1, 2))
    same = AutoModelForCausalLM.from_pretrained(zoo / EXPERTS["Math"])(torch.arange(9)[None]).logits
    assert torch.allclose(AutoModelForCausalLM.from_pretrained(other)(torch.arange(9)[None]).logits, same, atol=1e-5)
    experts = {"Chat": zoo / EXPERTS["Chat"], "Math": other}
    (told,) = order_warnings(make_plan(zoo / BASE, experts, []))
    assert told == (
        "expert Math has its experts in another order than the base in 2 of 3 layers "
        "(model.layers.1.block_sparse_moe.gate.weight: row 0 is the base's row 1), and those of the same number are "
        "merged; save it with the experts, and the rows of its routers, in the base's order"
    )
    given = ["--base_model_path", zoo / BASE, "--expert", f"Math={other}", "--method", "weight_average"]
    merged(tmp_path / "out", *given)
    assert f"warning: {told}" in capsys.readouterr().out


def test_no_order_is_told_where_routers_say_nothing(zoos, tiny_zoo, tmp_path):
    """Routers of zeros or of another origin, and models without routers."""
    zoo = zoos["mixtral"]
    experts = {name: zoo / folder for name, folder in EXPERTS.items()}
    assert not order_warnings(make_plan(zoo / BASE, experts, []))
    dense = {name: tiny_zoo / folder for name, folder in EXPERTS.items()}
    assert not order_warnings(make_plan(tiny_zoo / BASE, dense, []))
    for kind in (torch.zeros_like, lambda tensor: torch.randn_like(tensor) @ torch.eye(32).flip(0)):
        shutil.copytree(zoo / EXPERTS["Math"], tmp_path / "odd", dirs_exist_ok=True)
        torch.manual_seed(1)
        tensors = tensors_of(tmp_path / "odd")
        odd = {name: kind(tensor) if ".gate." in name else tensor for name, tensor in tensors.items()}
        save_file(odd, tmp_path / "odd" / SINGLE, metadata={"format": "pt"})
        assert not order_warnings(make_plan(zoo / BASE, {"Math": tmp_path / "odd"}, []))
