"""A mixture of experts: what it is made of, that it loads, and that it computes what its experts compute."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from expert_merging import merge as driver
from expert_merging.mixtures import moe
from expert_merging.mixtures.layouts import LAYOUTS
from expert_merging.outputs import shards
from Mistral.backbone import BACKBONE
from tests.checkpoints import (
    BASE,
    EXPERTS,
    SIZES,
    perturb,
    save_tokenizer,
    tensors_of,
    write_checkpoint,
)
from tests.command import assert_same_bytes, contents, flags, merge, merged, refusal, refused
from tests.test_naming import renamed

MOE = ("--method", "moe")
W = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
LAYERS = range(SIZES["num_hidden_layers"])
MLP = ".*mlp.*"


def routers(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors_of(folder).items() if name.endswith(".gate.weight")}


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(SIZES["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens).logits


def rewritten(source: Path, target: Path, **changes: object) -> Path:
    """A copy of a checkpoint with other entries in its ``config.json``."""
    perturb(source, target, 0, change=0)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def config_of(dense: dict[str, object]) -> dict[str, object]:
    return LAYOUTS[str(dense["model_type"])].config(dense, experts=3, per_token=2, shared_columns=1)


def save_dense(folder: Path, kind: str, **changes: object) -> None:
    """A random model of a kind, with its tokenizer; its vectors are random as well."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    save_tokenizer(folder)


# Settings that a mixture's own defaults differ from.
KINDS = {
    "mistral": {"sliding_window": 8},
    "llama": {"num_key_value_heads": None},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "head_dim": 12},
}
MIXTURES = {"mistral": "Mixtral", "llama": "Mixtral", "qwen2": "Qwen2Moe", "qwen3": "Qwen3Moe"}


@pytest.fixture(scope="module", params=KINDS)
def family(request, tmp_path_factory):
    """A base and an expert of each kind, in a folder of its name."""
    folder = tmp_path_factory.mktemp("kinds") / request.param
    save_dense(folder / "base", request.param, **KINDS[request.param])
    perturb(folder / "base", folder / "expert", 1)
    return folder


@pytest.mark.parametrize("more", [[], ["--shared_expert", "base"]], ids=["", "shared expert"])
def test_it_loads_without_missing_unexpected_or_mismatched_keys(more, family, tmp_path):
    if more and family.name != "qwen2":
        pytest.skip("it has no shared expert")
    run = merged(tmp_path, *MOE, *more, *flags(family / "base", A=family / "expert", B=family / "base"))
    model, report = AutoModelForCausalLM.from_pretrained(run.model, dtype="auto", output_loading_info=True)
    assert type(model).__name__ == f"{MIXTURES[family.name]}ForCausalLM"
    assert {kind: sorted(names) for kind, names in report.items() if names} == {}
    model.save_pretrained(tmp_path / "again")
    assert_same_bytes(tensors_of(tmp_path / "again"), tensors_of(run.model))


def test_it_answers(tiny_zoo, tmp_path):
    run = merged(tmp_path, *MOE, "--cache_dir", tiny_zoo)
    model = BACKBONE.load_model(run.model, torch.float32)  # as for --run_tests
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    answer = model.generate(**tokenizer("Why?", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > 5


@pytest.mark.parametrize("router", [("--router", "random"), ("--router", "zeros", "--experts_per_token", 3)], ids=str)
def test_identical_experts_compute_what_the_dense_model_computes(router, family, tmp_path):
    """Sliding windows, rotary base and norms are those of the dense model, or the logits would be others."""
    given = flags(family / "base", **dict.fromkeys("ABC", family / "expert"))
    dense = merged(tmp_path / "dense", "--method", "weight_average", *given)
    mixture = merged(tmp_path / "mixture", *MOE, *router, *given)
    torch.testing.assert_close(logits(mixture.model), logits(dense.model), rtol=0, atol=1e-5)
    assert not logits(dense.model).allclose(logits(family / "base"), rtol=0, atol=1e-3)


def test_with_nothing_excluded_it_is_the_expert(family, tmp_path):
    given = flags(family / "base", **dict.fromkeys("AB", family / "expert"))
    mixture = merged(tmp_path, *MOE, *given, "--exclude_params", "none")
    torch.testing.assert_close(logits(mixture.model), logits(family / "expert"), rtol=0, atol=1e-5)


def test_a_mixture_is_to_be_trained_before_it_is_evaluated(tiny_zoo, tmp_path):
    log = merged(tmp_path, *MOE, "--cache_dir", tiny_zoo).log.read_text()
    assert "load it:" in log
    assert "evaluate it:" not in log


def test_of_a_qwen_mixture_each_expert_has_its_classic_names(tmp_path):
    save_dense(tmp_path / "base", "qwen3")
    perturb(tmp_path / "base", tmp_path / "a", 1)
    run = merged(tmp_path / "out", *MOE, *flags(tmp_path / "base", A=tmp_path / "a"), "--include_base")
    written, expert = tensors_of(run.model), tensors_of(tmp_path / "a")
    for layer in LAYERS:
        for part in W.values():
            wanted = expert[f"model.layers.{layer}.mlp.{part}.weight"]
            assert written[f"model.layers.{layer}.mlp.experts.0.{part}.weight"].equal(wanted)
        assert written[f"model.layers.{layer}.mlp.gate.weight"].shape == (2, SIZES["hidden_size"])
    assert json.loads((run.model / "config.json").read_text())["num_experts"] == 2


def test_a_shared_expert_adds_nothing_or_a_half_of_the_base(tmp_path):
    save_dense(tmp_path / "base", "qwen2")
    perturb(tmp_path / "base", tmp_path / "a", 1)
    experts = flags(tmp_path / "base", A=tmp_path / "a", B=tmp_path / "a")
    without = merged(tmp_path / "none", *MOE, *experts)
    tensors = tensors_of(without.model)
    names = [f"model.layers.0.mlp.shared_expert.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")]
    hidden, middle = SIZES["hidden_size"], SIZES["intermediate_size"]
    assert [tuple(tensors[name].shape) for name in names] == [(1, hidden), (1, hidden), (hidden, 1)]
    assert not any(tensors[name].any() for name in names)

    half = merged(tmp_path / "base-shared", *MOE, *experts, "--shared_expert", "base")
    model = AutoModelForCausalLM.from_pretrained(half.model, dtype=torch.float32)
    dense = [AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("a", "base")]
    states = torch.randn(1, 3, hidden, generator=torch.Generator().manual_seed(0))
    expert, base = (one.model.layers[0].mlp(states) for one in dense)
    found = model.model.layers[0].mlp(states)
    torch.testing.assert_close(found if isinstance(found, torch.Tensor) else found[0], expert + base / 2)
    assert json.loads((half.model / "config.json").read_text())["shared_expert_intermediate_size"] == middle


def test_feed_forward_tensors_are_the_experts_byte_for_byte(tiny_zoo, tmp_path):
    run = merged(tmp_path, *MOE, "--cache_dir", tiny_zoo, "--include_base")
    written = tensors_of(run.model)
    for number, folder in enumerate([*EXPERTS.values(), BASE]):
        expert = tensors_of(tiny_zoo / folder)
        assert_same_bytes(
            {
                (layer, dense): written[f"model.layers.{layer}.block_sparse_moe.experts.{number}.{short}.weight"]
                for layer in LAYERS
                for short, dense in W.items()
            },
            {
                (layer, dense): expert[f"model.layers.{layer}.mlp.{dense}.weight"]
                for layer in LAYERS
                for dense in W.values()
            },
        )
    assert not any(".mlp." in name for name in written)


@pytest.mark.parametrize("method", ["weight_average", "task_arithmetic", "ties", "dare_ties", "svd"])
def test_shared_tensors_are_those_of_the_shared_method_alone(method, tiny_zoo, tmp_path):
    """Thresholds of TIES too, which are taken over what is merged."""
    mixture = merged(tmp_path / "mixture", *MOE, "--shared", method, "--cache_dir", tiny_zoo)
    plain = merged(
        tmp_path / "plain", "--method", method, "--cache_dir", tiny_zoo,
        "--exclude_params", *BACKBONE.exclude_params, MLP,
    )  # fmt: skip
    expected = {name: tensor for name, tensor in tensors_of(plain.model).items() if ".mlp." not in name}
    written = tensors_of(mixture.model)
    assert_same_bytes({name: written[name] for name in expected}, expected)
    assert len(written) == len(expected) + len(LAYERS) * (3 * len(EXPERTS) + 1)


def test_routers_depend_on_the_seed_and_on_nothing_else(tiny_zoo, tmp_path):
    def made(name, *more):
        return merged(tmp_path / name, *MOE, "--cache_dir", tiny_zoo, *more).model

    first = made("first", "--seed", 1)
    assert_same_bytes(tensors_of(made("again", "--seed", 1)), tensors_of(first))
    others = routers(made("other", "--seed", 2))
    for name, router in routers(first).items():
        assert router.shape == (3, SIZES["hidden_size"])
        assert router.std().item() == pytest.approx(0.02, rel=0.3)
        assert not router.equal(others[name])
    assert len({router.flatten()[0].item() for router in routers(first).values()}) == len(LAYERS)


def test_experts_in_another_order_make_the_same_model(tiny_zoo, tmp_path):
    def made(name, order):
        experts = {expert: tiny_zoo / EXPERTS[expert] for expert in order}
        return merged(tmp_path / name, *MOE, *flags(tiny_zoo / BASE, **experts)).model

    first, turned = made("first", ["Chat", "Math", "Code"]), made("turned", ["Code", "Chat", "Math"])
    for name, router in routers(first).items():
        assert router[[2, 0, 1]].equal(routers(turned)[name])
    torch.testing.assert_close(logits(first), logits(turned), rtol=0, atol=1e-5)


def test_zeros_are_zero(tiny_zoo, tmp_path):
    run = merged(tmp_path, *MOE, "--cache_dir", tiny_zoo, "--router", "zeros", "--experts_per_token", 3)
    assert all(not router.any() for router in routers(run.model).values())


def test_an_interrupted_run_keeps_finished_shards_and_ends_with_the_same_bytes(tiny_zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(moe, "shards", partial(shards, largest=40_000))
    command = [*MOE, "--cache_dir", tiny_zoo, "--run_name", "x"]
    run = merged(tmp_path, *command)
    whole = contents(run.model)
    index = json.loads((run.model / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(run.model).values())
    assert index["weight_map"].keys() == tensors_of(run.model).keys()
    assert logits(run.model).isfinite().all()

    run.model.rename(run.partial_model)
    first, second, third, *others = sorted(run.partial_model.glob("*.safetensors"))
    assert others
    second.rename(f"{second}.partial")
    third.unlink()
    (run.partial_model / "config.json").unlink()
    before = first.stat().st_ino, first.stat().st_mtime_ns
    assert contents(merged(tmp_path, *command).model) == whole
    first = run.model / first.name
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == before
    assert f"kept {len(others) + 1} finished shards" in run.log.read_text()


@pytest.mark.parametrize("bytes_at_a_time", [101, 1 << 22])
def test_experts_of_another_type_get_the_base_s(bytes_at_a_time, tiny_zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "_COPY_BYTES", bytes_at_a_time)
    perturb(tiny_zoo / BASE, tmp_path / "base", 0, change=0, dtype=torch.bfloat16)
    perturb(tiny_zoo / BASE, tmp_path / "a", 1, dtype=torch.float16)
    perturb(tiny_zoo / BASE, tmp_path / "b", 2, dtype=torch.bfloat16)
    given = flags(tmp_path / "base", A=tmp_path / "a", B=tmp_path / "b")
    written = tensors_of(merged(tmp_path / "out", *MOE, *given).model)
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    for number, name in enumerate("ab"):
        expected = tensors_of(tmp_path / name)["model.layers.1.mlp.up_proj.weight"].bfloat16()
        assert written[f"model.layers.1.block_sparse_moe.experts.{number}.w3.weight"].equal(expected)


def test_values_that_the_base_s_type_cannot_hold_are_refused(capsys, tiny_zoo, tmp_path):
    perturb(tiny_zoo / BASE, tmp_path / "base", 0, change=0, dtype=torch.float16)
    tensors = tensors_of(tiny_zoo / BASE)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    write_checkpoint(tmp_path / "a", tensors)
    given = flags(tmp_path / "base", A=tmp_path / "a")
    command = [*MOE, *given, "--experts_per_token", 1, "--output_path", tmp_path / "out"]
    assert refusal(capsys, *command) == (
        "model.layers.1.mlp.up_proj.weight of expert A has values that F16 (the base's type) cannot hold; convert the "
        "base to a wider type"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("expert", [True, False], ids=["expert", "base"])
def test_nan_and_infinity_do_not_become_an_expert(expert, value, capsys, tiny_zoo, tmp_path):
    """Feed-forward layers are copied, of an expert or of the base, and are looked at as what is merged is."""
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = tensors_of(tiny_zoo / BASE)
    tensors[name][3, 4] = value
    perturb(tiny_zoo / BASE, tmp_path / "faulty", 0, change=0)
    save_file(tensors, tmp_path / "faulty" / "model.safetensors")
    other = tiny_zoo / EXPERTS["Math"]
    base, own = (tiny_zoo / BASE, tmp_path / "faulty") if expert else (tmp_path / "faulty", other)
    command = [*MOE, *flags(base, A=own), "--include_base", "--output_path", tmp_path / "out"]
    who = "expert A" if expert else "the base"
    assert refusal(capsys, *command) == f"{who} has NaN or infinite values in {name}; download it again"
    assert not list(tmp_path.glob("out/*/*/model"))


@pytest.mark.parametrize("given", ["x", [1], True, -0.1])
def test_a_deviation_that_is_none_is_told_before_anything_is_written(given, capsys, tiny_zoo, tmp_path):
    base = rewritten(tiny_zoo / BASE, tmp_path / "base", initializer_range=given)
    experts = flags(base, **{name: tiny_zoo / folder for name, folder in EXPERTS.items()})
    assert refusal(capsys, *MOE, *experts, "--output_path", tmp_path / "out") == (
        f"{base}/config.json has the initializer_range {given!r}, and routers are drawn with it as their standard "
        "deviation; give it a number that is not negative, or choose --router zeros"
    )
    assert not (tmp_path / "out").exists()
    zeros = ("--router", "zeros", "--experts_per_token", 3)
    merged(tmp_path / "zeros", *MOE, *zeros, *experts)


def test_a_deviation_that_is_not_said_is_the_usual_one(tiny_zoo, tmp_path):
    experts = {name: tiny_zoo / folder for name, folder in EXPERTS.items()}
    without = rewritten(tiny_zoo / BASE, tmp_path / "base", initializer_range=None)
    expected = routers(merged(tmp_path / "expected", *MOE, *flags(tiny_zoo / BASE, **experts)).model)
    assert_same_bytes(routers(merged(tmp_path / "out", *MOE, *flags(without, **experts)).model), expected)


def test_the_configuration_is_a_mixtral_s(tiny_zoo, tmp_path):
    run = merged(tmp_path, *MOE, "--cache_dir", tiny_zoo)
    base = json.loads((tiny_zoo / BASE / "config.json").read_text())
    written = json.loads((run.model / "config.json").read_text())
    assert written == {
        **base,
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
        "num_local_experts": 3, "num_experts_per_tok": 2,
        "rope_theta": base["rope_parameters"]["rope_theta"],
        "output_router_logits": False, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
    }  # fmt: skip
    assert (run.model / "tokenizer.json").read_bytes() == (tiny_zoo / BASE / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_dense_configuration_leaves_to_its_defaults_is_kept(kind):
    dense = AutoConfig.for_model(kind)
    made = {key: value for key, value in config_of({"model_type": kind}).items() if key != "model_type"}
    mixture = AutoConfig.for_model(LAYOUTS[kind].model_type, **made)
    assert mixture.rope_parameters == dense.rope_parameters
    if kind == "qwen3":  # the others' is the hidden size by the number of heads
        assert mixture.head_dim == dense.head_dim
    for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "attention_dropout",
        "initializer_range",
    ):  # fmt: skip
        assert getattr(mixture, name) == getattr(dense, name), name
    assert (mixture.sliding_window or None) == getattr(dense, "sliding_window", None)


def test_settings_that_are_no_mixtral_s_are_left_out():
    said = {
        "model_type": "llama", "auto_map": {"AutoModel": "modeling_x.X"}, "sliding_window": 7, "mlp_bias": False,
        "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"}, "head_dim": 64, "pretraining_tp": 1,
        "num_key_value_heads": None, "num_attention_heads": 6,
    }  # fmt: skip
    made = config_of(said)
    assert not {"auto_map", "mlp_bias", "pretraining_tp"} & made.keys()
    assert made["sliding_window"] is None  # Llama takes no notice of it, and Mixtral would
    assert made["num_key_value_heads"] == 6
    kept = ("rope_theta", "rope_scaling", "head_dim")
    assert {name: made[name] for name in kept} == {name: said[name] for name in kept}
    assert config_of({"model_type": "mistral", "sliding_window": None})["sliding_window"] is None


def test_tables_that_follow_from_the_configuration_are_left_out(tiny_zoo, tmp_path):
    base = tensors_of(tiny_zoo / BASE)
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    write_checkpoint(tmp_path / "base", {**base, **table})
    write_checkpoint(tmp_path / "a", base)
    given = flags(tmp_path / "base", A=tmp_path / "a")
    run = merged(tmp_path / "out", *MOE, *given, "--experts_per_token", 1)
    assert not table.keys() & tensors_of(run.model).keys()


def test_the_plan_says_what_is_written(capsys, tiny_zoo, tmp_path):
    command = [*MOE, "--cache_dir", tiny_zoo, "--shared", "svd", "--output_path", tmp_path / "out", "--dry_run"]
    assert merge(*command) == 0
    lines = capsys.readouterr().out.splitlines()
    shapes = {name: tensor.shape for name, tensor in tensors_of(tiny_zoo / BASE).items()}
    one = sum(math.prod(shape) for name, shape in shapes.items() if ".mlp." in name)
    rest = sum(map(math.prod, shapes.values())) - one + 3 * SIZES["hidden_size"] * len(LAYERS)
    assert (
        f"Mixtral of 3 experts (Chat, Math, Code), 2 for each token: {(rest + 3 * one) / 1e6:.1f}M parameters, "
        f"{(rest + 2 * one) / 1e6:.1f}M of them active for a token; to run it takes "
        f"{4 * (rest + 3 * one) / 1e6:.1f} MB of memory for weights"
    ) in lines
    assert any(line.startswith("all but feed-forward layers is merged by svd ") for line in lines)
    assert "Routers are random numbers: train them before anything is expected of the model." in lines
    attention = 4 * len(LAYERS)
    kept = len(shapes) - attention - 3 * len(LAYERS)
    copied, written = 9 * len(LAYERS), attention + kept + 10 * len(LAYERS)
    (counted,) = (line for line in lines if "tensors are merged" in line)
    assert counted.startswith(f"{attention} of {written} tensors are merged (")
    assert counted.endswith(f"{kept} keep the base's value, {copied} are copied from experts, {len(LAYERS)} are made")
    (memory,) = (line.split("; ")[1] for line in lines if line.startswith("writes"))

    plain = ["--method", "svd", "--exclude_params", *BACKBONE.exclude_params, MLP]
    assert merge(*plain, "--cache_dir", tiny_zoo, "--output_path", tmp_path / "out", "--dry_run") == 0
    assert memory in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_card_and_the_record_say_what_it_is(tiny_zoo, tmp_path):
    run = merged(tmp_path, *MOE, "--cache_dir", tiny_zoo, "--shared", "task_arithmetic")
    card = (run.model / "README.md").read_text()
    assert (
        "A Mixtral of 3 experts (Chat, Math, Code), each with the feed-forward layers of one checkpoint; 2 work on "
        "each token. All else is merged by `task_arithmetic`, or the base's. Routers are random numbers: train them "
        "before anything is expected of the model."
    ) in card
    assert "the others are the base's or the experts', or were made for it" in card
    assert 'AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")' in card
    record = json.loads(run.config.read_text())
    wanted = {"router": "auto", "shared": "task_arithmetic", "experts_per_token": 2, "include_base": False}
    assert wanted.items() <= record["options"].items()
    assert record["inputs"]["shared"] == "task_arithmetic scaling_coefficient=0.3"


@pytest.mark.parametrize("shared", ["weight_average", "ties", "svd"])
def test_all_that_is_shared_may_be_the_base_s(shared, tiny_zoo, tmp_path):
    run = merged(
        tmp_path, *MOE, "--shared", shared, "--cache_dir", tiny_zoo,
        "--exclude_params", *BACKBONE.exclude_params, ".*self_attn.*",
    )  # fmt: skip
    base = {name: tensor for name, tensor in tensors_of(tiny_zoo / BASE).items() if ".mlp." not in name}
    written = tensors_of(run.model)
    assert_same_bytes({name: written[name] for name in base}, base)


NO_CLOSED_FORM = (
    "that is no closed form; choose a method that merges the base and experts alone into one dense model, such as "
    "weight_average, task_arithmetic, ties or svd"
)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--experts_per_token", 4],
            "--experts_per_token must be at most the number of experts, 3, got 4; give fewer, or more experts "
            "(--include_base makes the base one)",
        ),
        (
            ["--experts_per_token", 5, "--include_base"],
            "--experts_per_token must be at most the number of experts, 4, got 5; give fewer, or more experts",
        ),
        (["--experts_per_token", 0], "--experts_per_token must be a whole number in [1, inf), got 0"),
        (
            ["--router", "zeros"],
            "--router zeros rates all experts alike, so that the first 2 would do all the work; give "
            "--experts_per_token 3 to mix all, or another --router",
        ),
        (
            ["--router", "best"],
            "--router must be 'auto' or 'ridge' or 'task_vectors' or 'prompts' or 'embedding' or 'random' or 'zeros', "
            "got best",
        ),
        (["--shared", "ties density=0.2 density=1"], "--shared ties density=0.2 density=1: 'density' is given twice"),
        (
            ["--shared_expert", "base"],
            "--shared_expert base: a Mixtral has no expert for all tokens; leave it out",
        ),
        (["--shared", "tyes"], "--shared tyes: no method named 'tyes'. Did you mean 'ties'?"),
        (["--shared", "expert_merging"], f"--shared expert_merging: {NO_CLOSED_FORM}"),
        (["--shared", "coefficients"], f"--shared coefficients: {NO_CLOSED_FORM}"),
        (["--shared", "svd_intermediate"], f"--shared svd_intermediate: {NO_CLOSED_FORM}"),
        (["--shared", "moe"], f"--shared moe: {NO_CLOSED_FORM}"),
        (
            ["--exclude_params", ".*gate_proj.*"],
            "--exclude_params leaves out model.layers.0.mlp.gate_proj.weight and 2 more, and feed-forward "
            "layers are what a mixture has of its experts; exclude other parameters",
        ),
    ],
)
def test_options_that_cannot_be_used_are_refused(given, message, capsys, tiny_zoo, tmp_path):
    assert refusal(capsys, *MOE, "--cache_dir", tiny_zoo, "--output_path", tmp_path / "out", *given) == message
    assert not (tmp_path / "out").exists()


def test_all_options_of_the_shared_method_that_cannot_be_used_are_told(capsys, tiny_zoo, tmp_path):
    given = "ties densty=0.2 density=80 scaling_coefficient"
    assert refused(capsys, *MOE, "--cache_dir", tiny_zoo, "--output_path", tmp_path, "--shared", given) == [
        f"--shared {given}: {problem}"
        for problem in (
            "ties has no option 'densty'. Did you mean 'density'?",
            "--density must be a number in (0, 1], got 80; for 80 % write 0.8",
            "options follow the method as NAME=VALUE without blanks, got 'scaling_coefficient'",
        )
    ]


def test_a_window_that_a_qwen3_mixture_cannot_have_is_refused(capsys, tmp_path):
    save_dense(tmp_path / "base", "qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    given = [*flags(tmp_path / "base", A=tmp_path / "base"), "--experts_per_token", 1, "--output_path", tmp_path / "o"]
    assert refusal(capsys, *MOE, *given) == (
        "2 of 3 layers attend to a window of 8 tokens, and in a Qwen3-MoE all do or none; give a base whose "
        "config.json has use_sliding_window false"
    )
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "max_window_layers": "x"}))
    assert refusal(capsys, *MOE, *given) == (
        "config.json of the base has the max_window_layers 'x', which is no number of layers; correct it"
    )


@pytest.mark.parametrize("name", ["btx", "MergeME", "mergeme-dare"])
def test_published_settings_have_names(name, tiny_zoo, tmp_path):
    """Norms and embeddings are merged too; what a flag says goes before them."""
    shared = {
        "btx": {"method": "weight_average"},
        "MergeME": {"method": "ties", "density": 0.2, "ties_normalize": False, "scaling_coefficient": 1 / 3},
        "mergeme-dare": {"method": "dare_ta", "drop_rate": 0.8, "scaling_coefficient": 1 / 3},
    }[name]
    (tmp_path / "shared.json").write_text(json.dumps(shared))
    run = merged(tmp_path / "preset", "--method", name, "--cache_dir", tiny_zoo)
    written = tensors_of(run.model)
    assert run.folder.parent.name == "moe"
    assert routers(run.model)["model.layers.0.block_sparse_moe.gate.weight"].shape[0] == 3 + (name != "btx")
    plain = merged(
        tmp_path / "plain", "--cache_dir", tiny_zoo, "--exclude_params", MLP, "--config", tmp_path / "shared.json"
    )
    expected = {key: tensor for key, tensor in tensors_of(plain.model).items() if ".mlp." not in key}
    assert_same_bytes({key: written[key] for key in expected}, expected)
    own = merged(tmp_path / "own", "--method", name, "--shared", "svd", "--cache_dir", tiny_zoo)
    assert json.loads(own.config.read_text())["inputs"]["shared"] == "svd scaling_coefficient=1.0"


def test_all_problems_are_told_at_once(capsys, tmp_path):
    base = write_checkpoint(tmp_path / "base", {"a": torch.ones(2)}, config={"model_type": "qwen2_vl"})
    found = refused(
        capsys, *MOE, *flags(base, A=base), "--shared", "none", "--output_path", tmp_path / "out", "--run_name", "x"
    )
    assert found[0] == (
        f"{base} has the model_type 'qwen2_vl', and transformers has no class for a mixture of such models; there are "
        "classes for mistral (Mixtral), llama (Mixtral), qwen2 (Qwen2-MoE), qwen3 (Qwen3-MoE)"
    )
    assert found[1].startswith("--experts_per_token must be at most the number of experts, 1, got 2;")
    assert found[2].startswith("--shared none: no method named 'none'.")
    assert len(found) == 3


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"mlp_bias": True}, "model.layers.0.mlp.down_proj.bias and 8 more"),
        ({"attention_bias": True, "num_hidden_layers": 1}, "model.layers.0.self_attn.k_proj.bias and 3 more"),
    ],
    ids=["feed-forward", "attention"],
)
def test_biases_are_refused(changes, tensor, capsys, tmp_path):
    save_dense(tmp_path / "base", "llama", **changes)
    given = flags(tmp_path / "base", A=tmp_path / "base", B=tmp_path / "base")
    assert refusal(capsys, *MOE, *given, "--output_path", tmp_path / "out") == (
        f"{tmp_path / 'base'} has {tensor}, for which a Mixtral has no place"
    )


def test_a_base_that_lacks_feed_forward_tensors_is_refused(capsys, tmp_path):
    whole = {f"model.layers.{layer}.mlp.{part}.weight": torch.ones(2, 2) for layer in (0, 1) for part in W.values()}
    for missing, message in (
        (["model.layers.1.mlp.up_proj.weight"], "model.layers.1.mlp.up_proj.weight"),
        (whole, "model.layers.0.mlp.gate_proj.weight and 2 more"),
    ):
        tensors = {name: tensor for name, tensor in whole.items() if name not in missing}
        base = write_checkpoint(tmp_path / "base", {**tensors, "model.layers.0.self_attn.q_proj.weight": torch.ones(2)})
        given = [*flags(base, A=base), "--experts_per_token", 1, "--output_path", tmp_path / "out"]
        assert refusal(capsys, *MOE, *given) == f"{base} lacks {message}; download it again"


def test_a_base_in_a_container_is_refused_with_the_cause(tiny_zoo, tmp_path, capsys):
    base = renamed(tiny_zoo / BASE, tmp_path / "base", lambda name: f"module.{name}")
    assert refusal(capsys, *MOE, *flags(base, A=tiny_zoo / EXPERTS["Chat"], B=tiny_zoo / EXPERTS["Math"])) == (
        f"a Mixtral has fixed names, and those of {base} are read without 'module.'; save it without its container, or "
        "use another method"
    )
