"""Dense results of methods on factors can be swept, and what is no model is refused where one is needed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from transformers import MistralForCausalLM

from expert_merging.commands.main import main
from tests.adapters import save_adapter
from tests.checkpoints import BASE, write_tasks
from tests.command import flags, refusal
from tests.low_rank.adapters import pairs_of, write_zoo

ADAPTER = ("--method", "knots", "--output", "adapter")


@pytest.mark.slow
def test_a_sweep_scores_what_would_be_written(tiny_zoo, tmp_path):
    base, out = tiny_zoo / BASE, tmp_path / "out"
    load = partial(MistralForCausalLM.from_pretrained, base)
    experts = {
        name: save_adapter(load, tmp_path / name, seed=rank, r=rank)
        for name, rank in {"Chat": 1, "Math": 2, "Code": 3}.items()
    }
    write_tasks(tmp_path / "data", count=1, responses={"Chat": "Yes", "Math": "42", "Code": "def f():"})
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "sweep:\n"
        "- {method: [core_space], inner: ['task_arithmetic scaling_coefficient=0.5'], scaling_coefficient: [0.6]}\n"
        "- {method: [task_arithmetic], scaling_coefficient: [0.3]}\n"
    )
    given = ["--family", "Mistral", *flags(base, **experts), "--data_dir", tmp_path / "data", "--output_path", out]
    assert main(["sweep", *map(str, [file, *given, "--write", "none", "--device", "cpu"])]) == 0
    (record,) = out.glob("sweeps/*/sweep.json")
    first, second = (point["divergence"] for point in json.loads(record.read_text())["points"])
    assert first == pytest.approx(second, rel=1e-4)


def test_an_adapter_is_no_point_of_a_sweep(tmp_path, capsys):
    zoo = write_zoo(tmp_path, pairs_of())
    given = [*zoo.flags[:-2], "--family", "Mistral", *ADAPTER[2:], "--output_path", tmp_path, "--data_dir", tmp_path]
    assert main(["sweep", *map(str, given), "--sweep", "method=knots", "--device", "cpu"]) == 1
    assert capsys.readouterr().err == (
        "error: point knots: knots writes something else than one model, so it cannot be swept\n"
    )


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        (("--run_tests",), "--run_tests asks a merged model, and this run writes none; leave it out"),
        (
            ("--push_to_hub", "me/x"),
            "--push_to_hub publishes one model, and knots leaves none here; publish its adapter with `hf upload`",
        ),
        (
            ("--post", "consensus"),
            "--post consensus improves one model merged of task vectors, and knots makes something else",
        ),
    ],
)
def test_what_needs_a_model_refuses_an_adapter(flag, said, tmp_path: Path, capsys):
    assert refusal(capsys, *ADAPTER, *flag, *write_zoo(tmp_path, pairs_of()).flags) == said
