"""``--tokenizer`` and ``--embeddings``: rows are matched by token, and the result loads and encodes."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.checkpoints.tokenizer_files import Vocabulary
from expert_merging.libraries import import_transformers
from expert_merging.merged_tokenizer import choose_rows, choose_word_tables
from expert_merging.methods.linear import task_arithmetic
from expert_merging.plan import make_plan
from expert_merging.roles import ROW_PER_WORD
from tests import internvl
from tests.adapters import save_adapter
from tests.checkpoints import CHARACTERS, perturb, save_model, tensors_of, write_checkpoint, write_tasks
from tests.command import COMMAND, assert_same_bytes, contents, flags, merge, merge_plainly, merged, refused

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COUNT = len(CHARACTERS)


def add_tokens(folder, *tokens, rows=None, special=True):
    """Add tokens to a checkpoint as transformers does, with rows of their own, or more rows than there are tokens."""
    transformers = import_transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([transformers.AddedToken(token, special=special) for token in tokens])
    tokenizer.save_pretrained(folder)
    resize(folder, len(tokenizer) if rows is None else rows)
    return folder


def resize(folder, rows):
    """Give embeddings and head other rows, random where there were none."""
    tensors = tensors_of(folder)
    for name in (EMBEDDINGS, HEAD):
        if name in tensors:
            table = torch.randn(rows, tensors[name].shape[1], generator=torch.Generator().manual_seed(rows))
            kept = min(rows, len(tensors[name]))
            table[:kept] = tensors[name][:kept]
            tensors[name] = table.to(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, an expert ``a`` with the tokens <x> and <y>, an expert ``b`` with <y> and <z>, and one without any."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "base", 0)
    for number, name in enumerate("abc"):
        perturb(folder / "base", folder / name, number + 1)
    add_tokens(folder / "a", "<x>", "<y>")
    add_tokens(folder / "b", "<y>", "<z>", special=False)
    return folder


@pytest.fixture
def given(models):
    return [*COMMAND, *flags(models / "base", A=models / "a", B=models / "b", C=models / "c")]


def table(folder, name=EMBEDDINGS):
    return tensors_of(folder)[name]


def load(folder):
    """Model and tokenizer, with every tensor where it belongs."""
    transformers = import_transformers()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def log_of(run):
    return run.log.read_text()


# Whole runs


@pytest.mark.slow
@pytest.mark.parametrize("name", [EMBEDDINGS, HEAD])
def test_a_union_of_mean_rows(models, given, tmp_path, name):
    run = merged(tmp_path, *given, "--tokenizer", "union", "--embeddings", "mean")
    model, tokenizer = load(run.model)
    assert tokenizer.convert_tokens_to_ids(["<x>", "<y>", "<z>"]) == [COUNT, COUNT + 1, COUNT + 2]
    assert len(tokenizer) == model.config.vocab_size == COUNT + 3
    text = "a<x>bc<y>(<z>)"
    numbers = tokenizer(text)["input_ids"]
    assert numbers == [0, *tokenizer.convert_tokens_to_ids(["a", "<x>", "b", "c", "<y>", "(", "<z>", ")"])]
    assert tokenizer.decode(numbers[1:]) == text
    assert tokenizer.decode(numbers, skip_special_tokens=True) == "abc(<z>)", (
        "<x> and <y> are special in A, <z> not in B"
    )
    assert model(torch.tensor([numbers])).logits.shape == (1, len(numbers), COUNT + 3)
    base, a, b, c = (table(models / folder, name) for folder in ("base", "a", "b", "c"))
    expected = torch.cat(
        [torch.stack([base, a[:COUNT], b[:COUNT], c]).mean(0), a[[-2]], (a[[-1]] + b[[-2]]) / 2, b[[-1]]]
    )
    torch.testing.assert_close(table(run.model, name), expected, rtol=0, atol=1e-6)


def test_what_is_merged_is_merged_as_ever(models, given, tmp_path):
    run = merged(tmp_path, *given, "--tokenizer", "union", "--embeddings", "mean", "--exclude_params", ".*norm.*")
    expected = merge_plainly(
        models / "base", [models / name for name in "abc"], task_arithmetic, [".*norm.*", EMBEDDINGS, HEAD]
    )
    written = tensors_of(run.model)
    assert written.keys() == expected.keys()
    rest = written.keys() - {EMBEDDINGS, HEAD}
    assert_same_bytes({name: written[name] for name in rest}, {name: expected[name] for name in rest})


def test_every_other_file_is_the_base_s(models, given, tmp_path):
    run = merged(tmp_path, *given, "--tokenizer", "union")
    before, after = contents(models / "base"), contents(run.model)
    differing = {name for name in after if after[name] != before.get(name)}
    assert differing == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    config = json.loads(before["config.json"])
    assert json.loads(after["config.json"]) == {**config, "vocab_size": COUNT + 3}
    tokenizer, extended = json.loads(before["tokenizer.json"]), json.loads(after["tokenizer.json"])
    assert extended.pop("added_tokens")[:-3] == tokenizer.pop("added_tokens")
    assert extended == tokenizer
    card = after["README.md"].decode()
    about = (
        "The tokenizer is the base's with 3 tokens that experts have added "
        f"(<x> {COUNT}, <y> {COUNT + 1}, <z> {COUNT + 2}). Embeddings and head have {COUNT + 3} rows, matched by "
        "token: the base's, or of tokens that it lacks the mean of the experts'."
    )
    assert about.replace("<", r"\<").replace(">", r"\>") in card
    assert "are the base's, but for embeddings, head and tokenizer." in card
    assert f" INFO {about}\n" in log_of(run)
    assert "has 2 tokens that" not in log_of(run), "nothing is lost"
    assert '"tokenizer": "union"' in run.config.read_text()


def test_the_base_s_rows_stay_its_own_in_a_union(models, given, tmp_path):
    run = merged(tmp_path, *given, "--tokenizer", "union")
    base, a, b = (table(models / folder) for folder in ("base", "a", "b"))
    assert_same_bytes({"w": table(run.model)}, {"w": torch.cat([base, a[[-2]], (a[[-1]] + b[[-2]]) / 2, b[[-1]]])})


def test_an_expert_s_tokenizer(models, given, tmp_path):
    (models / "b" / "generation_config.json").write_text('{"eos_token_id": [1, 3], "temperature": 2.0}')
    run = merged(tmp_path, *given, "--tokenizer", "B")
    _, tokenizer = load(run.model)
    assert tokenizer.decode(tokenizer("<z>")["input_ids"][1:]) == "<z>"
    assert "<x>" not in tokenizer.get_vocab()
    base, a, b = (table(models / folder) for folder in ("base", "a", "b"))
    assert_same_bytes({"w": table(run.model)}, {"w": torch.cat([base, (a[[-1]] + b[[-2]]) / 2, b[[-1]]])})
    before, after = contents(models / "b"), contents(run.model)
    assert after["tokenizer.json"] == before["tokenizer.json"]
    generation = json.loads((models / "base" / "generation_config.json").read_text())
    assert json.loads(after["generation_config.json"]) == {**generation, "eos_token_id": [1, 3]}
    assert "expert A has 1 token that the merged tokenizer lacks (<x>)" in log_of(run)
    assert "The tokenizer is expert B's. " in after["README.md"].decode()


def test_an_expert_s_rows(models, given, tmp_path):
    run = merged(tmp_path, *given, "--embeddings", "A")
    a = table(models / "a")
    assert_same_bytes({"w": table(run.model)}, {"w": a[:COUNT]})
    before, after = contents(models / "base"), contents(run.model)
    assert {name for name in after if after[name] != before.get(name)} == {"README.md", "model.safetensors"}
    assert "expert A has 2 tokens that the merged tokenizer lacks (<x>, <y>)" in log_of(run)
    assert "The tokenizer is the base's. Embeddings and head have" in after["README.md"].decode()


def test_the_base_s_rows_are_the_base_s_file(models, given, tmp_path):
    run = merged(tmp_path, *given, "--embeddings", "base", "--exclude_params", "none")
    assert_same_bytes({"w": table(run.model)}, {"w": table(models / "base")})
    plain = merged(tmp_path / "plain", *given)
    assert (run.model / "tokenizer.json").read_bytes() == (plain.model / "tokenizer.json").read_bytes()


def test_rows_that_cannot_be_merged_are_refused_with_what_helps(given, capsys, tmp_path):
    lines = refused(capsys, *given, "--exclude_params", "none")
    assert len(lines) == 4
    assert all(line.endswith("; --embeddings mean, or base, matches rows by token") for line in lines)
    assert merge(*given, "--exclude_params", "none", "--embeddings", "mean", "--dry_run") == 0


@pytest.mark.slow
def test_a_tied_head_stays_tied(tmp_path):
    save_model(tmp_path / "base", 0, tie_word_embeddings=True)
    perturb(tmp_path / "base", tmp_path / "a", 1)
    add_tokens(tmp_path / "a", "<x>")
    untied = tensors_of(tmp_path / "a")
    write_checkpoint(tmp_path / "b", {**untied, HEAD: torch.zeros_like(untied[EMBEDDINGS])})
    for file in (tmp_path / "a").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "b")
    command = (*COMMAND, *flags(tmp_path / "base", A=tmp_path / "a", B=tmp_path / "b"), "--tokenizer", "union")
    run = merged(tmp_path / "out", *command)
    assert HEAD not in tensors_of(run.model)
    model, _ = load(run.model)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_tied_head_that_is_stored_too_is_the_embeddings(tmp_path):
    save_model(tmp_path / "source", 0, tie_word_embeddings=True)
    tensors = tensors_of(tmp_path / "source")
    shutil.copytree(tmp_path / "source", tmp_path / "base")
    save_file({**tensors, HEAD: tensors[EMBEDDINGS].clone()}, tmp_path / "base" / "model.safetensors")
    perturb(tmp_path / "source", tmp_path / "a", 1)
    add_tokens(tmp_path / "a", "<x>")
    run = merged(
        tmp_path / "out",
        *(*COMMAND, *flags(tmp_path / "base", A=tmp_path / "a"), "--tokenizer", "union", "--embeddings", "mean"),
    )
    written = tensors_of(run.model)
    assert len(written[HEAD]) == COUNT + 1
    assert_same_bytes({"w": written[HEAD]}, {"w": written[EMBEDDINGS]})


def test_a_tied_expert_of_an_untied_base_has_its_embeddings_as_head(models, tmp_path):
    tensors = {name: tensor for name, tensor in tensors_of(models / "c").items() if name != HEAD}
    tied = shutil.copytree(models / "c", tmp_path / "tied")
    save_file(tensors, tied / "model.safetensors")
    run = merged(tmp_path / "out", *COMMAND, *flags(models / "base", A=tied), "--embeddings", "A")
    assert_same_bytes({"w": table(run.model, HEAD)}, {"w": tensors[EMBEDDINGS]})


@pytest.mark.slow
def test_padding_goes_on_as_the_base_has_it(tmp_path):
    save_model(tmp_path / "base", 0)
    resize(tmp_path / "base", 88)
    perturb(tmp_path / "base", tmp_path / "a", 1)
    perturb(tmp_path / "base", tmp_path / "b", 2)
    few, many = ("<x>",), tuple(f"<{number}>" for number in range(12))
    add_tokens(tmp_path / "a", *few, rows=88)
    add_tokens(tmp_path / "b", *many, rows=96)
    command = (*COMMAND, "--base_model_path", tmp_path / "base", "--tokenizer", "union")
    kept = merged(tmp_path / "1", *command, "--expert", f"A={tmp_path / 'a'}")
    base, a, b = (table(tmp_path / name) for name in ("base", "a", "b"))
    assert_same_bytes({"w": table(kept.model)}, {"w": torch.cat([base[:COUNT], a[[COUNT]], base[COUNT + 1 :]])})
    assert (kept.model / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()
    assert load(kept.model)[1]("<x>")["input_ids"][1:] == [COUNT]
    grown = merged(tmp_path / "2", *command, "--expert", f"B={tmp_path / 'b'}")
    last = COUNT + len(many)
    assert 88 < last < 96
    filled = base[[-1]].expand(96 - last, -1)
    assert_same_bytes({"w": table(grown.model)}, {"w": torch.cat([base[:COUNT], b[COUNT:last], filled])})
    model, tokenizer = load(grown.model)
    assert model.config.vocab_size == 96
    assert len(tokenizer) == last


@pytest.mark.slow
def test_shards_keep_their_files_and_the_index_its_truth(tmp_path):
    save_model(tmp_path / "base", 0, max_shard_size="40KB")
    whole = write_checkpoint(tmp_path / "a", tensors_of(tmp_path / "base"))
    for file in (tmp_path / "base").iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name:
            shutil.copy(file, whole)
    add_tokens(whole, "<x>")
    run = merged(tmp_path / "out", *COMMAND, *flags(tmp_path / "base", A=whole), "--tokenizer", "union")
    names = {file.name for file in (tmp_path / "base").glob("*.safetensors")}
    assert {file.name for file in run.model.glob("*.safetensors")} == names
    before, after = (
        json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (tmp_path / "base", run.model)
    )
    assert after["weight_map"] == before["weight_map"]
    size = sum(tensor.nbytes for tensor in tensors_of(run.model).values())
    assert after["metadata"] == {**before["metadata"], "total_size": size}
    opened, base = Checkpoint(run.model), Checkpoint(tmp_path / "base")
    unchanged = [name for name in names if opened.headers[name] == base.headers[name]]
    assert 0 < len(unchanged) < len(names)
    load(run.model)


@pytest.mark.slow
@pytest.mark.parametrize("block", [7, 64])
def test_bytes_do_not_depend_on_blocks(models, given, tmp_path, monkeypatch, block):
    command = (*given, "--tokenizer", "union", "--embeddings", "mean", "--run_name", "r")
    expected = merged(tmp_path / "1", *command)
    monkeypatch.setattr("expert_merging.merge._COPY_BYTES", 4 * block)
    assert_same_bytes(tensors_of(merged(tmp_path / "2", *command).model), tensors_of(expected.model))


@pytest.mark.slow
def test_a_run_is_continued_with_the_same_vocabulary_alone(models, tmp_path, capsys):
    expert = shutil.copytree(models / "a", tmp_path / "a")
    command = (*COMMAND, *flags(models / "base", A=expert), "--output_path", tmp_path / "out", "--run_name", "r")
    command = (*command, "--tokenizer", "union")
    assert merge(*command) == 0
    run = tmp_path / "out" / "task_arithmetic" / "r"
    before = contents(run / "model")
    shutil.move(run / "model", run / "model.partial")
    (run / "model.partial" / "model.safetensors").unlink()
    assert merge(*command) == 0
    assert contents(run / "model") == before
    (expert / "tokenizer.json").write_text((expert / "tokenizer.json").read_text().replace("<x>", "<w>"))
    (line,) = refused(capsys, *command)
    assert "holds a different run (vocabulary: " in line


@pytest.mark.slow
def test_a_mixture_has_the_tokens_too(models, given, tmp_path):
    run = merged(tmp_path, "--method", "moe", *given[2:], "--tokenizer", "union", "--embeddings", "mean")
    model, tokenizer = load(run.model)
    assert model.config.model_type == "mixtral"
    assert model.config.vocab_size == COUNT + 3
    assert tokenizer("<z>")["input_ids"][1:] == [COUNT + 2]


@pytest.mark.slow
def test_learned_models_have_the_tokens_too(models, given, tmp_path):
    write_tasks(tmp_path / "dataset", responses=dict.fromkeys(("Chat", "Math", "Code"), "yes"))
    tasks = ["--task_expert", "Chat=A", "--task_expert", "Math=B", "--task_expert", "Code=C"]
    few = ["--data_dir", tmp_path / "dataset", "--samples_per_task", 2, "--num_epochs", 1]
    command = ("--method", "expert_merging", *given[2:], *tasks, *few, "--log_with", "none", "--run_tests")
    run = merged(tmp_path / "out", *command, "--tokenizer", "union", "--embeddings", "mean")
    plain = merged(tmp_path / "plain", *command)
    assert len(table(run.model)) == COUNT + 3
    assert load(run.model)[1]("<z>")["input_ids"][1:] == [COUNT + 2]
    written, without = tensors_of(run.model), tensors_of(plain.model)
    rest = without.keys() - {EMBEDDINGS, HEAD}
    assert_same_bytes({name: written[name] for name in rest}, {name: without[name] for name in rest})


def test_masks_go_by_the_base_s_embeddings(given, capsys):
    assert refused(capsys, "--method", "tall", *given[2:], "--embeddings", "mean", "--dry_run") == [
        "--tokenizer and --embeddings cannot be used with tall, whose files beside the model go by the base's "
        "embeddings"
    ]


@pytest.mark.slow
def test_bytes_tokens_in_their_published_files(tmp_path):
    internvl.save_model(tmp_path / "base", 0)
    expert = internvl.save_model(tmp_path / "a", 1)
    number = internvl.CONFIG["llm_config"]["vocab_size"]
    settings = json.loads((expert / "tokenizer_config.json").read_text())
    added = json.loads((expert / "added_tokens.json").read_text())
    last = max(added.values()) + 1
    assert last < number, "there are rows left"
    settings["added_tokens_decoder"][str(last)] = {"content": "<box>", "special": True}
    (expert / "tokenizer_config.json").write_text(json.dumps(settings))
    (expert / "added_tokens.json").write_text(json.dumps({**added, "<box>": last}))
    from InternVL.backbone import BACKBONE

    command = (*COMMAND, *flags(tmp_path / "base", A=expert), "--tokenizer", "union")
    run = merged(tmp_path / "out", *command, family=BACKBONE)
    tokenizer = BACKBONE.load_processor(run.model).tokenizer
    assert tokenizer("a<box>")["input_ids"][-1:] == [last]
    assert tokenizer.decode([last]) == "<box>"
    name = "language_model.model.embed_tokens.weight"
    base, a = (tensors_of(folder)[name] for folder in (tmp_path / "base", expert))
    expected = base.clone()
    expected[last] = a[last]
    assert_same_bytes({"w": tensors_of(run.model)[name]}, {"w": expected})


# What is refused


def test_names_that_are_none_are_refused(given, capsys):
    assert refused(capsys, *given, "--tokenizer", "uniom", "--embeddings", "median") == [
        "--tokenizer takes base, union or an expert's name, got 'uniom'. Did you mean 'union'?",
        "--embeddings takes base, mean or an expert's name, got 'median'. Did you mean 'mean'?",
    ]


def test_a_union_has_added_tokens_alone(models, tmp_path, capsys):
    other = shutil.copytree(models / "c", tmp_path / "other")
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"q":', '"ß":'))
    command = (*COMMAND, *flags(models / "base", A=models / "a", Q=other))
    assert refused(capsys, *command, "--tokenizer", "union") == [
        "expert Q has another tokenizer than the base, with 1 token of its vocabulary that the base lacks (ß); a "
        "union has added tokens alone, so choose --tokenizer base or Q"
    ]
    assert merge(*command, "--tokenizer", "Q", "--dry_run") == 0


def test_tokenizers_that_are_needed_are_there(models, tmp_path, capsys):
    folders = {name: shutil.copytree(models / name, tmp_path / name) for name in "ab"}
    for folder in folders.values():
        for file in folder.glob("tokenizer*"):
            file.unlink()
    command = (*COMMAND, *flags(models / "base", A=folders["a"], B=folders["b"], C=models / "c"))
    assert refused(capsys, *command, "--embeddings", "mean") == [
        f"{folder} has no tokenizer that can be read (tokenizer.json, vocab.json, vocab.txt, or a tokenizer.model of "
        "sentencepiece), and --tokenizer and --embeddings go by tokens; put its files there"
        for folder in folders.values()
    ]
    assert merge(*command, "--embeddings", "C", "--dry_run") == 0


def test_an_expert_without_tokenizer_and_with_the_base_s_rows_has_the_base_s_tokens(models, tmp_path):
    bare = write_checkpoint(tmp_path / "bare", tensors_of(models / "c"))
    run = merged(tmp_path / "out", *COMMAND, *flags(models / "base", C=bare), "--embeddings", "C")
    assert_same_bytes({"w": table(run.model)}, {"w": table(models / "c")})


def test_tables_that_do_not_fit_are_refused(tmp_path, capsys):
    weight = torch.ones(2, 2)
    folders = {
        "base": {"w": weight, "embed_tokens.weight": torch.ones(3, 4), "lm_head.weight": torch.ones(3, 4)},
        "Wide": {"w": weight + 1, "embed_tokens.weight": torch.ones(3, 5), "lm_head.weight": torch.ones(3, 4)},
        "Whole": {"w": weight + 2, "embed_tokens.weight": torch.ones(3, 4).int(), "lm_head.weight": torch.ones(3, 4)},
        "Two": {"w": weight + 3, "embed_tokens.weight": torch.ones(3, 4), "lm_head.weight": torch.ones(5, 4)},
        "Without": {"w": weight + 4},
    }
    places = {name: write_checkpoint(tmp_path / name, tensors) for name, tensors in folders.items()}
    for place in places.values():
        (place / "vocab.json").write_text('{"a": 0, "b": 1, "c": 2}')
    base = places.pop("base")
    lines = refused(capsys, *COMMAND, *flags(base, Wide=places["Wide"], Two=places["Two"]), "--embeddings", "mean")
    assert len(lines) == 2, "of all models at once"
    assert merge(*COMMAND, *flags(base, Wide=places["Wide"]), "--embeddings", "base", "--dry_run") == 0
    for name, problems in {
        "Wide": ["rows of embed_tokens.weight are [5] of F32, and the base's [4]; they cannot be put together"],
        "Whole": ["rows of embed_tokens.weight are [4] of I32, and the base's [4]; they cannot be put together"],
        "Two": ["embeddings and head have 3 and 5 rows"],
    }.items():
        lines = refused(capsys, *COMMAND, *flags(base, **{name: places[name]}), "--embeddings", "mean")
        assert lines == [f"{places[name]}: {problem}" for problem in problems]
    lines = refused(capsys, *COMMAND, *flags(base, Without=places["Without"]), "--embeddings", "mean")
    assert lines == [
        f"{places['Without']} has neither {name} nor embeddings that it could be tied to"
        for name in ("embed_tokens.weight", "lm_head.weight")
    ]


def test_a_base_without_known_tables_is_refused(tmp_path, capsys):
    base = write_checkpoint(tmp_path / "base", {"w": torch.ones(3, 4)})
    expert = write_checkpoint(tmp_path / "a", {"w": torch.zeros(3, 4)})
    for folder in (base, expert):
        (folder / "vocab.json").write_text('{"a": 0}')
    assert refused(capsys, *COMMAND, *flags(base, A=expert), "--embeddings", "mean") == [
        f"{base} has no embeddings or head that are known by name; leave out --tokenizer and --embeddings"
    ]


@pytest.mark.parametrize("value", [float("nan"), 1e38])
def test_numbers_that_are_none_are_refused_in_rows_too(models, tmp_path, capsys, value):
    expert = shutil.copytree(models / "c", tmp_path / "c")
    tensors = tensors_of(expert)
    tensors[EMBEDDINGS][3, 5] = value
    save_file(tensors, expert / "model.safetensors")
    base = tensors_of(models / "base")
    half = write_checkpoint(tmp_path / "base", {name: tensor.half() for name, tensor in base.items()})
    for file in (models / "base").glob("tokenizer*"):
        shutil.copy(file, half)
    command = (*COMMAND, *flags(half, C=expert), "--embeddings", "C", "--output_path", tmp_path / "out")
    assert refused(capsys, *command) == [
        f"{EMBEDDINGS} would have values that F16 (the base's type) cannot hold, or NaN; a checkpoint that it is made "
        "of has them"
    ]


# Rows


def test_rows_of_every_choice():
    vocabularies = {
        "base": Vocabulary({"a": 0, "b": 1}, {}, None),
        "A": Vocabulary({"b": 0, "a": 1, "x": 2}, {}, None),
        "B": Vocabulary({"a": 0, "x": 1, "y": 9}, {}, None),
    }
    tokens, sizes = ["a", "b", "x", "y", None], {"base": 3, "A": 3, "B": 2}

    def chosen(embeddings):
        found = choose_rows(tokens, vocabularies, sizes, owner="base", embeddings=embeddings)
        return {name: rows.tolist() for name, rows in found.items()}

    # "y" has no row anywhere (B has two rows), and the last row is padding: the base's last row stands for both.
    assert chosen("base") == {"base": [0, 1, -1, 2, 2], "A": [-1, -1, 2, -1, -1], "B": [-1, -1, 1, -1, -1]}
    assert chosen("mean") == {"base": [0, 1, -1, 2, 2], "A": [1, 0, 2, -1, -1], "B": [0, -1, 1, -1, -1]}
    assert chosen("B") == {"base": [-1, 1, -1, 2, 2], "B": [0, -1, 1, -1, -1]}


def test_scattered_rows_are_the_plain_twin_s(tmp_path):
    torch.manual_seed(0)
    words = [f"w{number}" for number in range(40)]
    orders = {"base": torch.arange(40), "A": torch.randperm(40), "B": torch.randperm(40)}
    types = {"base": torch.bfloat16, "A": torch.float64, "B": torch.float16}
    tables = {name: torch.randn(40, 6).bfloat16().to(types[name]) for name in orders}
    tables["base"][0, 0] = -0.0
    for name, order in orders.items():
        folder = write_checkpoint(tmp_path / name, {"embed_tokens.weight": tables[name], "w": torch.ones(2, 2)})
        vocabulary = {words[int(word)]: number for number, word in enumerate(order)}
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
    plan = make_plan(tmp_path / "base", {name: tmp_path / name for name in "AB"}, [ROW_PER_WORD])
    by_word = torch.stack([tables[name].float()[orders[name].argsort()] for name in orders])
    found = choose_word_tables(plan, "base", "mean")
    assert found._entries("embed_tokens.weight", 5, 100).equal(by_word.mean(0).view(-1)[5:100])
    for name, lost in {"A": 3, "B": 7}.items():  # rows that nobody asks for
        file = tmp_path / name / "vocab.json"
        file.write_text(file.read_text().replace(f'"{words[lost]}"', f'"only {name}"'))
    counts = torch.full((40, 1), 3.0)
    counts[[3, 7]] = 2.0
    fewer = by_word.clone()
    fewer[1, 3] = fewer[2, 7] = 0
    some = choose_word_tables(plan, "base", "mean")
    assert some._entries("embed_tokens.weight", 0, 240).equal((fewer.sum(0) / counts).view(-1))
    own = choose_word_tables(plan, "A", "base")
    expected = by_word[0][orders["A"]]
    expected[orders["A"] == 3] = by_word[1][3]  # which the base calls otherwise
    assert own._entries("embed_tokens.weight", 0, 240).equal(expected.view(-1))
    same = choose_word_tables(plan, "base", "base")._entries("embed_tokens.weight", 0, 1)
    assert same.signbit().all(), "-0 stays what it is"


@pytest.mark.parametrize("kind", ["adapter", "full model"])
def test_an_expert_without_a_tokenizer_has_the_bases(kind, models, tmp_path):
    """Neither the base's tokenizer nor what its generation_config.json says may get lost."""
    base, expert = tmp_path / "base", tmp_path / "expert"
    shutil.copytree(models / "base", base)
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    if kind == "adapter":
        save_adapter(partial(import_transformers().MistralForCausalLM.from_pretrained, base), expert)
        (expert / "chat_template.jinja").write_text("{{ messages }}")
    else:
        shutil.copytree(models / "c", expert, ignore=shutil.ignore_patterns("tokenizer*"))
    run = merged(tmp_path / "out", *COMMAND, *flags(base, A=expert), "--tokenizer", "A")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (run.model / name).read_bytes() == (base / name).read_bytes()
    assert "The tokenizer is the base's." in (run.model / "README.md").read_text()
    assert " WARNING " not in log_of(run)


@pytest.mark.parametrize(("whose", "asked"), [("a", "A"), ("base", "union")])
def test_a_tokenizer_that_lies_elsewhere_is_not_copied(whose, asked, models, tmp_path, capsys):
    for name in ("base", "a"):
        shutil.copytree(models / name, tmp_path / name)
    file = tmp_path / whose / "tokenizer.json"
    shutil.move(file, tmp_path / "elsewhere.json")
    file.symlink_to("../elsewhere.json")
    arguments = [*COMMAND, *flags(tmp_path / "base", A=tmp_path / "a"), "--output_path", tmp_path / "out"]
    assert refused(capsys, *arguments, "--tokenizer", asked) == [
        f"{file} is a link that leads out of its folder, and such links are not copied; put a copy in its place"
    ]
