"""Adapters as experts: what peft makes of the same files, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralForCausalLM,
)

from expert_merging.advice import other_base
from expert_merging.checkpoints.adapter import Adapter, open_checkpoint
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.errors import InputError
from expert_merging.running.sharding import load_on
from InternVL.backbone import BACKBONE as INTERNVL
from InternVL.layout import published_name
from InternVL.native import load_published, save_published
from Mistral.backbone import BACKBONE as MISTRAL
from Qwen2VL.backbone import BACKBONE as QWEN
from Qwen2VL.backbone import file_name
from tests import internvl, qwen2vl
from tests.adapters import Load, merged_by_peft, save_adapter
from tests.checkpoints import save_model, tensors_of, write_checkpoint

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> Load:
    folder = tmp_path_factory.mktemp("mistral")
    save_model(folder, 0)
    return partial(MistralForCausalLM.from_pretrained, folder)


@pytest.fixture(scope="module")
def tied_mistral(tmp_path_factory) -> Load:
    """Its embedding is its head."""
    folder = tmp_path_factory.mktemp("tied")
    save_model(folder, 0, tie_word_embeddings=True)
    return partial(MistralForCausalLM.from_pretrained, folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Load:
    """With biases."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return partial(LlamaForCausalLM.from_pretrained, folder)


def folder_of(load: Any) -> Path:
    return Path(load.args[0])


def opened(load: Load, folder: Path, name: Callable[[str], str] = str) -> Adapter:
    return Adapter(folder, Checkpoint(folder_of(load)), name)


def check_tensors(adapter: Adapter, expected: dict[str, torch.Tensor], *, changed: int) -> None:
    """All tensors, of which so many are not the base's."""
    different = 0
    assert adapter.entries.keys() <= expected.keys()
    for name, entry in adapter.entries.items():
        found = adapter.read(name).view(entry.shape)
        torch.testing.assert_close(found, expected[name], rtol=1e-6, atol=1e-7, msg=name, check_dtype=False)
        assert found.dtype == entry.torch_dtype
        base = adapter.base.entries.get(name)
        different += (
            base is None or base.shape != entry.shape or not found.equal(adapter.base.read(name).view_as(found))
        )
    assert different == changed == len(adapter.changed)


EMBEDDINGS = ["embed_tokens", "lm_head"]
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 9),
    "alpha": ({"lora_alpha": 3, "r": 5}, 9),
    "rslora": ({"use_rslora": True, "lora_alpha": 3}, 9),
    "patterns": (
        {"rank_pattern": {"q_proj": 2, ".*1.mlp.down_proj": 7}, "alpha_pattern": {r"layers\.0\..*v_proj": 5}},
        9,
    ),
    "patterns and rslora": (
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"^model.+v_proj": 5}, "use_rslora": True},
        9,
    ),
    "one layer": ({"layers_to_transform": 1}, 3),
    "left out": ({"exclude_modules": ["model.layers.0.self_attn.q_proj"]}, 8),
    "all": ({"target_modules": "all-linear"}, 21),
    "by expression": ({"target_modules": r".*\.[02]\..*up_proj"}, 2),
    "DoRA": ({"use_dora": True}, 9),
    "DoRA and rslora": ({"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 1}}, 9),
    "whole head": ({"modules_to_save": ["lm_head"]}, 10),
    "whole embeddings": ({"modules_to_save": EMBEDDINGS}, 11),
    "whole norms": ({"modules_to_save": ["input_layernorm"]}, 12),
    "embeddings": ({"target_modules": [*EMBEDDINGS, "q_proj"]}, 5),
    "embeddings with DoRA": ({"target_modules": EMBEDDINGS, "use_dora": True}, 2),
    "some tokens": ({"trainable_token_indices": [1, 5, 30]}, 10),
    "some tokens of both": ({"trainable_token_indices": {"embed_tokens": [7], "lm_head": [30, 3]}}, 11),
    "begun otherwise": ({"init_lora_weights": "gaussian"}, 9),
    "in bfloat16": ({"dtype": torch.bfloat16}, 9),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_is_what_peft_merges(variant, mistral, tmp_path):
    settings, changed = VARIANTS[variant]
    save_adapter(mistral, tmp_path, **settings)
    expected = merged_by_peft(mistral, tmp_path).state_dict()
    # peft computes in the type of the adapter: in bfloat16 with two roundings more.
    if "dtype" in settings:
        rounded = opened(mistral, tmp_path)
        for name in rounded.changed:
            assert (rounded.read(name) - expected[name].flatten()).abs().max() < 2e-3
        return
    check_tensors(opened(mistral, tmp_path), expected, changed=changed)


@pytest.mark.parametrize(
    ("settings", "changed"),
    [({"bias": "all"}, 16 + 4), ({"bias": "lora_only"}, 6 + 6), ({"lora_bias": True}, 6 + 6)],
    ids=str,
)
def test_biases_are_what_peft_merges(settings, changed, llama, tmp_path):
    save_adapter(llama, tmp_path, **settings)
    expected = merged_by_peft(llama, tmp_path).state_dict()
    check_tensors(opened(llama, tmp_path), expected, changed=changed)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=str)
def test_weights_that_files_have_transposed(settings, tmp_path):
    """GPT-2's, one of which is square."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=12, n_layer=2, n_head=2, vocab_size=20, n_positions=16)).save_pretrained(
        tmp_path / "base"
    )
    load = partial(GPT2LMHeadModel.from_pretrained, tmp_path / "base")
    save_adapter(load, tmp_path / "a", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **settings)
    expected = merged_by_peft(load, tmp_path / "a").state_dict()
    check_tensors(opened(load, tmp_path / "a"), expected, changed=6)


def test_rows_that_the_base_lacks_are_refused(mistral, tmp_path):
    save_adapter(mistral, tmp_path, trainable_token_indices=[1, 79])
    change_config(tmp_path, trainable_token_indices=[1, 80])
    assert problem(mistral, tmp_path) == (
        f"{tmp_path} has rows of model.embed_tokens that the base lacks; is it an adapter of this base?"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_is_rounded_on_a_narrower_base(dtype, mistral, tmp_path):
    """peft rounds what is added and the sum."""
    mistral().to(dtype).save_pretrained(tmp_path / "base")
    load = partial(MistralForCausalLM.from_pretrained, tmp_path / "base", dtype=dtype)
    save_adapter(load, tmp_path / "a", change=0.01)
    adapter, expected = opened(load, tmp_path / "a"), merged_by_peft(load, tmp_path / "a").state_dict()
    single = merged_by_peft(
        partial(MistralForCausalLM.from_pretrained, tmp_path / "base", dtype=torch.float32), tmp_path / "a"
    ).state_dict()
    assert len(adapter.changed) == 9
    for name in adapter.changed:
        found, base = adapter.read(name), adapter.base.read(name).float()
        torch.testing.assert_close(found, single[name].flatten(), rtol=1e-6, atol=1e-7)
        rounding = torch.finfo(dtype).eps * (found.abs() + (found - base).abs())
        assert bool(((found - expected[name].flatten().float()).abs() <= rounding).all()), name
        assert not found.equal(found.to(dtype).float())


@pytest.mark.slow
def test_adapters_of_qwen2_vl(tmp_path):
    """Trained with the names in memory of today, on a base with published names; one layer is a convolution."""
    qwen2vl.save_model(tmp_path / "base", 0)
    load = partial(AutoModelForImageTextToText.from_pretrained, tmp_path / "base")
    for use_dora in (False, True):
        folder = tmp_path / f"dora {use_dora}"
        save_adapter(load, folder, target_modules=["q_proj", "down_proj", "qkv", "proj"], use_dora=use_dora)
        expected = {file_name(name): tensor for name, tensor in merged_by_peft(load, folder).state_dict().items()}
        check_tensors(opened(load, folder, file_name), expected, changed=6 + 4 + 1)
        assert "visual.patch_embed.proj.weight" in opened(load, folder, file_name).changed


@pytest.mark.slow
def test_adapters_with_older_names(tmp_path):
    """As before transformers 4.52: the same adapter, on bases with older and newer names."""
    qwen2vl.save_model(tmp_path / "base", 0)
    newer = qwen2vl.with_newer_names(tmp_path / "base", tmp_path / "newer")
    load = partial(AutoModelForImageTextToText.from_pretrained, tmp_path / "base")
    expected = opened(load, save_adapter(load, tmp_path / "a", target_modules=["q_proj", "qkv"]), file_name)
    folder = shutil.copytree(tmp_path / "a", tmp_path / "older")
    file = folder / "adapter_model.safetensors"
    older = {re.sub(r"model\.model\.(language_model|visual)\.", _older, key): x for key, x in load_file(file).items()}
    save_file(older, file)
    assert "base_model.model.visual.blocks.0.attn.qkv.lora_A.weight" in older
    for base in (tmp_path / "base", newer):
        adapter = Adapter(folder, Checkpoint(base), file_name)
        assert len(adapter.changed) == 5
        for name in adapter.changed:
            assert adapter.read(name).equal(expected.read(file_name(name)))


def _older(found: re.Match[str]) -> str:
    return "model.model." if found[1] == "language_model" else "model.visual."


@pytest.mark.slow
def test_adapters_of_internvl(tmp_path):
    internvl.save_model(tmp_path / "base", 0)
    load = partial(load_published, tmp_path / "base", torch.float32, internvl.TOKENS["<IMG_CONTEXT>"])
    folder = save_adapter(load, tmp_path / "a", target_modules=["down_proj", "linear_1", "fc1"], use_dora=True)
    save_published(merged_by_peft(load, folder), tmp_path / "merged")
    check_tensors(opened(load, folder, published_name), tensors_of(tmp_path / "merged"), changed=3 + 1 + 2)
    assert "mlp1.1.weight" in opened(load, folder, published_name).changed


TOKENS = torch.tensor([[3, 4, 5, 6, 7, 30]])


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS).logits
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "norm"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"trainable_token_indices": [3, 30]},
    ],
    ids=str,
)
def test_an_adapter_runs_as_peft_s_model_does(settings, tied, mistral, tied_mistral, tmp_path):
    load = tied_mistral if tied else mistral
    save_adapter(load, tmp_path, **settings)
    model = load_on(torch.device("cpu"), MISTRAL, opened(load, tmp_path), torch.float32, sharded=False)
    expected = logits_of(merged_by_peft(load, tmp_path))
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-6, atol=1e-6)
    assert (expected - logits_of(load())).abs().max() > 0.01


def test_an_adapter_with_more_words_runs_as_peft_s_model_does(mistral, tmp_path):
    save_adapter(mistral, tmp_path, resized=90)
    adapter = opened(mistral, tmp_path)
    assert adapter.entries["lm_head.weight"].shape == (90, 32)
    model = load_on(torch.device("cpu"), MISTRAL, adapter, torch.float32, sharded=False)
    expected = logits_of(merged_by_peft(mistral, tmp_path, resized=90))
    assert expected.shape[-1] == 90
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_an_adapter_of_a_bfloat16_base_runs_in_the_wanted_type(kind, mistral, tmp_path):
    mistral().bfloat16().save_pretrained(tmp_path / "base")
    load = partial(MistralForCausalLM.from_pretrained, tmp_path / "base")
    adapter = opened(load, save_adapter(load, tmp_path / "a"))
    model = load_on(torch.device("cpu"), MISTRAL, adapter, kind, sharded=False)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == kind
        assert parameter.flatten().equal(adapter.read(name).to(kind)), name


@pytest.mark.slow
def test_picture_experts_that_are_adapters_run(tmp_path):
    internvl.save_model(tmp_path / "InternVL", 0)
    qwen2vl.save_model(tmp_path / "Qwen2VL", 0)
    published = partial(load_published, tmp_path / "InternVL", torch.float32, internvl.TOKENS["<IMG_CONTEXT>"])
    newer = partial(AutoModelForImageTextToText.from_pretrained, tmp_path / "Qwen2VL")
    for backbone, load in ((INTERNVL, published), (QWEN, newer)):
        folder = save_adapter(
            load, tmp_path / f"adapter of {backbone.name}", target_modules=r".*language_model.*q_proj"
        )
        adapter = Adapter(folder, Checkpoint(tmp_path / backbone.name), backbone.file_name)
        model = load_on(torch.device("cpu"), backbone, adapter, torch.float32, sharded=False)
        expected = merged_by_peft(load, folder).state_dict()
        assert len(adapter.changed) == 3
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.fixture
def saved(mistral, tmp_path) -> Path:
    return save_adapter(mistral, tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)


def change_config(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def change_tensors(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors, or take them away, by names whose dots are double underscores."""
    file = folder / "adapter_model.safetensors"
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in {**load_file(file), **named}.items() if tensor is not None}
    save_file(kept, file)


def problem(load: Load, folder: Path, name: Callable[[str], str] = str) -> str:
    with pytest.raises(InputError) as caught:
        opened(load, folder, name)
    (line,) = caught.value.problems
    return line


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "PREFIX_TUNING", "ADALORA", None])
def test_other_kinds_of_adapters_are_refused_by_name(kind, mistral, saved):
    change_config(saved, peft_type=kind)
    assert problem(mistral, saved) == (
        f"{saved}/adapter_config.json has the peft_type {json.dumps(kind)}, and adapters of the type LORA can be "
        "experts; others can if peft can merge them (merge_and_unload) and the result is saved as a full model"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_qalora", True),
        ("use_bdlora", {"target_modules_bd_a": []}),
        ("alora_invocation_tokens", [1, 2]),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("layer_replication", [[0, 2]]),
        ("kasa_config", {"beta": 1}),
        ("arrow_config", {"top_k": 1}),
        ("megatron_config", {"x": 1}),
        ("use_something_new", True),
    ],
)
def test_variants_that_compute_otherwise_are_refused_by_name(name, value, mistral, saved):
    change_config(saved, **{name: value})
    assert problem(mistral, saved) == (
        f"{saved}/adapter_config.json sets {name}, a variant of LoRA that is not known here; merge the adapter with "
        "peft (merge_and_unload) and give the full model"
    )


@pytest.mark.parametrize("begun", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_adapters_of_a_changed_base_are_refused(begun, mistral, saved):
    change_config(saved, init_lora_weights=begun)
    assert problem(mistral, saved) == (
        f"{saved}/adapter_config.json has init_lora_weights {begun.lower()!r}, which changes the base's weights before "
        "training: the adapter is of that base and not of the published one; save it again with "
        "path_initial_model_for_weight_conversion"
    )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:PiSSA changes:UserWarning")
def test_a_converted_adapter_of_a_changed_base_is_what_peft_merges(mistral, tmp_path):
    """PiSSA's, saved as one of the published base."""
    model = get_peft_model(mistral(), LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa", r=2))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "first")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    expected = merged_by_peft(mistral, tmp_path / "a").state_dict()
    check_tensors(opened(mistral, tmp_path / "a"), expected, changed=3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not valid JSON (Expecting property name"),
        ("[]", "holds list, not a JSON object"),
        ('{"peft_type": "LORA"}', "lacks 'lora_alpha'"),
        ('{"peft_type": "LORA", "lora_alpha": "x"}', "cannot be understood (could not convert string to float: 'x')"),
        (
            '{"peft_type": "LORA", "lora_alpha": 1, "alpha_pattern": {"(": 1}}',
            "cannot be understood (missing ), unterm",
        ),
        ('{"peft_type": "LORA", "lora_alpha": 1, "alpha_pattern": [1]}', "cannot be understood ('list' object has no"),
    ],
)
def test_settings_that_cannot_be_read(text, said, mistral, saved):
    (saved / "adapter_config.json").write_text(text)
    assert problem(mistral, saved).startswith(f"{saved}/adapter_config.json {said}")
    assert problem(mistral, saved).endswith("; download it again")


def test_pickled_adapters_are_refused(mistral, saved):
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    assert problem(mistral, saved) == (
        f"{saved} has its weights in pickle files (adapter_model.bin), which can run code when they are opened; this "
        f"converts them without running any, in the repository's folder: python -m expert_merging convert {saved} "
        "NEW_FOLDER"
    )


def test_an_adapter_without_weights_is_refused(mistral, saved):
    (saved / "adapter_model.safetensors").unlink()
    assert problem(mistral, saved) == f"{saved} has adapter_config.json and no adapter_model.safetensors; download it"


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_a_folder_with_an_adapter_and_a_full_model_is_refused(name, mistral, saved):
    (saved / name).touch()
    assert problem(mistral, saved) == (
        f"{saved} holds both an adapter (adapter_config.json) and a full model ({name}); which one is the expert? Move "
        "the other's files to a folder of their own"
    )


QUERY = "base_model__model__model__layers__0__self_attn__q_proj"
MODULE = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            {f"{QUERY}__lora_C__weight": torch.ones(2)},
            f"has the tensor base_model.model.{MODULE}.lora_C.weight, which plain LoRA and DoRA do not have",
        ),
        ({f"{QUERY}__lora_A__weight": None}, f"has lora_B, lora_magnitude_vector of {MODULE} without lora_A; download"),
        ({f"{QUERY}__lora_B__weight": None}, f"has lora_A, lora_magnitude_vector of {MODULE} without lora_B; download"),
        ({f"{QUERY}__lora_B__weight": torch.ones(32, 3)}, f"has matrices of ranks 3 and 4 for {MODULE}; download it"),
        (
            {f"{QUERY}__lora_A__weight": torch.ones(4, 30)},
            f"has numbers of the shape [30, 32] for {MODULE}, where the base has [32, 32]; is it an adapter of this",
        ),
        (
            {f"{QUERY}__lora_magnitude_vector": torch.ones(31)},
            f"has numbers of the shape [31] for {MODULE}, where the base has [32]; is it an adapter of this base?",
        ),
        (
            {f"{QUERY}__lora_B__bias": torch.ones(32)},
            f"adapts {MODULE}.bias, which the base lacks; is it an adapter of this base?",
        ),
        (
            {
                "base_model__model__layers__9__lora_A__weight": torch.ones(2, 2),
                "base_model__model__layers__9__lora_B__weight": torch.ones(2, 2),
            },
            "adapts layers.9.weight, which the base lacks; is it an adapter of this base?",
        ),
        (
            {f"{QUERY}__lora_A__weight": torch.ones(4, 32, dtype=torch.int8)},
            f": base_model.model.{MODULE}.lora_A.weight is stored as I8, and floating-point numbers are needed",
        ),
        (
            {"base_model__model__lm_head__token_adapter__trainable_tokens_delta": torch.ones(2, 32)},
            "has rows [2, 32] of lm_head, and adapter_config.json says which for 0",
        ),
        (
            {f"{QUERY}__lora_magnitude_vector": None},
            f"has lora_A, lora_B of {MODULE}, and adapter_config.json says use_dora true",
        ),
        (
            {f"{QUERY}__lora_A__weight": torch.ones(0, 32), f"{QUERY}__lora_B__weight": torch.ones(32, 0)},
            f"has matrices of ranks 0 and 0 for {MODULE}; download it",
        ),
        (
            {f"{QUERY}__lora_A__weight": torch.tensor(1.0)},
            f"has matrices of ranks 1 and 4 for {MODULE}; download it",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors, said, mistral, saved):
    change_tensors(saved, **tensors)
    assert problem(mistral, saved).startswith(f"{saved}{'' if said.startswith(':') else ' '}{said}")


def test_parts_of_a_tensor_are_refused(tmp_path):
    """InternVL's vision tower has query, key and value in one tensor of the files."""
    internvl.save_model(tmp_path / "base", 0)
    load = partial(load_published, tmp_path / "base", torch.float32, internvl.TOKENS["<IMG_CONTEXT>"])
    folder = save_adapter(load, tmp_path / "a", target_modules=r".*vision.*layer\.0\..*q_proj")
    assert problem(load, folder, published_name) == (
        f"{folder} adapts model.vision_tower.encoder.layer.0.attention.q_proj, which is a part of a tensor in the "
        "base's files; leave it out"
    )


def test_a_base_of_integers_is_refused(saved, tmp_path):
    base = write_checkpoint(tmp_path / "base", {f"{MODULE}.weight": torch.ones(32, 32, dtype=torch.int8)})
    file = saved / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if ".0." in name}, file)
    with pytest.raises(
        InputError, match=re.escape(f"{saved} adapts {MODULE}.weight, which the base stores as I8; use")
    ):
        Adapter(saved, Checkpoint(base))


def test_all_problems_of_an_adapter_are_told(mistral, saved):
    change_tensors(saved, **{f"{QUERY}__lora_A__weight": None, f"{QUERY.replace('0', '1')}__lora_B__weight": None})
    with pytest.raises(InputError) as caught:
        opened(mistral, saved)
    assert len(caught.value.problems) == 2


def test_an_adapter_s_files_are_looked_at_without_its_base(saved):
    with pytest.raises(InputError) as caught:
        open_checkpoint(saved, None)
    assert not caught.value.problems
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors"):
        open_checkpoint(saved, None)


def test_modules_may_be_stored_in_their_wrappers(mistral, tmp_path):
    """As peft has them when embeddings are saved that are trained whole as well."""
    save_adapter(mistral, tmp_path, modules_to_save=["lm_head"])
    expected = opened(mistral, tmp_path)
    head = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    change_tensors(
        tmp_path,
        base_model__model__lm_head__weight=None,
        base_model__model__lm_head__modules_to_save__weight=head,
        base_model__model__lm_head__original_module__weight=torch.zeros_like(head),
    )
    wrapped = opened(mistral, tmp_path)
    assert wrapped.entries.keys() == expected.entries.keys()
    assert wrapped.read("lm_head.weight").equal(head.flatten())


def test_pages_of_the_files_are_mapped_where_nothing_is_computed(mistral, saved):
    adapter = opened(mistral, saved)
    for name in (f"{MODULE}.weight", "lm_head.weight"):
        assert adapter.mapped(name).equal(adapter.read(name))
    assert adapter.mapped("lm_head.weight").data_ptr() == adapter.mapped("lm_head.weight").data_ptr()


def test_fingerprints_change_with_the_adapter_and_with_its_base(saved, tmp_path):
    save_model(tmp_path / "base", 0)

    def digests() -> tuple[str, str]:
        adapter = Adapter(saved, Checkpoint(tmp_path / "base"))
        return adapter.fingerprint(whole=False), adapter.content()

    found = [digests()]
    change_config(saved, lora_alpha=9)
    found.append(digests())
    change_tensors(saved, **{f"{QUERY}__lora_B__weight": torch.ones(32, 4)})
    found.append(digests())
    save_model(tmp_path / "base", 1)
    found.append(digests())
    assert all(len(set(kind)) == 4 for kind in zip(*found, strict=True))
    assert digests() == found[-1]


@pytest.mark.parametrize(
    ("said", "base", "expected"),
    [
        ("mistralai/Mistral-7B-v0.1", "Mistral-7B-v0.1", None),
        ("meta-llama/Llama-2-7b-hf", "Mistral-7B-v0.1", "Llama-2-7b-hf"),
        ("Qwen/Qwen2-VL-7B-Instruct", "Qwen2-VL-7B", "Qwen2-VL-7B-Instruct"),
        ("/home/x/ckpt/mistral-7b-v0.1/", "Mistral-7B-v0.1", None),
        ("unsloth/mistral-7b-v0.1-bnb-4bit", "Mistral-7B-v0.1", None),
        ("unsloth/Llama-3.2-1B-unsloth-bnb-4bit", "Llama-3.2-3B", "Llama-3.2-1B-unsloth-bnb-4bit"),
        ("/scratch/base", "Mistral-7B-v0.1", None),
        ("meta-llama/Llama-2-7b-hf", "base", None),
        ("", "Mistral-7B-v0.1", None),
        ("mistralai/Mistral-7B-v0.1", "models--mistralai--Mistral-7B-v0.1/snapshots/ab12cd7b", None),
        (
            "meta-llama/Llama-2-7b-hf",
            "models--mistralai--Mistral-7B-v0.1/snapshots/ab12cd7b",
            "Llama-2-7b-hf",
        ),
    ],
)
def test_another_base_is_seen_by_its_name(said, base, expected, tmp_path):
    (tmp_path / base).mkdir(parents=True)
    assert other_base(said, tmp_path / base) == expected


def test_a_pointer_to_settings_is_named(mistral, saved):
    """As Git without its extension for large files leaves it."""
    (saved / "adapter_config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert problem(mistral, saved).startswith(f"{saved}/adapter_config.json is ")
