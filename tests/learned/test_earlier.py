"""Coefficients of an earlier run, or of the published implementation, for the experts and weights of this one."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from transformers import MistralForCausalLM

from expert_merging.learned.coefficients import Coefficients
from expert_merging.plan import make_plan
from Mistral.backbone import BACKBONE
from tests.adapters import save_adapter
from tests.checkpoints import perturb, save_model, tensors_of, write_checkpoint
from tests.command import TENSORS, assert_same_bytes, flags, merge, merged, refusal, refused

VALUES = {
    "layers.0.weight": torch.tensor([[0.5, 0.25], [1.0, 0.125]]),
    "layers.1.weight": torch.tensor([[0.75], [0.0625]]),
}
PUBLISHED = {"layers_0_weight": [[0.5, 0.25], [1.0, 0.125]], "layers_1_weight": [0.75, 0.0625]}
FOLDERS = ("base", "A", "B", "C")


@pytest.fixture
def folders(tmp_path):
    """A base and three experts whose task vectors are all 1, all 2 and all 4."""
    return {
        name: write_checkpoint(tmp_path / name, {key: tensor + change for key, tensor in TENSORS.items()})
        for name, change in zip(FOLDERS, (0, 1, 2, 4), strict=True)
    }


@pytest.fixture
def file(folders, tmp_path):
    """Coefficients learned for A and B."""
    plan = make_plan(folders["base"], {name: folders[name] for name in "AB"}, list(BACKBONE.exclude_params))
    given = Coefficients(("A", "B"), VALUES, (1.0, 1.0), checkpoints=plan.contents)
    (tmp_path / "run").mkdir()
    given.save(tmp_path / "run" / "coefficients.safetensors")
    return tmp_path / "run" / "coefficients.safetensors"


def changed(file, **description):
    """The same coefficients with another description."""
    described = file.with_suffix(".json")
    described.write_text(json.dumps({**json.loads(described.read_text()), **description}))


def command(folders, file, *arguments, experts="AB"):
    named = flags(folders["base"], **{name: folders[name] for name in experts})
    return ["--method", "coefficients", "--coefficients", file, *named, *arguments]


def expected(**factors):
    """The merged tensors, where every entry of a task vector is the same."""
    learned = {"A": 0, "B": 1}
    rows, sizes = [("A", 1.0), ("B", 2.0), ("C", 4.0)], {"layers.0.weight": [6, 6], "layers.1.weight": [5]}
    found = dict(TENSORS)
    for name, value in VALUES.items():
        total = torch.zeros(value.shape[1])
        for expert, change in rows:
            if expert in factors:
                total += change * factors[expert] * (value[learned[expert]] if expert in learned else 1.0)
        found[name] = found[name] + total.repeat_interleave(torch.tensor(sizes[name])).view(found[name].shape)
    return found


@pytest.mark.parametrize(
    ("experts", "given", "factors"),
    [
        ("AB", [], {"A": 1, "B": 1}),
        ("BA", [], {"A": 1, "B": 1}),
        ("B", [], {"B": 1}),
        ("AB", ["--task_vector_coeffs_dict", '{"B": 0}'], {"A": 1, "B": 0}),
        ("AB", ["--task_vector_coeffs_dict", "A=0.5", "B=2"], {"A": 0.5, "B": 2}),
        ("ABC", ["--task_vector_coeffs_dict", '{"C": 0.25}'], {"A": 1, "B": 1, "C": 0.25}),
        ("CB", ["--task_vector_coeffs_dict", '{"C": -1, "B": 0.5}'], {"B": 0.5, "C": -1}),
    ],
)
def test_coefficients_serve_fewer_more_and_reordered_experts(folders, file, tmp_path, experts, given, factors):
    run = merged(tmp_path / "out", *command(folders, file, *given, experts=experts))
    assert_same_bytes(tensors_of(run.model), expected(**factors))


def test_a_factor_comes_on_top_of_what_was_learned(folders, file, tmp_path):
    changed(file, task_vector_scale=[0.5, 4.0])
    run = merged(tmp_path / "out", *command(folders, file, "--task_vector_coeffs_dict", '{"A": 0.5}'))
    assert_same_bytes(tensors_of(run.model), expected(A=0.25, B=4))
    assert "INFO factors on task vectors: A 0.25, B 4\n" in run.log.read_text()


def test_experts_that_are_left_out_are_told(folders, file, capsys):
    assert merge(*command(folders, file, experts="B"), "--dry_run") == 0
    assert "coefficients of experts that are not merged here are left out: A\n" in capsys.readouterr().out


def test_an_expert_without_coefficients_needs_one(folders, file, capsys):
    assert refusal(capsys, *command(folders, file, experts="ABC")) == (
        f"--coefficients {file} belong to the experts A, B and have none for C; leave such an expert out, or give it a "
        "coefficient: --task_vector_coeffs_dict '{\"C\": 0.3}'"
    )
    assert refusal(capsys, *command(folders, file, "--task_vector_coeffs_dict", '{"C": 0.3}')) == (
        "--task_vector_coeffs_dict: there is no expert 'C'. Known: A, B."
    )


@pytest.mark.parametrize(
    "directions",
    [
        {"name": "svd", "options": {}},
        {"name": "trimmed", "options": {"thresholds": [0.0, 0.0], "majority": 1.0}},
    ],
    ids=lambda directions: directions["name"],
)
def test_what_was_made_of_all_experts_together_needs_all_of_them(folders, file, tmp_path, capsys, directions):
    changed(file, directions=directions)
    for experts in ("A", "BA"):
        assert refusal(capsys, *command(folders, file, experts=experts)) == (
            f"--coefficients {file} belong to the experts A, B and multiply what was made of all of these together "
            f"({directions['name']}); give the same in the same order, not {', '.join(experts)}, and leave one out "
            "with --task_vector_coeffs_dict '{\"B\": 0}'"
        )
    run = merged(tmp_path / "out", *command(folders, file, "--task_vector_coeffs_dict", '{"B": 0}'))
    assert not tensors_of(run.model)["layers.0.weight"].equal(TENSORS["layers.0.weight"])


def test_other_weights_are_refused_unless_they_are_meant(folders, file, tmp_path, capsys):
    for name in ("base", "B"):
        write_checkpoint(folders[name], {key: tensor + 1 for key, tensor in tensors_of(folders[name]).items()})
    told = (
        "--coefficients {} were learned with other weights of {} than those in {}; give the checkpoint that they were "
        "learned with, or --force to use them with this one"
    )
    assert refused(capsys, *command(folders, file)) == [
        told.format(file, name, folders[name]) for name in ("base", "B")
    ]
    run = merged(tmp_path / "out", *command(folders, file, "--force"))
    assert "INFO by --force, coefficients are used with other weights of base, B\n" in run.log.read_text()


def test_a_copy_of_a_checkpoint_is_no_other(folders, file, tmp_path):
    moved = {name: folder.rename(tmp_path / f"new-{name}") for name, folder in folders.items()}
    assert merge(*command(moved, file), "--dry_run") == 0


def test_coefficients_that_do_not_say_their_weights_are_used_and_that_is_told(folders, file, capsys):
    changed(file, checkpoints={})
    assert merge(*command(folders, file), "--dry_run") == 0
    assert "which weights the coefficients were learned with is not recorded, so they are not compared\n" in (
        capsys.readouterr().out
    )


def test_edits_are_factors_on_what_was_learned_and_stand_in_record_and_card(folders, file, tmp_path):
    edit = "A: 0.5, layers 1 B: 4"
    run = merged(tmp_path / "out", *command(folders, file, "--edit", edit))
    kept = expected(A=0.5, B=1)
    kept["layers.1.weight"] = TENSORS["layers.1.weight"] + 0.5 * 0.75 + 4 * 2 * 0.0625
    assert_same_bytes(tensors_of(run.model), kept)
    assert run.record["options"]["edit"] == edit
    card = (run.model / "README.md").read_text()
    assert f'"edit": "{edit}"' in card
    assert f"--edit '{edit}'" in card
    log = run.log.read_text()
    assert "INFO edit A: 0.5: coefficients of A in 2 parameters\n" in log
    assert "INFO edit layers 1 B: 4: coefficients of B in 1 parameters\n" in log
    other = merged(tmp_path / "out2", *command(folders, file, "--edit", "A: 0.25"))
    assert other.name != run.name


def test_all_that_is_wrong_with_edits_and_coefficients_is_told_at_once(folders, file, capsys):
    assert refused(capsys, *command(folders, file, "--edit", "layers 7: 1, Math: 1", experts="ABC")) == [
        "--edit layers 7: layers are 0-1 here; 5- is all from 5 on",
        "--edit: 'Math' means nothing here. Known: A, B, C, attention, down, early, gate, gate_up, k, late, layers 0-, "
        "middle, mlp, o, other, outside, q, qkv, up, v.",
        f"--coefficients {file} belong to the experts A, B and have none for C; leave such an expert out, or give it a "
        "coefficient: --task_vector_coeffs_dict '{\"C\": 0.3}'",
    ]


# The published implementation's file


@pytest.fixture
def published(tmp_path):
    (tmp_path / "published").mkdir()
    file = tmp_path / "published" / "weight_coeffs.json"
    file.write_text(json.dumps(PUBLISHED))
    return file


def test_the_published_file_is_read(folders, published, tmp_path):
    for number, place in enumerate((published, published.parent)):
        run = merged(tmp_path / f"out{number}", *command(folders, place))
        assert_same_bytes(tensors_of(run.model), expected(A=1, B=1))
    run = merged(tmp_path / "scaled", *command(folders, published, "--task_vector_coeffs_dict", '{"A": 0.5}'))
    assert_same_bytes(tensors_of(run.model), expected(A=0.5, B=1))


def test_a_published_file_in_a_run_s_folder_belongs_to_its_experts(folders, file, tmp_path):
    """There it has the factors, the order and the directions of the coefficients beside it."""
    edited = file.parent / "weight_coeffs.json"
    edited.write_text(json.dumps({**PUBLISHED, "layers_1_weight": [0.75, 0.5]}))
    changed(file, task_vector_scale=[1.0, 0.5])
    run = merged(tmp_path / "out", *command(folders, edited, experts="BA"))
    assert_same_bytes(
        tensors_of(run.model), {**expected(A=1, B=0.5), "layers.1.weight": TENSORS["layers.1.weight"] + 0.75 + 0.5}
    )
    run = merged(tmp_path / "described", *command(folders, file.with_suffix(".json")))
    assert_same_bytes(tensors_of(run.model), expected(A=1, B=0.5))


def test_more_published_chunks_than_a_tensor_has_are_left_out(folders, published, tmp_path):
    """`torch.chunk` cuts 5 entries into 3 runs where 4 are asked for; the last coefficient multiplies nothing."""
    rows = [[0.5, 0.25, 1.0, 9.0], [0.0, 0.5, 0.0, 9.0]]
    published.write_text(json.dumps({**PUBLISHED, "layers_1_weight": rows}))
    run = merged(tmp_path / "out", *command(folders, published))
    assert tensors_of(run.model)["layers.1.weight"].tolist() == [1.5, 1.5, 2.25, 2.25, 2.0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1]", "{} must hold coefficients by parameter, as weight_coeffs.json does"),
        ("{}", "{} must hold coefficients by parameter, as weight_coeffs.json does"),
        (
            '{"layers_0_weight": 0.5}',
            "{}: layers_0_weight must have a number for each expert, or for each a list of as many numbers",
        ),
        (
            '{"layers_0_weight": [[1, 2], [3]]}',
            "{}: layers_0_weight must have a number for each expert, or for each a list of as many numbers",
        ),
        (
            '{"layers_0_weight": [NaN, 1]}',
            "{}: layers_0_weight must have a number for each expert, or for each a list of as many numbers",
        ),
        (
            '{"layers_0_weight": [1, 2, 3]}',
            "{} has coefficients of 3 experts, and 2 are given (A, B); give those that they were learned with, in the "
            "same order",
        ),
    ],
)
def test_published_files_that_cannot_be_used(folders, published, capsys, text, problem):
    published.write_text(text)
    assert refusal(capsys, *command(folders, published)) == "--coefficients " + problem.replace("{}", str(published), 1)


def test_a_published_file_that_is_damaged_is_refused(folders, published, capsys):
    published.write_text("{")
    assert refusal(capsys, *command(folders, published)) == (
        f"{published} is not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); "
        "download it again"
    )


def test_published_parameters_that_are_not_merged_are_told(folders, published, capsys):
    published.write_text('{"layers_0_weight": [1, 2], "norm_weight": [1, 2]}')
    assert refused(capsys, *command(folders, published)) == [
        f"--coefficients {published} has none for layers.1.weight (1 in all); use the same --exclude_params",
        f"--coefficients {published} has norm_weight, which is not merged (1 in all)",
    ]


def test_published_names_that_two_parameters_share_are_refused(folders, published, capsys):
    for folder in folders.values():
        tensors = tensors_of(folder)
        write_checkpoint(folder, {**tensors, "layers.0_weight": tensors["layers.0.weight"] + 0})
    assert refusal(capsys, *command(folders, published)) == (
        "--coefficients: layers.0.weight and layers.0_weight are both layers_0_weight in the published format, which "
        "cannot tell them apart; give coefficients.safetensors"
    )


def test_adapters_of_another_base_are_themselves_no_others(tmp_path, capsys):
    """An adapter's weights follow from its base's, which alone is another one."""
    save_model(tmp_path / "base", 0)
    adapter = save_adapter(partial(MistralForCausalLM.from_pretrained, tmp_path / "base"), tmp_path / "adapter")
    perturb(tmp_path / "base", tmp_path / "full", 1)
    perturb(tmp_path / "base", tmp_path / "other", 2)
    experts = {"A": adapter, "B": tmp_path / "full"}
    plan = make_plan(tmp_path / "base", experts, list(BACKBONE.exclude_params))
    values = {name: torch.full((2, 1), 0.5) for name in plan.merged}
    Coefficients(("A", "B"), values, (1.0, 1.0), checkpoints=plan.contents).save(tmp_path / "coefficients.safetensors")
    given = ["--method", "coefficients", "--coefficients", tmp_path / "coefficients.safetensors"]
    text = " were learned with other weights of {} than those in "
    assert text.format("base") in refusal(capsys, *given, *flags(tmp_path / "other", **experts))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 1}))
    assert text.format("A") in refusal(capsys, *given, *flags(tmp_path / "base", **experts))
