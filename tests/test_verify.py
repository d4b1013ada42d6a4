"""``python -m expert_merging verify``: what is as it was, and a line for everything that is not."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from expert_merging.commands.main import main
from expert_merging.kept import Written
from expert_merging.learned.coefficients import load_coefficients
from expert_merging.run import Run
from tests.adapters import save_adapter
from tests.checkpoints import BASE, EXPERTS, INDEX, write_checkpoint, write_tasks
from tests.command import COMMAND, flags, merge, merged

NAMES = ("layers.0.weight", "layers.1.weight", "norm.weight", "embed_tokens.weight")
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def verify(capsys, *runs) -> tuple[int, list[str], list[str]]:
    """Exit code, what was told, and the problems."""
    capsys.readouterr()
    code = main(["verify", *map(str, runs)])
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert bool(lines) == bool(code)
    return code, told.out.splitlines(), [line.removeprefix("error: ") for line in lines]


def problems(capsys, run) -> list[str]:
    """The problems of a run, without its name."""
    code, _, found = verify(capsys, run)
    assert code == 1
    assert all(line.startswith(f"{run}: ") for line in found)
    return [line.removeprefix(f"{run}: ") for line in found]


@pytest.fixture
def folders(tmp_path):
    """Base and experts, whose tensors are larger than the samples that fingerprints are made of."""
    generator = torch.Generator().manual_seed(0)

    def shard(*names):
        return {name: torch.randn(60, 50, generator=generator) for name in names}

    return [write_checkpoint(tmp_path / name, shard(*NAMES[:2]), shard(*NAMES[2:])) for name in ("base", "A", "B")]


@pytest.fixture
def run(folders, tmp_path):
    base, a, b = folders
    return merged(tmp_path / "out", *COMMAND, *flags(base, A=a, B=b)).folder


def change_last(file) -> None:
    """Another last number, as large as the others."""
    with file.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\0\0\x80\x3f")


def test_a_run_is_what_it_was(run, capsys):
    for place in (run, run / "model"):
        code, told, _ = verify(capsys, place)
        assert code == 0
        assert told[-1] == (
            f"{run}: 5 files of model (0.0 MB) are as they were written, 4 tensors; 2 copied tensors are those of "
            "their checkpoints; fingerprints unchanged: the base, expert A, expert B"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["ties", "svd", "moe", "tall", "svd_intermediate", "dare_ta --post consensus", "ties --embeddings mean"]
)
def test_every_kind_of_result_can_be_verified(method, tiny_zoo, tmp_path, capsys):
    run = merged(tmp_path, "--cache_dir", tiny_zoo, "--method", *method.split())
    code, told, _ = verify(capsys, run.folder)
    assert code == 0, told
    for file in sorted(run.folder.glob("model*/**/*.safetensors")):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        (line,) = problems(capsys, run.folder)
        assert line.startswith(f"{file.relative_to(next(run.folder.glob('model*')))}: ")
        assert line.endswith(" is not what was written")
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (lambda model: change_last(model / FIRST), f"{FIRST}: layers.1.weight is not what was written"),
        (lambda model: os.truncate(model / FIRST, 1000), f"{FIRST} has 1000 bytes, and 24200 were written"),
        (lambda model: (model / FIRST).unlink(), f"{FIRST} is missing"),
        (lambda model: (model / "config.json").write_text("{}"), "config.json has 2 bytes, and 25 were written"),
        (
            lambda model: (model / "config.json").write_text('{"model_type": "mixtral"}'),
            "config.json is not what was written",
        ),
        (lambda model: (model / INDEX).unlink(), f"{INDEX} is missing"),
        (
            lambda model: shutil.copy(model / FIRST, model / "model.safetensors"),
            "model.safetensors lies there, and the run has not written it",
        ),
        (
            lambda model: (model / "modeling_x.py").write_text("x = 1"),
            "modeling_x.py lies there, and the run has not written it",
        ),
    ],
    ids=["changed", "cut", "gone", "configuration cut", "configuration changed", "no index", "other weights", "code"],
)
def test_a_model_that_was_changed_is_told(fault, expected, run, capsys):
    fault(run / "model")
    assert problems(capsys, run) == [expected]


def test_what_python_and_desktops_leave_is_no_difference(run, capsys):
    for name in ("__pycache__/modeling_x.cpython-311.pyc", ".DS_Store"):
        (run / "model" / name).parent.mkdir(exist_ok=True)
        (run / "model" / name).write_bytes(b"x")
    assert main(["verify", str(run)]) == 0


def test_a_header_that_was_changed_is_told(run, capsys):
    file = run / "model" / FIRST
    file.write_bytes(file.read_bytes().replace(b"layers.0.weight", b"layers.9.weight"))
    assert problems(capsys, run) == [f"{FIRST} is not what was written: its header differs"]


def test_values_that_are_no_numbers_are_told_whoever_has_written_them(run, capsys):
    file = run / "model" / FIRST
    with file.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\0\0\xc0\x7f")
    expected = [
        f"{FIRST}: layers.1.weight {what}" for what in ("is not what was written", "has NaN or infinite values")
    ]
    assert problems(capsys, run) == expected


def test_large_finite_values_are_no_infinity_and_the_base_may_have_any(tmp_path, capsys):
    tensors = {"a": torch.full((40,), 3e38), "norm.weight": torch.full((4,), float("nan"))}
    base = write_checkpoint(tmp_path / "base", tensors)
    run = merged(tmp_path / "out", *COMMAND, *flags(base, A=base))
    assert verify(capsys, run.folder)[0] == 0


def test_the_card_has_to_fit_the_model(run, capsys):
    card = run / "model" / "README.md"
    for old, new in (("2 of 4 tensors", "2 of 5 tensors"), ("`task_arithmetic`", "`ties`")):
        text = card.read_text()
        assert old in text
        card.write_text(text.replace(old, new))
        Run(run).kept.within("model").note({card.name: Written.of_file(card)})
        assert problems(capsys, run) == ["model/README.md does not tell of 4 tensors and of task_arithmetic"]
        card.write_text(text)


@pytest.mark.parametrize("who", [0, 1])
def test_checkpoints_that_have_changed_are_told(who, run, folders, capsys):
    name = ["the base", "expert A"][who]
    tensors = load_file(folders[who] / FIRST)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folders[who] / FIRST, {"format": "pt"})
    assert problems(capsys, run) == [f"{name} ({folders[who]}) is not what was merged: its files have changed"]


def test_tensors_that_keep_the_base_s_value_are_compared_as_a_whole(run, folders, capsys):
    """Here the change lies between the samples of the fingerprint."""
    change_last(folders[0] / SECOND)
    assert problems(capsys, run) == [f"{SECOND}: norm.weight is not what the base has"]


def test_checkpoints_that_are_gone_are_not_looked_at(run, folders, capsys):
    shutil.rmtree(folders[1])
    folders[0].rename(folders[0].with_name("moved"))
    code, told, _ = verify(capsys, run)
    assert code == 0
    assert told[-3:-1] == [
        f"not looked at: the base, which is not at {folders[0]} any more",
        f"not looked at: expert A, which is not at {folders[1]} any more",
    ]
    assert told[-1].endswith("; fingerprints unchanged: expert B")


def test_runs_that_nothing_can_be_said_of(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", run.parent, run / "config.json"):
        assert problems(capsys, place) == ["this is no finished run: it has no config.json of one, or no folder model"]
    assert problems(capsys, tmp_path / "absent") == ["there is no such folder"]
    record = run / "digests.json"
    record.write_text("{")
    assert problems(capsys, run) == [
        "digests.json is missing, damaged, or of an earlier version, and says what the run has written; nothing can be "
        "verified without it"
    ]
    (run / "model").rename(run / "model.partial")
    assert problems(capsys, run) == ["this run is not complete; its own command continues it"]
    assert problems(capsys, run / "model.partial") == [
        "this is no finished run: it has no config.json of one, or no folder model"
    ]


def test_several_runs_are_verified_at_once(run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    assert verify(capsys, run, other)[0] == 0
    change_last(other / "model" / FIRST)
    code, told, found = verify(capsys, other, run)
    assert code == 1
    assert found == [f"{other}: {FIRST}: layers.1.weight is not what was written"]
    assert told[-1].startswith(f"{run}: 5 files")


@pytest.mark.parametrize(
    "changes",
    [{"family": 1}, {"checkpoints": None}, {"options": {}}, {"options": {"base_model_path": "/x", "expert": [1]}}],
)
def test_a_record_that_was_edited_is_refused(changes, run, capsys):
    record = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**record, **changes}))
    assert problems(capsys, run) == [f"{run / 'config.json'} does not say what was merged; was it edited?"]


def test_folders_inside_that_are_no_models_are_files_like_others(folders, tmp_path, capsys):
    (folders[0] / "inside").mkdir()
    for name in ("config.json", "README.md"):
        (folders[0] / "inside" / name).write_text("{}")
    run = merged(tmp_path / "out", *COMMAND, *flags(folders[0], A=folders[1])).folder
    assert verify(capsys, run)[0] == 0
    (run / "model" / "inside" / "README.md").write_text("[]")
    assert problems(capsys, run) == ["inside/README.md is not what was written"]


@pytest.fixture
def learned(tiny_zoo, tmp_path):
    write_tasks(tmp_path / "dataset", responses=dict.fromkeys(EXPERTS, "42"))
    run = merged(
        tmp_path / "out", "--cache_dir", tiny_zoo, "--data_dir", tmp_path / "dataset",
        "--log_with", "none", "--samples_per_task", 1,
    )  # fmt: skip
    return Run(run.folder)


@pytest.mark.slow
def test_coefficients_have_to_be_what_was_learned_and_to_fit_the_weights(learned, capsys):
    run = learned
    assert verify(capsys, run.folder)[0] == 0

    published = json.loads(run.weight_coeffs.read_text())
    run.weight_coeffs.write_text(json.dumps(published))
    expected = ["weight_coeffs.json has other values than coefficients.safetensors"]
    assert problems(capsys, run.folder) == expected
    run.weight_coeffs.write_text(json.dumps(published, indent=4) + "\n")
    assert verify(capsys, run.folder)[0] == 0

    before = run.coefficients.read_bytes()
    change_last(run.coefficients)
    assert problems(capsys, run.folder) == ["coefficients.safetensors is not what was learned"]
    run.coefficients.unlink()
    assert problems(capsys, run.folder) == ["coefficients.safetensors is not what was learned"]
    run.coefficients.write_bytes(before)

    other = load_coefficients(run.folder)
    name = max(other.values)
    other.values[name].add_(0.01)
    other.save(run.coefficients, run.kept)
    other.save_published(run.weight_coeffs)
    assert problems(capsys, run.folder) == [f"{name} is not what coefficients.safetensors makes of the experts"]


@pytest.mark.slow
def test_an_adapter_is_recognised(tiny_zoo, tmp_path, capsys):
    adapter = save_adapter(lambda: AutoModelForCausalLM.from_pretrained(tiny_zoo / BASE), tmp_path / "adapter")
    command = [*COMMAND, *flags(tiny_zoo / BASE, A=adapter, B=tiny_zoo / EXPERTS["Math"])]
    run = merged(tmp_path / "out", *command)
    assert verify(capsys, run.folder)[0] == 0
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    assert problems(capsys, run.folder) == [f"expert A ({adapter}) is not what was merged: its files have changed"]
    assert merge(*command, "--run_name", "x", "--output_path", tmp_path / "out") == 0
