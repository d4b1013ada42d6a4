"""Memory that ran out is one line with the flags that help, and none that are set or that the method has not."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from expert_merging.catalogue import all_methods
from expert_merging.options import resolve
from expert_merging.parser import parse
from expert_merging.relief import advice, out_of_memory
from expert_merging.shortage import Shortage
from InternVL.backbone import BACKBONE as INTERNVL
from Mistral.backbone import BACKBONE as MISTRAL
from Qwen2VL.backbone import BACKBONE as QWEN
from tests.command import refusal
from tests.test_shortage import ON_GPU

GPU, HOST = Shortage(True, 2**31), Shortage(False, None)


def advised(shortage, *arguments, family=MISTRAL, on_gpu=True, doing="in the step 'learning'"):
    resolved = resolve(parse(list(arguments), family), {}, family)
    return advice(shortage, resolved, family, on_gpu=on_gpu, doing=doing)


LEARNING = ("--method", "expert_merging")
LENGTH = "a smaller --max_new_tokens than 128 or shorter samples, which is another run; --dry_run tells what is needed"


def test_a_gpu_that_learns():
    assert advised(GPU, *LEARNING) == (
        "give --batch_tokens 1, --logits_chunk_tokens 64, --weight_gradients sample, --task_vectors host, "
        f"--gradient_checkpointing or --shard in several processes, with which the same command continues; or {LENGTH}"
    )


def test_what_is_set_is_not_named():
    given = [
        "--batch_tokens",
        "1",
        "--logits_chunk_tokens",
        "64",
        "--weight_gradients",
        "sample",
        "--task_vectors",
        "host",
    ]
    assert advised(GPU, *LEARNING, *given, "--gradient_checkpointing", "--shard") == f"give {LENGTH}"
    assert advised(GPU, *LEARNING, *given, "--shard").startswith("give --gradient_checkpointing, with which the same")


def test_while_experts_are_asked_nothing_is_trained():
    doing = "in the step 'asking the experts'"
    assert advised(GPU, *LEARNING, doing=doing) == (
        f"give --batch_tokens 1 or --shard in several processes, with which the same command continues; or {LENGTH}"
    )
    assert advised(HOST, *LEARNING, doing=doing) == f"give {LENGTH}"


def test_several_processes_can_share_a_model_at_once(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--gradient_checkpointing or --shard, with which" in advised(GPU, *LEARNING)


def test_a_host_beside_a_gpu_and_a_host_that_learns():
    assert advised(HOST, *LEARNING) == f"give --task_vectors disk, with which the same command continues; or {LENGTH}"
    assert advised(HOST, *LEARNING, on_gpu=False) == (
        "give --batch_tokens 1, --logits_chunk_tokens 64, --weight_gradients sample, --task_vectors disk or "
        f"--gradient_checkpointing, with which the same command continues; or --mixed_precision bf16, {LENGTH}"
    )


@pytest.mark.parametrize(
    ("family", "bounds"),
    [(QWEN, "a smaller --max_pixels, "), (INTERNVL, "a smaller --max_tiles, a smaller --max_tiles_dict, ")],
    ids=["Qwen2VL", "InternVL"],
)
def test_pictures_can_be_smaller(family, bounds):
    assert advised(GPU, "--method", "regmean", family=family) == f"give {bounds}{LENGTH}"


def test_merging(monkeypatch):
    end = "--exclude_params with the largest tensors, which is another run; --dry_run tells what is needed"
    for method in ("wudi", "expert_merging"):
        assert advised(HOST, "--method", method, doing="in the step 'merging'") == f"give {end}"
        assert advised(GPU, "--method", method, doing="in the step 'merging'") == f"give --device cpu or {end}"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert advised(HOST, "--method", "wudi", doing="in the step 'merging'") == (
        f"give fewer processes, with which the same command continues; or {end}"
    )


@pytest.mark.parametrize("family", [MISTRAL, QWEN, INTERNVL], ids=lambda family: family.name)
@pytest.mark.parametrize("shortage", [GPU, HOST], ids=["GPU", "host"])
def test_every_flag_that_is_named_can_be_given(shortage, family):
    for name, method in all_methods().items():
        if method.is_modifier:
            continue
        for on_gpu in (True, False):
            told = advised(shortage, "--method", name, family=family, on_gpu=on_gpu)
            known = {*method.options, *family.options, "exclude_params", "device", "dry_run"}
            assert set(re.findall(r"--(\w+)", told)) <= known, name


def test_one_line_says_where_when_and_how_much():
    assert out_of_memory(GPU, "in the step 'learning'", "do").problems == (
        "GPU memory ran out in the step 'learning', asking for 2.0 GiB more; do",
    )
    assert out_of_memory(HOST, "", "do").problems == ("host memory ran out; do",)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(ON_GPU), MemoryError()], ids=["GPU", "host"])
def test_a_merge_without_memory_is_one_line(error, command, capsys, monkeypatch, tmp_path):
    def fail(*_arguments, progress, **_keywords):
        with progress("merging", 1, "B"):
            raise error

    monkeypatch.setattr("expert_merging.job.write_output", fail)
    told = refusal(capsys, *command)
    where = (
        "GPU memory ran out in the step 'merging', asking for 20.0 GiB more; "
        if str(error)
        else ("host memory ran out in the step 'merging'; ")
    )
    assert told.startswith(where + "give --")
    assert not list((tmp_path / "out").glob("*/*/model"))


@pytest.mark.parametrize("when", ["in the step 'asking the experts'", "before the first step"])
def test_learning_without_memory_is_one_line(when, tiny_zoo, tmp_path, capsys):
    loaded = []

    def load(folder, dtype):
        loaded.append(folder)
        return torch.empty(10**15)

    def no_names(folder):
        return torch.empty(10**15)

    family = replace(MISTRAL, load_model=load) if "step '" in when else replace(MISTRAL, parameter_names=no_names)
    data = [
        "--cache_dir",
        tiny_zoo,
        "--data_dir",
        tiny_zoo / "dataset",
        "--output_path",
        tmp_path,
        "--log_with",
        "none",
    ]
    told = refusal(capsys, *LEARNING, *data, family=family)
    assert told.startswith(f"host memory ran out {when}, asking for 3725290.3 GiB more; give --")
    assert len(loaded) == ("step '" in when)


def test_align_without_memory_is_one_line(capsys, monkeypatch, tmp_path):
    from expert_merging.commands.main import main

    for error, told in {
        torch.OutOfMemoryError(ON_GPU): "GPU memory ran out, asking for 20.0 GiB more; give --device cpu",
        MemoryError(): "host memory ran out; take a machine with more",
    }.items():

        def fail(*_arguments, error=error, **_keywords):
            raise error

        monkeypatch.setattr("expert_merging.commands.align.compare", fail)
        assert main(["align", str(tmp_path)]) == 1
        assert capsys.readouterr().err == f"error: {told}\n"


def test_other_errors_of_align_are_no_shortage(monkeypatch, tmp_path):
    from expert_merging.commands.main import main

    def fail(*_arguments, **_keywords):
        raise RuntimeError("a mistake here")

    monkeypatch.setattr("expert_merging.commands.align.compare", fail)
    with pytest.raises(RuntimeError, match="a mistake here"):
        main(["align", str(tmp_path)])
