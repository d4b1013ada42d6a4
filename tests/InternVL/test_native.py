"""transformers' own classes on published checkpoints, against the independent implementation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expert_merging.backbone import empty_model
from expert_merging.errors import InputError
from InternVL.backbone import load_model, parameter_names
from InternVL.layout import native_config, published_name, read_config
from InternVL.native import CLASS, file_parameters, load_published, save_published
from tests.checkpoints import tensors_of
from tests.InternVL import reference
from tests.internvl import TOKENS, make_config, make_picture, save_model, shapes

IMAGE = TOKENS["<IMG_CONTEXT>"]
VARIANTS = {
    "1B": {},
    "tied head": {"llm_config.tie_word_embeddings": True},
    "6B vision tower": {
        "vision_config.qk_normalization": True,
        "vision_config.norm_type": "rms_norm",
        "vision_config.qkv_bias": False,
    },
    "Llama": {"llm_config.architectures": ["LlamaForCausalLM"], "llm_config.model_type": "llama"},
    "earlier vision layer": {"select_layer": -2},
    "other tile size": {"force_image_size": 42},
    "one tile": {"dynamic_image_size": False},
    "no thumbnail": {"use_thumbnail": False},
    "stretched positions": {"llm_config.rope_scaling": {"type": "linear", "factor": 2.0}},
    "eight heads": {"llm_config.num_attention_heads": 8, "llm_config.num_key_value_heads": 8},
}


@pytest.fixture(params=VARIANTS)
def variant(request, tmp_path):
    """A checkpoint with two pictures beside it, and its configuration."""
    changes = VARIANTS[request.param]
    folder = save_model(tmp_path / "model", 3, changes)
    make_picture(tmp_path / "a.png", (90, 40))
    make_picture(tmp_path / "b.png", (30, 70), seed=3)
    return folder, make_config(changes)


@torch.no_grad()
def outputs(model, tokens, pixels):
    pictures = {} if pixels is None else {"pixel_values": pixels}
    found = model.base_model(input_ids=tokens, output_hidden_states=True, use_cache=False, **pictures)
    return model.get_output_embeddings()(found.last_hidden_state), found.hidden_states


@pytest.mark.parametrize(
    ("question", "names"), [("Why?", []), ("What?", ["a.png"]), ("First <image>, then <image>?", ["a.png", "b.png"])]
)
def test_logits_and_hidden_states_equal_the_independent_ones(question, names, variant):
    folder, config = variant
    tokens, pixels = reference.encode(question, [folder.parent / name for name in names], config, 6)
    model = load_published(folder, torch.float32, IMAGE)
    assert not model.training
    logits, hidden = outputs(model, tokens, pixels)
    expected_logits, expected_hidden = reference.forward(tensors_of(folder), config, tokens, pixels)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(hidden, expected_hidden, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_pictures_matter_to_the_comparison(tmp_path):
    """Each part of the vision tower and the projector moves the logits far more than the tolerance above."""
    folder, config = save_model(tmp_path / "model", 3), make_config()
    tokens, pixels = reference.encode("What?", [make_picture(tmp_path / "a.png")], config, 6)
    weights = tensors_of(folder)
    before, _ = reference.forward(weights, config, tokens, pixels)
    generator = torch.Generator().manual_seed(1)
    for name in weights:
        if name.startswith(("vision_model", "mlp1")):
            noise = 0.3 * torch.randn(weights[name].shape, generator=generator)
            changed = {**weights, name: weights[name] + noise}
            after, _ = reference.forward(changed, config, tokens, pixels)
            assert (after - before).abs().max() > 2e-3, name


def test_names_lead_to_the_published_ones_and_back(variant):
    folder, config = variant
    assert {published_name(name) for name in parameter_names(folder)} == set(shapes(config))
    assert {published_name(name) for name in shapes(config)} == set(shapes(config))


def test_fused_attention_is_the_rows_of_three_parameters():
    groups = file_parameters(empty_model(CLASS, native_config(make_config())))
    start = "model.vision_tower.encoder.layer.1.attention"
    assert groups["vision_model.encoder.layers.1.attn.qkv.weight"] == [
        f"{start}.{part}_proj.weight" for part in ("q", "k", "v")
    ]
    assert all(len(parts) == 1 for name, parts in groups.items() if ".qkv." not in name)


def test_writing_a_native_model_gives_back_the_published_checkpoint(variant, tmp_path):
    folder, config = variant
    save_published(load_published(folder, torch.float32, IMAGE), tmp_path / "again")
    written, original = tensors_of(tmp_path / "again"), tensors_of(folder)
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], original[name]) for name in original)
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["model_type"] == "internvl_chat"
    assert again["architectures"] == ["InternVLChatModel"]
    tied = config["llm_config"]["tie_word_embeddings"]
    assert (
        native_config(read_config(tmp_path / "again"), tied=tied).to_dict()
        == native_config(config, tied=tied).to_dict()
    )
    shutil.copy(folder / "tokenizer_config.json", tmp_path / "again")
    assert isinstance(load_published(tmp_path / "again", torch.float32, IMAGE), torch.nn.Module)


def test_sharded_and_single_files_load_the_same(tmp_path):
    single = load_published(save_model(tmp_path / "one", 5), torch.float32, IMAGE).state_dict()
    sharded = load_published(save_model(tmp_path / "three", 5, shards=3), torch.float32, IMAGE).state_dict()
    assert len(list((tmp_path / "three").glob("*.safetensors"))) == 3
    assert all(torch.equal(single[name], sharded[name]) for name in single)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_weights_come_in_the_wanted_type(stored, wanted, tmp_path):
    folder = save_model(tmp_path / "model", 5)
    tensors = {name: tensor.to(stored) for name, tensor in tensors_of(folder).items()}
    save_file(tensors, folder / "model.safetensors")
    model = load_published(folder, wanted, IMAGE)
    for name, parts in file_parameters(model).items():
        loaded = torch.cat([model.get_parameter(part) for part in parts])
        assert loaded.dtype == wanted
        assert torch.equal(loaded, tensors[name].to(wanted)), name
    # Positions are computed in float32 whatever the weights are in.
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_head_in_the_file_is_loaded_though_the_configuration_says_tied(tmp_path):
    folder = save_model(tmp_path / "model", 5)
    change(folder, {"llm_config.tie_word_embeddings": True})
    model = load_published(folder, torch.float32, IMAGE)
    assert torch.equal(model.lm_head.weight, tensors_of(folder)["language_model.lm_head.weight"])
    assert "lm_head.weight" in dict(model.named_parameters())


def test_a_tied_head_is_one_parameter(tmp_path):
    folder = save_model(tmp_path / "model", 5, {"llm_config.tie_word_embeddings": True})
    model = load_published(folder, torch.float32, IMAGE)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_a_tied_head_that_is_stored_as_well_is_one_parameter(tmp_path):
    folder = save_model(tmp_path / "model", 5)
    tensors = tensors_of(folder)
    tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    change(folder, {"llm_config.tie_word_embeddings": True})
    model = load_published(folder, torch.float32, IMAGE)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def change(folder: Path, changes: dict[str, object]) -> Path:
    (folder / "config.json").write_text(json.dumps(make_config(changes)), encoding="utf-8")
    return folder


def test_settings_that_equal_a_published_default_may_be_left_out(tmp_path):
    """As a fine-tune's configuration leaves them out."""
    config = make_config({"vision_config.patch_size": 14, "vision_config.image_size": 56, "force_image_size": 56})
    for key in ("patch_size", "num_channels", "hidden_act", "layer_norm_eps", "drop_path_rate"):
        del config["vision_config"][key]
    for key in ("downsample_ratio", "select_layer", "use_llm_lora"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    native = native_config(read_config(tmp_path))
    assert native.vision_config.patch_size in ([14, 14], (14, 14))
    assert (native.downsample_ratio, native.vision_feature_layer, native.image_seq_length) == (0.5, -1, 4)


def test_settings_of_whoever_saved_the_file_are_dropped():
    native = native_config(make_config()).text_config
    assert native._attn_implementation != "flash_attention_2"
    assert native.dtype is None
    assert native.rope_parameters == {"rope_type": "default", "rope_theta": 1000.0}
    assert (native.eos_token_id, native.max_position_embeddings, native.sliding_window) == (258, 1024, None)


REFUSED = {
    "language model": (
        {"llm_config.architectures": ["InternLM2ForCausalLM"]},
        r"config.json has the language model InternLM2ForCausalLM; transformers' own InternVL covers Qwen2ForCausalLM "
        r"and LlamaForCausalLM. --trust_remote_code runs the checkpoint's own code instead; methods that do not learn",
    ),
    "no language model": ({"llm_config": {}}, "config.json has the language model none; "),
    "pixel shuffle": (
        {"ps_version": "v1"},
        "has ps_version 'v1', which transposes picture features; transformers' own",
    ),
    "norm": (
        {"vision_config.qk_normalization": True, "vision_config.layer_norm_eps": 1e-5},
        "normalises queries and keys with layer_norm_eps 1e-05; transformers' own InternVL does it with 1e-06",
    ),
    "adapter": ({"use_llm_lora": 16}, "has use_llm_lora 16: merge the LoRA adapter into the weights first"),
    "other layout": (
        {"model_type": "internvl"},
        "has the model_type 'internvl'; learning with the InternVL family takes the published layout, 'internvl_chat'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_variants_that_are_not_covered_are_refused(name, tmp_path):
    changes, message = REFUSED[name]
    folder = change(save_model(tmp_path / "model", 5), changes)
    for load in (parameter_names, lambda folder: load_model(folder, torch.float32)):
        with pytest.raises(InputError, match=message):
            load(folder)


def test_everything_that_is_not_covered_is_said_at_once(tmp_path):
    changes = {"ps_version": "v1", "llm_config.architectures": ["Phi3ForCausalLM"]}
    with pytest.raises(InputError) as raised:
        parameter_names(change(save_model(tmp_path / "model", 5), changes))
    assert len(raised.value.problems) == 2


def with_tensors(folder: Path, edit) -> Path:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


QKV = "vision_model.encoder.layers.0.attn.qkv.weight"
HEAD = "language_model.lm_head.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(QKV), rf"lacks the tensor {QKV}"),
        (
            lambda tensors: tensors.pop("language_model.lm_head.weight"),
            "lacks the tensor language_model.lm_head.weight",
        ),
        (
            lambda tensors: tensors.update({"mlp1.4.weight": torch.zeros(2)}),
            "has the tensor mlp1.4.weight, which its configuration lacks",
        ),
        (
            lambda tensors: tensors.update({QKV: torch.zeros(40, 16)}),
            rf"{QKV} has shape \[40, 16\], its configuration's has \[48, 16\]",
        ),
        (
            lambda tensors: tensors.update({QKV: torch.zeros(48, 16, dtype=torch.int8)}),
            rf"{QKV} is stored as I8, which cannot be merged",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(edit, message, tmp_path):
    folder = with_tensors(save_model(tmp_path / "model", 5), edit)
    with pytest.raises(InputError, match=message) as raised:
        load_published(folder, torch.float32, IMAGE)
    assert str(folder) in str(raised.value)
    assert len(raised.value.problems) == 1


def test_many_tensors_that_do_not_fit_are_counted(tmp_path):
    folder = with_tensors(
        save_model(tmp_path / "model", 5), lambda tensors: [tensors.pop(name) for name in [*tensors][:9]]
    )
    with pytest.raises(InputError, match=r"and 5 more like the last") as raised:
        load_published(folder, torch.float32, IMAGE)
    assert len(raised.value.problems) == 5


def test_rotary_tables_of_older_files_are_passed_over(tmp_path):
    name = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = with_tensors(save_model(tmp_path / "model", 5), lambda tensors: tensors.update({name: torch.zeros(4)}))
    assert load_published(folder, torch.float32, IMAGE).model.language_model.rotary_emb.inv_freq.max() == 1
