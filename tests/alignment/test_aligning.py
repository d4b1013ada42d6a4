"""Whole runs with shuffled experts are those with the experts as they were before."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MistralForCausalLM

from expert_merging.alignment import aligning
from expert_merging.alignment.units import find_layout
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.cli import main
from expert_merging.commands.main import main as tools
from Mistral.backbone import BACKBONE
from tests.adapters import save_adapter
from tests.alignment.shuffling import save_shuffled
from tests.checkpoints import BASE, EXPERTS, perturb, tensors_of, write_checkpoint, write_tasks
from tests.command import contents, flags, merge, merged, refusal, refused
from tests.launching import run_together

ALIGNED = ("--align_experts", "weight_matching")


@dataclass(frozen=True)
class Zoo:
    """A base and three fine-tunes, two of which are shuffled in a second form."""

    base: Path
    plain: dict[str, Path]
    shuffled: dict[str, Path]
    data: Path


@pytest.fixture(scope="module")
def zoo(tiny_zoo, tmp_path_factory) -> Zoo:
    folder = tmp_path_factory.mktemp("aligned")
    plain = {name: tiny_zoo / place for name, place in EXPERTS.items()}
    layout = find_layout(Checkpoint(tiny_zoo / BASE), str)
    shuffled = {
        name: save_shuffled(plain[name], folder / name.lower(), layout, seed)
        for seed, name in enumerate(("Chat", "Math"), start=1)
    }
    write_tasks(folder / "dataset", count=3, responses={"Chat": "Certainly", "Math": "42", "Code": "x = 1"})
    return Zoo(tiny_zoo / BASE, plain, {**plain, **shuffled}, folder / "dataset")


def assert_same(found: Path, expected: Path, *, atol: float) -> None:
    tensors = tensors_of(found)
    for name, tensor in tensors_of(expected).items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=atol, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        ["weight_average"],
        ["ties", "--exclude_params", "none"],
        ["slerp"],
        ["iso"],
        ["regmean"],
        ["weight_average", "--post", "featcal"],
        ["expert_merging", "--num_epochs", "2", "--hidden_states_layers", "all"],
    ],
    ids=lambda words: "-".join(words[:3:2]),
)
def test_shuffled_experts_are_merged_as_they_were_before(method, zoo, tmp_path):
    names = ("Chat", "Math") if method[0] == "slerp" else (*zoo.plain,)
    experts, plain = ({name: own[name] for name in names} for own in (zoo.shuffled, zoo.plain))
    data = ["--data_dir", zoo.data] if {"regmean", "featcal", "expert_merging"} & {*method} else []
    found = merged(tmp_path / "found", "--method", *method, *ALIGNED, *flags(zoo.base, **experts), *data)
    expected = merged(tmp_path / "expected", "--method", *method, *flags(zoo.base, **plain), *data)
    # What does not run models reads the same numbers; a model's sums are rounded in another order.
    assert_same(found.model, expected.model, atol=1e-5 if data else 0)


def test_runs_tell_how_much_has_moved(zoo, tmp_path, capsys):
    run = merged(tmp_path, "--method", "weight_average", *ALIGNED, *flags(zoo.base, **zoo.shuffled))
    record = json.loads((run.alignment / "alignment.json").read_text())
    assert (record["method"], record["to"]) == ("weight_matching", "base")
    chat, code = record["experts"]["Chat"], record["experts"]["Code"]
    assert [*chat["moved"]] == ["query heads", "value units", "feed-forward units", "residual stream"]
    assert min(chat["moved"].values()) >= 0.5
    assert chat["cosine_before"] < 0.1 < 0.7 < chat["cosine_after"]
    assert set(code["moved"].values()) == {0}
    assert code["cosine_before"] == code["cosine_after"]
    assert json.loads(run.config.read_text())["options"]["align_experts"] == "weight_matching"
    log = run.log.read_text()
    assert "units in the base's order by weight_matching: Chat, Math, Code; 3 blocks of 48 feed-forward units" in log
    assert "expert Chat: " in log
    assert "of residual stream moved; cosine of weights with the base 0." in log
    assert " warning: expert Code has the base's order of units, as a fine-tune of this base has" in log
    assert "hardly related" not in log
    card = (run.model / "README.md").read_text()
    assert "units were put in the base's order (`weight_matching`)" in card
    assert ", Code 0 %." in card
    assert tools(["verify", str(run.folder)]) == 0


@pytest.mark.slow
def test_the_record_of_an_expert_that_stays_has_no_cosine_of_an_order_that_was_not_taken(zoo, tmp_path):
    samples = ("--align_experts", "activation_matching", "--data_dir", zoo.data, "--samples_per_task", "1")
    run = merged(tmp_path, "--method", "weight_average", *samples, *flags(zoo.base, **zoo.plain))
    record = json.loads((run.alignment / "alignment.json").read_text())["experts"]
    assert all(not any(found["moved"].values()) for found in record.values())
    assert all(found["cosine_after"] == found["cosine_before"] for found in record.values())
    assert "in the order that was found): --align_experts changes nothing of it" in run.log.read_text()


def test_shares_are_of_units_that_left_their_places():
    tensors = {
        "cosine": torch.zeros(2),
        "0.heads": torch.tensor([0, 1, 3, 2]),
        "1.heads": torch.tensor([0, 1, 2, 3]),
        "0.feed": torch.tensor([2, 0, 1]),
    }
    assert aligning._moved(tensors) == {"query heads": 0.25, "feed-forward units": 1.0}


def test_without_the_flag_nothing_is_said_of_it(zoo, tmp_path, capsys):
    run = merged(tmp_path, "--method", "weight_average", *flags(zoo.base, **zoo.shuffled))
    assert not run.alignment.exists()
    assert "align_experts" not in run.config.read_text() + (run.model / "README.md").read_text()


@pytest.mark.slow
def test_fine_tunes_alone_are_left_as_they_are(zoo, tmp_path, capsys):
    found = merged(tmp_path / "a", "--method", "ties", *ALIGNED, *flags(zoo.base, **zoo.plain))
    expected = merged(tmp_path / "b", "--method", "ties", *flags(zoo.base, **zoo.plain))
    assert found.log.read_text().count("--align_experts changes nothing of it") == len(zoo.plain)
    assert_same(found.model, expected.model, atol=0)


@pytest.mark.slow
def test_a_gain_that_is_noise_changes_nothing(zoo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(aligning, "_LEAST_GAIN", 2.0)
    run = merged(tmp_path / "a", "--method", "weight_average", *ALIGNED, *flags(zoo.base, **zoo.shuffled))
    expected = merged(tmp_path / "b", "--method", "weight_average", *flags(zoo.base, **zoo.shuffled))
    assert_same(run.model, expected.model, atol=0)
    assert run.log.read_text().count("--align_experts changes nothing of it") == 3


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_orders_that_it_has_found(zoo, tmp_path, monkeypatch, capsys):
    command = ["--method", "ties", *ALIGNED, *flags(zoo.base, **zoo.shuffled)]
    command += ["--output_path", tmp_path, "--run_name", "r"]
    with monkeypatch.context() as patch:
        patch.setattr("expert_merging.job.write", interrupted)
        with pytest.raises(RuntimeError, match="interrupted"):
            merge(*command)
    monkeypatch.setattr("expert_merging.alignment.weights.match_by_weights", None)
    assert merge(*command) == 0
    expected = merged(tmp_path / "whole", "--method", "ties", *flags(zoo.base, **zoo.plain))
    assert_same(tmp_path / "ties" / "r" / "model", expected.model, atol=0)


def interrupted(*_):
    raise RuntimeError("interrupted")


def test_a_run_with_other_alignment_is_another_run(zoo, tmp_path, capsys):
    command = ["--method", "weight_average", *flags(zoo.base, **zoo.shuffled)]
    command += ["--output_path", tmp_path, "--run_name", "r"]
    assert merge(*command) == 0
    assert "align_experts" in refusal(capsys, *command, *ALIGNED)


@pytest.mark.slow
def test_experts_are_asked_again_where_their_units_have_another_order(zoo, tmp_path, capsys):
    """What experts have said to other runs is kept: their hidden states are in the order of their own units."""
    method = ["--method", "expert_merging", "--num_epochs", "1", "--data_dir", zoo.data, "--output_path", tmp_path]
    runs = [[*method, *flags(zoo.base, **zoo.shuffled), "--run_name", name] for name in ("plain", "aligned")]
    assert merge(*runs[0]) == 0
    before = {folder.name for folder in (tmp_path / "targets").iterdir()}
    assert merge(*runs[1], *ALIGNED) == 0
    after = {folder.name for folder in (tmp_path / "targets").iterdir()}
    new = sorted(name.rpartition("-")[0] for name in after - before)
    assert new == ["Chat", "Chat-units", "Code-units", "Math", "Math-units"]


@pytest.mark.slow
def test_orders_are_kept_for_other_runs_with_the_same_weights(zoo, tmp_path, monkeypatch, capsys):
    """As for the points of a sweep; another expert, base or way of matching is matched anew."""
    given = [*ALIGNED, *flags(zoo.base, **zoo.shuffled), "--output_path", tmp_path]
    assert merge("--method", "weight_average", *given) == 0
    first = capsys.readouterr().out
    find, matched = aligning._find, []
    monkeypatch.setattr(aligning, "_find", lambda *found: matched.append(found[2]) or find(*found))
    assert merge("--method", "ties", *given) == 0
    assert not matched
    told = capsys.readouterr().out
    assert told.count("is not matched: the order of its units is known from another run") == 3
    (one, other) = (next(tmp_path.glob(f"{name}/*/alignment")) for name in ("weight_average", "ties"))
    assert contents(one) == contents(other)
    for line in first.splitlines():
        if "of weights with the base" in line:
            assert line in told
    perturb(zoo.base, tmp_path / "changed", 8)
    other = [*ALIGNED, *flags(zoo.base, **{**zoo.shuffled, "Math": tmp_path / "changed"}), "--output_path", tmp_path]
    assert merge("--method", "ties", *other) == 0
    assert matched == ["Math"]
    matched.clear()
    for number, others in enumerate((["--keep_targets", "false"], ["--base_model_path", zoo.plain["Code"]])):
        assert merge("--method", "ties", *given, *others, "--run_name", f"r{number}") == 0
    assert matched == [*zoo.shuffled, *zoo.shuffled]
    matched.clear()
    for file in tmp_path.glob("targets/Chat-units-*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert merge("--method", "ties", *given, "--run_name", "again") == 0
    assert matched == ["Chat"], "its file was damaged"


@pytest.mark.slow
def test_a_sweep_matches_each_expert_once(zoo, tmp_path, monkeypatch):
    find, matched = aligning._find, []
    monkeypatch.setattr(aligning, "_find", lambda *given: matched.append(given[2]) or find(*given))
    (tmp_path / "sweep.yaml").write_text("{sweep: {method: [ties], scaling_coefficient: [0.3, 0.6, 0.9]}}")
    given = ["--family", "Mistral", *flags(zoo.base, **zoo.shuffled), *ALIGNED, "--data_dir", zoo.data]
    command = ["sweep", tmp_path / "sweep.yaml", *given, "--output_path", tmp_path / "out", "--device", "cpu"]
    assert tools([*map(str, command)]) == 0
    assert matched == [*zoo.shuffled]


@pytest.mark.slow
def test_adapters_have_the_base_s_units(zoo, tmp_path, capsys):
    adapter = save_adapter(partial(MistralForCausalLM.from_pretrained, zoo.base), tmp_path / "adapter")
    experts = {"Chat": zoo.shuffled["Chat"], "Law": adapter}
    run = merged(tmp_path / "a", "--method", "weight_average", *ALIGNED, *flags(zoo.base, **experts))
    assert "adapters have the base's units, and --align_experts changes nothing of them: Law" in run.log.read_text()
    plain = flags(zoo.base, Chat=zoo.plain["Chat"], Law=adapter)
    assert_same(run.model, merged(tmp_path / "b", "--method", "weight_average", *plain).model, atol=0)


@pytest.mark.slow
def test_mixtures_have_the_aligned_layers(zoo, tmp_path, capsys):
    """Tensors that are copied from experts are copied in the base's order."""
    command = ["--method", "moe", "--router", "zeros", "--experts_per_token", 3]
    found = merged(tmp_path / "a", *command, *ALIGNED, *flags(zoo.base, **zoo.shuffled))
    expected = merged(tmp_path / "b", *command, *flags(zoo.base, **zoo.plain))
    assert_same(found.model, expected.model, atol=0)
    assert tools(["verify", str(found.folder)]) == 0


@pytest.mark.slow
def test_aligned_merges_are_compared_by_predictions_alone(zoo, tmp_path, capsys):
    """Hidden states of the experts themselves are in another order."""
    runs = [
        merged(tmp_path / name, "--method", "weight_average", *given, *flags(zoo.base, **zoo.shuffled)).folder
        for name, given in (("aligned", ALIGNED), ("as they are", ()))
    ]
    found, shown = [], []
    for run in runs:
        numbers, given = tmp_path / "numbers.json", ["--data_dir", zoo.data, "--samples", 2]
        assert tools(["align", *map(str, [run, *given, "--device", "cpu", "--json", numbers])]) == 0
        found.append(next(own for own in json.loads(numbers.read_text())["models"].values())["relative"]["mean"])
        shown.append(capsys.readouterr().out)
    assert "hidden" not in found[0]
    assert found[1]["hidden"] > 0
    line = (
        "hidden states are not compared: weight_average/{} put experts' units in another order than the experts have\n"
    )
    assert line.format(runs[0].name) in shown[0]
    assert "hidden states" not in shown[0].replace(line.format(runs[0].name), "")
    assert "hidden" in shown[1]
    assert "not compared" not in shown[1]
    assert 0 < found[0]["divergence"] < found[1]["divergence"]


@pytest.mark.slow
def test_several_processes_align_as_one_does(zoo, tmp_path):
    given = ["--device", "cpu", "--method", "regmean", "--data_dir", zoo.data, *ALIGNED, "--run_name", "r"]
    command = [*map(str, [*given, *flags(zoo.base, **zoo.shuffled)]), "--output_path"]
    assert main(BACKBONE, [*command, str(tmp_path / "one")]) == 0
    done = run_together(2, main, BACKBONE, [*command, str(tmp_path / "two")], folder=tmp_path)
    assert done.codes == (0, 0), done.stdout + done.stderr
    assert done.stdout.count("aligning experts took") == 1
    assert_same(*(tmp_path / name / "regmean" / "r" / "model" for name in ("one", "two")), atol=1e-5)


def test_a_dry_run_tells_and_writes_nothing(zoo, tmp_path, capsys):
    command = ["--method", "ties", *ALIGNED, *flags(zoo.base, **zoo.shuffled), "--output_path", tmp_path / "out"]
    assert merge(*command, "--dry_run") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "option align_experts weight_matching units in the base's order by weight_matching: Chat, Math, Code" in told
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_aligned_is_refused_with_all_problems(zoo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(aligning, "find_spec", lambda name: None)
    strange = tmp_path / "strange"
    perturb(zoo.base, strange, 3)
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**config, "num_attention_heads": 2}))
    command = ["--method", "weight_average", *ALIGNED, *flags(zoo.base, Law=strange)]
    assert refused(capsys, *command, "--output_path", tmp_path / "out") == [
        "--align_experts needs scipy, which matches units; pip install scipy",
        f"expert Law cannot be aligned ({strange}): its config.json says 2 heads (num_attention_heads), and the base's "
        "4",
    ]
    assert not (tmp_path / "out").exists()


def test_models_with_other_blocks_are_refused(tmp_path, capsys):
    folders = [write_checkpoint(tmp_path / name, {"layers.0.weight": torch.ones(2, 2)}) for name in ("base", "expert")]
    command = ["--method", "weight_average", *ALIGNED, *flags(folders[0], Law=folders[1])]
    assert "--align_experts knows units of blocks" in refusal(capsys, *command, "--output_path", tmp_path / "out")


def test_orders_are_kept_as_numbers_of_units(zoo, tmp_path, capsys):
    run = merged(tmp_path, "--method", "weight_average", *ALIGNED, *flags(zoo.base, Chat=zoo.shuffled["Chat"]))
    tensors = load_file(run.alignment / "Chat.safetensors")
    assert sorted(tensors["0.feed"].tolist()) == [*range(48)]
    assert sorted(tensors["stream"].tolist()) == [*range(32)]
    assert tensors["cosine"].shape == (2,)
