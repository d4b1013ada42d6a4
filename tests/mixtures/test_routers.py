"""Routers that are made of samples: against plain twins, what they do, what is kept, told and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from expert_merging.cli import main
from expert_merging.mixtures import fitting, report
from expert_merging.mixtures.statistics import FirstVectors, SumWithMean
from Mistral.backbone import BACKBONE
from tests.adapters import merged_by_peft, save_adapter
from tests.checkpoints import (
    BASE,
    EXPERTS,
    SINGLE,
    SIZES,
    perturb,
    save_model,
    save_tokenizer,
    tensors_of,
    write_tasks,
)
from tests.command import assert_same_bytes, contents, flags, merge, merged, refusal
from tests.launching import run_together
from tests.mixtures.conftest import ANSWERS, COUNT
from tests.mixtures.test_moe import MOE, logits, routers
from tests.statistics.twin import answered, inputs_of_layers

SHARED = "task_arithmetic scaling_coefficient=0.4"


def one_expert(cache: Path, mixture: Path, number: int) -> torch.nn.Module:
    """A dense model of an expert's feed-forward layers and a mixture's other tensors, put together without the code."""
    model = AutoModelForCausalLM.from_pretrained(cache / BASE, dtype=torch.float32)
    written, own = tensors_of(mixture), {}
    for name in model.state_dict():
        before, found, part = name.partition(".mlp.")
        short = {"gate_proj.weight": "w1", "down_proj.weight": "w2", "up_proj.weight": "w3"}.get(part)
        own[name] = written[f"{before}.block_sparse_moe.experts.{number}.{short}.weight" if found else name]
    model.load_state_dict(own)
    return model.eval()


def twins_inputs(cache: Path, mixture: Path) -> list[dict[str, torch.Tensor]]:
    """What goes into the feed-forward layers of each such model on the samples of its expert that are not held out."""
    tokenizer, found = AutoTokenizer.from_pretrained(cache / BASE), []
    for number, expert in enumerate(EXPERTS):
        asked = answered(tokenizer, expert, ANSWERS[expert], range(1, COUNT))  # the first is held out
        seen = inputs_of_layers(one_expert(cache, mixture, number), asked)
        found.append({name: seen[name].double() for name in seen if name.endswith("gate_proj.weight")})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("shared", [SHARED, "svd"])
def test_ridge_is_least_squares_on_what_the_mixture_s_routers_see(shared, arguments, tiny_zoo, tmp_path):
    run = merged(tmp_path, *arguments, "--shared", shared)
    seen, written = twins_inputs(tiny_zoo, run.model), routers(run.model)
    assert len(written) == SIZES["num_hidden_layers"]
    for name in seen[0]:
        weights = torch.cat([own[name].new_full((len(own[name]),), len(own[name]) ** -0.5) for own in seen])
        inputs = torch.cat([own[name] for own in seen]) * weights[:, None]
        labels = torch.block_diag(*[torch.ones(len(own[name]), 1, dtype=torch.float64) for own in seen])
        pull = 0.01 * inputs.square().sum(0).mean()
        stacked = torch.cat([inputs, torch.eye(len(pull.expand(inputs.shape[1]))).double() * pull.sqrt()])
        wanted = torch.cat([labels * weights[:, None], torch.zeros(inputs.shape[1], len(seen))])
        expected = torch.linalg.lstsq(stacked, wanted).solution.T / 0.1
        router = written[name.replace("mlp.gate_proj", "block_sparse_moe.gate")]
        torch.testing.assert_close(router.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("negative", ["none", "others"])
def test_prompts_are_directions_of_mean_states(negative, arguments, tiny_zoo, tmp_path):
    more = ["--router", "prompts", "--negative_prompts", negative, "--router_temperature", 2]
    run = merged(tmp_path, *arguments, *more)
    seen, written = twins_inputs(tiny_zoo, run.model), routers(run.model)
    for name in seen[0]:
        router = written[name.replace("mlp.gate_proj", "block_sparse_moe.gate")]
        assert torch.allclose(router.norm(dim=1), torch.tensor(0.5))
        means = torch.stack([own[name].mean(0) for own in seen])
        if negative == "others":
            means -= torch.stack([means[[1, 2]].mean(0), means[[0, 2]].mean(0), means[[0, 1]].mean(0)])
        expected = means / means.norm(dim=1, keepdim=True) / 2
        torch.testing.assert_close(router.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_samples_that_an_expert_is_not_for_are_subtracted(arguments, tmp_path):
    negative = tmp_path / "negative"
    write_tasks(negative, responses=dict.fromkeys(EXPERTS, "zzzzzzz"))
    more = ["--router", "prompts", "--negative_prompts", negative]
    first = routers(merged(tmp_path / "a", *arguments, *more).model)
    plain = routers(merged(tmp_path / "b", *arguments, *more[:3], "none").model)
    name = "model.layers.1.block_sparse_moe.gate.weight"
    assert torch.nn.functional.cosine_similarity(first[name], plain[name]).max() < 0.9


def test_embeddings_are_the_base_s(arguments, tiny_zoo, tmp_path):
    run = merged(tmp_path, *arguments, "--router", "embedding", "--negative_prompts", "none", "--held_out", 0.5)
    table = tensors_of(tiny_zoo / BASE)["model.embed_tokens.weight"].double()
    tokenizer, rows = AutoTokenizer.from_pretrained(tiny_zoo / BASE), []
    for expert in EXPERTS:
        asked = answered(tokenizer, expert, ANSWERS[expert], range(COUNT))  # no model runs that could be tried on some
        mean = table[torch.cat([inputs["input_ids"][0] for inputs, _ in asked])].mean(0)
        rows.append(mean / mean.norm())
    for router in routers(run.model).values():
        torch.testing.assert_close(router.double(), torch.stack(rows), rtol=1e-5, atol=1e-6)
    assert not run.statistics.exists()
    assert "ignored with --router embedding: --held_out" in run.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("router", ["ridge", "prompts", "embedding"])
def test_identical_experts_compute_what_the_dense_model_computes(router, tiny_zoo, dataset, tmp_path):
    expert = tiny_zoo / EXPERTS["Chat"]
    given = flags(tiny_zoo / BASE, Chat=expert, Math=expert, Code=expert)
    dense = merged(tmp_path / "dense", "--method", "weight_average", *given)
    more = ["--router", router, "--data_dir", dataset, "--samples_per_task", 2]
    mixture = merged(tmp_path / "mixture", *MOE, *given, *more)
    torch.testing.assert_close(logits(mixture.model), logits(dense.model), rtol=0, atol=1e-5)


def test_a_mixture_whose_routers_choose_one_expert_is_that_expert(arguments, tiny_zoo, tmp_path):
    """Routers that rate the second expert 1 and the others 0 on every token that is asked."""
    run = merged(tmp_path, *arguments, "--experts_per_token", 1, "--router", "zeros", "--experts_per_token", 3)
    alone = one_expert(tiny_zoo, run.model, 1)
    mixture = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32, num_experts_per_tok=1)
    tokens = torch.randint(SIZES["vocab_size"], (1, 20), generator=torch.Generator().manual_seed(0))
    seen = inputs_of_layers(alone, [({"input_ids": tokens}, 1)])
    with torch.no_grad():
        for number, layer in enumerate(mixture.model.layers):
            states = seen[f"model.layers.{number}.mlp.gate_proj.weight"].float()
            layer.mlp.gate.weight[1] = torch.linalg.lstsq(states, torch.ones(20, 1)).solution[:, 0]
        torch.testing.assert_close(mixture(tokens).logits, alone(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_statistics_of_an_earlier_part_are_taken(arguments, tmp_path):
    run = merged(tmp_path, *arguments, "--run_name", "x")
    whole = contents(run.model)
    files = sorted(run.statistics.iterdir())
    assert [file.stem for file in files] == ["Chat", "Code", "Math"]
    run.model.rename(tmp_path / "earlier")
    files[1].write_bytes(files[1].read_bytes()[:-4] + b"abcd")
    before = [file.stat().st_ino for file in files]
    assert contents(merged(tmp_path, *arguments, "--run_name", "x").model) == whole
    after = [file.stat().st_ino for file in files]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]


@pytest.mark.slow
def test_statistics_are_gathered_anew_once_a_checkpoint_was_written(arguments, tiny_zoo, tmp_path):
    """Any of them: what is shared is made of all."""
    (tmp_path / "zoo").mkdir()
    for folder in (BASE, *EXPERTS.values()):
        perturb(tiny_zoo / folder, tmp_path / "zoo" / folder, 0, change=0)
    given = [*arguments, "--cache_dir", tmp_path / "zoo", "--run_name", "x"]
    run = merged(tmp_path / "out", *given)
    before = [file.stat().st_mtime_ns for file in sorted(run.statistics.iterdir())]
    run.model.rename(tmp_path / "earlier")
    file = tmp_path / "zoo" / EXPERTS["Math"] / SINGLE
    file.write_bytes(file.read_bytes())
    again = merged(tmp_path / "out", *given)
    after = [file.stat().st_mtime_ns for file in sorted(again.statistics.iterdir())]
    assert not set(before) & set(after)


@pytest.mark.slow
def test_experts_in_another_order_make_the_same_routers(tiny_zoo, dataset, tmp_path):
    def made(name, order):
        experts = {expert: tiny_zoo / EXPERTS[expert] for expert in order}
        return routers(merged(tmp_path / name, *MOE, *flags(tiny_zoo / BASE, **experts), "--data_dir", dataset).model)

    first, turned = made("first", ["Chat", "Math", "Code"]), made("turned", ["Code", "Chat", "Math"])
    for name, router in first.items():
        torch.testing.assert_close(router[[2, 0, 1]], turned[name], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_tokens_that_an_expert_has_added_change_nothing(tiny_zoo, dataset, tmp_path):
    """The mixture has the base's embeddings; an expert's model has others until it is made a part of one."""

    def load():
        return AutoModelForCausalLM.from_pretrained(tiny_zoo / BASE, dtype=torch.float32)

    more = SIZES["vocab_size"] + 3
    save_adapter(load, tmp_path / "adapter", resized=more)
    model = merged_by_peft(load, tmp_path / "adapter", resized=more)
    model.save_pretrained(tmp_path / "more")
    model.resize_token_embeddings(SIZES["vocab_size"])
    model.save_pretrained(tmp_path / "same")
    found = {}
    for name in ("adapter", "more", "same"):
        save_tokenizer(tmp_path / name)
        given = flags(tiny_zoo / BASE, Chat=tmp_path / name, Math=tiny_zoo / EXPERTS["Math"])
        run = merged(tmp_path / "out" / name, *MOE, *given, "--data_dir", dataset)
        found[name] = routers(run.model)
    assert_same_bytes(found["more"], found["same"])
    for router, expected in found["same"].items():
        torch.testing.assert_close(found["adapter"][router], expected, rtol=1e-3, atol=1e-3)


def test_the_base_is_rated_zero(arguments, tmp_path):
    run = merged(tmp_path, *arguments, "--include_base")
    for router in routers(run.model).values():
        assert router.shape[0] == 4
        assert not router[3].any()
        assert router[:3].any(1).all()
    told = json.loads((run.folder / report.FILE).read_text())
    assert told["experts"] == [*EXPERTS, "base"]
    loads = torch.tensor([shares for own in told["load"].values() for shares in own.values()])
    assert loads.shape == (SIZES["num_hidden_layers"] * len(EXPERTS), 4)
    assert loads.max() == 0.5, "of two experts that work on a token, each has half of the work at most"


@pytest.mark.slow
def test_the_load_on_held_out_samples_is_told(arguments, tmp_path):
    run = merged(tmp_path, *arguments, "--experts_per_token", 1)
    told = json.loads((run.folder / report.FILE).read_text())
    assert told["experts"] == [*EXPERTS]
    layers = [f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(SIZES["num_hidden_layers"])]
    assert [*told["load"]] == layers
    for own in told["load"].values():
        assert [*own] == [*EXPERTS]
        assert all(sum(shares) == pytest.approx(1) for shares in own.values())
        assert all(shares[place] > 0.6 for place, shares in enumerate(own.values()))
    log = run.log.read_text()
    assert log.count("held-out samples of Chat go to Chat ") == 1
    assert " (mean over layers)" in log


@pytest.mark.slow
def test_without_held_out_samples_there_is_no_load(arguments, tmp_path):
    run = merged(tmp_path, *arguments, "--held_out", 0)
    assert json.loads((run.folder / report.FILE).read_text())["load"] == {}
    assert "held-out samples of" not in run.log.read_text()


@pytest.mark.slow
def test_dead_experts_and_routers_that_do_not_tell_experts_apart_are_warned_of(arguments, tmp_path, monkeypatch):
    def favourite(grams, ridge, device):
        rows = torch.randn(3, SIZES["hidden_size"], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        rows[2] = rows[1] + 1e-3
        return rows

    monkeypatch.setattr(fitting, "ridge_rows", favourite)
    monkeypatch.setattr(report, "loads", lambda *_: torch.tensor([0.995, 0.005, 0.0], dtype=torch.float64))
    log = merged(tmp_path, *arguments).log.read_text()
    for name in ("Math", "Code"):
        assert f"expert {name} is dead in 3 of 3 layers: less than 1% of held-out tokens go to it" in log
    assert "expert Chat is dead" not in log
    assert "3 of 3 routers hardly tell experts apart: the condition number of model.layers." in log


def test_conditions_are_of_differences():
    apart = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    found = fitting.conditions({"apart": apart, "shifted": apart + 100, "same": torch.ones(3, 3)})
    assert found["apart"] == pytest.approx(1)
    assert found["shifted"] == pytest.approx(1, rel=1e-3)
    assert found["same"] == float("inf")


def test_loads_count_assignments():
    router = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    vectors = torch.tensor([[3.0, 1.0], [2.0, 1.0], [1.0, 3.0], [4.0, 0.5]])
    assert fitting.loads(router, vectors, 1).tolist() == [0.75, 0.25, 0.0]
    assert fitting.loads(router, vectors, 2).tolist() == [0.5, 0.5, 0.0]


def test_sums_have_the_mean_as_their_last_row_and_first_vectors_are_bounded():
    vectors = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    for count in (3, 20):
        total, first = SumWithMean(), FirstVectors()
        for some in vectors[:count].split(2):
            total.add(some)
            first.add(some)
        gram = total.finish()
        assert gram.is_summed == (count > 6)
        expected = vectors[:count].mean(0).double()
        torch.testing.assert_close(fitting.mean_of(gram, torch.device("cpu")), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gram.matrix(torch.device("cpu"))[-1, :-1], expected, rtol=1e-5, atol=1e-6)
        assert first.finish().values.equal(vectors[: min(count, 5)])


@pytest.mark.slow
def test_routers_are_of_samples_where_a_folder_is_given(arguments, tiny_zoo, dataset, tmp_path, capsys):
    plain = merged(tmp_path / "plain", *MOE, "--cache_dir", tiny_zoo)
    assert not plain.statistics.exists()
    random = merged(tmp_path / "random", *arguments, "--router", "random", "--ridge", 1, "--held_out", 0.5)
    assert_same_bytes(routers(random.model), routers(plain.model))
    log = random.log.read_text()
    for flag in ("data_dir", "samples_per_task", "ridge", "held_out"):
        assert f"ignored with --router random: --{flag}" in log
    plain = merged(tmp_path / "auto", *MOE, "--cache_dir", tiny_zoo, "--samples_per_task", 3, "--ridge", 1)
    for flag in ("samples_per_task", "ridge"):
        assert f"ignored with --router random: --{flag}" in plain.log.read_text()
    ridge = merged(tmp_path / "ridge", *arguments, "--negative_prompts", "none")
    assert "Routers are fitted by least squares" in (ridge.model / "README.md").read_text()
    assert "ignored with --router ridge: --negative_prompts" in ridge.log.read_text()
    capsys.readouterr()
    assert merge(*arguments, "--dry_run", "--output_path", tmp_path / "dry") == 0
    shown = capsys.readouterr().out
    assert "routers are made of 15 samples, held-out ones included: an expert at a time runs alone" in shown
    assert "what routers are made of is kept in " in shown
    assert not (tmp_path / "dry").exists()
    assert merge(*arguments, "--router", "embedding", "--dry_run", "--output_path", tmp_path / "dry") == 0
    assert "routers are made of the base's embeddings of 15 samples" in capsys.readouterr().out


def test_folders_that_do_not_serve_are_refused(arguments, tiny_zoo, dataset, tmp_path, capsys):
    nowhere = tmp_path / "nowhere"
    message = f"calibration folder {nowhere} does not exist; give --{{}} a folder with one JSON file per task"
    assert refusal(capsys, *MOE, "--cache_dir", tiny_zoo, "--data_dir", nowhere) == message.format("data_dir")
    given = [*arguments, "--router", "prompts", "--negative_prompts", nowhere]
    assert refusal(capsys, *given) == message.format("negative_prompts")
    nowhere.write_text("")
    assert refusal(capsys, *given) == f"--negative_prompts {nowhere} is a file; give the folder that it lies in"
    nowhere.unlink()
    write_tasks(nowhere, responses=ANSWERS)
    (nowhere / "Math.json").unlink()
    assert refusal(capsys, *given) == (
        f"expert Math has no calibration samples: {nowhere} has no Math.json (--negative_prompts)"
    )


def test_nan_in_what_a_router_sees_is_told(capsys, tiny_zoo, dataset, tmp_path):
    save_model(tmp_path / "base", 0)
    for number, name in enumerate("AB"):
        perturb(tmp_path / "base", tmp_path / name, number)
    tensors = tensors_of(tmp_path / "A")
    tensors["model.layers.0.mlp.down_proj.weight"][:] = 3e38
    save_file(tensors, tmp_path / "A" / "model.safetensors", metadata={"format": "pt"})
    given = [*flags(tmp_path / "base", Chat=tmp_path / "A", Math=tmp_path / "B"), "--data_dir", dataset]
    assert refusal(capsys, *MOE, *given, "--output_path", tmp_path / "out").startswith(
        "the mixture with expert Chat alone computes NaN or infinite inputs of model.layers.1.mlp.gate_proj.weight"
    )


@pytest.mark.slow
def test_two_processes_make_the_mixture_of_one(arguments, tmp_path):
    expected = merged(tmp_path / "one", *arguments)
    given = [*map(str, arguments), "--device", "cpu", "--output_path", str(tmp_path / "two")]
    done = run_together(2, main, BACKBONE, given, folder=tmp_path)
    assert done.codes == (0, 0), done.stderr
    (folder,) = (tmp_path / "two").glob("*/*")
    assert_same_bytes(tensors_of(folder / "model"), tensors_of(expected.model))
    assert (folder / report.FILE).read_bytes() == (expected.folder / report.FILE).read_bytes()
