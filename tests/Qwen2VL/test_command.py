"""The command of the Qwen2-VL family: both namings, both generations, closed forms and learning."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, Qwen2VLForConditionalGeneration

from expert_merging.learned.coefficients import load_coefficients
from expert_merging.methods.linear import task_arithmetic
from InternVL.backbone import BACKBONE as internvl  # noqa: N811
from Qwen2VL.backbone import BACKBONE, encode_prompt, load_processor
from tests.checkpoints import perturb, tensors_of, write_checkpoint
from tests.command import assert_same_bytes, forget_accelerate, merge, merge_plainly, merged, refusal, refused
from tests.learned.twin import Example, Twin
from tests.qwen2vl import BASE, CONFIG, CONFIG_2_5, EXPERTS, make_zoo, newer_name, save_picture, with_newer_names
from tests.Qwen2VL.reference import chat, patches, positions, tokens

ROOT = Path(__file__).parents[2]
run_command = partial(merged, family=BACKBONE)


@pytest.fixture(scope="session")
def newer_zoo(qwen_zoo: Path, tmp_path_factory) -> Path:
    """The same checkpoints with newer names."""
    cache = tmp_path_factory.mktemp("newer")
    for folder in (BASE, *EXPERTS.values()):
        with_newer_names(qwen_zoo / folder, cache / folder)
    return cache


@pytest.fixture(scope="session")
def second_zoo(tmp_path_factory) -> Path:
    """Checkpoints of Qwen2.5-VL."""
    return make_zoo(tmp_path_factory.mktemp("second"), config=CONFIG_2_5)


def mixed(target: Path, base: Path, experts: Path) -> Path:
    """A cache folder with the base of one and the experts of another."""
    target.mkdir()
    (target / BASE).symlink_to(base / BASE)
    for folder in EXPERTS.values():
        (target / folder).symlink_to(experts / folder)
    return target


def names_by_file(folder: Path) -> dict[str, list[str]]:
    """Tensor names of every file, in the file's order."""
    return {file.name: list(safe_open(file, "pt").keys()) for file in sorted(folder.glob("*.safetensors"))}


def experts_of(cache: Path) -> list[Path]:
    return [cache / folder for folder in EXPERTS.values()]


@pytest.mark.parametrize("experts", ["published", "newer"])
@pytest.mark.parametrize("base", ["published", "newer"])
def test_namings_are_matched_and_the_bases_is_written(base, experts, qwen_zoo, newer_zoo, tmp_path):
    zoos = {"published": qwen_zoo, "newer": newer_zoo}
    cache = mixed(tmp_path / "cache", zoos[base], zoos[experts])
    run = run_command(tmp_path / "out", "--method", "task_arithmetic", "--cache_dir", cache)
    rule = partial(task_arithmetic, scaling_coefficient=0.3)
    expected = merge_plainly(qwen_zoo / BASE, experts_of(qwen_zoo), rule, BACKBONE.exclude_params)
    if base == "newer":
        expected = {newer_name(name): tensor for name, tensor in expected.items()}
    assert_same_bytes(tensors_of(run.model), expected)
    source = zoos[base] / BASE
    assert names_by_file(run.model) == names_by_file(source)
    assert len(names_by_file(run.model)) > 1
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            assert (run.model / file.name).read_bytes() == file.read_bytes(), file.name
    model, report = Qwen2VLForConditionalGeneration.from_pretrained(
        run.model, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    written = expected[name if base == "newer" else name.replace("language_model.", "")]
    assert torch.equal(model.get_parameter(name), written)


def test_exclusion_patterns_speak_of_published_names(qwen_zoo, newer_zoo, tmp_path):
    """Whatever a checkpoint calls the vision tower and the language model, the defaults leave out the same tensors."""
    flags = ["--method", "weight_average", "--exclude_params", "visual.blocks.*", "model.layers.*"]
    for cache in (qwen_zoo, newer_zoo):
        run = run_command(tmp_path / cache.name, *flags, "--cache_dir", cache)
        before, after = tensors_of(cache / BASE), tensors_of(run.model)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        kept = set(before) - changed
        assert {name for name in kept if ".blocks." in name or ".layers." in name} == kept
        assert {name.removeprefix("model.") for name in changed if "visual" in name} == {
            "visual.patch_embed.proj.weight",
            *(f"visual.merger.{part}.{kind}" for part in ("ln_q", "mlp.0", "mlp.2") for kind in ("weight", "bias")),
        }


@pytest.mark.slow
@pytest.mark.parametrize("method", ["weight_average", "ties", "dare_ties", "svd", "iso", "wudi"])
def test_methods_give_the_same_whatever_the_experts_are_called(method, qwen_zoo, newer_zoo, tmp_path):
    tensors = []
    for number, experts in enumerate((qwen_zoo, newer_zoo)):
        cache = mixed(tmp_path / f"cache{number}", qwen_zoo, experts)
        run = run_command(tmp_path / f"out{number}", "--method", method, "--cache_dir", cache, "--seed", 1)
        tensors.append(tensors_of(run.model))
    assert_same_bytes(*tensors)
    before = tensors_of(qwen_zoo / BASE)
    changed = {name for name in before if not torch.equal(before[name], tensors[0][name])}
    assert changed == {
        f"model.layers.{layer}.{part}_proj.weight"
        for layer in range(3)
        for part in (*(f"self_attn.{kind}" for kind in "qkvo"), *(f"mlp.{kind}" for kind in ("gate", "up", "down")))
    }


class PictureTwin(Twin):
    """The plain twin with inputs made by the published rules and positions given to the model."""

    def load(self, folder):
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)

    def in_memory(self, name):
        return newer_name(name)

    def inputs(self, example):
        files, question = example.prompt
        cut = [patches(Image.open(file).convert("RGB")) for file in files]
        prompt = tokens(chat(*((columns // 2, rows // 2) for _, (_, rows, columns) in cut), question))
        ids = [*prompt, *tokens(example.response), *tokens("<|im_end|>\n")]
        inputs = {"input_ids": torch.tensor([ids])}
        if cut:
            pixels, grids = zip(*cut, strict=True)
            inputs["pixel_values"], inputs["image_grid_thw"] = torch.cat(pixels), torch.tensor(grids)
            inputs["position_ids"] = positions(ids, list(grids))[:, None]
            inputs["mm_token_type_ids"] = torch.tensor([[int(token == 6) for token in ids]])
        return inputs, len(prompt)


TASKS = {"Chart": "Chart", "GQA": "VQA", "Grounding": "Grounding", "MathVista": "Geometry", "OCR": "OCR"}


def examples_of(dataset: Path) -> list[Example]:
    """The calibration samples in the order of their files."""
    examples = []
    for task, expert in TASKS.items():
        for entry in json.loads((dataset / f"{task}.json").read_text()):
            images = entry.get("image_path") or []
            files = [dataset / image for image in ([images] if isinstance(images, str) else images)]
            examples.append(Example(expert, task, (files, entry["question"]), entry["response"]))  # type: ignore[arg-type]
    return examples


LEARNING = ("--method", "expert_merging", "--seed", 3, "--log_with", "none", "--max_new_tokens", 6)


@pytest.fixture
def gradients(monkeypatch) -> list[torch.Tensor]:
    """The gradient that every later update takes, clipped, as one vector."""
    seen: list[torch.Tensor] = []
    step = torch.optim.AdamW.step

    def record(optimizer, *arguments):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        seen.append(torch.cat([parameter.grad.flatten() for parameter in parameters]).clone())
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    return seen


VISUAL_TOO = ("--exclude_params", ".*lm_head.*", ".*norm.*", ".*embed_tokens.*", ".*bias.*")


@pytest.mark.parametrize(
    ("options", "count"),
    [
        pytest.param((), 21, id="defaults"),
        pytest.param(("--gradient_checkpointing",), 21, id="layers computed again", marks=pytest.mark.slow),
        pytest.param(
            ("--gradient_checkpointing", *VISUAL_TOO), None, id="layers of the vision tower too", marks=pytest.mark.slow
        ),
    ],
)
def test_gradients_and_learned_coefficients_are_the_plain_twins(options, count, qwen_zoo, tmp_path, gradients):
    dataset = qwen_zoo / "dataset"
    flags = ["--gradient_accumulation_steps", 4, "--num_epochs", 2, "--learning_rate", 0.1, *options]
    run = run_command(tmp_path, *LEARNING, *flags, "--cache_dir", qwen_zoo, "--data_dir", dataset)
    learned = load_coefficients(run.folder)
    ours = list(gradients)
    gradients.clear()
    twin = PictureTwin(
        base=qwen_zoo / BASE,
        experts={name: qwen_zoo / folder for name, folder in EXPERTS.items()},
        merged=list(learned.values),
        initial=[0.3] * 5,
        layers=[1],
        regularisation=0.8,
        learning_rate=0.1,
        accumulation=4,
    )
    twin.train(examples_of(dataset), 2, seed=3)
    assert len(ours) == len(gradients) == 6
    for actual, expected in zip(ours, gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=2e-5)
    assert len(learned.values) == count or (count is None and any("visual" in name for name in learned.values))
    for name, values in learned.values.items():
        torch.testing.assert_close(values, twin.coefficients(name).detach(), rtol=1e-4, atol=2e-5)
        assert not torch.allclose(values, torch.tensor(0.3), atol=1e-3)
    weights = twin.merged_weights()
    for name, tensor in tensors_of(run.model).items():
        torch.testing.assert_close(tensor, weights[newer_name(name)].detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_learning_is_the_same_whatever_the_checkpoints_are_called(qwen_zoo, newer_zoo, tmp_path):
    dataset = qwen_zoo / "dataset"
    found = {}
    for base, base_zoo in (("published", qwen_zoo), ("newer", newer_zoo)):
        for experts, expert_zoo in (("published", qwen_zoo), ("newer", newer_zoo)):
            cache = mixed(tmp_path / f"{base}-{experts}", base_zoo, expert_zoo)
            output = tmp_path / f"out-{base}-{experts}"
            run = run_command(output, *LEARNING, "--cache_dir", cache, "--data_dir", dataset)
            found[base, experts] = load_coefficients(run.folder).values
            assert set(tensors_of(run.model)) == set(tensors_of(base_zoo / BASE))
    first = found["published", "published"]
    assert set(found["published", "newer"]) == set(first)
    for (base, _), values in found.items():
        for name, expected in first.items():
            actual = values[newer_name(name) if base == "newer" else name]
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_answers_that_are_missing_are_written_by_the_task_s_expert(qwen_zoo, tmp_path):
    dataset = tmp_path / "dataset"
    picture = save_picture(dataset / "images" / "a.png", 60, 60)
    for task in TASKS:
        entries = [{"question": "What?", "image_path": "images/a.png"}]
        (dataset / f"{task}.json").write_text(json.dumps(entries))
    run = run_command(tmp_path / "out", *LEARNING, "--cache_dir", qwen_zoo, "--data_dir", dataset)
    answers = json.loads(run.responses.read_text())
    assert set(answers.pop("formats")) == set(EXPERTS)
    assert len(answers) == len(TASKS)
    for task, expert in TASKS.items():
        model = AutoModelForImageTextToText.from_pretrained(qwen_zoo / EXPERTS[expert], dtype=torch.float32)
        pixels, grid = patches(Image.open(picture))
        ids = tokens(chat((2, 2), "What?"))
        for _ in range(6):  # greedily, without any cache
            inputs = {
                "input_ids": torch.tensor([ids]),
                "position_ids": positions(ids, [grid])[:, None],
                "pixel_values": pixels,
                "image_grid_thw": torch.tensor([grid]),
            }
            with torch.no_grad():
                likely = model(**inputs).logits[0, -1].topk(3).indices.tolist()
            ids.append(next(token for token in likely if token not in (6, 7)))  # those are for pictures
            if ids[-1] == 2:
                break
        assert answers[f"{task}/0/What?/{picture}"]["tokens"] == ids[len(tokens(chat((2, 2), "What?"))) :], task


@pytest.mark.slow
def test_defaults_are_the_papers(qwen_zoo, tmp_path):
    run = run_command(tmp_path, *LEARNING, "--cache_dir", qwen_zoo, "--data_dir", qwen_zoo / "dataset")
    record = json.loads(run.config.read_text())
    options = record["options"]
    assert record["inputs"]["initial"] == "0.3"
    expected = {
        "samples_per_task": 10,
        "sparsity_reg_weight": 0.8,
        "hidden_states_layers": "middle",
        "exclude_params": ["visual.*", ".*lm_head.*", ".*norm.*", ".*embed_tokens.*", ".*bias.*"],
        "min_pixels": None,
        "max_pixels": None,
    }
    assert {name: options[name] for name in expected} == expected
    assert list(options["expert"]) == ["OCR", "VQA", "Geometry", "Chart", "Grounding"]


def test_one_set_of_calibration_files_serves_both_picture_families():
    assert BACKBONE.task_experts == internvl.task_experts
    assert set(BACKBONE.task_experts.values()) | {"Chart", "Grounding"} == set(BACKBONE.expert_folders)
    assert list(BACKBONE.expert_folders) == list(internvl.expert_folders)


@pytest.mark.slow
def test_bounds_on_pictures_reach_the_model(qwen_zoo, tmp_path):
    flags = [*LEARNING, "--cache_dir", qwen_zoo, "--data_dir", qwen_zoo / "dataset"]
    runs = [
        run_command(tmp_path / str(number), *flags, *bounds)
        for number, bounds in enumerate(([], ["--max_pixels", 12845056], ["--min_pixels", 784, "--max_pixels", 784]))
    ]
    plain, same, small = (load_coefficients(run.folder).values for run in runs)
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    assert not all(torch.allclose(plain[name], small[name], atol=1e-4) for name in plain)
    assert json.loads(runs[2].config.read_text())["options"]["max_pixels"] == 784


@pytest.mark.parametrize("method", ["ties", pytest.param("expert_merging", marks=pytest.mark.slow)])
def test_the_second_generation_works_alike(method, second_zoo, tmp_path):
    dataset = ["--data_dir", second_zoo / "dataset"] if method == "expert_merging" else []
    run = run_command(tmp_path, "--method", method, "--cache_dir", second_zoo, "--seed", 3, *dataset)
    model, report = AutoModelForImageTextToText.from_pretrained(
        run.model, dtype=torch.float32, output_loading_info=True
    )
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert not any(report.values()), report
    before, after = tensors_of(second_zoo / BASE), tensors_of(run.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 21
    assert all(name.startswith("model.layers.") for name in changed)
    if method == "expert_merging":
        twin = PictureTwin(
            base=second_zoo / BASE,
            experts={name: second_zoo / folder for name, folder in EXPERTS.items()},
            merged=sorted(changed),
            initial=[0.3] * 5,
            layers=[1],
            regularisation=0.8,
        )
        twin.train(examples_of(second_zoo / "dataset"), 1, seed=3)
        for name, values in load_coefficients(run.folder).values.items():
            torch.testing.assert_close(values, twin.coefficients(name).detach(), rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_half_precision_checkpoints_learn_and_keep_their_type(qwen_zoo, tmp_path):
    """The published files are in bfloat16; pictures follow the type that the model has in memory."""
    for folder in (BASE, *EXPERTS.values()):
        perturb(qwen_zoo / folder, tmp_path / "cache" / folder, 0, change=0.0, dtype=torch.bfloat16)
    flags = [*LEARNING, "--cache_dir", tmp_path / "cache", "--data_dir", qwen_zoo / "dataset"]
    learned = []
    for precision in ("no", "bf16"):
        forget_accelerate()
        run = run_command(tmp_path / precision, *flags, "--mixed_precision", precision)
        assert {tensor.dtype for tensor in tensors_of(run.model).values()} == {torch.bfloat16}
        learned.append(torch.cat([values.flatten() for values in load_coefficients(run.folder).values.values()]))
    exact, rough = learned
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.1)
    assert (exact - 0.3).abs().mean() > 3 * (rough - exact).abs().mean()


def test_the_merged_folder_has_all_that_evaluation_needs(qwen_zoo, tmp_path):
    run = run_command(tmp_path, "--method", "weight_average", "--cache_dir", qwen_zoo, "--run_name", "mean")
    evaluation = json.loads((run.evaluation()).read_text())
    settings = {"class": "Qwen2VLChat", "min_pixels": 1003520, "max_pixels": 12845056}
    assert evaluation["model"] == {"Qwen2VL-mean": {**settings, "model_path": str(run.model.resolve())}}
    log = run.log.read_text()
    assert "VLMEvalKit goes by the path" not in log
    assert (
        f"--model qwen2_vl --model_args pretrained={run.model},max_pixels=2359296 --tasks refcoco_bbox_rec_val" in log
    )
    assert f"run.py --config {run.evaluation()}" in log
    card = (run.model / "README.md").read_text()
    assert "from transformers import AutoModelForImageTextToText, AutoProcessor" in card
    processor = load_processor(run.model)
    assert processor.tokenizer.chat_template == load_processor(qwen_zoo / BASE).tokenizer.chat_template


def test_the_second_generation_is_evaluated_as_such(second_zoo, tmp_path):
    run = run_command(tmp_path, "--method", "weight_average", "--cache_dir", second_zoo)
    assert re.fullmatch(r"Qwen2_5VL-[0-9a-f]{8}", run.folder.name)
    (settings,) = json.loads((run.evaluation()).read_text())["model"].values()
    assert settings["use_custom_prompt"] is False
    log = run.log.read_text()
    assert "lmms_eval --model qwen2_5_vl --model_args" in log
    assert "VLMEvalKit goes by the path" not in log


@pytest.mark.parametrize(
    ("config", "name", "wrong"),
    [
        (CONFIG, "mean", False),
        (CONFIG, "like-Qwen2.5", True),
        (CONFIG_2_5, "mean", True),
        (CONFIG_2_5, "my-Qwen25", False),
        (CONFIG_2_5, "qwen25-omni", True),
    ],
)
def test_a_path_that_vlmevalkit_misreads_is_told(config, name, wrong, tmp_path, capsys):
    base, expert = (
        write_checkpoint(
            tmp_path / name,
            {part: torch.full((3,), value) for part in ("model.layers.0.weight", "visual.blocks.0.weight")},
            config=config,
        )
        for name, value in {"base": 1.0, "expert": 1.1}.items()
    )
    flags = ["--base_model_path", base, "--expert", f"A={expert}", "--output_path", tmp_path, "--run_name", name]
    assert merge("--method", "weight_average", *flags, "--dry_run", family=BACKBONE) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    path = tmp_path / "weight_average" / name / "model"
    kind = config["model_type"]
    assert len(told) == wrong
    assert all(
        line.startswith(f"warning: VLMEvalKit goes by the path and will not take {path} for {kind}, for which it has")
        and line.endswith("; choose another --run_name or --output_path before you evaluate it there")
        for line in told
    )


def test_a_base_of_another_family_is_told(qwen_zoo, tmp_path, capsys):
    base, expert = (
        write_checkpoint(
            tmp_path / name,
            {"vision_tower.layers.0.weight": torch.full((3,), value), "language_model.lm_head.weight": torch.ones(3)},
            config={"model_type": "internvl"},
        )
        for name, value in {"base": 1.0, "expert": 1.1}.items()
    )
    flags = ["--method", "weight_average", "--expert", f"A={expert}", "--base_model_path", base, "--dry_run"]
    assert merge(*flags, family=BACKBONE) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("warning"))
    assert line == (
        "warning: the base has the model_type 'internvl', and the Qwen2VL command is made for qwen2_vl and qwen2_5_vl: "
        "its patterns may leave out other parameters than they should (a vision tower may be merged); look at the "
        "names and give --exclude_params, or use the command of the base's own family"
    )
    assert merge(*flags) == 0
    assert "model_type" not in capsys.readouterr().out, "the Mistral command takes any language model"
    assert merge("--method", "ties", "--cache_dir", qwen_zoo, "--dry_run", family=BACKBONE) == 0
    assert "model_type" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_merged_model_answers_the_test_questions(qwen_zoo, tmp_path):
    flags = ["--method", "weight_average", "--cache_dir", qwen_zoo, "--run_tests", "--max_pixels", "6272"]
    run = run_command(tmp_path, *flags)
    log = run.log.read_text()
    for question in BACKBONE.test_questions:
        assert f"question: {question.question}" in log
    assert log.count("answer:") == len(BACKBONE.test_questions)
    assert any(question.images for question in BACKBONE.test_questions)


def test_the_test_questions_can_be_asked(qwen_zoo):
    processor = load_processor(qwen_zoo / BASE, max_pixels=6272)
    for question in BACKBONE.test_questions:
        assert encode_prompt(processor, question, None)["input_ids"].shape[0] == 1


def test_pictures_are_checked_before_any_work(qwen_zoo, tmp_path, capsys):
    dataset = tmp_path / "dataset"
    save_picture(dataset / "line.png", 1000, 4)
    (dataset / "broken.png").write_text("no picture")
    entries = [{"question": "What?", "image_path": name, "response": "x"} for name in ("line.png", "broken.png")]
    for task in TASKS:
        (dataset / f"{task}.json").write_text(json.dumps(entries if task == "Chart" else [{"question": "What?"}]))
    flags = [*LEARNING, "--cache_dir", qwen_zoo, "--data_dir", dataset, "--output_path", tmp_path / "out"]
    for mode in ([], ["--dry_run"]):
        line, broken = refused(capsys, *flags, *mode, family=BACKBONE)
        assert f"Chart.json, entry 0 (counted from 0): {dataset / 'line.png'} (1000 x 4 pixels): " in line
        assert f"Chart.json, entry 1 (counted from 0): {dataset / 'broken.png'} cannot be read as a picture" in broken
    assert not (tmp_path / "out").exists()


def test_bounds_are_checked_before_any_work(qwen_zoo, tmp_path, capsys):
    flags = [*LEARNING, "--cache_dir", qwen_zoo, "--data_dir", qwen_zoo / "dataset", "--output_path", tmp_path / "out"]
    assert refusal(capsys, *flags, "--min_pixels", 5000, "--max_pixels", 4000, family=BACKBONE) == (
        "--min_pixels 5000 is above --max_pixels 4000; pictures get a size between the two"
    )
    assert "--max_pixels must be a whole number in [1, inf), got 0" in refusal(
        capsys, *flags, "--max_pixels", 0, family=BACKBONE
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_works_from_its_own_folder(qwen_zoo, tmp_path):
    flags = ["--method", "task_arithmetic", "--cache_dir", str(qwen_zoo), "--output_path", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "model_merging.py", *flags], cwd=ROOT / "Qwen2VL", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("task_arithmetic/*/model/*.safetensors"))) > 1
