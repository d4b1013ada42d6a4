"""How well models predict texts: against a plain pass over the whole text, and against lm-evaluation-harness."""

from __future__ import annotations

import json
import math
from shutil import copytree

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from expert_merging.comparing import asked
from expert_merging.comparing import texts as module
from expert_merging.comparing.scores_file import read_scores
from expert_merging.comparing.texts import windows
from expert_merging.run import Run
from expert_merging.running.answers import likelihoods
from tests.checkpoints import BASE
from tests.comparing.test_evaluate import evaluate, refusal, runs  # noqa: F401  (a fixture)

LONG = "the cat sat on the mat " * 9 + "é"


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "general"
    folder.mkdir()
    (folder / "long.txt").write_text(LONG, encoding="utf-8")
    (folder / "short.md").write_text("# A title", encoding="utf-8")
    (folder / "ignored.json").write_text("{}")
    return folder


def bits_plainly(folder, text, longest):
    """Every token's probability, one pass for each window, by the model's own loss."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    nats = 0.0
    for start in range(0, len(tokens) - 1, longest):
        stop = min(start + longest, len(tokens) - 1)
        window = torch.tensor([tokens[max(0, stop - longest) : stop + 1]])
        labels = window.clone()
        labels[0, : -(stop - start)] = -100
        with torch.no_grad():
            nats += model(input_ids=window, labels=labels).loss.item() * (stop - start)
    return nats / math.log(2) / len(text.encode())


@pytest.mark.parametrize("longest", [None, 16])
def test_bits_per_byte_are_those_of_plain_passes(longest, answered_zoo, texts, tmp_path, monkeypatch, capsys):
    if longest:
        monkeypatch.setattr(module, "_LONGEST", longest)
    given = ["--texts", texts, "--json", tmp_path / "found.json"]
    assert evaluate(answered_zoo / BASE, *given) == 0
    found = json.loads((tmp_path / "found.json").read_text())["models"][BASE]["scores"]["general"]
    assert (found["metric"], found["higher_is_better"]) == ("bits_per_byte", False)
    most = json.loads((answered_zoo / BASE / "config.json").read_text())["max_position_embeddings"]
    for name, content in (("long", LONG), ("short", "# A title")):
        expected = bits_plainly(answered_zoo / BASE, content, longest or min(most, 2048))
        assert found["tasks"][name]["mean"] == pytest.approx(expected, rel=1e-5)
    assert "general: bits per byte, lower is better" in capsys.readouterr().out


def test_each_token_is_predicted_once():
    for count in (1, 3, 4, 9):
        rows = windows(range(count), -1, 4)
        assert [token for row in rows for token in row.answer] == list(range(count))
        given = [row.prompt["input_ids"][0].tolist() for row in rows]
        assert given[:-1] == [[start - 1] for start in range(0, count, 4)][:-1]
        assert [*given[-1], *rows[-1].answer] == [*range(-1, count)][-5:]


def test_no_more_tokens_go_through_a_model_than_it_takes():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=4, n_embd=8, n_layer=1, n_head=2)).eval()
    tokens = torch.randint(11, (9,)).tolist()
    found = -sum(nats for _, nats in likelihoods(model, dict(enumerate(windows(tokens, 0, 4)))))
    with torch.no_grad():
        logits = [model(torch.tensor([part])).logits[0] for part in ([0, *tokens[:3]], tokens[3:7], tokens[4:8])]
    scores = torch.cat([logits[0], logits[1], logits[2][-1:]]).log_softmax(-1)
    assert found == pytest.approx(-scores[range(9), tokens].sum().item(), rel=1e-5)


def test_they_are_kept_beside_scores_on_questions(runs, texts, tmp_path):  # noqa: F811
    questions = tmp_path / "mine"
    questions.mkdir()
    (questions / "Chat.json").write_text(json.dumps([{"question": "1?", "answer": "yes"}]))
    assert evaluate(runs[0], "--texts", texts, "--questions", questions) == 0
    kept = read_scores(Run(runs[0]).scores).sets
    assert set(kept) == {"mine", "general"}
    assert set(kept["general"].tasks) == {"long", "short"}
    assert kept["general"].tasks["long"].questions != kept["general"].tasks["short"].questions


def test_problems_are_told(runs, texts, tmp_path, capsys):  # noqa: F811
    assert refusal(capsys, runs[0], "--texts", tmp_path / "none") == [
        f"--texts {tmp_path / 'none'} is not a folder; give one with texts in it (.txt, .md)"
    ]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refusal(capsys, runs[0], "--texts", empty) == [
        f"--texts {empty} has no texts in it; they are files called NAME.txt or NAME.md"
    ]
    (texts / "nothing.txt").write_text(" \n")
    (texts / "short.txt").write_text("again")
    (texts / "other.txt").write_bytes(b"\xff\xfe\x00")
    told = refusal(capsys, runs[0], "--texts", texts)
    assert f"{texts / 'nothing.txt'} is empty; write a text into it, or remove it" in told
    assert f"--texts {texts} has short twice; rename one of them" in told
    assert any(str(texts / "other.txt") in line for line in told)
    assert refusal(capsys, runs[0], "--texts", texts, "--questions", tmp_path / "x" / "general")[0] == (
        f"--texts {texts}: scores are kept by the folder's name, which is taken; rename it"
    )


@pytest.fixture
def bare(answered_zoo, tmp_path):
    """A model, and what takes tokens out of its tokenizer's settings."""
    folder = copytree(answered_zoo / BASE, tmp_path / "bare")

    def without(*names):
        for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
            if file.exists():
                content = json.loads(file.read_text())
                file.write_text(json.dumps({name: one for name, one in content.items() if name not in names}))

    return folder, without


def test_a_text_begins_with_the_last_token_where_there_is_no_first(bare, texts, tmp_path):
    folder, without = bare
    without("bos_token", "add_bos_token")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.bos_token_id is None
    assert evaluate(folder, "--texts", texts, "--json", tmp_path / "found.json") == 0
    found = json.loads((tmp_path / "found.json").read_text())["models"]["bare"]["scores"]["general"]["tasks"]
    tokens = [tokenizer.eos_token_id, *tokenizer("# A title", add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        scores = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([tokens])).logits[0].log_softmax(-1)
    bits = -scores[range(len(tokens) - 1), tokens[1:]].sum().item() / math.log(2) / len("# A title")
    assert found["short"]["mean"] == pytest.approx(bits, rel=1e-5)


def test_problems_of_texts_are_told_before_questions_are_asked(bare, texts, tmp_path, capsys, monkeypatch):
    folder, without = bare
    without("bos_token", "eos_token", "add_bos_token", "add_eos_token")
    questions = tmp_path / "mine"
    questions.mkdir()
    (questions / "Chat.json").write_text(json.dumps([{"question": "1?", "answer": "yes"}]))
    monkeypatch.setattr(asked, "loaded", lambda *_: pytest.fail("a model is loaded"))
    assert refusal(capsys, folder, "--texts", texts, "--questions", questions) == [
        "bare: its tokenizer has neither a first nor a last token; name one in tokenizer_config.json (bos_token)"
    ]


def test_the_harness_finds_the_same(answered_zoo, texts, tmp_path):
    harness = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    (tmp_path / "data.jsonl").write_text(json.dumps({"text": LONG}) + "\n")
    task = {
        "task": "own_text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "own_text.yaml").write_text(yaml.safe_dump(task))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = harness.simple_evaluate(
        "hf",
        model_args={"pretrained": str(answered_zoo / BASE), "dtype": "float32", "add_bos_token": False},
        tasks=["own_text"],
        task_manager=manager,
        device="cpu",
        bootstrap_iters=0,
    )
    assert evaluate(answered_zoo / BASE, "--texts", texts, "--json", tmp_path / "found.json") == 0
    own = json.loads((tmp_path / "found.json").read_text())["models"][BASE]["scores"]["general"]["tasks"]["long"]
    assert own["mean"] == pytest.approx(found["results"]["own_text"]["bits_per_byte,none"], rel=1e-4)
