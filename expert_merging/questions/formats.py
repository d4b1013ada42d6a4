"""How models are asked: the text around a question, and what ends a turn.

Every fine-tune was trained on a format of its own. An expert that is asked in another one does not behave like itself,
and neither does what is learned from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from expert_merging.checkpoints.fingerprints import of_text
from expert_merging.checkpoints.folders import owner
from expert_merging.errors import InputError
from expert_merging.questions.templates import ChatTemplate, Content, fault, turn_end

QUESTION, RESPONSE = "{question}", "{response}"
_BY_TEMPLATE = "the chat template of "


@dataclass(frozen=True)
class Format:
    """How a model is asked, and how its turn ends.

    Args:
        origin: where it is from, for log and card.
        text: text with ``{question}`` in it, which the tokenizer's own special tokens are added to; unused with a
            template.
        template: a chat template, which writes special tokens itself.
        end: text that ends the model's turn; None for the tokenizer's end token.
        adds_special_tokens: the tokenizer has to add its start token to a prompt.
    """

    origin: str
    text: str = QUESTION
    template: ChatTemplate | None = None
    end: str | None = None
    adds_special_tokens: bool = True

    @classmethod
    def of_text(cls, origin: str, text: str, end: str | None) -> Format:
        """A format from a text.

        Args:
            origin: where it is from.
            text: text with ``{question}`` in it; what ends a turn may follow after ``{response}``.
            end: what ends a turn where the text does not say.
        """
        prompt, found, rest = text.partition(RESPONSE)
        return cls(origin, prompt, end=rest if found else end)

    @classmethod
    def of_template(cls, template: ChatTemplate, end: str | None) -> Format:
        """A format from a chat template, which says itself how a turn ends; ``end`` counts where it does not."""
        return cls(f"{_BY_TEMPLATE}{owner(template.name)}", "", template, turn_end(template) or end, False)

    @classmethod
    def of_record(cls, record: Mapping[str, str]) -> Format:
        """The format that a `record` tells of, as a text.

        Raises:
            KeyError, TypeError, AttributeError: it is something else.
        """
        origin = record["from"]
        return replace(
            cls.of_text(origin, record["example"], None), adds_special_tokens=not origin.startswith(_BY_TEMPLATE)
        )

    def prompt(self, content: Content) -> str:
        """The text of a prompt, ending where the answer starts.

        Args:
            content: the question; for a template also parts of which some are pictures.

        Raises:
            InputError: the template raises an error, does not come to an end, or leaves out the question.
        """
        if self.template is not None:
            try:
                return self.template.ask(content)
            except InputError as error:
                raise InputError(f"{error}; give --prompt_template with {QUESTION} in it") from None
        return self.text.replace(QUESTION, str(content))

    @property
    def example(self) -> str:
        """What a conversation looks like, with ``{question}`` and ``{response}`` in it."""
        return self.prompt(QUESTION) + RESPONSE + (self.end or "")

    @property
    def shown(self) -> str:
        """The example in one line, as JSON."""
        return json.dumps(self.example, ensure_ascii=False)

    @property
    def described(self) -> str:
        """Origin and example in one line."""
        return f"{self.origin}, `{self.shown}`"

    @property
    def record(self) -> dict[str, str]:
        """For files: where it is from, and what it looks like."""
        return {"from": self.origin, "example": self.example}

    @property
    def digest(self) -> str:
        """A digest of all that decides tokens."""
        template = None if self.template is None else [self.template.text, self.template.special_tokens]
        return of_text(json.dumps([self.text, template, self.end]))


@dataclass(frozen=True)
class Asking:
    """How the models of a family are asked.

    Args:
        conversation: the published format of the family, where it has one.
        known: formats of published experts whose folders do not say, by folder name.
        vocabulary: entries that a checkpoint's vocabulary must have to be a published one.
        end: what ends a turn, where nothing else says; None for the tokenizer's end token.
        picture: the text that a chat template writes in a picture's place; empty for language models.
        reads_templates: chat templates count; otherwise the family is asked in its published format alone.
    """

    conversation: Format | None = None
    known: Mapping[str, Format] = field(default_factory=dict)
    vocabulary: int = 0
    end: str | None = None
    picture: str = ""
    reads_templates: bool = True

    def fault(self, template: ChatTemplate) -> str | None:
        """Why a chat template cannot be used; None where it can."""
        return fault(template, self.picture)

    def format_of(self, template: ChatTemplate | None) -> Format:
        """How a model with this chat template, or without one, is asked.

        That is with the template if it renders a question, else in the family's published format, else the question is
        put as it is.
        """
        if self.reads_templates and template is not None and self.fault(template) is None:
            return Format.of_template(template, self.end)
        return self.conversation or Format("the bare question", end=self.end)

    def known_format(self, folder: Path, vocabulary: int | None) -> Format | None:
        """The format of a published expert, None for others.

        Args:
            folder: the checkpoint.
            vocabulary: entries of its vocabulary.
        """
        return self.known.get(owner(folder).rpartition("/")[2]) if vocabulary == self.vocabulary else None
