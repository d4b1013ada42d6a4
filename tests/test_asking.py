"""In whose words experts are asked: their own, where the base's tokenizer makes the same tokens of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expert_merging.asking import Formats, check_given, choose_formats, choose_wording
from expert_merging.errors import InputError
from expert_merging.plan import Plan, make_plan
from expert_merging.questions.calibration import Sample
from expert_merging.questions.formats import Asking, Format
from expert_merging.questions.templates import ChatTemplate
from Mistral.backbone import BACKBONE
from Qwen2VL.backbone import BACKBONE as QWEN
from tests.checkpoints import SPECIAL, save_tokenizer, write_checkpoint
from tests.qwen2vl import SILENT_TEMPLATE, save_processor
from tests.test_templates import INSTRUCT
from zoo.tokens import character_tokenizer

TENSORS = {"layers.0.weight": torch.ones(3)}
FOLDERS = {"Chat": "Mistral-7B-Instruct-v0.1", "Math": "MAmmoTH2-7B", "Code": "my-coder"}
PLAIN = "the bare question"


def set_template(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


def make(folder: Path, *, vocabulary: int = 32000) -> Plan:
    """A base and three experts with tokenizers and without templates."""
    for name in ("base", *FOLDERS.values()):
        write_checkpoint(folder / name, TENSORS, config={"model_type": "mistral", "vocab_size": vocabulary})
        save_tokenizer(folder / name)
    return make_plan(folder / "base", {name: folder / own for name, own in FOLDERS.items()}, [])


@pytest.fixture
def plan(tmp_path):
    return make(tmp_path)


def origins(formats: Formats) -> dict[str, str]:
    return {name: found.origin for name, found in formats.named.items()}


def ask(task: str, expert: str) -> Sample:
    return Sample(task, expert, "Why?", None, "0")


def test_experts_have_their_own_templates_or_known_formats_or_the_bases(plan):
    set_template(plan.experts["Chat"].folder, INSTRUCT)
    formats = choose_formats(BACKBONE, plan)
    assert origins(formats) == {
        "Chat": "the chat template of Mistral-7B-Instruct-v0.1",
        "Math": "the format of MAmmoTH2-7B",
        "Code": PLAIN,
    }
    assert formats.of(ask("Chat", "Chat")).example == "<s>[INST] {question} [/INST]{response}</s>"
    assert formats.of(ask("Other", "Math")).prompt("1 + 1?") == (
        "You are supposed to provide a solution to a given problem.\n\n\nProblem:\n1 + 1?\nSolution: Let's think step "
        "by step.\n"
    )
    assert formats.of(ask("Other", "nobody")) is formats.default
    assert not formats.warnings


def test_a_format_is_known_of_the_published_checkpoint_alone(tmp_path):
    formats = choose_formats(BACKBONE, make(tmp_path, vocabulary=64))
    assert set(origins(formats).values()) == {PLAIN}
    place = tmp_path / "models--TIGER-Lab--MAmmoTH2-7B" / "snapshots" / "0123"
    assert BACKBONE.asking.known_format(place, 32000) is BACKBONE.asking.known["MAmmoTH2-7B"]
    assert BACKBONE.asking.known_format(tmp_path / "models--a--b" / "snapshots" / "c", 32000) is None
    template = ChatTemplate("{{ messages[0].content }}", str(place))
    assert Format.of_template(template, None).origin == "the chat template of TIGER-Lab/MAmmoTH2-7B"


def test_a_known_format_serves_where_a_folder_has_lost_its_template(plan):
    assert choose_formats(BACKBONE, plan).experts["Chat"].text == "[INST] {question} [/INST]"


def test_the_bases_template_serves_experts_without_any(plan):
    set_template(plan.base.folder, INSTRUCT)
    formats = choose_formats(BACKBONE, plan)
    assert formats.experts["Code"] == formats.default
    assert formats.default.origin == "the chat template of base"
    set_template(plan.experts["Code"].folder, INSTRUCT)
    assert choose_formats(BACKBONE, plan).experts["Code"] == formats.default, "the same template is the base's"


def test_given_formats_count_by_expert_and_by_task(plan):
    given = {"Code": "C: {question}{response}\n##", "Sums": "S: {question}"}
    formats = choose_formats(BACKBONE, plan, given)
    assert formats.of(ask("Code", "Code")) == Format("--prompt_template", "C: {question}", end="\n##")
    assert formats.of(ask("Sums", "Math")).prompt("2") == "S: 2"
    assert formats.of(ask("Math", "Math")).origin == "the format of MAmmoTH2-7B"
    assert set(formats.named) == {"Chat", "Math", "Code", "task Sums"}
    everything = choose_formats(QWEN, plan, "Q: {question}")
    assert {found.text for found in everything.named.values()} == {"Q: {question}"}
    assert everything.of(ask("x", "y")).end == "<|im_end|>\n", "the family's end counts where none is given"


def test_what_is_given_is_checked():
    experts = {"Chat": 1, "Math": 2}
    assert check_given(None, experts, {"Chat"}) == []
    assert check_given({"Chat": "{question}", "Sums": "{question}"}, experts, {"Sums"}) == []
    assert check_given("Why?", experts, set()) == ["--prompt_template must contain {question}, got 'Why?'"]
    assert check_given({"Chat": "{response}{question}"}, experts, set()) == [
        "--prompt_template must contain {question}, got '{response}{question}' for 'Chat'"
    ]
    assert check_given({"chat": "{question}"}, experts, {"Sums"}) == [
        "--prompt_template names 'chat', which is no expert and no task. Did you mean 'Chat'?"
    ]


def test_a_template_that_asks_nothing_is_told_and_not_used(plan):
    set_template(plan.base.folder, SILENT_TEMPLATE)
    set_template(plan.experts["Code"].folder, SILENT_TEMPLATE + " ")
    set_template(plan.experts["Chat"].folder, "{{ raise_exception('no') }}")
    formats = choose_formats(BACKBONE, plan)
    assert origins(formats) == {
        "Chat": "the format of Mistral-7B-Instruct-v0.1",
        "Math": "the format of MAmmoTH2-7B",
        "Code": PLAIN,
    }
    assert formats.warnings == (
        f"the chat template of {plan.base.folder} leaves out the question; in its place stands {PLAIN}, for Code",
        f"the chat template of {plan.experts['Chat'].folder} raises an error (no); expert Chat is asked in other "
        "words: the format of Mistral-7B-Instruct-v0.1",
        f"the chat template of {plan.experts['Code'].folder} leaves out the question; expert Code is asked in other "
        f"words: {PLAIN}",
    )


def test_a_base_s_template_that_nobody_needs_is_no_reason_to_warn(plan):
    set_template(plan.base.folder, SILENT_TEMPLATE)
    for expert in plan.experts.values():
        set_template(expert.folder, "[{{ messages[0].content }}]")
    assert choose_formats(BACKBONE, plan).warnings == ()


def other_tokenizer(folder: Path, tokens: list[str]) -> None:
    names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), SPECIAL, strict=True))
    numbers = {token: number for number, token in enumerate(tokens)}
    character_tokenizer(
        numbers, [*SPECIAL, *(token for token in tokens if token.startswith("<|"))], **names
    ).save_pretrained(folder)


def test_a_template_of_other_tokens_is_told_and_not_used(plan):
    """Such as one with tokens that the fine-tune has added, which the base has no embeddings for."""
    from tests.checkpoints import CHARACTERS

    folder = plan.experts["Code"].folder
    set_template(folder, "<|turn|>{% for m in messages %}{{ m.content }}{% endfor %}")
    other_tokenizer(folder, [*CHARACTERS, "<|turn|>"])
    formats = choose_formats(BACKBONE, plan)
    assert formats.experts["Code"] == formats.default
    (told,) = formats.warnings
    assert told == (
        f"the tokenizer of {plan.base.folder} makes other tokens of the chat template of {folder} ('<unk>', number 3, "
        f"in place of '<|turn|>', number {len(CHARACTERS)}); expert Code is asked in other words: {PLAIN}"
    )


def test_a_merged_tokenizer_that_knows_the_tokens_is_asked_with_the_template(plan):
    """Of a union or an expert's own tokenizer, which the merged model has instead of the base's."""
    from tests.checkpoints import CHARACTERS

    folder = plan.experts["Code"].folder
    set_template(folder, "<|turn|>{% for m in messages %}{{ m.content }}{% endfor %}")
    other_tokenizer(folder, [*CHARACTERS, "<|turn|>"])
    for tokenizer in ("union", "Code"):
        wording = choose_wording(BACKBONE, plan, None, None, tokenizer)
        assert wording.asked.experts["Code"].origin == "the chat template of my-coder"
        assert not wording.asked.warnings
        assert wording.of_merged.of(ask("Code", "Code")).prompt("2") == "<|turn|>2"
        assert '- Code: `"<|turn|>{question}{response}"`' in wording.card([])
        assert wording.formats.experts["Code"].origin == PLAIN, "while experts run, tokens are the base's"
    assert choose_wording(BACKBONE, plan, None, None, "Code").source == "Code", "its files hold its template"
    assert choose_wording(BACKBONE, plan, None, "base", "Code").source == "base"
    for name in ("Chat", "Math"):
        shutil.copytree(folder, plan.experts[name].folder, dirs_exist_ok=True)
    assert choose_wording(BACKBONE, plan, None, None, "union").source == "experts"
    assert choose_wording(BACKBONE, plan, None, None).source == "base"


def test_a_base_s_template_that_nobody_is_asked_with_is_not_warned_about(plan):
    set_template(plan.base.folder, SILENT_TEMPLATE)
    for expert in plan.experts.values():
        set_template(expert.folder, INSTRUCT)
    wording = choose_wording(BACKBONE, plan, None, None)
    assert not wording.formats.warnings
    fault = f"the chat template of {plan.base.folder} leaves out the question"
    assert wording.gets == [f"the merged folder has the chat template of Mistral-7B-Instruct-v0.1, since {fault}"]
    assert choose_wording(BACKBONE, plan, None, "base").gets == [
        "the merged folder has the chat template of base, which asks nothing; --chat_template_from chooses another"
    ]


def test_another_number_for_the_same_token_is_another_token(plan):
    from tests.checkpoints import CHARACTERS

    folder = plan.experts["Code"].folder
    set_template(folder, "a{% for m in messages %}{{ m.content }}{% endfor %}")
    swapped = [{"a": "b", "b": "a"}.get(token, token) for token in CHARACTERS]
    other_tokenizer(folder, swapped)
    (told,) = choose_formats(BACKBONE, plan).warnings
    assert "('a', number 4, in place of 'a', number 5)" in told


def test_a_folder_without_a_tokenizer_has_no_other_tokens(plan):
    folder = plan.experts["Code"].folder
    set_template(folder, "a{% for m in messages %}{{ m.content }}{% endfor %}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    formats = choose_formats(BACKBONE, plan)
    assert formats.experts["Code"].origin == "the chat template of my-coder"
    assert not formats.warnings


def test_the_digest_follows_all_that_decides_tokens():
    template = ChatTemplate("{{ messages[0].content }}", "X")
    one = Format("a", "{question}", end="</s>")
    others = [
        replace(one, text="{question}!"),
        replace(one, end=None),
        Format("a", "", template, "</s>"),
        Format("a", "", replace(template, text="{{ messages[-1].content }}"), "</s>"),
        Format("a", "", replace(template, special_tokens=(("bos_token", "<s>"),)), "</s>"),
    ]
    assert len({found.digest for found in (one, *others)}) == 6
    assert replace(one, origin="b").digest == one.digest
    formats = [Formats(one, {"A": found}) for found in (one, *others)] + [Formats(one, {"A": one}, {"T": others[0]})]
    assert len({found.digest for found in formats}) == 7


def test_a_question_that_a_template_drops_is_refused():
    template = ChatTemplate("{{ messages[0].content | replace('7', '') }}", "X")
    with pytest.raises(InputError) as caught:
        Format("t", "", template).prompt("What is 7?")
    assert caught.value.problems == (
        "the chat template of X leaves out the question; give --prompt_template with {question} in it",
    )
    assert Format("t", "", replace(template, text="{{ messages[0].content | trim }}")).prompt(" Why? ") == "Why?"


def chosen(plan: Plan, asked: str | None = None, backbone=BACKBONE):
    wording = choose_wording(backbone, plan, None, asked)
    return wording.source, wording.template and wording.template.text


def test_the_merged_folder_keeps_a_template_that_asks(plan):
    set_template(plan.base.folder, INSTRUCT)
    for expert in plan.experts.values():
        set_template(expert.folder, "X" + INSTRUCT)
    assert chosen(plan) == ("base", None)
    assert chosen(plan, "Code") == ("Code", "X" + INSTRUCT)


def test_the_merged_folder_gets_what_all_experts_share(plan, tmp_path):
    for expert in plan.experts.values():
        assert chosen(plan) == ("base", None)
        set_template(expert.folder, INSTRUCT)
    assert chosen(plan) == ("experts", INSTRUCT)
    assert chosen(plan, "base") == ("base", None)
    other = make(tmp_path / "other")
    for expert in other.experts.values():
        set_template(expert.folder, INSTRUCT)
    other_tokenizer(other.experts["Code"].folder, ["<s>", "</s>", "<pad>", "<unk>", "["])
    assert chosen(other) == ("base", None), "the base's tokenizer must make the same tokens of it"


def test_the_merged_folder_gets_the_family_s_template_in_place_of_one_that_asks_nothing(tmp_path):
    plan = make(tmp_path)
    write_checkpoint(tmp_path / "base", TENSORS, config={"model_type": "qwen2_vl"})
    plan = make_plan(tmp_path / "base", {name: one.folder for name, one in plan.experts.items()}, [])
    save_processor(tmp_path / "base")
    (tmp_path / "base" / "chat_template.json").write_text(json.dumps({"chat_template": SILENT_TEMPLATE}))
    source, template = chosen(plan, backbone=QWEN)
    assert (source, template) == ("family", QWEN.asking.conversation.template.text)
    assert chosen(plan, "family", QWEN) == ("family", template)
    assert chosen(plan, "base", QWEN) == ("base", None)
    shutil.rmtree(tmp_path / "base")
    write_checkpoint(tmp_path / "base", TENSORS, config={"model_type": "another"})
    plan = make_plan(tmp_path / "base", {name: one.folder for name, one in plan.experts.items()}, [])
    assert chosen(plan, backbone=QWEN) == ("base", None), "the base is of another family"


def test_a_template_that_cannot_be_taken_is_refused(plan):
    set_template(plan.experts["Chat"].folder, SILENT_TEMPLATE)
    for asked, expected in {
        "Math": f"{plan.experts['Math'].folder} has no chat template; choose another",
        "Chat": f"the chat template of {plan.experts['Chat'].folder} leaves out the question; choose another",
        "family": "Mistral has none; choose among base, Chat, Math, Code",
        "Maths": "no such expert. Did you mean 'Math'?",
    }.items():
        with pytest.raises(InputError) as caught:
            chosen(plan, asked)
        assert caught.value.problems == (f"--chat_template_from {asked}: {expected}",)


def test_a_family_may_be_asked_in_its_published_words_alone(plan):
    set_template(plan.base.folder, SILENT_TEMPLATE)
    set_template(plan.experts["Math"].folder, INSTRUCT)
    conversation = Format("the published conversation", "U: {question} A:", end="|")
    family = replace(BACKBONE, asking=Asking(conversation=conversation, reads_templates=False))
    formats = choose_formats(family, plan)
    assert {found.origin for found in (formats.default, *formats.named.values())} == {"the published conversation"}
    assert not formats.warnings
    assert chosen(plan, backbone=family) == ("base", None)
    assert choose_wording(family, plan, None, None).card([]) == (
        "It has the chat template of base. Ask it as the expert of the task is asked, with a line break for each "
        '`\\n`:\n\n- All tasks: `"U: {question} A:{response}|"`, the published conversation'
    )
    assert choose_wording(family, plan, None, "Math").gets == ["the merged folder has the chat template of MAmmoTH2-7B"]


def test_the_card_says_how_to_ask(plan):
    set_template(plan.experts["Chat"].folder, INSTRUCT)
    card = choose_wording(BACKBONE, plan, None, None).card([])
    assert card == (
        "It has no chat template. Ask it as the expert of the task is asked, with a line break for each `\\n`:\n\n"
        '- Chat: `"<s>[INST] {question} [/INST]{response}</s>"`, the chat template of Mistral-7B-Instruct-v0.1\n'
        '- Math: `"You are supposed to provide a solution to a given problem.\\n\\n\\nProblem:\\n{question}\\n'
        "Solution: Let's think step by step.\\n{response}\"`, the format of MAmmoTH2-7B\n"
        '- Code: `"{question}{response}"`, the bare question'
    )
    for expert in plan.experts.values():
        set_template(expert.folder, INSTRUCT)
    card = choose_wording(BACKBONE, plan, None, None).card(["chat_template.base.json"])
    assert card.startswith(
        "It has the chat template of Mistral-7B-Instruct-v0.1. The base's is kept in `chat_template.base.json`. Ask it"
    )
