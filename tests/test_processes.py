"""What needs processes of its own: the ways to start the command, being killed, and what is imported when."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from expert_merging.cli import main
from expert_merging.options import ROOT
from expert_merging.run import Run
from Mistral.backbone import BACKBONE
from tests.checkpoints import BASE, EXPERTS, tensors_of, write_checkpoint
from tests.command import contents, flags, merge, merged
from tests.launching import run_together

METHOD = ("--method", "task_arithmetic", "--device", "cpu")
ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "default", "OMP_NUM_THREADS": "1"}
SCRIPT = Path("Mistral") / "model_merging.py"


def start(*command: object, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def the_run(output: Path) -> Run:
    (config,) = output.glob("*/*/config.json")
    return Run(config.parent)


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    """All files but the card, which has the run's name and seed."""
    return {name: content for name, content in files.items() if name != "README.md"}


@pytest.fixture(scope="module")
def expected(tiny_zoo, tmp_path_factory):
    """Files of the merged model, from a run in this process."""
    run = merged(tmp_path_factory.mktemp("expected"), *METHOD, "--cache_dir", tiny_zoo)
    return contents(run.model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "script"), [(ROOT, SCRIPT), (ROOT / "Mistral", "model_merging.py")], ids=["root", "family"]
)
def test_the_script_runs_from_the_root_and_from_its_folder(tiny_zoo, tmp_path, expected, folder, script):
    done = start(script, *METHOD, "--cache_dir", tiny_zoo, "--output_path", tmp_path, folder=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("method task_arithmetic, run folder ")
    run = the_run(tmp_path)
    assert run.folder.name.encode() in expected["README.md"], "the same command has the same name everywhere"
    assert contents(run.model) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "seed"),
    [
        (("accelerate.commands.launch", "--cpu", "--num_processes", 2, "--num_machines", 1), 0),
        (("torch.distributed.run", "--standalone", "--nproc_per_node", 2), -1),
    ],
    ids=["accelerate", "torchrun"],
)
def test_launchers_of_parallel_runs_start_it(tiny_zoo, tmp_path, expected, launcher, seed):
    """``accelerate launch --cpu`` starts a single process whatever the number; torchrun really starts two."""
    command = (*METHOD, "--cache_dir", tiny_zoo, "--output_path", tmp_path, "--seed", seed)
    done = start("-m", *launcher, SCRIPT, *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("merged model: ") == 1
    assert weights(contents(the_run(tmp_path).model)) == weights(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ("torch.distributed.run", "--standalone", "--nproc_per_node", 2),
        (
            *("accelerate.commands.launch", "--main_process_port", 0, "--config_file"),
            ROOT / "configs" / "accelerate" / "cpu_two_processes.yaml",
        ),
    ],
    ids=["torchrun", "accelerate"],
)
def test_a_mistake_is_told_once_and_last_below_launchers_of_several_processes(launcher):
    """At the end of the launcher's own report, which cannot be kept from the terminal."""
    done = start("-m", *launcher, SCRIPT, "--method", "task-arithmetik", "--device", "none")
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert said.count("error: no method named 'task-arithmetik'. Did you mean 'task_arithmetic'?") == 1
    *_, last, border = said.splitlines()
    assert last == "  traceback : error: no method named 'task-arithmetik'. Did you mean 'task_arithmetic'?"
    assert set(border) == {"="}


@pytest.mark.slow
def test_a_mistake_is_told_last_below_a_quiet_launcher_of_a_single_process():
    launcher = ("accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", 1, "--num_machines", 1)
    done = start("-m", *launcher, SCRIPT, "--method", "task-arithmetik")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: no method named 'task-arithmetik'")


@pytest.mark.slow
@pytest.mark.parametrize("damage", [False, True], ids=["merging", "finding a NaN"])
def test_two_processes_write_the_bytes_of_one(damage, tmp_path):
    """Blocks, thresholds and drawn numbers do not depend on who computes them; whoever finds a fault tells it."""
    generator = torch.Generator().manual_seed(0)
    folders = {}
    for name in ("base", "a", "b"):
        shards = [{f"{shard}.weight": torch.randn(400, 500, generator=generator)} for shard in range(3)]
        if damage and name == "b":
            shards[2]["2.weight"][-1, -1] = float("nan")
        folders[name] = write_checkpoint(tmp_path / name, *shards)
    given = [*METHOD, "--method", "dare_ties", *flags(folders["base"], a=folders["a"], b=folders["b"]), "--output_path"]
    given = [*map(str, given), str(tmp_path / "two")]
    done = run_together(2, main, BACKBONE, given, folder=tmp_path)
    if damage:
        assert all(done.codes)
        assert "error: expert b has 1 NaN or infinite values in 2.weight" in done.stderr
        assert not list((tmp_path / "two").glob("*/*/model"))
        return
    assert done.codes == (0, 0), done.stderr
    assert merge(*given[:-1], tmp_path / "one") == 0
    one, two = (weights(contents(the_run(tmp_path / folder).model)) for folder in ("one", "two"))
    assert one == two


MISTAKES = """
import sys
from expert_merging.cli import main
from Mistral.backbone import BACKBONE

for arguments in (["--method", "task-arithmetik"], ["--sede", "1"], ["--seed", "x"], ["--config", sys.argv[1]]):
    assert main(BACKBONE, arguments) == 1, arguments
assert main(BACKBONE, ["--list_methods"]) == 0
try:
    main(BACKBONE, ["--help"])
except SystemExit as exit_:
    assert exit_.code == 0
heavy = [name for name in ("torch", "transformers", "accelerate", "safetensors", "numpy") if name in sys.modules]
assert not heavy, heavy
"""


MERGE = """
import sys
import torch
from expert_merging.cli import main
from Mistral.backbone import BACKBONE

before = set(sys.modules)
assert main(BACKBONE, sys.argv[1:]) == 0
slow = ("transformers", "accelerate", "tensorboard", "matplotlib", "sympy", "torch.distributed.tensor", "torch._dynamo")
print([name for name in slow if name in set(sys.modules) - before])
"""


@pytest.mark.slow
def test_a_merge_without_learning_loads_little_more_than_torch(tiny_zoo, tmp_path):
    """What learning needs takes longer to import than a small model to merge."""
    done = start("-c", MERGE, "--method", "dare_ties", "--cache_dir", tiny_zoo, "--output_path", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


LACKING = """
import sys
import torch
from pathlib import Path
from expert_merging.errors import InputError
from Mistral.backbone import BACKBONE

try:
    BACKBONE.load_model(Path(sys.argv[1]), torch.float32)
except InputError as error:
    print(error)
"""


@pytest.mark.slow
def test_transformers_adds_nothing_to_an_error(tiny_zoo, tmp_path):
    tensors = tensors_of(tiny_zoo / BASE)
    del tensors["model.norm.weight"]
    config = json.loads((tiny_zoo / BASE / "config.json").read_text())
    done = start("-c", LACKING, write_checkpoint(tmp_path / "base", tensors, config=config))
    assert done.stdout.startswith(f"{tmp_path / 'base'} lacks model.norm.weight, which ")
    assert done.stderr == ""


def test_mistakes_and_help_are_answered_without_torch(tmp_path):
    (tmp_path / "options.yaml").write_text("sede: 1\n")
    done = start("-c", MISTAKES, tmp_path / "options.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "error: no method named 'task-arithmetik'. Did you mean 'task_arithmetic'?",
        "error: no flag --sede. Did you mean '--seed'?",
        "error: --seed must be a whole number, got x",
        f"error: {tmp_path / 'options.yaml'}: no option 'sede'. Did you mean 'seed'?",
    ]


SLOW = """
import sys, time
from expert_merging import writing
from expert_merging.cli import main
from Mistral.backbone import BACKBONE

finish, finished = writing.ShardWriter.finish, []

def finish_slowly(writer):
    if len(finished) == 1:
        print("ready to be killed", flush=True)
        time.sleep(100)
    finish(writer)
    finished.append(writer.target)

writing.ShardWriter.finish = finish_slowly
sys.exit(main(BACKBONE, sys.argv[1:]))
"""


def kill_when_ready(*arguments: object) -> None:
    """Start a merge and send SIGKILL while it is at the end of its second shard."""
    command = [sys.executable, "-c", SLOW, *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "ready to be killed" not in (line := process.stdout.readline()):
            assert line, "the merge ended by itself"
        process.kill()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_merge_continues_and_gives_the_same_bytes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    folders = [
        write_checkpoint(
            tmp_path / name,
            *({f"layer.{shard}": torch.randn(50, 40, generator=generator).bfloat16()} for shard in range(4)),
        )
        for name in ("base", "A", "B")
    ]
    arguments = [*METHOD, *flags(folders[0], A=folders[1], B=folders[2])]
    whole = merged(tmp_path / "whole", *arguments)

    kill_when_ready(*arguments, "--output_path", tmp_path / "killed")
    run = the_run(tmp_path / "killed")
    assert not run.model.exists()
    names = sorted(path.name for path in run.partial_model.iterdir())
    assert names == ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors.partial"]
    first = run.partial_model / names[0]
    before = (first.stat().st_ino, first.stat().st_mtime_ns)

    assert merge(*arguments, "--output_path", tmp_path / "killed") == 0
    kept = run.model / names[0]
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == before
    assert contents(run.model) == contents(whole.model)
    assert "kept 1 finished shards of an earlier, interrupted run" in run.log.read_text()
    assert "largest relative change outside of them: " in run.log.read_text()
    assert not run.partial_model.exists()


def test_the_default_names_are_the_published_ones():
    """The zoo of the tests stands for what users download."""
    assert BASE == "Mistral-7B-v0.1"
    assert EXPERTS == {
        "Chat": "Mistral-7B-Instruct-v0.1",
        "Math": "MAmmoTH2-7B",
        "Code": "Mistral-7B-codealpaca-lora",
    }
