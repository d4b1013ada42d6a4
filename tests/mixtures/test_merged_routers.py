"""Mixtures merged with one another: every method, and routers made anew by modifiers."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from expert_merging.mixtures.router_calibration import Curvature, solve
from tests.checkpoints import BASE, EXPERTS, tensors_of, write_tasks
from tests.command import contents, merge, merged, refusal
from tests.mixtures.merging import save_zoo
from tests.statistics.faults import spoiled, stop_at_the_last_layer
from tests.statistics.twin import RESPONSES, answered, least_squares

ROUTER = re.compile(r".*\.gate\.weight")


@pytest.fixture(scope="module")
def zoos(tmp_path_factory):
    """Experts of a kind, made once, with calibration files."""
    made = {}

    def zoo(kind):
        if kind not in made:
            made[kind] = save_zoo(tmp_path_factory.mktemp(kind), kind)
            write_tasks(made[kind] / "dataset", responses=RESPONSES)
        return made[kind]

    return zoo


def given(zoo, *more):
    flags = ["--cache_dir", zoo, "--data_dir", zoo / "dataset", "--samples_per_task", 2, "--run_name", "r"]
    return [*flags, "--method", "task_arithmetic", "--post", "harc", *more]


def dense(inputs, router, damping):
    """An expert's curvature as a matrix, token by token, and beside the diagonal times the damping."""
    inputs, router = inputs.double(), router.double()
    size = router.numel()
    total = torch.zeros(size, size, dtype=torch.float64)
    for vector in inputs:
        shares = torch.softmax(router @ vector, 0)
        total += torch.kron(torch.diag(shares) - torch.outer(shares, shares), torch.outer(vector, vector))
    total /= len(inputs)
    return damping * total + (1 - damping) * torch.diag(total.diagonal())


def solved(inputs, routers, start, damping):
    """The nearest solution to the start, by singular values."""
    matrices = [dense(seen, router, damping) for seen, router in zip(inputs, routers, strict=True)]
    left = torch.stack(matrices).sum(0)
    right = sum(matrix @ router.double().flatten() for matrix, router in zip(matrices, routers, strict=True))
    start = start.double().flatten()
    change = torch.linalg.lstsq(left, right - left @ start, rcond=1e-12, driver="gelsd").solution
    return (start + change).view(routers[0].shape)


@pytest.mark.parametrize("damping", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("tokens", [(2, 3), (30, 40)], ids=["few", "many"])
def test_a_router_solves_the_equations(damping, tokens):
    torch.manual_seed(0)
    routers, start = [*torch.randn(2, 4, 6)], torch.randn(4, 6)
    inputs = [torch.randn(count, 6) for count in tokens]
    curvatures = [Curvature.of(seen, router, damping) for seen, router in zip(inputs, routers, strict=True)]
    found = solve(curvatures, routers, start, 1000)
    torch.testing.assert_close(found, solved(inputs, routers, start, damping), rtol=1e-4, atol=1e-4)


def test_the_curvature_is_that_of_the_divergence():
    """Of the expert's routing from the new router's, by autograd, at the expert's router."""
    torch.manual_seed(0)
    inputs, router, change = torch.randn(7, 5).double(), torch.randn(3, 5).double(), torch.randn(3, 5).double()
    shares = (inputs @ router.T).softmax(1)

    def divergence(other):
        return torch.nn.functional.kl_div((inputs @ other.T).log_softmax(1), shares, reduction="batchmean")

    expected = torch.autograd.functional.hvp(divergence, router, change)[1]
    torch.testing.assert_close(Curvature.of(inputs, router, 1.0).product(change), expected)


def test_one_expert_s_router_comes_back_and_nothing_is_nothing():
    torch.manual_seed(0)
    router, inputs = torch.randn(3, 5), torch.randn(20, 5)
    start = torch.randn(3, 5)
    found = solve([Curvature.of(inputs, router, 0.9)], [router], start, 1000)
    torch.testing.assert_close(found, router.double(), rtol=1e-3, atol=1e-3)
    nothing = solve([Curvature.of(torch.zeros(4, 5), router, 0.9)], [router], start, 1000)
    assert torch.equal(nothing, start.double())
    assert torch.equal(solve([Curvature.of(inputs, router, 0.9)], [router], router, 1000), router.double())
    assert torch.equal(solve([Curvature.of(inputs, router, 0.9)], [router], start, 0), start.double())


def inputs_of(model, name, asked, *, response_only=False):
    """What goes into a router, ``(tokens, hidden size)``, from whole runs of the model."""
    seen = []
    hook = model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
        lambda _router, given: seen.append(given[0].flatten(0, -2).clone())
    )
    with torch.no_grad():
        for inputs, _ in asked:
            model(**inputs)
    hook.remove()
    first = [prompt - 1 if response_only else 0 for _, prompt in asked]
    return torch.cat(
        [vectors[start : -1 if response_only else None] for vectors, start in zip(seen, first, strict=True)]
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe"])
def test_harc_changes_routers_as_the_plain_twin_and_nothing_else(kind, zoos, tmp_path):
    zoo = zoos(kind)
    run = merged(tmp_path / "out", *given(zoo, "--harc_damping", 0.5))
    plain = merged(tmp_path / "plain", "--cache_dir", zoo, "--method", "task_arithmetic")
    tokenizer = AutoTokenizer.from_pretrained(zoo / BASE)
    asked = {name: answered(tokenizer, name, RESPONSES[name], range(2)) for name in EXPERTS}

    def load(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    model, experts = load(plain.model), {name: load(zoo / folder) for name, folder in EXPERTS.items()}
    found, before = load(run.model), load(plain.model)
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.gate.weight"
        inputs = [inputs_of(model, name, asked[expert]) for expert in experts]
        routers = [expert.get_parameter(name).detach() for expert in experts.values()]
        router = model.get_parameter(name)
        router.data = solved(inputs, routers, router.detach(), 0.5).float()
        torch.testing.assert_close(found.get_parameter(name), router, rtol=1e-3, atol=1e-3)
        assert (router - before.get_parameter(name)).abs().max() > 0.02
    others, unchanged = tensors_of(run.model), tensors_of(plain.model)
    assert all(ROUTER.match(name) or torch.equal(others[name], unchanged[name]) for name in unchanged)


@pytest.mark.slow
def test_harc_leaves_layers_without_experts_alone(tmp_path):
    zoo = save_zoo(tmp_path / "zoo", "qwen3_moe", mlp_only_layers=[1])
    write_tasks(zoo / "dataset", responses=RESPONSES)
    run = merged(tmp_path / "out", *given(zoo))
    plain = tensors_of(merged(tmp_path / "plain", "--cache_dir", zoo, "--method", "task_arithmetic").model)
    changed = {name for name, tensor in tensors_of(run.model).items() if not torch.equal(tensor, plain[name])}
    assert changed == {f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 2)}


def test_harc_goes_on_with_the_layer_that_is_missing(zoos, tmp_path, monkeypatch):
    arguments = given(zoos("mixtral"))
    expected = contents(merged(tmp_path / "whole", *arguments).model)
    layers = stop_at_the_last_layer(monkeypatch, *arguments, "--output_path", tmp_path / "parts")
    assert contents(merged(tmp_path / "parts", *arguments).model) == expected
    assert layers == ["layer-0002"]


def test_the_plan_tells_of_routers(zoos, tmp_path, capsys):
    assert merge(*given(zoos("mixtral")), "--output_path", tmp_path, "--dry_run") == 0
    assert "3 routers are calibrated on 6 samples, a layer at a time" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_routers_are_the_experts_mean_and_all_else_as_it_was_merged(kind, zoos, tmp_path):
    zoo = zoos(kind)
    arguments = ["--cache_dir", zoo, "--method", "ties"]
    run = merged(tmp_path / "out", *arguments, "--post", "router_mean")
    plain = tensors_of(merged(tmp_path / "plain", *arguments).model)
    experts = [tensors_of(zoo / folder) for folder in EXPERTS.values()]
    for name, tensor in tensors_of(run.model).items():
        is_router = ROUTER.fullmatch(name) is not None
        expected = torch.stack([expert[name] for expert in experts]).mean(0) if is_router else plain[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6 if is_router else 0)
        assert torch.equal(tensor, plain[name]) != is_router, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_methods_that_look_at_inputs_solve_for_routers_and_tell_of_experts(kind, zoos, tmp_path):
    """RegMean against torch's least squares, on the tokens that predict the response alone."""
    zoo = zoos(kind)
    arguments = ["--cache_dir", zoo, "--data_dir", zoo / "dataset", "--samples_per_task", 2, "--method", "regmean"]
    run = merged(tmp_path, *arguments, "--loss_tokens", "response", "--reduce_non_diagonal_ratio", 0.9)
    tokenizer, found = AutoTokenizer.from_pretrained(zoo / BASE), tensors_of(run.model)
    models = {name: AutoModelForCausalLM.from_pretrained(zoo / folder) for name, folder in EXPERTS.items()}
    asked = {name: answered(tokenizer, name, RESPONSES[name], range(2)) for name in EXPERTS}
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.gate.weight"
        inputs = [inputs_of(model, name, asked[expert], response_only=True) for expert, model in models.items()]
        routers = torch.stack([model.get_parameter(name).detach() for model in models.values()])
        expected = least_squares(routers, inputs, 0.9)
        (router,) = (found[own] for own in found if ROUTER.match(own) and f".{layer}." in own)
        torch.testing.assert_close(router, expected, rtol=0, atol=2e-4)
        assert (router - routers.mean(0)).abs().max() > 1e-3
    assert ".experts.0." in run.log.read_text()
    assert "merged by the mean" in run.log.read_text()


@pytest.mark.parametrize("modifier", ["harc", "router_mean"])
def test_without_routers_there_is_nothing_to_make(modifier, zoos, tiny_zoo, tmp_path, capsys):
    arguments = ["--method", "task_arithmetic", "--post", modifier, "--output_path", tmp_path / "out"]
    known = "mixtral, olmoe, qwen2_moe, qwen3_moe"
    assert refusal(capsys, *arguments, "--cache_dir", tiny_zoo) == (
        f"--post {modifier} is for experts that are mixtures themselves ({known}), and {tiny_zoo / BASE} has the "
        "model_type 'mistral'; leave it out"
    )
    assert refusal(capsys, *arguments, "--cache_dir", zoos("mixtral"), "--exclude_params", r".*gate\.weight") == (
        f"--post {modifier} makes routers anew, and --exclude_params leaves out "
        "model.layers.0.block_sparse_moe.gate.weight and 2 more; exclude other parameters, or leave it out"
    )
    assert not (tmp_path / "out").exists()


def test_a_merged_model_that_computes_nan_is_refused(zoos, tmp_path, capsys):
    family = spoiled(BASE, "model.layers.1.input_layernorm")
    told = refusal(capsys, *given(zoos("mixtral"), "--output_path", tmp_path), family=family)
    assert told == "the merged model computes NaN or infinite values in layer 1; merge with less"


def test_options_are_checked(zoos, tmp_path, capsys):
    arguments = given(zoos("mixtral"), "--output_path", tmp_path)
    told = "--harc_damping must be a number in [0, 1], got 1.5"
    assert refusal(capsys, *arguments, "--harc_damping", 1.5) == told
    assert "--harc_iterations must be" in refusal(capsys, *arguments, "--harc_iterations", 0)
