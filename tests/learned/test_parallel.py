"""Learning in several processes: the same coefficients, one writer, and no survivors of a process that dies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import save_file

from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.cli import main
from expert_merging.errors import InputError
from expert_merging.learned.coefficients import load_coefficients
from expert_merging.options import ROOT
from expert_merging.running.sharding import load_on
from Mistral.backbone import BACKBONE
from tests.checkpoints import BASE, make_zoo, perturb, tensors_of
from tests.launching import Ended, run_together
from tests.learned.watched import learn, learn_elsewhere

LOST = "error: another process of this run has ended, so this one does too; what it said last tells why"
WATCHED = "tests.learned.watched"
CONFIGS = ROOT / "configs" / "accelerate"
# At any free port, as other tests start it at the same time.
ACCELERATE = ("accelerate.commands.launch", "--main_process_port", 0, "--config_file")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node")
# Entries of what is merged of the tiny checkpoints: all of three layers but the norms.
MERGED = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)


def start(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def arguments(cache: Path, output: Path) -> list[str]:
    """Nine samples: a group of eight, and one of a single sample, in which some processes have nothing to do."""
    given = ["--cache_dir", cache, "--data_dir", cache / "dataset", "--output_path", output, "--run_name", "r"]
    given += ["--device", "cpu", "--samples_per_task", 3]
    return [str(argument) for argument in given]


def learn_together(count: int, folder: Path, given: Sequence[str], **watching: str) -> Ended:
    """Watched processes that learn with their results in ``folder / output``."""
    watched = partial(learn, given, output=str(folder / "output"), **watching)
    return run_together(count, watched, folder=folder)


@pytest.fixture(scope="module")
def alone(answered_zoo, tmp_path_factory):
    """Coefficients of one process."""
    output = tmp_path_factory.mktemp("alone")
    assert main(BACKBONE, arguments(answered_zoo, output)) == 0
    return load_coefficients(output / "expert_merging" / "r").values


def check_same(output: Path, alone: dict[str, torch.Tensor]) -> None:
    values = load_coefficients(output / "expert_merging" / "r").values
    for name, value in alone.items():
        torch.testing.assert_close(values[name], value, rtol=0, atol=1e-6)


def told_of_the_dead(errors: str) -> bool:
    """By a process that missed it, unless the launcher was faster to see it, say so and end the others."""
    return LOST in errors or "Signal 9 (SIGKILL) received" in errors


def amounts(done: Ended | subprocess.CompletedProcess[str]) -> list[tuple[int, int]]:
    """What each process has: entries of merged parameters, and of base and experts together."""
    found = re.findall(r"process (\d) has (\d+) and (\d+)", done.stdout)
    return [(int(held), int(kept)) for _, held, kept in sorted(found)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options", "together"),
    [
        ("expert_merging", [], []),
        ("expert_merging", ["--directions", "svd", "--parametrisation", "row", "--learning_rate", 0.05], []),
        ("expert_merging", ["--parametrisation", "direction", "--learning_rate", 0.05], []),
        ("expert_merging", ["--parametrisation", "direction", "--learning_rate", 0.05], ["--shard"]),
        ("expert_merging", ["--parametrisation", "rank", "--learning_rate", 0.05], ["--shard"]),
        ("expert_merging++", [], []),
    ],
)
def test_two_processes_learn_what_one_learns(method, options, together, tiny_zoo, tmp_path):
    """Uneven groups: 15 samples in groups of 8 and 7 for two processes; the drawn seed is shared."""
    given = [
        "--method",
        method,
        *options,
        "--cache_dir",
        tiny_zoo,
        "--data_dir",
        tiny_zoo / "dataset",
        "--max_new_tokens",
        6,
    ]
    given = [str(argument) for argument in [*given, "--run_name", "r", "--device", "cpu", "--output_path"]]
    both = [*given, str(tmp_path / "two"), "--seed", "-1", *together]
    done = run_together(2, main, BACKBONE, both, folder=tmp_path)
    assert done.codes == (0, 0), done.stderr
    assert "in 2 processes" in done.stdout
    two = tmp_path / "two" / method / "r"
    seed = json.loads((two / "config.json").read_text())["seed"]
    assert main(BACKBONE, [*given, str(tmp_path / "one"), "--seed", str(seed)]) == 0
    one = load_coefficients(tmp_path / "one" / method / "r")
    for name, value in load_coefficients(two).values.items():
        # Sums in another order, which up to two stages of updates magnify more with some seeds than with others.
        torch.testing.assert_close(value, one.values[name], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_learn_what_one_learns_and_one_writes(count, answered_zoo, alone, tmp_path):
    output = tmp_path / "output"
    done = learn_together(count, tmp_path, arguments(answered_zoo, output))
    assert done.codes == (0,) * count, done.stdout + done.stderr
    assert f"from 9 samples in {count} processes" in done.stdout
    assert amounts(done) == [(MERGED, 4 * MERGED)] * count
    check_same(output, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "options"),
    [(2, []), (3, ["--gradient_checkpointing", "--rank_batches", "sample", "--task_vectors", "host"])],
)
def test_a_model_split_over_processes_learns_the_same(count, options, answered_zoo, alone, tmp_path):
    """Rows that two processes share evenly, and three do not; a single sample, which the others run along with."""
    output = tmp_path / "output"
    done = learn_together(count, tmp_path, [*arguments(answered_zoo, output), "--shard", *options])
    assert done.codes == (0,) * count, done.stdout + done.stderr
    found = amounts(done)
    assert len(found) == count
    assert sum(held for held, _ in found) == MERGED
    assert max(held for held, _ in found) < 1.1 * MERGED / count
    assert all(kept == 4 * held for held, kept in found)
    check_same(output, alone)


@pytest.mark.slow
def test_a_model_with_one_weight_for_embeddings_and_head_can_be_split(tmp_path):
    """Everything is merged, in two stages, and the experts answer while they are split."""
    zoo = make_zoo(tmp_path / "zoo", tie_word_embeddings=True)
    given = ["--method", "expert_merging++", "--max_new_tokens", "6", "--exclude_params", "nothing"]
    assert main(BACKBONE, [*arguments(zoo, tmp_path / "one"), *given]) == 0
    done = run_together(2, main, BACKBONE, [*arguments(zoo, tmp_path / "two"), *given, "--shard"], folder=tmp_path)
    assert done.codes == (0, 0), done.stdout + done.stderr
    one, two = (tmp_path / output / "expert_merging++" / "r" for output in ("one", "two"))
    assert json.loads((two / "responses.json").read_text()) == json.loads((one / "responses.json").read_text())
    learned = load_coefficients(two).values
    for name, value in load_coefficients(one).values.items():
        torch.testing.assert_close(learned[name], value, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_what_a_split_model_has_learned_goes_on_in_one_process(answered_zoo, alone, tmp_path, capsys):
    output = tmp_path / "output"
    done = learn_together(2, tmp_path, [*arguments(answered_zoo, output), "--shard"], dying="1")
    assert done.codes == (1, -signal.SIGKILL)
    assert LOST in done.stderr
    assert main(BACKBONE, arguments(answered_zoo, output)) == 0
    assert "continuing after update 1" in capsys.readouterr().out
    check_same(output, alone)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["expert_merging", "weight_average"])
def test_machines_that_do_not_share_the_output_folder_are_told(method, answered_zoo, tmp_path):
    given = [*arguments(answered_zoo, tmp_path / "output"), "--method", method]
    done = run_together(2, learn_elsewhere, given, folder=tmp_path)
    assert done.codes == (1, 1)
    folder = tmp_path / "output1" / method / "r"
    assert f"error: {folder} is another folder here than for the main process; the machines" in done.stderr
    assert not list(tmp_path.glob("output*/*/r/model"))


@pytest.mark.slow
def test_several_processes_continue_from_the_same_state_or_not_at_all(answered_zoo, alone, tmp_path):
    output = tmp_path / "output"
    given = arguments(answered_zoo, output)
    assert learn_together(2, tmp_path, given, dying="0").codes == (-signal.SIGKILL, 1)
    done = learn_together(2, tmp_path, given, blind="1")
    assert done.codes == (1, 1)
    state = output / "expert_merging" / "r" / "state"
    problem = f"error: some processes continue after update 0, others after 1; all of them must be able to read {state}"
    assert problem in done.stderr
    done = learn_together(2, tmp_path, given)
    assert done.codes == (0, 0), done.stdout + done.stderr
    assert "continuing after update 1" in done.stdout
    check_same(output, alone)


def test_a_model_is_not_split_over_a_single_process(answered_zoo, tmp_path, capsys):
    assert main(BACKBONE, [*arguments(answered_zoo, tmp_path), "--shard"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "this is the only one; start it with torchrun or accelerate launch, or leave the flag away" in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_models_are_loaded_in_the_type_of_their_files_and_converted_on_their_way(dtype, answered_zoo, tmp_path):
    """So that several processes of a machine share the files' pages instead of having a copy each."""
    for mixed in (False, True):
        folder = tmp_path / str(mixed)
        perturb(answered_zoo / BASE, folder, 3, dtype=torch.bfloat16)
        if mixed:  # no type that all tensors could be loaded in without loss
            tensors = tensors_of(folder)
            tensors["model.norm.weight"] = torch.full((32,), 1 + 2.0**-20)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        asked = []

        def load(place, kind, asked=asked):
            asked.append(kind)
            return BACKBONE.load_model(place, kind)

        backbone = replace(BACKBONE, load_model=load)
        model = load_on(torch.device("cpu"), backbone, Checkpoint(folder), dtype, sharded=False)
        assert asked == [dtype if mixed else torch.bfloat16]
        expected = BACKBONE.load_model(folder, dtype)
        for name, tensor in expected.state_dict(keep_vars=True).items():
            torch.testing.assert_close(model.state_dict()[name], tensor.detach(), rtol=0, atol=0)
        buffers = dict(model.named_buffers())
        assert all(torch.equal(buffers[name], value) for name, value in expected.named_buffers())


def test_what_a_model_computes_from_its_type_is_of_the_wanted_type(tmp_path):
    """Gemma's scale of embeddings, which is rounded to the type that it is loaded in."""
    from transformers import GemmaConfig, GemmaForCausalLM

    sizes = {"hidden_size": 40, "intermediate_size": 64, "head_dim": 8, "vocab_size": 50}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 1}
    GemmaForCausalLM(GemmaConfig(**sizes, **heads)).bfloat16().save_pretrained(tmp_path)
    expected = BACKBONE.load_model(tmp_path, torch.float32)
    model = load_on(torch.device("cpu"), BACKBONE, Checkpoint(tmp_path), torch.float32, sharded=False)
    tables = dict(model.named_buffers())
    assert any(torch.ne(value, value.bfloat16()).any() for value in tables.values())
    for name, value in expected.named_buffers():
        assert (tables[name].dtype, tables[name].tolist()) == (value.dtype, value.tolist())
    tokens = torch.arange(7)[None]
    assert model(tokens).logits.equal(expected(tokens).logits)


def test_a_model_without_layers_cannot_be_split(answered_zoo):
    model = torch.nn.Linear(2, 2)
    model.get_decoder = lambda: model
    backbone = replace(BACKBONE, load_model=lambda folder, dtype: model)
    with pytest.raises(InputError, match="--shard splits a decoder's list of layers, and Linear has none"):
        load_on(torch.device("cpu"), backbone, Checkpoint(answered_zoo / BASE), torch.float32, sharded=True)


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_down(answered_zoo, tmp_path):
    output = tmp_path / "output"
    done = start(*TORCHRUN, 2, "-m", WATCHED, output, "1", *arguments(answered_zoo, output))
    assert done.returncode == 1
    died = float(re.search(r"dies at (\S+)", done.stdout)[1])  # type: ignore[index]
    assert time.time() - died < 60
    assert told_of_the_dead(done.stderr)
    assert "SIGKILL" in done.stderr
    assert not (output / "expert_merging" / "r" / "model").exists()


@pytest.mark.slow
def test_the_cpu_configuration_starts_two_processes(answered_zoo, alone, tmp_path):
    """Which ``accelerate launch --cpu --num_processes 2`` does not."""
    command = (*ACCELERATE, CONFIGS / "cpu_two_processes.yaml")
    done = start(*command, "Mistral/model_merging.py", *arguments(answered_zoo, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "from 9 samples in 2 processes" in done.stdout
    check_same(tmp_path, alone)


@pytest.mark.slow
def test_the_fsdp_configuration_splits_the_model(answered_zoo, alone, tmp_path):
    """By what the launcher says of it, without ``--shard``; here on two processes of a CPU."""
    command = (*ACCELERATE, CONFIGS / "eight_gpus_fsdp2.yaml", "--num_processes", 2)
    watched = ("--module", WATCHED, tmp_path / "output", "")
    done = start(*command, *watched, *arguments(answered_zoo, tmp_path / "output"), "--mixed_precision", "no")
    assert done.returncode == 0, done.stderr
    assert sum(held for held, _ in amounts(done)) == MERGED
    check_same(tmp_path / "output", alone)


@pytest.mark.parametrize(
    ("name", "processes", "machines", "precision"),
    [
        ("one_gpu_fp16", 1, 1, "fp16"),
        ("eight_gpus_fp16", 8, 1, "fp16"),
        ("eight_gpus_fsdp2", 8, 1, "fp16"),
        ("several_machines", 16, 2, "fp16"),
        ("cpu_two_processes", 2, 1, "no"),
    ],
)
def test_accelerate_accepts_every_configuration(name, processes, machines, precision):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    found = (config.num_processes, config.num_machines, str(config.mixed_precision))
    assert found == (processes, machines, precision)


def test_every_configuration_is_tested():
    assert len(list(CONFIGS.iterdir())) == 5
