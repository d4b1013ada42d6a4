"""Chat templates: where a checkpoint folder keeps one, what it renders, and whether it asks what it is given.

A template is code from a checkpoint. It is rendered in transformers' sandbox alone, and with little time and memory.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from expert_merging.checkpoints.folders import refuse_pointers
from expert_merging.documents import read_json, read_text
from expert_merging.errors import InputError
from expert_merging.libraries import import_transformers
from expert_merging.machine import limited_memory
from expert_merging.writing import put_aside, write_atomically

Message = Mapping[str, Any]
# Content of a message: a text, or parts of which some are pictures.
Content = str | Sequence[Mapping[str, str]]

JINJA, JSON, TOKENIZER = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"
# From what counts most to what counts least, as in transformers.
_FILES = (JINJA, JSON, TOKENIZER)
_SPECIAL_TOKENS = "special_tokens_map.json"
# Of a processor, which other programs cannot take away; templates take thousandths of them.
_SECONDS = 1
_MEMORY = 1 << 29
# Letters, digits and blanks alone, so that no template has a reason to change it.
_QUESTION, _ANSWER = "Which of 7 seas is blue", "The 2nd one is blue"
# What templates raise beside jinja's own errors, which depends on what they compute.
_FAULTS = (
    ImportError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    StopIteration,
    SyntaxError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template.

    Args:
        text: the template.
        name: whose it is, for messages.
        special_tokens: tokens that a template may name, such as ``("eos_token", "</s>")``.
    """

    text: str
    name: str
    special_tokens: tuple[tuple[str, str], ...] = ()

    def render(self, messages: Sequence[Message], *, asks: bool = True) -> str:
        """The text of a conversation.

        Args:
            messages: each with ``role`` and ``content``.
            asks: the model's turn comes next, and its beginning is added.

        Raises:
            InputError: the template raises an error, or does not come to an end.
        """
        import_transformers()
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        if _has_power(self.text):
            raise InputError(f"the chat template of {self.name} computes a power (**), which none needs and none may")
        try:
            with _limited(), limited_memory(_MEMORY):
                (text,), _ = render_jinja_template(
                    [list(messages)], chat_template=self.text, add_generation_prompt=asks, **dict(self.special_tokens)
                )
        except TimeoutError:
            raise InputError(f"the chat template of {self.name} does not come to an end") from None
        except (TemplateError, *_FAULTS) as error:
            said = " ".join(str(error).split()) or type(error).__name__  # whatever the template wants to be said
            raise InputError(f"the chat template of {self.name} raises an error ({said[:200]})") from None
        return str(text)

    def ask(self, content: Content) -> str:
        """The prompt of one question, ending where the answer starts.

        Raises:
            InputError: the template raises an error, does not come to an end, or leaves out the question.
        """
        text = self.render([{"role": "user", "content": content}])
        parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
        if not all(part.strip() in text for part in parts):
            raise InputError(f"the chat template of {self.name} leaves out the question")
        return text


@contextmanager
def _limited() -> Iterator[None]:
    """Around what may loop for ever: a `TimeoutError` after some seconds of work, where signals can be had."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError

    before, hook = signal.signal(signal.SIGVTALRM, stop), sys.unraisablehook
    # Python tells of what is raised where nobody can hear it, as while an object is let go of; the next one is heard.
    sys.unraisablehook = lambda _: None
    signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS, _SECONDS / 4)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        sys.unraisablehook = hook


@cache
def _has_power(text: str) -> bool:
    """Whether a template computes a power: one number of many digits cannot be stopped while it is computed."""
    from jinja2 import Environment, TemplateError

    before = ""
    try:
        for _, kind, value in Environment(autoescape=True).lex(text):
            if value == "**" and kind == "operator" and before not in ("(", ","):  # which unpack arguments
                return True
            before = before if kind == "whitespace" else value
    except TemplateError:  # which rendering tells of
        return False
    return False


@cache
def fault(template: ChatTemplate, picture: str = "") -> str | None:
    """Why a template cannot be used to ask; None where it can.

    Args:
        template: the template.
        picture: the text that a rendered prompt has in a picture's place; empty for a language model.
    """
    try:
        template.ask(_QUESTION)
        shown = template.ask([{"type": "image"}, {"type": "text", "text": _QUESTION}]) if picture else ""
    except InputError as error:
        return str(error)
    if picture and shown.count(picture) != 1:
        return f"the chat template of {template.name} has {shown.count(picture)} places for 1 picture"
    return None


@cache
def turn_end(template: ChatTemplate) -> str | None:
    """What a template writes after an answer, without the blanks before the next turn; None where that is nothing."""
    conversation = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = template.render(conversation, asks=False)
    except InputError:  # it takes no answers
        return None
    _, found, end = text.rpartition(_ANSWER)
    return end.rstrip(" ") or None if found else None


def read_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a checkpoint folder; None where it has none.

    Raises:
        InputError: a file that may hold one is no valid JSON.
    """
    for file in _FILES:
        text = _text_in(folder / file)
        if text is not None:
            return ChatTemplate(text, str(folder), _named_in(text, special_tokens_of(folder)))
    return None


def _text_in(file: Path) -> str | None:
    """The template that a file holds; of several by name, the default."""
    if not file.is_file():
        return None
    if file.name == JINJA:
        refuse_pointers([file])  # which would render as a template that asks nothing
        return read_text(file)
    return default_of(_read_json(file).get("chat_template"))


def template_of(tokenizer: Any) -> ChatTemplate | None:
    """The chat template of a tokenizer in memory; None where it has none."""
    text = default_of(getattr(tokenizer, "chat_template", None))
    tokens = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return None if text is None else ChatTemplate(text, str(tokenizer.name_or_path), _named_in(text, tokens))


def default_of(templates: Any) -> str | None:
    """The template that counts: the only one, or that named ``default`` of a dictionary or of a list of named ones."""
    if isinstance(templates, list):
        entries = [entry for entry in templates if isinstance(entry, dict)]
        templates = {entry.get("name"): entry.get("template") for entry in entries}
    if isinstance(templates, dict):
        templates = templates.get("default")
    return templates if isinstance(templates, str) else None


def _named_in(text: str, tokens: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The special tokens that a template names; others do not change what it renders."""
    return tuple(sorted((name, token) for name, token in tokens.items() if name in text))


def special_tokens_of(folder: Path) -> dict[str, str]:
    """The tokens that the tokenizer files of a folder name, such as ``eos_token``."""
    found: dict[str, str] = {}
    for file in (folder / _SPECIAL_TOKENS, folder / TOKENIZER):
        for name, token in _read_json(file).items() if file.is_file() else ():
            content = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(content, str):
                found[name] = content
    return found


def _read_json(file: Path) -> dict[str, Any]:
    refuse_pointers([file])
    content = read_json(file)
    return content if isinstance(content, dict) else {}


def put_template(text: str, folder: Path) -> list[str]:
    """Give a folder a chat template in every file where it has one, or in a file of its own.

    Args:
        text: the template.
        folder: a model's folder.

    Returns:
        Names under which the files as they were are kept.
    """
    texts = {folder / file: _text_in(folder / file) for file in _FILES}
    present = [file for file, former in texts.items() if former is not None]
    files = [file for file in present if texts[file] != text]
    kept = []
    for file in files:
        kept.append(put_aside(file).name)
    for file in files if present else [folder / JINJA]:
        content = text
        if file.name != JINJA:
            content = json.dumps({**_read_json(file), "chat_template": text}, indent=2, ensure_ascii=False) + "\n"
        write_atomically(file, content.encode())
    return kept
