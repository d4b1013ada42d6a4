"""What experts have said is said once: read again, whatever asks, it is what they would say."""

from __future__ import annotations

import errno
import json
import logging
import os
from dataclasses import replace

import pytest
import torch

from expert_merging.questions.calibration import Sample
from expert_merging.running import kept_targets, targets
from expert_merging.writing import take_hold
from InternVL.backbone import BACKBONE as internvl  # noqa: N811
from tests import internvl as internvl_checkpoints
from tests.checkpoints import BASE, EXPERTS, perturb
from tests.command import contents, merge, merged
from tests.learned.training import make_trainer

CPU = torch.device("cpu")


@pytest.fixture
def makers(tiny_zoo, tmp_path, monkeypatch):
    """Makes what asks the experts for a run of its own, and counts the experts that are loaded."""
    loaded, own_load = [], targets.load_on

    def load_on(device, backbone, checkpoint, dtype, *, sharded):
        loaded.append(checkpoint.folder.name)
        return own_load(device, backbone, checkpoint, dtype, sharded=sharded)

    monkeypatch.setattr(targets, "load_on", load_on)

    def make(name, zoo=tiny_zoo, layers=(1, 2), **options):
        run = tmp_path / "out" / "method" / name
        run.mkdir(parents=True, exist_ok=True)
        trainer = make_trainer(zoo, run, **options)
        trainer.context.run.targets = trainer.context.run.common_targets
        maker = trainer.settings.asked.target_maker(trainer.context, layers, CPU)
        return maker, list(trainer.settings.asked.samples)

    make.loaded = loaded
    make.folder = tmp_path / "out" / "targets"
    return make


def same(one, other):
    assert one.sample == other.sample
    assert {name: value.tolist() for name, value in one.inputs.items()} == {
        name: value.tolist() for name, value in other.inputs.items()
    }
    for first, second in zip(
        (one.tokens, one.last_hidden, *one.layers), (other.tokens, other.last_hidden, *other.layers), strict=True
    ):
        assert torch.equal(first, second)
    assert (one.head is None) == (other.head is None)
    if one.head is not None:
        assert torch.equal(one.head.weight, other.head.weight)
        assert torch.equal(one.head(one.last_hidden), other.head(other.last_hidden))
    return True


@pytest.mark.parametrize("own_heads", [True, False])
def test_another_run_reads_what_experts_have_said(own_heads, makers, monkeypatch):
    if not own_heads:
        monkeypatch.setattr("expert_merging.running.targets.same_tensor", lambda *_: True)
    made = []
    for name in ("first", "second"):
        maker, samples = makers(name)
        made.append(maker.make(samples))
        assert len(makers.loaded) == 3, "the second run loads no expert"
    assert all(map(same, *made))
    assert all((target.head is not None) == own_heads for target in made[1])
    responses = [
        (makers.folder.parent / "method" / name / "responses.json").read_text() for name in ("first", "second")
    ]
    assert responses[0] == responses[1]


def test_other_layers_need_the_experts_and_not_their_answers(makers, monkeypatch):
    maker, samples = makers("first")
    first = maker.make(samples)

    def refuse(*_):
        raise AssertionError("a known answer must not be written again")

    monkeypatch.setattr("expert_merging.running.targets.generate", refuse)
    maker, samples = makers("second", layers=(0,))
    second = maker.make(samples)
    assert len(makers.loaded) == 6
    assert [target.sample for target in first] == [target.sample for target in second]


def test_what_decides_a_target_decides_whether_it_is_read(makers, tiny_zoo, tmp_path):
    """An expert's weights, its words, the base's files, the bound on answers, and which tokens are looked at."""
    maker, samples = makers("first")
    maker.make(samples)
    changed = tmp_path / "changed"
    changed.mkdir()
    for folder in (BASE, EXPERTS["Chat"], EXPERTS["Code"]):
        (changed / folder).symlink_to(tiny_zoo / folder)
    perturb(tiny_zoo / BASE, changed / EXPERTS["Math"], 3)
    for name, asked, options in (
        ("weights", [EXPERTS["Math"]], {"zoo": changed, "data_dir": str(tiny_zoo / "dataset")}),
        ("words", [*EXPERTS.values()], {"prompt_template": "Q: {question}"}),
        ("bound", [*EXPERTS.values()], {"max_new_tokens": 3}),
        ("tokens", [*EXPERTS.values()], {"loss_tokens": "response"}),
        ("again", [], {}),
    ):
        makers.loaded.clear()
        maker, samples = makers(name, **options)
        maker.make(samples)
        assert makers.loaded == asked, name


def test_the_family_s_flags_decide_too(makers):
    """They say how pictures are cut, and whose code runs."""
    for tiles, loads in ((1, 3), (2, 3), (1, 0)):
        makers.loaded.clear()
        maker, samples = makers(f"run-{tiles}-{loads}")
        replace(maker, backbone=maker.backbone.configured({"max_tiles": tiles})).make(samples)
        assert len(makers.loaded) == loads


@pytest.mark.slow
def test_pictures_that_are_cut_otherwise_are_others(tmp_path):
    zoo = internvl_checkpoints.make_zoo(tmp_path / "zoo")
    for picture in (zoo / "dataset" / "images").iterdir():
        internvl_checkpoints.make_picture(picture, (900, 448))
    given = ["--cache_dir", zoo, "--data_dir", zoo / "dataset", "--method", "expert_merging", "--num_epochs", 1]
    runs = {}
    for output, tiles in (("both", 1), ("both", 2), ("alone", 2)):
        run = [*given, "--max_tiles", tiles, "--run_name", f"{tiles}", "--output_path", tmp_path / output]
        assert merge(*run, family=internvl) == 0
        runs[output] = contents(tmp_path / output / "expert_merging" / f"{tiles}" / "model")
    assert tensors_only(runs["both"]) == tensors_only(runs["alone"])


def tensors_only(files):
    return {name: content for name, content in files.items() if name.endswith(".safetensors")}


def test_states_are_of_the_answers_that_a_run_has(makers):
    """A run that was interrupted keeps its own answers, whatever experts have said to others meanwhile."""
    maker, samples = makers("first")
    first = maker.make(samples)
    own = makers.folder.parent / "method" / "second" / "responses.json"
    maker, samples = makers("second")
    answers = json.loads((makers.folder.parent / "method" / "first" / "responses.json").read_text())
    for name in answers:
        if name.startswith("Math/"):
            answers[name] = {"response": "other", "tokens": [5, 6, 7]}
    own.write_text(json.dumps(answers))
    makers.loaded.clear()
    second = maker.make(samples)
    assert makers.loaded == [EXPERTS["Math"]]
    for one, other in zip(first, second, strict=True):
        assert other.last_hidden.shape[0] == other.length
        assert same(one, other) if one.sample.expert != "Math" else other.sample.response == "other"


def test_nothing_of_the_user_s_is_removed_and_what_a_killed_process_left_is(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_targets, "MOST_BYTES", 900)
    kept = kept_targets.KeptTargets(tmp_path, "Math", {"some": "way"})
    theirs, left = tmp_path / "model" / "model.safetensors", kept.folder / f"{'0' * 16}.safetensors.partial"
    for file in (theirs, left):
        file.parent.mkdir()
        file.write_bytes(b"x" * 800)
        os.utime(file, (1, 1))
    kept.add_states("a" * 16, [torch.zeros(100)])
    assert theirs.exists()
    assert not left.exists()


def test_two_processes_do_not_write_at_once(tmp_path):
    kept = kept_targets.KeptTargets(tmp_path, "Math", {})
    kept.add_answers({"a": 1})
    lock = take_hold(kept.folder / ".lock", "--output_path")
    kept.add_answers({"b": 2})
    kept.add_states("s", [torch.zeros(3)])
    assert kept.answers() == {"a": 1}
    assert kept.states("s") is None
    os.close(lock)
    kept.add_answers({"b": 2})
    assert kept.answers() == {"a": 1, "b": 2}


def test_a_full_disk_leaves_nothing_and_stops_nothing(tmp_path, monkeypatch, caplog):
    def fill(_tensors, file):
        file.write_bytes(b"some of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("expert_merging.running.tensor_files.save_file", fill)
    kept = kept_targets.KeptTargets(tmp_path, "Math", {})
    kept.add_states("s", [torch.zeros(3)])
    assert "No space left on device" in caplog.text
    assert not [*kept.folder.glob("s*")]


def test_what_is_damaged_is_made_again(makers):
    maker, samples = makers("first")
    first = maker.make(samples)
    (states,) = makers.folder.glob("Math-*/*.safetensors")
    content = bytearray(states.read_bytes())
    content[-3] ^= 1
    states.write_bytes(content)
    (answers,) = makers.folder.glob("Code-*/responses.json")
    answers.write_text(answers.read_text().replace('"tokens"', '"tokenz"'))
    makers.loaded.clear()
    maker, samples = makers("second")
    assert all(map(same, first, maker.make(samples)))
    assert makers.loaded == [EXPERTS["Math"], EXPERTS["Code"]]
    maker, samples = makers("third")
    assert all(map(same, first, maker.make(samples)))
    assert len(makers.loaded) == 2, "and kept again"


def test_a_picture_counts_by_its_content(tmp_path):
    identity = kept_targets.identity
    picture, copy = tmp_path / "a.png", tmp_path / "b.png"
    for file, content in ((picture, b"one"), (copy, b"one")):
        file.write_bytes(content)
    one, other = (Sample("Task", "Expert", "?", None, name, (file,)) for name, file in (("1", picture), ("2", copy)))
    assert identity(one) == identity(other)
    copy.write_bytes(b"two")
    assert identity(one) != identity(other)


def test_the_oldest_files_go_and_too_large_ones_are_not_kept(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(kept_targets, "MOST_BYTES", 900)
    kept = kept_targets.KeptTargets(tmp_path, "Math", {"some": "way"})
    names = [letter * 16 for letter in "abcd"]
    for number, name in enumerate(names[:3]):
        kept.add_states(name, [torch.full((70,), float(number))])
        for file in tmp_path.glob(f"*/{name}.safetensors"):
            os.utime(file, (number, number))
    assert kept.states(names[0]) is None
    assert kept.states(names[2])[0].tolist() == [2.0] * 70
    kept.add_states(names[3], [torch.zeros(300)])
    assert kept.states(names[3]) is None
    assert "are not kept: they take 0.0 GB" in caplog.text


def test_what_is_read_is_aligned_as_what_is_made(tmp_path):
    """Otherwise the sums over it differ in the last digits, and with them what is learned."""
    kept = kept_targets.KeptTargets(tmp_path, "A", {})
    kept.add_states("a", [torch.ones(3), torch.ones(5, 7), torch.ones(2)])
    assert [state.data_ptr() % 64 for state in kept.states("a")] == [0] * 3, "as torch aligns memory of its own"


def test_a_folder_that_cannot_be_written_to_stops_nothing(makers, caplog):
    makers.folder.parent.mkdir()
    makers.folder.write_text("a file in its place")
    maker, samples = makers("first")
    assert len(maker.make(samples)) == len(samples)
    assert "what experts say cannot be kept in" in caplog.text


def test_a_run_keeps_them_beside_all_runs_unless_that_is_not_wanted(tiny_zoo, tmp_path):
    given = ["--method", "regmean", "--cache_dir", tiny_zoo, "--data_dir", tiny_zoo / "dataset", "--max_new_tokens", 4]
    merged(tmp_path / "kept", *given)
    assert {folder.name.split("-")[0] for folder in (tmp_path / "kept" / "targets").iterdir()} == {*EXPERTS}
    merged(tmp_path / "not", *given, "--keep_targets", "false")
    assert {folder.name for folder in (tmp_path / "not").iterdir()} == {"regmean"}
