"""The command of the InternVL family: closed forms, learning against the plain twin, evaluation, questions."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from expert_merging.learned.coefficients import load_coefficients
from expert_merging.learned.trainer import Trainer
from expert_merging.methods.linear import task_arithmetic
from expert_merging.questions.pictures import read_picture
from expert_merging.running.prompts import Prompts
from InternVL.backbone import BACKBONE, load_processor
from tests.checkpoints import tensors_of
from tests.command import assert_same_bytes, merge, merge_plainly, merged, refusal, refused
from tests.InternVL import reference
from tests.internvl import BASE, CODE, EXPERTS, TOKENS, make_picture, make_zoo, save_model, write_tasks
from tests.learned.twin import Example, Twin

ROOT = Path(__file__).parents[2]
run_command = partial(merged, family=BACKBONE)
refused_command = partial(refused, family=BACKBONE)
LEARNING = ("--method", "expert_merging", "--seed", 3, "--log_with", "none", "--max_new_tokens", 6)
TASKS = {"Chart": "Chart", "Grounding": "Grounding", "MathVista": "Geometry", "TextVQA": "OCR", "VizWiz": "VQA"}

# What the default exclusions leave: the language model's matrices and the projector with its layer norm.
MERGED = {
    *(
        f"language_model.model.layers.{layer}.{part}_proj.weight"
        for layer in range(3)
        for part in (*(f"self_attn.{kind}" for kind in "qkvo"), *(f"mlp.{kind}" for kind in ("gate", "up", "down")))
    ),
    *(f"mlp1.{part}.weight" for part in (0, 1, 3)),
}


def experts_of(cache: Path) -> list[Path]:
    return [cache / folder for folder in EXPERTS.values()]


def changed_names(before: Path, after: Path) -> set[str]:
    old, new = tensors_of(before), tensors_of(after)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def test_closed_forms_equal_the_plain_way_and_keep_every_other_file(internvl_zoo, tmp_path):
    run = run_command(tmp_path, "--method", "task_arithmetic", "--cache_dir", internvl_zoo)
    rule = partial(task_arithmetic, scaling_coefficient=0.1)
    base = internvl_zoo / BASE
    assert_same_bytes(
        tensors_of(run.model), merge_plainly(base, experts_of(internvl_zoo), rule, BACKBONE.exclude_params)
    )
    assert changed_names(base, run.model) == MERGED
    names = {file.name for file in base.iterdir()} - {"model.safetensors"}
    assert {*CODE, "preprocessor_config.json", "added_tokens.json", "vocab.json", "merges.txt"} <= names
    for name in names:
        assert (run.model / name).read_bytes() == (base / name).read_bytes(), name


@pytest.mark.parametrize("method", ["weight_average", "ties", "dare_ties", "iso", "svd", "wudi"])
def test_methods_leave_excluded_parameters_byte_for_byte(method, internvl_zoo, tmp_path):
    run = run_command(tmp_path, "--method", method, "--cache_dir", internvl_zoo, "--seed", 1)
    assert changed_names(internvl_zoo / BASE, run.model) == MERGED


@pytest.mark.slow
def test_closed_forms_need_no_model_class(tmp_path):
    """Also a variant that no class here covers, with half-precision shards, is merged; none of its code runs."""
    cache = make_zoo(tmp_path / "cache", {"llm_config.architectures": ["InternLM2ForCausalLM"], "ps_version": "v1"})
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from expert_merging.cli import main; "
        "from InternVL.backbone import BACKBONE; code = main(BACKBONE); "
        "assert 'transformers' not in sys.modules; sys.exit(code)"
    )
    arguments = ["--method", "ties", "--cache_dir", str(cache), "--output_path", str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)


@pytest.mark.slow
def test_the_command_is_a_script_of_its_own(internvl_zoo, tmp_path):
    command = [sys.executable, "model_merging.py", "--method", "weight_average", "--cache_dir", str(internvl_zoo)]
    subprocess.run([*command, "--output_path", str(tmp_path)], cwd=ROOT / "InternVL", check=True, capture_output=True)
    assert len(list(tmp_path.glob("weight_average/*/model/model.safetensors"))) == 1


class Plain(torch.nn.Module):
    """The independent implementation in the form that the twin drives: parameters under slashes instead of dots."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.config = json.loads((folder / "config.json").read_text())
        for name, tensor in tensors_of(folder).items():
            self.register_parameter(name.replace(".", "/"), torch.nn.Parameter(tensor))

    def forward(self, input_ids, pixel_values=None, output_hidden_states=True):
        weights = {name.replace("/", "."): parameter for name, parameter in self.named_parameters()}
        logits, hidden = reference.forward(weights, self.config, input_ids, pixel_values)
        return SimpleNamespace(logits=logits, hidden_states=hidden)


class PictureTwin(Twin):
    """The plain twin on the independent implementation, with inputs made by the published rules."""

    def load(self, folder):
        return Plain(folder)

    def in_memory(self, name):
        return name.replace(".", "/")

    def inputs(self, example):
        files, question = example.prompt
        most = 12 if example.task in ("Chart", "Grounding") else 6
        prompt, pixels = reference.encode(question, files, self.model.config, most)
        response = [*reference.tokens_of(example.response), TOKENS["<|im_end|>"], *b"\n"]
        inputs = {"input_ids": torch.cat([prompt, torch.tensor([response])], dim=1)}
        return {**inputs, **({} if pixels is None else {"pixel_values": pixels})}, prompt.shape[1]


def examples_of(dataset: Path) -> list[Example]:
    """The calibration samples in the order of their files."""
    return [
        Example(
            expert,
            task,
            ([dataset / entry["image_path"]] if "image_path" in entry else [], entry["question"]),  # type: ignore[arg-type]
            entry["response"],
        )
        for task, expert in TASKS.items()
        for entry in json.loads((dataset / f"{task}.json").read_text())
    ]


def make_twin(cache: Path, merged: list[str], **options) -> PictureTwin:
    experts = {name: cache / folder for name, folder in EXPERTS.items()}
    settings = {"initial": [0.1] * 5, "layers": [1], "regularisation": 5.0}
    return PictureTwin(base=cache / BASE, experts=experts, merged=merged, **{**settings, **options})


# Every floating-point tensor that the learned coefficients reach; the vision tower's attention is fused in the file.
_TOWER_TOO = ["--exclude_params", ".*lm_head.*", ".*norm.*", ".*embed_tokens.*", ".*bias.*"]
EXCLUSIONS = {
    "defaults": ([], MERGED),
    "vision tower too": (_TOWER_TOO, None),
    "layers computed again": ([*_TOWER_TOO, "--gradient_checkpointing"], None),
    "nothing": (["--exclude_params", "none"], None),
}
NAMES = ["defaults", *(pytest.param(name, marks=pytest.mark.slow) for name in EXCLUSIONS if name != "defaults")]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_learned_coefficients_are_the_plain_twins(name, internvl_zoo, tmp_path):
    flags, expected = EXCLUSIONS[name]
    dataset = internvl_zoo / "dataset"
    settings = ["--gradient_accumulation_steps", 4, "--num_epochs", 2, "--learning_rate", 0.1]
    run = run_command(tmp_path, *LEARNING, *settings, *flags, "--cache_dir", internvl_zoo, "--data_dir", dataset)
    learned = load_coefficients(run.folder)
    qkv = "vision_model.encoder.layers.0.attn.qkv.weight"
    assert (qkv in learned.values) == (expected is None)
    assert {"mlp1.0.weight", "mlp1.1.weight", "mlp1.3.weight"} <= set(learned.values)
    assert expected is None or set(learned.values) == expected
    twin = make_twin(internvl_zoo, list(learned.values), learning_rate=0.1, accumulation=4)
    twin.train(examples_of(dataset), 2, seed=3)
    for parameter, values in learned.values.items():
        torch.testing.assert_close(values, twin.coefficients(parameter).detach(), rtol=1e-4, atol=2e-5, msg=parameter)
    weights = twin.merged_weights()
    written, before = tensors_of(run.model), tensors_of(internvl_zoo / BASE)
    for parameter, tensor in written.items():
        torch.testing.assert_close(tensor, weights[parameter.replace(".", "/")].detach(), rtol=1e-3, atol=1e-4)
        assert torch.equal(tensor, before[parameter]) == (parameter not in learned.values), parameter


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_coefficients_equal_the_plain_twins(name, internvl_zoo, tmp_path, monkeypatch):
    """One update from all samples: the projector's, the language model's and, where merged, the fused attention's."""
    collected, collect = {}, Trainer._collect

    def record(trainer, group, advance):
        sums = collect(trainer, group, advance)
        for parameter in trainer.vector.places:
            collected[parameter] = trainer.vector.view(trainer.live.gradient, parameter).clone()
        return sums

    monkeypatch.setattr(Trainer, "_collect", record)
    dataset = internvl_zoo / "dataset"
    flags = [*EXCLUSIONS[name][0], "--gradient_accumulation_steps", 10]
    run_command(tmp_path, *LEARNING, *flags, "--cache_dir", internvl_zoo, "--data_dir", dataset)
    twin = make_twin(internvl_zoo, list(collected), accumulation=10)
    gradients = twin.update(examples_of(dataset))
    for parameter, gradient in collected.items():
        expected = gradients[parameter] / (0.1 * 0.9)  # of the coefficient, not of its logit
        assert expected.abs().min() > 0
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-7, msg=parameter)


@pytest.mark.slow
def test_chunks_of_the_fused_attention_cross_its_three_parts(internvl_zoo, tmp_path):
    """Two chunks for three row blocks: the second begins in the middle of the keys."""
    dataset = internvl_zoo / "dataset"
    flags = ["--exclude_params", "language_model.*", "--coeffs_size_dict", '{"*attn.qkv*": 2, "mlp1.1*": 3}']
    run = run_command(tmp_path, *LEARNING, *flags, "--cache_dir", internvl_zoo, "--data_dir", dataset)
    learned = load_coefficients(run.folder)
    chunks = {name: values.shape[1] for name, values in learned.values.items()}
    assert chunks["vision_model.encoder.layers.1.attn.qkv.weight"] == 2
    assert chunks["mlp1.1.weight"] == 3
    twin = make_twin(internvl_zoo, list(learned.values), chunks=chunks)
    twin.train(examples_of(dataset), 1, seed=3)
    for parameter, values in learned.values.items():
        torch.testing.assert_close(values, twin.coefficients(parameter).detach(), rtol=1e-4, atol=2e-5, msg=parameter)


@pytest.mark.slow
def test_a_tied_head_learns_like_the_twin(tmp_path):
    cache = make_zoo(tmp_path / "cache", {"llm_config.tie_word_embeddings": True})
    flags = ["--exclude_params", "vision_model.*"]
    run = run_command(tmp_path / "out", *LEARNING, *flags, "--cache_dir", cache, "--data_dir", cache / "dataset")
    learned = load_coefficients(run.folder)
    assert "language_model.model.embed_tokens.weight" in learned.values
    twin = make_twin(cache, list(learned.values))
    twin.train(examples_of(cache / "dataset"), 1, seed=3)
    for parameter, values in learned.values.items():
        torch.testing.assert_close(values, twin.coefficients(parameter).detach(), rtol=1e-3, atol=1e-4, msg=parameter)


@pytest.mark.slow
def test_answers_that_are_missing_are_written_by_the_task_s_expert(internvl_zoo, tmp_path):
    dataset = tmp_path / "dataset"
    picture = make_picture(dataset / "images" / "a.png", (60, 60))
    for task in TASKS:
        entries = [{"question": "What?", "image_path": f"images/{name}.png", "question_id": 0} for name in "ab"]
        (dataset / f"{task}.json").write_text(json.dumps(entries))
    make_picture(dataset / "images" / "b.png", (60, 60), seed=3)
    counts = ["--samples_per_task", 1, "--samples_per_task_dict", "Chart=2"]
    run = run_command(tmp_path / "out", *LEARNING, *counts, "--cache_dir", internvl_zoo, "--data_dir", dataset)
    answers = json.loads(run.responses.read_text())
    assert set(answers.pop("formats")) == set(EXPERTS)
    assert len(answers) == len(TASKS) + 1, "questions of the same words about two pictures are two questions"
    for task, expert in TASKS.items():
        model = Plain(internvl_zoo / EXPERTS[expert])
        ids, pixels = reference.encode("What?", [picture], model.config, 12 if task in ("Chart", "Grounding") else 6)
        prompt = ids.shape[1]
        for _ in range(6):  # greedily, without any cache
            with torch.no_grad():
                following = model(ids, pixels).logits[0, -1].argmax()
            ids = torch.cat([ids, following.view(1, 1)], dim=1)
            if following == TOKENS["<|im_end|>"]:
                break
        assert answers[f"{task}/0/What?/{picture}"]["tokens"] == ids[0, prompt:].tolist(), task


@pytest.mark.slow
def test_defaults_are_the_papers(internvl_zoo, tmp_path):
    run = run_command(tmp_path, *LEARNING, "--cache_dir", internvl_zoo, "--data_dir", internvl_zoo / "dataset")
    record = json.loads(run.config.read_text())
    options = record["options"]
    assert record["inputs"]["initial"] == "0.1"
    expected = {
        "samples_per_task": 5,
        "sparsity_reg_weight": 5.0,
        "hidden_states_layers": "middle",
        "exclude_params": ["vision_model.*", ".*lm_head.*", ".*norm.*", ".*embed_tokens.*", ".*bias.*"],
        "max_tiles": 6,
        "max_tiles_dict": {"Chart": 12, "OCRVQA": 12, "Grounding": 12},
        "trust_remote_code": False,
    }
    assert {name: options[name] for name in expected} == expected
    assert list(options["expert"]) == ["OCR", "VQA", "Geometry", "Chart", "Grounding"]


@pytest.mark.slow
def test_fewer_tiles_reach_the_model(internvl_zoo, tmp_path):
    flags = [*LEARNING, "--cache_dir", internvl_zoo, "--data_dir", internvl_zoo / "dataset"]
    fewer = ["--max_tiles", 1, "--max_tiles_dict", '{"Chart": 1, "Grounding": 1}']
    plain, small = (
        load_coefficients(run_command(tmp_path / str(number), *flags, *given).folder).values
        for number, given in enumerate(([], fewer))
    )
    assert not all(torch.allclose(plain[name], small[name], atol=1e-5) for name in plain)


@pytest.mark.slow
def test_half_precision_checkpoints_learn_and_keep_their_type(internvl_zoo, tmp_path):
    cache = tmp_path / "cache"
    for folder in (BASE, *EXPERTS.values()):
        (cache / folder).mkdir(parents=True)
        for file in (internvl_zoo / folder).iterdir():
            if file.suffix == ".safetensors":
                tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
                save_file(tensors, cache / folder / file.name, metadata={"format": "pt"})
            else:
                (cache / folder / file.name).write_bytes(file.read_bytes())
    flags = ["--mixed_precision", "bf16", "--cache_dir", cache, "--data_dir", internvl_zoo / "dataset"]
    run = run_command(tmp_path / "out", *LEARNING, *flags)
    assert {tensor.dtype for tensor in tensors_of(run.model).values()} == {torch.bfloat16}
    assert changed_names(cache / BASE, run.model) == MERGED


def test_the_merged_folder_has_all_that_evaluation_needs(internvl_zoo, tmp_path):
    run = run_command(tmp_path, "--method", "weight_average", "--cache_dir", internvl_zoo, "--run_name", "mean")
    evaluation = json.loads((run.evaluation()).read_text())
    settings = {"class": "InternVLChat", "version": "V2.0", "model_path": str(run.model.resolve())}
    assert evaluation["model"] == {"InternVL-mean": settings}
    log = " ".join(run.log.read_text().split())
    assert f"python run.py --config {run.evaluation()} --verbose" in log
    assert f"launch -m lmms_eval --model internvl2 --batch_size 1 --model_args pretrained={run.model} --tasks " in log
    assert f'("{run.model}", torch_dtype="auto", trust_remote_code=True) # with transformers 4' in log
    assert load_processor(run.model).tokenizer.get_vocab() == load_processor(internvl_zoo / BASE).tokenizer.get_vocab()


@pytest.mark.slow
def test_the_merged_model_answers_the_test_questions(internvl_zoo, tmp_path):
    run = run_command(
        tmp_path, "--method", "weight_average", "--cache_dir", internvl_zoo, "--run_tests", "--max_tiles", 1
    )
    log = run.log.read_text()
    for question in BACKBONE.test_questions:
        assert f"question: {question.question}" in log
    assert log.count("answer:") == len(BACKBONE.test_questions)


def test_variants_that_cannot_be_learned_are_refused_before_any_work(tmp_path, capsys):
    cache = make_zoo(tmp_path / "cache", {"llm_config.architectures": ["InternLM2ForCausalLM"]})
    flags = [*LEARNING, "--cache_dir", cache, "--data_dir", cache / "dataset", "--output_path", tmp_path / "out"]
    errors = refused_command(capsys, *flags)
    assert any(
        "has the language model InternLM2ForCausalLM; transformers' own InternVL covers" in line for line in errors
    )
    assert not (tmp_path / "out").exists()


def test_an_expert_of_another_size_is_refused(internvl_zoo, tmp_path, capsys):
    other = save_model(tmp_path / "other", 1, {"llm_config.intermediate_size": 64})
    flags = ["--method", "ties", "--base_model_path", internvl_zoo / BASE, "--expert", f"OCR={other}"]
    errors = refused_command(capsys, *flags, "--output_path", tmp_path / "out")
    assert "layers.0.mlp.down_proj.weight has shape [32, 64], the base's has [32, 48]" in errors[0]


def test_flags_of_the_family_are_checked(internvl_zoo, capsys):
    flags = [*LEARNING, "--cache_dir", internvl_zoo, "--data_dir", internvl_zoo / "dataset"]
    line = refusal(capsys, *flags, "--max_tiles", 0, family=BACKBONE)
    assert line == "--max_tiles must be a whole number in [1, inf), got 0"
    line = refusal(capsys, *flags, "--max_tiles_dict", '{"Chart": 0}', family=BACKBONE)
    assert line == "--max_tiles_dict must be a whole number in [1, inf), got 0 for 'Chart'"
    line = refusal(capsys, *flags, "--max_tiles_dict", "chart=3", family=BACKBONE)
    assert line.startswith("--max_tiles_dict names the task 'chart', which ")
    assert line.endswith(" has no file for. Did you mean 'Chart'?")


def test_what_makes_samples_shorter_is_told(tmp_path, capsys):
    cache = make_zoo(tmp_path / "cache", {"llm_config.max_position_embeddings": 180})
    flags = [*LEARNING, "--cache_dir", cache, "--data_dir", cache / "dataset", "--output_path", tmp_path / "out"]
    lines = refused_command(capsys, *flags)
    (shown,) = [line for line in lines if "Chart.json, entries 0, " in line]
    assert shown.endswith("takes at most 180; shorten the samples or lower --max_tiles or --max_tiles_dict")
    assert len(lines) <= len(TASKS), "one for each file"


def test_samples_are_checked_before_any_work(internvl_zoo, tmp_path, capsys):
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    (dataset / "broken.png").write_text("no picture")
    faulty = [
        {"question": "What?", "image_path": "broken.png", "response": "x"},
        {"question": "<image>?", "question_id": "q1"},
    ]
    for task in TASKS:
        (dataset / f"{task}.json").write_text(json.dumps(faulty if task == "Chart" else [{"question": "What?"}]))
    flags = [*LEARNING, "--cache_dir", internvl_zoo, "--data_dir", dataset, "--output_path", tmp_path / "out"]
    places = [f"{dataset / 'Chart.json'}, entry {number} (counted from 0)" for number in range(2)]
    for mode in ([], ["--dry_run"]):
        broken, mark = refused_command(capsys, *flags, *mode)
        assert broken.startswith(f"{places[0]}: {dataset / 'broken.png'} cannot be read as a picture")
        assert mark == f"{places[1]}: 1 <image> marks for 0 pictures; add image_path or remove marks"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_experts_need_neither_tokenizer_nor_preprocessor_nor_code(internvl_zoo, tmp_path):
    """As the published ones lack some of the base's files and have others; what tokens mean is the base's to say."""
    bare = tmp_path / "bare"
    for folder in (BASE, *EXPERTS.values()):
        shutil.copytree(internvl_zoo / folder, bare / folder)
    kept = ("config.json", "model.safetensors")
    for folder in experts_of(bare):
        for file in folder.iterdir():
            if file.name not in kept:
                file.unlink()
    (experts_of(bare)[0] / "tokenizer_config.json").write_text("{ damaged")
    (experts_of(bare)[1] / "flash_attention.py").write_text("raise RuntimeError('executed')")
    flags = [*LEARNING, "--samples_per_task", 1, "--data_dir", internvl_zoo / "dataset", "--cache_dir"]
    whole = run_command(tmp_path / "whole", *flags, internvl_zoo)
    assert_same_bytes(tensors_of(run_command(tmp_path / "out", *flags, bare).model), tensors_of(whole.model))


@pytest.mark.slow
@pytest.mark.parametrize("response", ["yes", None])
def test_a_picture_is_decoded_once_a_run(response, internvl_zoo, tmp_path, monkeypatch):
    """By the checks, whose result the experts and the merged model are given, also where experts write responses."""
    decoded = []
    monkeypatch.setattr("InternVL.backbone.read_picture", lambda file: decoded.append(file) or read_picture(file))
    write_tasks(tmp_path / "dataset", response=response)
    flags = [*LEARNING, "--cache_dir", internvl_zoo, "--data_dir", tmp_path / "dataset"]
    run_command(tmp_path / "out", *flags)
    assert Counter(decoded) == Counter((tmp_path / "dataset" / "images").glob("*0.png"))


def test_a_dry_run_keeps_no_pictures(internvl_zoo, tmp_path, monkeypatch):
    kept = []
    check = Prompts.check
    monkeypatch.setattr(Prompts, "check", lambda prompts, samples: (check(prompts, samples), kept.append(prompts))[0])
    flags = [*LEARNING, "--cache_dir", internvl_zoo, "--data_dir", internvl_zoo / "dataset", "--output_path", tmp_path]
    assert merge(*flags, "--dry_run", family=BACKBONE) == 0
    assert [prompts._made for prompts in kept] == [{}]
