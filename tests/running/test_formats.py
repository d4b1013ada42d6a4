"""Runs on look-alikes of the published Mistral checkpoints, each asked in its own words, to the end."""

from __future__ import annotations

import json
import string
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expert_merging.backbone import load_tokenizer
from expert_merging.errors import InputError
from expert_merging.run import Run
from tests.checkpoints import BASE, EXPERTS, SPECIAL, perturb, save_model, tensors_of, write_tasks
from tests.command import merge, merged, refused
from tests.learned.training import answering, make_trainer, make_twin
from tests.learned.twin import Example
from tests.test_templates import INSTRUCT
from zoo.tokens import character_tokenizer

VOCABULARY = 32000  # as the published ones have, by which they are known
TEXTS = [*SPECIAL, *string.printable[:95], "\n", "\n\n", "\n\n\n"]
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{question}\n\n### Response:"
)
MAMMOTH = (
    "You are supposed to provide a solution to a given problem.\n\n\nProblem:\n{question}\n"
    "Solution: Let's think step by step.\n"
)
RESPONSES = {"Chat": "Certainly", "Math": "42", "Code": "def f():"}
PROMPTS = {"Chat": "[INST] {question} [/INST]", "Math": MAMMOTH, "Code": ALPACA}


def tokens(text: str) -> list[int]:
    """The look-alikes' tokens of a text: its characters, and line breaks in a row as one."""
    found: list[str] = []
    for character in text:
        if character == "\n" and found and found[-1].startswith("\n"):
            found[-1] += character
        else:
            found.append(character)
    return [TEXTS.index(token) for token in found]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A base without a template, a chat expert with one, and two experts whose words their family knows."""
    cache = tmp_path_factory.mktemp("published")
    save_model(cache / BASE, 0, vocab_size=VOCABULARY, hidden_size=16, max_position_embeddings=512)
    names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), SPECIAL, strict=True))
    fillers = [f"<filler {number}>" for number in range(VOCABULARY - len(TEXTS))]
    vocabulary = {token: number for number, token in enumerate([*TEXTS, *fillers])}
    character_tokenizer(vocabulary, SPECIAL, **names).save_pretrained(cache / BASE)
    for number, folder in enumerate(EXPERTS.values()):
        perturb(cache / BASE, cache / folder, 1 + number)
    settings = json.loads((cache / EXPERTS["Chat"] / "tokenizer_config.json").read_text())
    settings = {**settings, "chat_template": INSTRUCT}
    (cache / EXPERTS["Chat"] / "tokenizer_config.json").write_text(json.dumps(settings))
    write_tasks(cache / "dataset", count=2, responses=RESPONSES)
    write_tasks(cache / "unanswered", count=1)
    return cache


def flags(cache: Path, data: str) -> list[object]:
    return ["--cache_dir", cache, "--data_dir", cache / data, "--max_new_tokens", 4, "--log_with", "none"]


@pytest.mark.slow
def test_what_is_learned_is_learned_from_each_expert_in_its_own_words(published, tmp_path):
    trainer = make_trainer(published, tmp_path, samples_per_task=2, sparsity_reg_weight=0.0)
    coefficients = trainer.train()
    twin, examples = make_twin(trainer)

    def inputs(example: Example) -> tuple[dict[str, torch.Tensor], int]:
        prompt = [0, *tokens(PROMPTS[example.expert].replace("{question}", example.prompt))]
        return {"input_ids": torch.tensor([[*prompt, *tokens(example.response), 1]])}, len(prompt)

    twin.inputs = inputs
    twin.train(examples, 1, seed=3)
    for parameter, values in coefficients.values.items():
        torch.testing.assert_close(values, twin.coefficients(parameter).detach(), rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["expert_merging", "regmean", "evo"])
def test_log_responses_and_card_say_how_each_was_asked(method, published, tmp_path, capsys):
    more = ["--evaluations", 2] if method == "evo" else []
    run = merged(tmp_path, "--method", method, *flags(published, "unanswered"), *more, "--run_tests")
    asked = json.loads(run.responses.read_text())["formats"]
    assert {name: found["example"] for name, found in asked.items()} == {
        "Chat": "<s>[INST] {question} [/INST]{response}</s>",
        "Math": f"{MAMMOTH}{{response}}",
        "Code": f"{ALPACA}{{response}}",
    }
    assert json.loads(run.config.read_text())["asking"] == {"chat_template_from": "base", "formats": asked}
    card, log = (run.model / "README.md").read_text(), run.log.read_text()
    assert "It has no chat template. Ask it as the expert of the task is asked, with a line break for each" in card
    for name, found in asked.items():
        shown = f"`{json.dumps(found['example'])}`"
        assert f"- {name}: {shown}, {found['from']}" in card
        assert f"{name}: asked with {found['from']}, {shown}" in log
    assert not (run.model / "chat_template.jinja").exists()
    assert log.count("question: ") == 3
    assert tensors_of(run.model).keys() == tensors_of(published / BASE).keys()


@pytest.mark.slow
def test_another_wording_is_another_run(published, tmp_path, capsys):
    command = ["--method", "expert_merging", *flags(published, "dataset"), "--output_path", tmp_path]
    command += ["--run_name", "one", "--samples_per_task", 1]
    given = json.dumps({"Code": "# {question}\n"})
    assert merge(*command, "--prompt_template", given) == 0
    run = Run.named(tmp_path, "expert_merging", "one")
    code = json.loads(run.config.read_text())["asking"]["formats"]["Code"]
    assert code == {"from": "--prompt_template", "example": "# {question}\n{response}"}
    (problem,) = refused(capsys, *command)
    assert "formats: " in problem
    assert "prompt_template: " in problem


def test_a_template_that_has_changed_is_another_run(published, tmp_path):
    first = make_trainer(published, tmp_path).settings.asked.inputs
    for folder in (BASE, EXPERTS["Math"], EXPERTS["Code"]):
        (tmp_path / folder).symlink_to(published / folder)
    chat = tmp_path / EXPERTS["Chat"]
    chat.mkdir()
    for file in (published / EXPERTS["Chat"]).iterdir():
        (chat / file.name).symlink_to(file)
    (chat / "chat_template.jinja").write_text(INSTRUCT.replace("[INST] ", "[INST]"))
    second = make_trainer(tmp_path, tmp_path / "run", data_dir=str(published / "dataset")).settings.asked.inputs
    assert first["calibration"] == second["calibration"]
    assert first["formats"] != second["formats"]


def test_the_merged_folder_gets_the_template_that_is_asked_for(published, tmp_path):
    command = ["--method", "weight_average", "--cache_dir", published]
    run = merged(tmp_path, *command, "--chat_template_from", "Chat")
    assert load_tokenizer(run.model).chat_template == INSTRUCT
    assert "It has the chat template of Mistral-7B-Instruct-v0.1. Ask it" in (run.model / "README.md").read_text()
    record = json.loads(run.config.read_text())
    assert record["asking"]["chat_template_from"] == record["options"]["chat_template_from"] == "Chat"


def test_all_that_is_wrong_with_prompts_is_told(published, capsys, tmp_path):
    command = [*flags(published, "dataset"), "--output_path", tmp_path]
    assert refused(capsys, *command, "--prompt_template", '{"Code": "{question}", "Chat": "Why?"}') == [
        "--prompt_template must contain {question}, got 'Why?' for 'Chat'"
    ]
    (problem,) = refused(capsys, *command, "--prompt_template", '{"Code": "{question}')
    assert problem.startswith("--prompt_template is not valid JSON (")
    (problem,) = refused(capsys, *command, "--chat_template_from", "Maths")
    assert problem == "--chat_template_from Maths: no such expert. Did you mean 'Math'?"


@pytest.mark.parametrize(("written", "kept"), [((9, 1), (9, 1, 5, 6)), ((9, 1, 5), (9, 1, 5, 6)), ((9, 8), (9, 8))])
def test_a_written_answer_gets_the_rest_of_a_turn_s_end(written, kept, tiny_zoo, tmp_path, monkeypatch):
    """As a given one does; an answer that was cut off stays open."""
    monkeypatch.setattr("expert_merging.running.targets.generate", answering(*written))
    trainer = make_trainer(tiny_zoo, tmp_path, samples_per_task=1, prompt_template="{question}{response}</s>bc")
    for target in trainer._make_targets(torch.device("cpu")):
        prompt = len(target.sample.question) + 1
        assert tuple(target.inputs["input_ids"][0, prompt:].tolist()) == kept


def test_an_expert_stops_at_the_end_of_its_turn(tiny_zoo, tmp_path):
    """Also where its own settings do not name that token."""
    from expert_merging.running.generating import generate
    from Mistral.backbone import BACKBONE

    processor, model = BACKBONE.load_processor(tiny_zoo / BASE), BACKBONE.load_model(tiny_zoo / BASE, torch.float32)
    model.generation_config.eos_token_id = None
    inputs = {"input_ids": torch.tensor([[0, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with torch.no_grad():
        model.lm_head.weight[1] = 10 * model.base_model(**inputs).last_hidden_state[0, -1]
    assert generate(model, processor, [inputs], 3, [1])[0][1] == [1]
    assert generate(model, processor, [inputs], 3, [4])[0][1][:1] == [1]
    assert len(generate(model, processor, [inputs], 3, [4])[0][1]) == 3, "no end but a special token's"


@pytest.mark.parametrize("where", ["states", "logits"])
@pytest.mark.parametrize(("precision", "hint"), [("no", "its weights are damaged"), ("fp16", "beyond float16's range")])
def test_numbers_that_overflow_name_expert_and_sample(where, precision, hint, tiny_zoo, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_zoo, tmp_path, data_dir=str(tiny_zoo / "dataset"), samples_per_task=1)
    maker = trainer.settings.asked.target_maker(trainer.context, (1,), torch.device("cpu"))
    load = maker.backbone.load_model

    def broken(folder, dtype):
        model = load(folder, dtype)
        if folder.name == EXPERTS["Math"]:
            with torch.no_grad():
                weight = model.lm_head.weight if where == "logits" else model.model.layers[1].mlp.up_proj.weight
                weight[7] = torch.finfo(dtype).max
                weight[:, 3] = torch.finfo(dtype).max
        return model

    dtype = {"no": torch.float32, "fp16": torch.float16}[precision]
    maker = replace(maker, backbone=replace(maker.backbone, load_model=broken), dtype=dtype)
    monkeypatch.setattr("expert_merging.running.targets.generate", answering(5, 6))
    with pytest.raises(InputError) as caught:
        maker.make(trainer.settings.asked.samples)
    (problem,) = caught.value.problems
    place = f"{tiny_zoo / 'dataset' / 'Math.json'}, entry 0 (counted from 0)"
    assert problem.startswith(f"{place}: expert Math computes NaN or infinite values; ")
    assert hint in problem
