"""Output heads that are embeddings stay that, however many tensors files have for the two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.checkpoints.tying import is_tied
from expert_merging.commands.main import main
from expert_merging.learned.coefficients import load_coefficients
from tests.checkpoints import make_zoo, perturb, save_model, tensors_of, write_checkpoint
from tests.command import COMMAND, flags, merge, merged, refused

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = "model.layers.0.mlp.weight"
TIED: dict[str, object] = {"model_type": "mistral", "tie_word_embeddings": True}
UNTIED = {**TIED, "tie_word_embeddings": False}
SILENT: dict[str, object] = {"model_type": "mistral"}
METHODS = ["weight_average", "task_arithmetic", "ties", "dare_ta", "dare_ties", "svd", "iso", "wudi", "iwudi", "tall"]
EVERYTHING = ("--exclude_params", "nothing")


def tensors(shift: float, *stored: str, head: float | None = None) -> dict[str, torch.Tensor]:
    """Weights with one table of words under the given names, the head another one where it is given."""
    table = torch.arange(24.0).view(8, 3) / 7 + shift * torch.linspace(-1, 1, 24).view(8, 3)
    found = {LAYER: torch.ones(4, 3) + shift * torch.linspace(0, 1, 12).view(4, 3)}
    for name in stored:
        found[name] = table.clone() if name == EMBEDDING or head is None else table + head
    return found


def write(folder: Path, config: dict, *arguments: object, **options: object) -> Path:
    return write_checkpoint(folder, tensors(*arguments, **options), config=config)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "stored", "head", "expected"),
    [
        (TIED, (EMBEDDING,), None, True),
        (TIED, (HEAD,), None, True),
        (TIED, (EMBEDDING, HEAD), None, True),
        (TIED, (EMBEDDING, HEAD), 0.5, False),
        (SILENT, (EMBEDDING,), None, True),
        (SILENT, (HEAD,), None, False),
        (SILENT, (EMBEDDING, HEAD), None, True),
        (SILENT, (EMBEDDING, HEAD), 0.5, False),
        (UNTIED, (EMBEDDING, HEAD), None, False),
        (UNTIED, (EMBEDDING,), None, False),
        (TIED, (), None, False),
    ],
)
def test_a_head_is_the_embedding_as_transformers_takes_it(config, stored, head, expected, tmp_path):
    assert is_tied(Checkpoint(write(tmp_path, config, 0.0, *stored, head=head))) is expected


def test_tables_of_different_types_are_not_one(tmp_path):
    stored = tensors(0.0, EMBEDDING, HEAD)
    stored[HEAD] = stored[HEAD].double()
    assert not is_tied(Checkpoint(write_checkpoint(tmp_path, stored, config=TIED)))


@pytest.mark.parametrize("stored", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD)])
@pytest.mark.parametrize("base", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD)])
def test_tied_checkpoints_fit_whichever_of_the_two_they_store(base, stored, tmp_path):
    folder = write(tmp_path / "base", TIED, 0.0, *base)
    experts = {"A": write(tmp_path / "a", TIED, 1.0, *stored), "B": write(tmp_path / "b", TIED, -3.0, EMBEDDING)}
    run = merged(tmp_path / "out", *COMMAND, *flags(folder, **experts), *EVERYTHING)
    written = tensors_of(run.model)
    assert written.keys() == {LAYER, *base}
    expected = tensors(0.0, EMBEDDING)[EMBEDDING] + 0.3 * sum(
        tensors(shift, EMBEDDING)[EMBEDDING] - tensors(0.0, EMBEDDING)[EMBEDDING] for shift in (1.0, -3.0)
    )
    for name in base:
        torch.testing.assert_close(written[name], expected)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    "method",
    ["weight_average", "task_arithmetic", "ties", "dare_ta", "dare_ties", "svd", "iso", "wudi", "iwudi", "tall"],
)
def test_a_head_that_is_stored_twice_stays_the_embedding(method, shards, tmp_path, capsys):
    stored = tensors(0.0, EMBEDDING, HEAD)
    parts = [stored] if shards == 1 else [{HEAD: stored.pop(HEAD)}, stored]
    base = write_checkpoint(tmp_path / "base", *parts, config=TIED)
    experts = {
        "A": write(tmp_path / "a", TIED, 1.0, EMBEDDING),
        "B": write(tmp_path / "b", TIED, -2.0, EMBEDDING, HEAD),
    }
    command = ("--method", method, *flags(base, **experts), "--seed", 1)
    run = merged(tmp_path / "out", *command, "--exclude_params", ".*lm_head.*")
    written = tensors_of(run.model)
    assert torch.equal(written[HEAD], written[EMBEDDING])
    assert not torch.equal(written[HEAD], tensors(0.0, HEAD)[HEAD])
    assert f"{HEAD} becomes what {EMBEDDING} becomes, since the two are one" in capsys.readouterr().out
    kept = merged(tmp_path / "kept", *command, "--exclude_params", ".*embed_tokens.*")
    assert torch.equal(tensors_of(kept.model)[HEAD], tensors(0.0, HEAD)[HEAD]), "excluded is excluded for both"
    assert "becomes what" not in capsys.readouterr().out


def test_experts_of_tall_are_rebuilt_with_both(tmp_path):
    base = write(tmp_path / "base", TIED, 0.0, EMBEDDING, HEAD)
    experts = {"A": write(tmp_path / "a", TIED, 1.0, EMBEDDING), "B": write(tmp_path / "b", TIED, -2.0, EMBEDDING)}
    run = merged(tmp_path / "out", "--method", "tall", *flags(base, **experts), *EVERYTHING)
    command = ["extract", run.folder, "--expert", "A", "--output", tmp_path / "rebuilt"]
    assert main(list(map(str, command))) == 0
    written = tensors_of(tmp_path / "rebuilt")
    assert torch.equal(written[HEAD], written[EMBEDDING])
    assert not torch.equal(written[HEAD], tensors(0.0, HEAD)[HEAD])


@pytest.mark.parametrize("stored", [(EMBEDDING,), (EMBEDDING, HEAD)])
def test_a_tied_expert_of_a_base_with_its_own_head_has_the_embedding_for_both(stored, tmp_path):
    base = write(tmp_path / "base", UNTIED, 0.0, EMBEDDING, HEAD, head=0.5)
    expert = write(tmp_path / "a", TIED, 1.0, *stored)
    run = merged(tmp_path / "out", "--method", "weight_average", *flags(base, A=expert), *EVERYTHING)
    written, table = tensors_of(run.model), tensors(1.0, EMBEDDING)[EMBEDDING]
    torch.testing.assert_close(written[EMBEDDING], table)
    torch.testing.assert_close(written[HEAD], table)


@pytest.mark.parametrize("base", [(EMBEDDING,), (EMBEDDING, HEAD)])
def test_a_head_that_the_merged_model_has_no_place_for_is_told(base, tmp_path, capsys):
    folder = write(tmp_path / "base", TIED, 0.0, *base)
    apart = write(tmp_path / "b", SILENT, 1.0, EMBEDDING, HEAD, head=1)
    experts = {"A": write(tmp_path / "a", TIED, 1.0, EMBEDDING), "B": apart}
    given = (*COMMAND, *flags(folder, **experts), "--output_path", tmp_path / "out")
    expected = [
        f"expert B has an output head apart from its embedding, and in the base the two are one ({EMBEDDING}); exclude "
        "that, or give a base with a head of its own"
    ]
    assert refused(capsys, *given, "--exclude_params", ".*lm_head.*") == expected
    assert refused(capsys, *given, "--exclude_params", ".*lm_head.*", "--dry_run") == expected
    assert merge(*given, "--dry_run") == 0
    assert (
        "warning: expert B has an output head apart from its embedding, and in the base the two are one: the merged "
        "model gets the base's"
    ) in capsys.readouterr().out.splitlines()


def test_a_setting_that_the_files_contradict_is_told(tmp_path, capsys):
    base = write(tmp_path / "base", TIED, 0.0, EMBEDDING, HEAD, head=0.5)
    expert = write(tmp_path / "a", TIED, 1.0, EMBEDDING, HEAD, head=0.7)
    assert merge(*COMMAND, *flags(base, A=expert), "--dry_run", "--output_path", tmp_path) == 0
    assert (
        f"warning: {base / 'config.json'} says tie_word_embeddings, and head and embedding differ: recent versions of "
        "transformers load both, older ones and other programs may take the embedding for both"
    ) in capsys.readouterr().out.splitlines()
    run = merged(tmp_path / "out", *COMMAND, *flags(base, A=expert), *EVERYTHING)
    written = tensors_of(run.model)
    assert not torch.equal(written[HEAD], written[EMBEDDING])


@pytest.mark.slow
def test_learning_with_a_head_that_is_stored_twice_is_learning_with_one(tmp_path):
    """Head and embedding have one coefficient, as they are one parameter in memory."""
    zoo = make_zoo(tmp_path / "zoo", tie_word_embeddings=True)
    given = ("--method", "expert_merging", "--seed", 1, "--log_with", "none", "--max_new_tokens", 4, "--cache_dir", zoo)
    given = (*given, "--data_dir", zoo / "dataset", "--exclude_params", ".*norm.*", ".*lm_head.*")
    once = merged(tmp_path / "once", *given)
    base = zoo / "Mistral-7B-v0.1"
    stored = tensors_of(base)
    config = json.loads((base / "config.json").read_text())
    write_checkpoint(base, {**stored, HEAD: stored[EMBEDDING].clone()}, config=config)
    twice = merged(tmp_path / "twice", *given)
    first, second = load_coefficients(once.folder).values, load_coefficients(twice.folder).values
    assert first.keys() == second.keys() >= {EMBEDDING}
    assert all(torch.equal(first[name], second[name]) for name in first)
    written = tensors_of(twice.model)
    assert torch.equal(written[HEAD], written[EMBEDDING])
    assert torch.equal(written[HEAD], tensors_of(once.model)[EMBEDDING])


@pytest.mark.slow
def test_the_merged_model_loads_tied(tmp_path):
    from transformers import MistralForCausalLM

    save_model(tmp_path / "base", 0, tie_word_embeddings=True)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    stored = tensors_of(tmp_path / "base")
    write_checkpoint(tmp_path / "base", {**stored, HEAD: stored[EMBEDDING].clone()}, config=config)
    save_model(tmp_path / "plain", 0, tie_word_embeddings=True)
    perturb(tmp_path / "plain", tmp_path / "a", 1)
    run = merged(tmp_path / "out", "--method", "dare_ties", *flags(tmp_path / "base", A=tmp_path / "a"), *EVERYTHING)
    model, report = MistralForCausalLM.from_pretrained(run.model, output_loading_info=True)
    assert not any(report.values()), report
    assert model.lm_head.weight is model.model.embed_tokens.weight
