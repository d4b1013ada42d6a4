"""Options of methods that learn: what is refused before any work, and `--method coefficients`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from expert_merging.learned.coefficients import Coefficients
from expert_merging.plan import make_plan
from Mistral.backbone import BACKBONE, encode_prompt, load_processor
from tests.checkpoints import BASE, EXPERTS, tensors_of, write_tasks
from tests.command import assert_same_bytes, flags, given, merge, merged
from tests.learned.test_coefficients import make_coefficients


@pytest.fixture
def command(tiny_zoo: Path, tmp_path: Path):
    """Run the command on the tiny zoo with more arguments."""

    def run(*arguments: str) -> int:
        fixed = ["--cache_dir", str(tiny_zoo), "--output_path", str(tmp_path / "out"), "--max_new_tokens", "4"]
        data = [] if "--data_dir" in arguments else ["--data_dir", str(tiny_zoo / "dataset")]
        return merge(*fixed, *data, *arguments)

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scaling_coefficient", "1"], "must lie strictly between 0 and 1 (0.3, for example), got 1"),
        (["--scaling_coefficient", "[0.1, 0.2]"], "has 2 values for 3 experts (Chat, Math, Code)"),
        (["--task_vector_coeffs_dict", '{"Maths": 1}'], "there is no expert 'Maths'. Did you mean 'Math'?"),
        (["--coeffs_size_dict", '{"*z_proj*": 2}'], "'*z_proj*' matches no merged parameter"),
        (["--parametrisation", "chunk"], "--parametrisation chunk needs --coeffs_size_dict to say how many chunks"),
        (["--directions", "ties"], "--directions ties: the result of ties is no sum of a part for each expert"),
        (["--directions", "svdd"], "--directions svdd: there are no such. Did you mean 'svd'?"),
        (["--method", "expert_merging++", "--directions", "iso"], "--directions iso: the result of iso is no sum"),
        (["--directions", "trimmed", "--scaling_coefficient", "1"], "must lie strictly between 0 and 1"),
        (["--method", "supermerge", "--scaling_coefficient", "-1"], "must lie strictly between -1 and 1"),
        (["--hidden_states_layers", "1,9"], "the model has 3 layers (0 to 3), got 9"),
        (["--mixed_precision", "fp16"], "fp16 needs a GPU; on a CPU use bf16 or no"),
        (["--mixed_precision", "fp8"], "--mixed_precision must be 'auto' or 'no' or 'fp16' or 'bf16', got fp8"),
        (["--log_with", "tensorbord"], "Did you mean 'tensorboard'?"),
        (["--log_with", "wandb"], "--log_with wandb: that tracker is not available. pip install wandb"),
        (["--prompt_template", "[INST] [/INST]"], "--prompt_template must contain {question}"),
        (["--loss_alphas", '{"Chart": 2}'], "names the task 'Chart', which has no samples. Did you mean 'Chat'?"),
        (["--samples_per_task_dict", '{"Chart": 2}'], "names the task 'Chart'"),
        (["--task_expert", "Chat=Chatt"], "there is no expert 'Chatt'. Did you mean 'Chat'?"),
        (["--patience", "0"], "--patience must be a whole number in [1, inf), got 0"),
        (["--learning_rate", "0"], "--learning_rate must be a number in (0, inf), got 0"),
        (["--data_dir", "/nowhere"], "calibration folder /nowhere does not exist"),
        (["--method", "coefficients"], "--method coefficients needs --coefficients RUN_OR_FILE"),
        (["--logits_weight", "0", "--hidden_states_weight", "0"], "neither logits nor hidden states are aligned"),
        (["--method", "expert_merging++", "--budget", "0.01"], "--budget 0.01 times 21 merged parameters is less than"),
        (["--method", "expert_merging_pp", "--chunking", "some"], "--chunking must be 'importance' or 'all' or 'none'"),
        (
            ["--method", "expert_merging++", "--coefficients", "/nowhere"],
            "--coefficients /nowhere: /nowhere does not exist",
        ),
        (["--method", "adamerging_pp", "--density", "80"], "for 80 % write 0.8"),
    ],
)
def test_refused_before_any_work(arguments, message, command, tmp_path, capsys):
    assert command(*arguments) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert all(line.startswith("error: ") for line in shown.splitlines())
    assert not (tmp_path / "out").exists()


def test_what_loading_any_model_needs_is_checked_before_an_expert_is_asked(command, tiny_zoo, tmp_path, capsys):
    folders = {}
    for name, published in EXPERTS.items():
        folders[name] = shutil.copytree(tiny_zoo / published, tmp_path / name)
    file = folders["Chat"] / "generation_config.json"
    file.write_text("{")
    for mode in ([], ["--dry_run"]):
        assert command(*mode, *map(str, flags(tiny_zoo / BASE, **folders))) == 1
        assert capsys.readouterr().err.splitlines() == [
            f"error: {file} is not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
            "(char 1)); download it again",
        ]


def test_an_expert_that_lacks_a_tensor_is_told_before_any_is_asked(command, tiny_zoo, tmp_path, capsys):
    folder = shutil.copytree(tiny_zoo / EXPERTS["Code"], tmp_path / "code")
    tensors = tensors_of(folder)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert command(*map(str, flags(tiny_zoo / BASE, Chat=tiny_zoo / EXPERTS["Chat"], Code=folder))) == 1
    assert capsys.readouterr().err == (
        f"error: {folder} lacks model.norm.weight, which the model of its config.json has; download it again\n"
    )


@pytest.mark.slow
def test_experts_need_no_tokenizer_of_their_own(tiny_zoo, tmp_path):
    """As a published expert has one that only another library reads, and another a list of three added tokens."""
    folders = {name: shutil.copytree(tiny_zoo / published, tmp_path / name) for name, published in EXPERTS.items()}
    for folder in folders.values():
        for file in folder.glob("tokenizer*"):
            file.unlink()
    (folders["Math"] / "tokenizer.model").write_bytes(b"pieces")
    (folders["Code"] / "added_tokens.json").write_text(json.dumps({"</s>": 2, "<s>": 1, "<unk>": 0}))
    found = []
    for number, experts in enumerate([{name: tiny_zoo / published for name, published in EXPERTS.items()}, folders]):
        run = merged(
            tmp_path / str(number),
            *("--data_dir", tiny_zoo / "dataset", "--samples_per_task", 1, "--max_new_tokens", 4, "--log_with", "none"),
            *("--method", "expert_merging", *flags(tiny_zoo / BASE, **experts)),
        )
        found.append(tensors_of(run.model))
    assert_same_bytes(*found)


def test_all_problems_are_told_at_once(command, capsys):
    assert command("--scaling_coefficient", "2", "--hidden_states_layers", "7", "--coeffs_size_dict", '{"x": 1}') == 1
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_pictures_are_refused_by_a_language_model(command, tmp_path, capsys):
    write_tasks(tmp_path / "dataset")
    (tmp_path / "dataset" / "a.png").write_bytes(b"picture")
    (tmp_path / "dataset" / "Math.json").write_text(json.dumps([{"question": "?", "image_path": "a.png"}]))
    assert command("--data_dir", str(tmp_path / "dataset")) == 1
    assert (
        "Math.json, entry 0 (counted from 0) has a picture, and Mistral is a language model" in capsys.readouterr().err
    )


def test_a_base_without_a_layer_count_needs_an_explicit_choice(tiny_zoo, tmp_path, capsys):
    (tmp_path / "base").mkdir()
    for file in (tiny_zoo / BASE).iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    del config["num_hidden_layers"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    arguments = ["--cache_dir", str(tiny_zoo), "--base_model_path", str(tmp_path / "base"), "--dry_run"]
    assert merge(*arguments, "--data_dir", tiny_zoo / "dataset") == 1
    assert "does not say how many layers it has; give --hidden_states_layers none" in capsys.readouterr().err


@pytest.mark.slow
def test_saved_coefficients_write_the_checkpoint_that_learning_wrote(command, tmp_path):
    assert (
        command(
            "--run_name", "learned", "--coeffs_size_dict", '{"*mlp*": 3}', "--task_vector_coeffs_dict", '{"Math": 0.5}'
        )
        == 0
    )
    learned = tmp_path / "out" / "expert_merging" / "learned"
    recorded = json.loads((learned / "coefficients.json").read_text())["checkpoints"]
    assert list(recorded) == ["base", *EXPERTS]
    assert len(set(recorded.values())) == 4
    for source in (learned, learned / "coefficients.safetensors", learned / "weight_coeffs.json"):
        assert command("--method", "coefficients", "--coefficients", str(source), "--run_name", source.name) == 0
        again = tmp_path / "out" / "coefficients" / source.name / "model" / "model.safetensors"
        assert again.read_bytes() == (learned / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_written_weights_are_base_plus_coefficients_times_task_vectors(command, tiny_zoo, tmp_path):
    assert command("--run_name", "r", "--task_vector_coeffs_dict", '{"Math": 0.5}') == 0
    run = tmp_path / "out" / "expert_merging" / "r"
    published = json.loads((run / "weight_coeffs.json").read_text())
    base, merged = tensors_of(tiny_zoo / BASE), tensors_of(run / "model")
    experts = [tensors_of(tiny_zoo / folder) for folder in EXPERTS.values()]
    for name, weight in base.items():
        expected = weight.clone()
        for expert, scale, value in zip(
            experts, (1, 0.5, 1), published.get(name.replace(".", "_"), [0] * 3), strict=True
        ):
            expected += value * scale * (expert[name] - weight)
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)


def test_coefficients_of_other_experts_or_parameters_are_refused(command, tmp_path, capsys):
    make_coefficients().save(tmp_path / "coefficients.safetensors")
    assert command("--method", "coefficients", "--coefficients", str(tmp_path)) == 1
    shown = capsys.readouterr().err
    assert (
        "belong to the experts x, y and have none for Chat, Math, Code; leave such an expert out, or give it" in shown
    )
    assert "has none for model.layers.0" in shown
    assert "has w, which is not merged (2 in all)" in shown


def test_a_first_stage_of_other_weights_is_refused_unless_it_is_meant(command, tiny_zoo, tmp_path, capsys):
    plan = make_plan(
        tiny_zoo / BASE, {name: tiny_zoo / EXPERTS[name] for name in EXPERTS}, list(BACKBONE.exclude_params)
    )
    values = {name: torch.full((3, 1), 0.3) for name in plan.merged}
    given = Coefficients(tuple(EXPERTS), values, (1.0,) * 3, checkpoints={**plan.contents, "base": "other"})
    given.save(tmp_path / "coefficients.safetensors")
    arguments = ["--method", "expert_merging++", "--coefficients", str(tmp_path), "--dry_run"]
    assert command(*arguments) == 1
    assert capsys.readouterr().err == (
        f"error: --coefficients {tmp_path} were learned with other weights of base than those in {tiny_zoo / BASE}; "
        "give the checkpoint that they were learned with, or --force to use them with this one\n"
    )
    assert command(*arguments, "--force") == 0
    assert "by --force, coefficients are used with other weights of base\n" in capsys.readouterr().out


def test_the_dry_run_tells_what_would_be_learned(command, tmp_path, capsys):
    assert command("--dry_run", "--samples_per_task_dict", '{"Math": 2}') == 0
    shown = capsys.readouterr().out
    assert "63 coefficients learned from 12 samples in 1 epoch" in shown
    assert "hidden states aligned: after layer 1; precision" in shown
    assert not (tmp_path / "out").exists()


def test_changed_calibration_data_is_a_different_run(command, tmp_path, capsys):
    write_tasks(tmp_path / "data")
    arguments = ["--data_dir", str(tmp_path / "data"), "--run_name", "r", "--samples_per_task", "1"]
    assert command(*arguments) == 0
    write_tasks(tmp_path / "data", responses={"Math": "other"})
    assert command(*arguments) == 1
    assert "holds a different run (calibration:" in capsys.readouterr().err


def test_a_run_goes_on_with_other_options_that_save_memory(command, capsys):
    assert command("--samples_per_task", "1") == 0
    capsys.readouterr()
    saving = ["--gradient_checkpointing", "--task_vectors", "disk", "--rank_batches", "sample"]
    assert command("--samples_per_task", "1", *saving, "--logits_chunk_tokens", "3") == 0
    assert "this run is complete already" in capsys.readouterr().out


def test_what_answering_questions_needs_is_checked_before_merging(command, tiny_zoo, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(tiny_zoo / BASE, base, ignore=shutil.ignore_patterns("tokenizer*"))
    arguments = ["--method", "weight_average", "--base_model_path", str(base), "--dry_run"]
    experts = [f"--expert={name}={tiny_zoo / folder}" for name, folder in EXPERTS.items()]
    assert command(*arguments, *experts) == 0, "merging needs no tokenizer"
    assert command(*arguments, *experts, "--run_tests") == 1
    assert str(base) in capsys.readouterr().err


def test_questions_are_answered_after_merging(command, capsys):
    assert command("--method", "weight_average", "--run_tests") == 0
    shown = capsys.readouterr().out
    assert all(f"question: {sample.question}" in shown for sample in BACKBONE.test_questions)


def test_prompts_by_template_chat_template_or_bare_question(tiny_zoo):
    from expert_merging.questions.calibration import Sample

    tokenizer = load_processor(tiny_zoo / BASE)
    sample = Sample("t", "e", "ab", None, "0")

    def text(template):
        return tokenizer.decode(encode_prompt(tokenizer, sample, template and given(template))["input_ids"][0])

    assert text(None) == "<s>ab"
    assert text("Q: {question}?") == "<s>Q: ab?"
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}({{ m.content }}){% endfor %}={% if add_generation_prompt %}+{% endif %}"
    )
    assert text(None) == "<s>(ab)=+"


def test_deepspeed_is_refused_where_something_is_learned(command, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert command("--dry_run") == 1
    assert capsys.readouterr().err == (
        "error: accelerate launch was told to use DeepSpeed, with which coefficients cannot be learned; take one of "
        "the configurations in configs/accelerate (eight_gpus_fsdp2.yaml where no device has room for the model)\n"
    )
    assert command("--dry_run", "--method", "task_arithmetic") == 0


@pytest.mark.parametrize(("launched", "expected"), [("bf16", "bf16"), ("no", "float32")])
def test_the_launchers_precision_counts_where_none_is_asked_for(launched, expected, tiny_zoo, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    asked = ["--cache_dir", tiny_zoo, "--data_dir", tiny_zoo / "dataset", "--dry_run"]
    assert merge(*asked) == 0
    assert f"precision: {expected}" in capsys.readouterr().out
    assert merge(*asked, "--mixed_precision", "no") == 0
    assert "precision: float32" in capsys.readouterr().out
