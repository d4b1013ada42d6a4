"""A run from its flags to the merged folder, and every way it refuses or ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from expert_merging import __version__
from expert_merging.catalogue import all_methods
from expert_merging.errors import InputError
from expert_merging.libraries import import_transformers
from expert_merging.method import Preparation, Prepare, enter_method
from expert_merging.methods.linear import task_arithmetic, weight_average
from expert_merging.processes import choose_device
from expert_merging.run import Run
from tests.checkpoints import BASE, EXPERTS, perturb, save_model, tensors_of, write_checkpoint
from tests.command import (
    COMMAND,
    TENSORS,
    assert_same_bytes,
    contents,
    flags,
    merge,
    merge_plainly,
    merged,
    refusal,
    snapshot,
)

PUBLISHED = tuple(EXPERTS.values())
Usage = namedtuple("Usage", "total used free")


# What is written


def test_a_merge_of_real_models_is_the_plain_twin_s(tiny_zoo, tmp_path):
    before = snapshot(tiny_zoo)
    run = merged(tmp_path, *COMMAND, "--cache_dir", tiny_zoo)
    experts = [tiny_zoo / folder for folder in EXPERTS.values()]
    assert_same_bytes(tensors_of(run.model), merge_plainly(tiny_zoo / BASE, experts, task_arithmetic))
    assert snapshot(tiny_zoo) == before


def test_weight_average_is_an_average_unless_a_coefficient_is_given(tiny_zoo, tmp_path):
    experts = [tiny_zoo / folder for folder in EXPERTS.values()]
    whole = merged(tmp_path / "1", "--method", "weight-average", "--cache_dir", tiny_zoo)
    assert_same_bytes(tensors_of(whole.model), merge_plainly(tiny_zoo / BASE, experts, weight_average))
    part = merged(tmp_path / "2", "--method", "weight_average", "--cache_dir", tiny_zoo, "--scaling_coefficient", "0.1")
    expected = merge_plainly(tiny_zoo / BASE, experts, lambda given: weight_average(given, scaling_coefficient=0.1))
    assert_same_bytes(tensors_of(part.model), expected)


@pytest.mark.parametrize(("text", "value"), [("1", 1.0), ("0.3", 0.3), ("[0.2,0.3,0.4]", [0.2, 0.3, 0.4])])
def test_coefficients_reach_the_method_and_the_record(tiny_zoo, tmp_path, text, value):
    run = merged(tmp_path, *COMMAND, "--cache_dir", tiny_zoo, "--scaling-coefficient", text)
    experts = [tiny_zoo / folder for folder in EXPERTS.values()]
    expected = merge_plainly(tiny_zoo / BASE, experts, lambda given: task_arithmetic(given, scaling_coefficient=value))
    assert_same_bytes(tensors_of(run.model), expected)
    assert json.loads(run.config.read_text())["options"]["scaling_coefficient"] == value


def loads_strictly(folder, **expected):
    model, info = import_transformers().AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    for name, value in expected.items():
        assert getattr(model, name) == value
    return model


def test_the_merged_folder_loads_strictly_and_generates(tiny_zoo, tmp_path):
    run = merged(tmp_path, *COMMAND, "--cache_dir", tiny_zoo)
    model = loads_strictly(run.model, dtype=torch.float32)
    tokenizer = import_transformers().AutoTokenizer.from_pretrained(run.model)
    inputs = tokenizer("hello", return_tensors="pt")
    tokens = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=3)
    assert tokens.shape[1] > inputs["input_ids"].shape[1]


def test_tied_embeddings_and_shards_in_half_precision(tmp_path):
    base = tmp_path / "base"
    save_model(base, 0, tie_word_embeddings=True)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    for file in base.glob("*.safetensors"):
        save_file(
            {name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"}
        )
    assert "lm_head.weight" not in tensors_of(base)
    perturb(base, tmp_path / "a", 1, dtype=torch.float32)
    head = {"lm_head.weight": tensors_of(tmp_path / "a")["model.embed_tokens.weight"].clone()}
    sharded = write_checkpoint(tmp_path / "b", tensors_of(tmp_path / "a"), head)
    run = merged(tmp_path / "out", *COMMAND, *flags(base, A=tmp_path / "a", B=sharded))
    model = loads_strictly(run.model, dtype=torch.bfloat16)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert_same_bytes(tensors_of(run.model), merge_plainly(base, [tmp_path / "a", sharded], task_arithmetic))


def test_shards_of_base_and_experts_may_differ(tmp_path):
    base = tmp_path / "base"
    save_model(base, 0, max_shard_size="40KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    experts = {}
    for seed, name in enumerate("AB"):
        perturb(base, tmp_path / "sharded" / name, seed)
        experts[name] = write_checkpoint(tmp_path / name, tensors_of(tmp_path / "sharded" / name))
    run = merged(tmp_path / "out", *COMMAND, *flags(base, **experts))
    assert {file.name for file in run.model.glob("*.safetensors")} == {file.name for file in base.glob("*.safetensors")}
    assert_same_bytes(tensors_of(run.model), merge_plainly(base, experts.values(), task_arithmetic))
    loads_strictly(run.model)


# The run folder


def test_the_run_folder_has_its_files(command, tmp_path):
    (tmp_path / "base" / "README.md").write_text("# The base")
    run = merged(tmp_path / "out", *command, "--run_name", "my-run")
    assert run.folder == tmp_path / "out" / "task_arithmetic" / "my-run"
    assert sorted(contents(run.folder)) == [
        ".lock",
        "config.json",
        "digests.json",
        "merge.log",
        "model/README.base.md",
        "model/README.md",
        "model/config.json",
        "model/model.safetensors",
        "outcome.json",
    ]
    assert "# my-run" in (run.model / "README.md").read_text()
    assert (run.model / "README.base.md").read_text() == "# The base"


def test_the_record_holds_everything(command, tmp_path):
    run = merged(tmp_path / "out", *command)
    record = json.loads(run.config.read_text())
    assert record["options"] == {
        "base_model_path": str(tmp_path / "base"),
        "expert": {"A": str(tmp_path / "a"), "B": str(tmp_path / "b")},
        "exclude_params": [".*lm_head.*", ".*norm.*", ".*embed_tokens.*", ".*bias.*"],
        "seed": 0,
        "scaling_coefficient": 0.3,
    }
    assert (record["family"], record["method"], record["seed"]) == ("Mistral", "task_arithmetic", 0)
    assert record["checkpoints"].keys() == {"base", "A", "B"}
    assert len(set(record["checkpoints"].values())) == 3
    assert {"expert_merging", "python", "torch", "transformers", "accelerate", "safetensors"} <= record[
        "versions"
    ].keys()
    assert record["git_revision"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", record["git_revision"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", record["started"])


def test_the_log_tells_the_plan_and_the_result(command, tmp_path, capsys):
    run = merged(tmp_path / "out", *command)
    lines = run.log.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO ", line) for line in lines)
    texts = [line.split(" INFO ")[1] for line in lines]
    assert texts == capsys.readouterr().out.splitlines()
    assert texts[:8] == [
        f"method task_arithmetic, run folder {run.folder}",
        f"base {tmp_path / 'base'}",
        f"expert A {tmp_path / 'a'}",
        f"expert B {tmp_path / 'b'}",
        "relative change by experts, from samples: A 9.1 %, B 36 %",
        "the base: names of tensors are read with 'model.' before them",
        "option scaling_coefficient 0.3",
        "2 of 4 tensors are merged (0.0M parameters), 2 keep the base's value",
    ]
    assert re.fullmatch(r"writes 0.0 MB; merging needs about 0.0 MiB of memory on \S+", texts[8])
    assert re.fullmatch(r"merging took \d\.\d s", texts[9])
    assert texts[10] == "largest relative change: 0.45 in layers.1.weight"
    assert texts[12] == f"merged model: {run.model}"
    assert f'from_pretrained("{run.model}"' in texts[13]
    assert f"pretrained={run.model}" in texts[14]
    assert "\x1b" not in run.log.read_text()


MATH = "evaluate it:  lm_eval --model hf --model_args pretrained={model} --tasks gsm8k --batch_size auto"
CODE = (
    "evaluate it:  HF_ALLOW_CODE_EVAL=1 lm_eval --model hf --model_args pretrained={model} --tasks humaneval,mbpp "
    "--batch_size auto --confirm_run_unsafe_code"
)
OTHER = (
    "evaluate it:  lm_eval --model hf --model_args pretrained={model} --batch_size auto --tasks TASKS  "
    "# what your experts do; lm_eval ls tasks lists all"
)


@pytest.mark.parametrize(
    ("names", "commands"),
    [(("Math", "code"), [MATH, CODE]), (("CODE", "Law"), [CODE]), (("Law", "Mathematics"), [OTHER])],
)
def test_evaluations_are_those_of_the_experts(tiny, tmp_path, names, commands):
    experts = dict(zip(names, (tmp_path / "a", tmp_path / "b"), strict=True))
    run = merged(tmp_path / "out", *COMMAND, *flags(tmp_path / "base", **experts))
    lines = [line.split(" INFO ")[1] for line in run.log.read_text().splitlines() if "evaluate it" in line]
    assert lines == [command.format(model=run.model) for command in commands]


def test_a_model_of_one_expert_is_evaluated_as_that(tiny_zoo, tmp_path):
    run = merged(tmp_path, "--method", "svd_intermediate", "--cache_dir", tiny_zoo)
    run.holds_several = True
    lines = [line.split(" INFO ")[1] for line in run.log.read_text().splitlines() if "evaluate it" in line]
    models = {name: run.model / name for name in EXPERTS}
    assert lines == [
        command.format(model=models[name]) for name, command in {"Chat": OTHER, "Math": MATH, "Code": CODE}.items()
    ]


def test_weights_in_other_formats_are_left_out_and_named(command, tmp_path):
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"")
    run = merged(tmp_path / "out", *command)
    assert not (run.model / "pytorch_model.bin").exists()
    assert "not copied, since they hold the base's weights: pytorch_model.bin" in run.log.read_text()


# The same command again


def test_a_complete_run_is_not_repeated(command, tmp_path, capsys):
    run = merged(tmp_path / "out", *command)
    before = snapshot(run.folder)
    assert merged(tmp_path / "out", *command).folder == run.folder
    assert snapshot(run.folder) == before
    complete = "this run is complete already; remove its folder to repeat it"
    assert complete in capsys.readouterr().out
    assert merge(*command, "--output_path", tmp_path / "out", "--drop_rate", "0.3") == 0
    told = capsys.readouterr().out
    assert "ignored, since task_arithmetic has no such option: --drop_rate" in told, "another run is not what was asked"
    assert complete in told
    assert merge(*command, "--output_path", tmp_path / "out", "--dry_run") == 0
    assert complete in capsys.readouterr().out


def test_the_same_command_has_the_same_name_and_another_has_not(command, tmp_path):
    command = [*command, "--device", "auto"]
    run = merged(tmp_path / "out", *command)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert merge(*command, "--device", device, "--log_with", "none") == 0
    assert merge(*command, "--scaling_coefficient", "0.3", "--seed", "0") == 0
    assert len(list(run.folder.parent.iterdir())) == 1
    assert merge(*command, "--scaling_coefficient", "0.4") == 0
    assert len(list(run.folder.parent.iterdir())) == 2


def test_a_changed_checkpoint_is_another_run(command, tmp_path, capsys):
    run = merged(tmp_path / "out", *command, "--run_name", "x")
    write_checkpoint(tmp_path / "a", {name: tensor + 9 for name, tensor in TENSORS.items()})
    assert re.fullmatch(
        rf'{run.folder} holds a different run \(A: "\w+" there, "\w+" now\); choose another --run_name, or move .*',
        refusal(capsys, *command, "--run_name", "x"),
    )


def test_copied_checkpoints_continue_a_run(command, tmp_path, capsys):
    run = merged(tmp_path / "out", *command)
    for name in ("base", "a", "b"):
        shutil.copytree(tmp_path / name, tmp_path / "copies" / name)
    copies = flags(tmp_path / "copies" / "base", A=tmp_path / "copies" / "a", B=tmp_path / "copies" / "b")
    capsys.readouterr()
    assert merged(tmp_path / "out", *COMMAND, *copies).folder == run.folder
    told = capsys.readouterr().out
    assert "this run is complete already" in told
    assert "written again" not in told, "a copy has times of its own"


def test_weights_that_were_written_again_without_a_change_that_shows_are_told(command, tmp_path, capsys):
    run = merged(tmp_path / "out", *command)
    write_checkpoint(tmp_path / "a", tensors_of(tmp_path / "a"))
    told = (
        f"the weights of A ({tmp_path / 'a'}) were written again since this run began; samples of them are as they "
        "were, so it goes on. If you have changed weights, move the run's folder away"
    )
    capsys.readouterr()
    for more in ((), ("--dry_run",)):
        assert merge(*command, *more) == 0
        assert told in capsys.readouterr().out
    run.model.rename(run.partial_model)
    assert merge(*command) == 0
    assert f"warning: {told}\n" in run.log.read_text()
    capsys.readouterr()
    again = merged(tmp_path / "again", *command)
    assert "written again" not in again.log.read_text(), "a new run begins with them"


def test_two_runs_give_the_same_bytes(command, tmp_path):
    assert merge(*command, "--run_name", "x") == 0
    assert merge(*command, "--run_name", "y") == 0
    first, second = (contents(tmp_path / "out" / "task_arithmetic" / name / "model") for name in "xy")
    assert first.pop("README.md") == second.pop("README.md").replace(b"# y", b"# x")
    assert first == second


@pytest.mark.parametrize("kind", ["config.json", "yaml"])
def test_a_run_is_reproduced_from_a_configuration_file(command, tmp_path, kind):
    run = merged(tmp_path / "out", *command, "--scaling_coefficient", "[0.5, 0.25]", "--exclude_params", "none")
    file = run.config
    if kind == "yaml":
        file = tmp_path / "options.yaml"
        file.write_text(
            f"method: task-arithmetic\nbase-model-path: {tmp_path}/base\nexpert: {{A: {tmp_path}/a, B: {tmp_path}/b}}\n"
            "scaling_coefficient: [0.5, 0.25]\nexclude_params: none\n"
        )
    again = merged(tmp_path / "again", "--config", file)
    assert again.folder.name == run.folder.name
    assert contents(again.model) == contents(run.model)
    other = merged(tmp_path / "other", "--config", file, "--scaling_coefficient", "1")
    assert not tensors_of(other.model)["layers.0.weight"].equal(tensors_of(run.model)["layers.0.weight"])


def test_a_cache_folder_on_the_command_line_wins_over_a_run_s_own_paths(tmp_path):
    folders = {BASE: TENSORS, **{folder: {name: value + 1 for name, value in TENSORS.items()} for folder in PUBLISHED}}
    for folder, tensors in folders.items():
        write_checkpoint(tmp_path / "old" / folder, tensors)
        write_checkpoint(tmp_path / "new" / folder, {name: 3 * tensor for name, tensor in tensors.items()})
    run = merged(tmp_path / "out", *COMMAND, "--cache_dir", tmp_path / "old")
    again = merged(tmp_path / "again", "--config", run.config, "--cache_dir", tmp_path / "new")
    expected = merged(tmp_path / "expected", *COMMAND, "--cache_dir", tmp_path / "new")
    assert_same_bytes(tensors_of(again.model), tensors_of(expected.model))
    assert json.loads(again.config.read_text())["options"] == json.loads(expected.config.read_text())["options"]


def test_a_dry_run_of_a_run_s_own_configuration_tells_that_it_is_complete(command, tmp_path, capsys):
    run = merged(tmp_path / "out", *command, "--scaling_coefficient", '{"B": 0.25}')
    assert json.loads(run.config.read_text())["options"]["scaling_coefficient"] == [0.3, 0.25]
    capsys.readouterr()
    before = snapshot(tmp_path)
    given = ["--config", run.config, "--output_path", tmp_path / "out", "--dry_run"]
    assert merge(*given) == 0
    told = capsys.readouterr().out
    assert f"run folder {run.folder}\n" in told
    assert "option scaling_coefficient [0.3, 0.25]\n" in told
    assert "this run is complete already; remove its folder to repeat it\n" in told
    assert merge(*given, "--scaling_coefficient", "0.5") == 0
    assert "option scaling_coefficient 0.5\n" in capsys.readouterr().out
    assert snapshot(tmp_path) == before


def test_seed_minus_one_draws_and_records_a_seed(command, tmp_path):
    run = merged(tmp_path / "out", *command, "--seed", "-1")
    record = json.loads(run.config.read_text())
    assert record["options"]["seed"] == -1
    assert 0 <= record["seed"] < 2**31
    other = merged(tmp_path / "other", *command, "--seed", "-1")
    assert json.loads(other.config.read_text())["seed"] != record["seed"]
    assert f'"seed": {record["seed"]}' in (run.model / "README.md").read_text()
    merged(tmp_path / "out", *command, "--seed", "-1")
    assert json.loads(run.config.read_text()) == record


@pytest.fixture
def learning(monkeypatch):
    """A method that learns and is stopped the first time; the seeds that it was given."""
    table, seeds = dict(all_methods()), []
    for name in ("method", "catalogue"):
        monkeypatch.setattr(f"expert_merging.{name}.TABLE", table)

    def work():
        raise KeyboardInterrupt

    def stopping(context):
        """Learn nothing."""
        seeds.append(context.seed)
        return Preparation(work, {"data": "1"})

    enter_method(lambda task_vectors, found: task_vectors[0], described=stopping, prepare=Prepare(stopping, ("found",)))
    return seeds


def test_a_resumed_run_learns_with_the_recorded_seed(command, tmp_path, capsys, learning):
    arguments = [*command, "--method", "stopping", "--seed", "-1"]
    assert [merge(*arguments) for _ in range(3)] == [130] * 3
    assert "interrupted; the same command continues where this one stopped" in capsys.readouterr().err
    (config,) = (tmp_path / "out").glob("stopping/*/config.json")
    record = json.loads(config.read_text())
    assert learning[1:] == [record["seed"]] * 2
    assert merge(*arguments, "--dry_run") == 0
    assert "this run has been begun and would be continued\n" in capsys.readouterr().out
    assert record["inputs"] == {"device": "cpu", "version": __version__, "data": "1"}


# What is refused


@pytest.mark.parametrize(
    ("device", "problem"),
    [
        ("gpu", "--device must be auto, cpu, cuda or cuda:NUMBER, got 'gpu'"),
        ("meta", "--device must be auto, cpu, cuda or cuda:NUMBER, got 'meta'"),
        ("", "--device must be auto, cpu, cuda or cuda:NUMBER, got ''"),
        ("cuda:99", r"--device cuda:99: this machine has \d+ GPUs that torch can use"),
    ],
)
def test_devices_that_are_not_there(command, capsys, device, problem):
    assert re.fullmatch(problem, refusal(capsys, *command, "--device", device))


def launched(monkeypatch, *, gpus, number=None, processes=None):
    """So many GPUs, and the variables with which a launcher of processes numbers them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in {"LOCAL_RANK": number, "LOCAL_WORLD_SIZE": processes}.items():
        if value is not None:
            monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("asked", "there", "device"),
    [
        ("auto", {"gpus": 0}, "cpu"),
        ("auto", {"gpus": 0, "number": 1, "processes": 2}, "cpu"),
        ("auto", {"gpus": 2}, "cuda"),
        ("auto", {"gpus": 2, "number": 1, "processes": 2}, "cuda:1"),
        ("auto", {"gpus": 2, "number": 1}, "cuda:1"),
        ("cuda", {"gpus": 2, "number": 1, "processes": 2}, "cuda:1"),
        ("cuda:0", {"gpus": 2, "number": 1, "processes": 2}, "cuda:0"),
        ("cpu", {"gpus": 1, "number": 1, "processes": 2}, "cpu"),
    ],
)
def test_each_process_takes_its_own_gpu(asked, there, device, monkeypatch):
    launched(monkeypatch, **there)
    assert choose_device(asked) == device


@pytest.mark.parametrize("asked", ["auto", "cuda"])
@pytest.mark.parametrize("number", [0, 1])
def test_fewer_gpus_than_processes(asked, number, monkeypatch):
    """The main process finds it too, which has a GPU but is the one that tells."""
    launched(monkeypatch, gpus=1, number=number, processes=2)
    with pytest.raises(InputError) as caught:
        choose_device(asked)
    assert str(caught.value) == (
        "2 processes run on this machine, and torch can use 1 of its GPUs; start one process for each GPU, or give "
        "--device cpu"
    )


def test_processes_that_learn_together_cannot_share_a_gpu(command, capsys, monkeypatch):
    launched(monkeypatch, gpus=2, number=1, processes=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = (
        "--device cuda:0 is one GPU, and each of the 2 processes on this machine needs one of its own; give --device "
        "cuda, or start one process"
    )
    with pytest.raises(InputError) as caught:
        choose_device("cuda:0", one_each=True)
    assert str(caught.value) == refused
    assert choose_device("cuda", one_each=True) == "cuda:1"
    assert choose_device("cpu", one_each=True) == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert refusal(capsys, *command, "--method", "expert_merging", "--device", "cuda:0") == refused
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # the other one is on another machine
    assert choose_device("cuda:0", one_each=True) == "cuda:0"


@pytest.mark.parametrize("name", ["a/b", "..", ".", "/tmp/x", "x/", "", "a\nb", "n" * 201], ids=ascii)
def test_a_run_name_is_no_path(command, tmp_path, capsys, name):
    assert refusal(capsys, *command, "--run_name", name) == (
        f"--run_name is the name of a folder inside {tmp_path / 'out' / 'task_arithmetic'}, at most 200 bytes long, "
        f"got {name!r}"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", ["base", "a", "b/deeper"])
def test_checkpoint_folders_are_never_written_to(tiny, tmp_path, capsys, inside):
    before = snapshot(tmp_path)
    found = refusal(capsys, *tiny, "--output_path", tmp_path / inside, "--run_name", "x")
    checkpoint = tmp_path / inside.split("/")[0]
    assert found == (
        f"the run folder {tmp_path / inside / 'task_arithmetic' / 'x'} would lie inside the checkpoint folder "
        f"{checkpoint}, which is never written to; choose another --output_path"
    )
    assert snapshot(tmp_path) == before


def test_checkpoint_folders_are_never_written_to_by_way_of_links_and_names(tmp_path, capsys):
    base = write_checkpoint(tmp_path / "task_arithmetic", TENSORS)
    expert = write_checkpoint(tmp_path / "expert", TENSORS)
    arguments = [*COMMAND, *flags(base, A=expert), "--run_name", "x"]
    (tmp_path / "link").symlink_to(expert)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "task_arithmetic").symlink_to(expert)
    before = snapshot(tmp_path)
    assert "would lie inside the checkpoint folder" in refusal(capsys, *arguments, "--output_path", tmp_path)
    assert "would lie inside the checkpoint folder" in refusal(capsys, *arguments, "--output_path", tmp_path / "link")
    assert "would lie inside the checkpoint folder" in refusal(capsys, *arguments, "--output_path", tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_an_output_path_that_is_a_file_or_locked_up(tiny, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert refusal(capsys, *tiny, "--output_path", tmp_path / "file") == (
        f"{tmp_path / 'file'} is a file where the run needs a folder; move it away"
    )
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert refusal(capsys, *tiny, "--output_path", tmp_path / "new") == (
        f"{tmp_path} cannot be written to; choose another --output_path"
    )


def test_a_run_folder_with_something_else(command, tmp_path, capsys):
    folder = tmp_path / "out" / "task_arithmetic" / "x"
    folder.mkdir(parents=True)
    (folder / "holiday.jpg").write_text("sea")
    before = snapshot(tmp_path)
    assert refusal(capsys, *command, "--run_name", "x") == (
        f"{folder} is in use and has no readable config.json of a run; "
        "choose another --run_name, or move the folder away"
    )
    assert snapshot(tmp_path) == before


def test_a_run_folder_with_a_different_run(command, tmp_path, capsys):
    run = merged(tmp_path / "out", *command, "--run_name", "x")
    before = snapshot(run.folder)
    assert refusal(capsys, *command, "--run_name", "x", "--scaling_coefficient", "0.5") == (
        f"{run.folder} holds a different run (scaling_coefficient: 0.3 there, 0.5 now); "
        "choose another --run_name, or move the folder away"
    )
    assert snapshot(run.folder) == before


def test_a_run_folder_that_another_process_writes_to(command, tmp_path, capsys):
    folder = tmp_path / "out" / "task_arithmetic" / "x"
    folder.mkdir(parents=True)
    other = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert refusal(capsys, *command, "--run_name", "x") == (
        f"another process is writing to {folder}; wait for it or choose another --run_name"
    )
    os.close(other)
    assert merge(*command, "--run_name", "x") == 0


def test_a_run_that_another_process_has_just_finished_is_complete(command, tmp_path, monkeypatch):
    """Between the look at the folder and taking hold of it."""
    begin, others = Run.begin, [command]

    def late(run, description):
        if others:
            assert merge(*others.pop(), "--run_name", "x") == 0
        begin(run, description)

    monkeypatch.setattr(Run, "begin", late)
    run = merged(tmp_path / "out", *command, "--run_name", "x")
    assert not run.partial_model.exists()
    assert run.is_complete


def test_too_little_disk_is_found_before_anything_is_written(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10))
    assert refusal(capsys, *command).startswith("the result needs 0.0 GB and the disk of ")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_finished(command, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert refusal(capsys, *command).startswith("the disk is full; make room")
    assert not list((tmp_path / "out").glob("*/*/model"))
    assert merge(*command) == 0


def test_finished_shards_need_no_room_again(tmp_path, capsys, monkeypatch):
    shards = [{name: tensor} for name, tensor in TENSORS.items()]
    base = write_checkpoint(tmp_path / "base", *shards)
    command = [*COMMAND, *flags(base, A=base), "--run_name", "x", "--output_path", tmp_path / "out"]
    run = merged(tmp_path / "out", *command)
    run.model.rename(run.partial_model)
    last = max(run.partial_model.glob("*.safetensors"))
    size = last.stat().st_size
    last.unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, size - 1))
    assert "make room" in refusal(capsys, *command)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, size))
    assert merge(*command) == 0
    assert "kept 3 finished shards of an earlier, interrupted run" in run.log.read_text()


@pytest.mark.parametrize("who", ["base", "a"])
def test_nan_is_named_and_leaves_nothing_that_looks_finished(command, tmp_path, capsys, who):
    tensors = {name: tensor.clone() for name, tensor in TENSORS.items()}
    tensors["layers.1.weight"][3] = float("nan")
    write_checkpoint(tmp_path / who, tensors)
    name = {"base": "the base", "a": "expert A"}[who]
    assert refusal(capsys, *command) == (
        f"{name} has 1 NaN or infinite values in layers.1.weight ({tmp_path / who / 'model.safetensors'})"
    )
    assert not list((tmp_path / "out").rglob("*.safetensors*"))
    assert not list((tmp_path / "out").rglob("model"))
    write_checkpoint(tmp_path / who, TENSORS)
    assert merge(*command) == 0, "the run folder was not let go"


def test_half_precision_that_overflows(command, tmp_path, capsys):
    tensors = {"layers.0.weight": torch.full((4,), 6e4).half()}
    base = write_checkpoint(tmp_path / "base", tensors)
    expert = write_checkpoint(tmp_path / "a", {name: tensor + 5000 for name, tensor in tensors.items()})
    arguments = [*COMMAND, *flags(base, A=expert), "--output_path", tmp_path / "out"]
    assert refusal(capsys, *arguments, "--scaling_coefficient", "2") == (
        "the merged layers.0.weight does not fit into F16 (the base's type); use a smaller coefficient"
    )


def test_test_questions_are_asked_of_the_merged_model(tiny_zoo, tmp_path):
    run = merged(tmp_path, *COMMAND, "--cache_dir", tiny_zoo, "--run_tests")
    text = run.log.read_text()
    assert text.count("INFO question: ") == text.count("INFO answer: ") == 3


@pytest.mark.slow
def test_every_model_of_a_run_is_asked_and_can_be_evaluated(tiny_zoo, tmp_path):
    command = ["--method", "svd_intermediate", "--cache_dir", tiny_zoo, "--run_tests"]
    run = merged(tmp_path, *command)
    text = run.log.read_text()
    for expert in EXPERTS:
        folder = run.folder / "models" / expert
        assert f"merged model: {folder}\n" in text
        assert f'load it:      AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto")' in text
        assert f"pretrained={folder} " in text
        assert f"questions to  {folder}\n" in text
    assert text.count("INFO question: ") == text.count("INFO answer: ") == 3 * len(EXPERTS)
