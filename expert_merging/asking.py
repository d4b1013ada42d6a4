"""In whose words the models of a run are asked: each expert in its own, and the merged model later.

Tokens are always the base's, since the merged model has the base's embeddings. So an expert's own words are used only
where the base's tokenizer makes the same tokens of them.
"""

from __future__ import annotations

import filecmp
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path

from expert_merging.backbone import Backbone, load_tokenizer
from expert_merging.card import code, inline
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.checkpoints.configurations import language_setting
from expert_merging.checkpoints.fingerprints import of_text
from expert_merging.checkpoints.folders import owner
from expert_merging.errors import InputError, near_name
from expert_merging.plan import Plan
from expert_merging.questions.calibration import Sample
from expert_merging.questions.formats import QUESTION, Asking, Format
from expert_merging.questions.templates import ChatTemplate, read_template

GIVEN = "--prompt_template"
BASE, EXPERTS, FAMILY = "base", "experts", "family"
# Before a task's name where formats are named by expert.
TASK = "task "
# The base's is compared with one expert's after the other.
_tokenizer = lru_cache(maxsize=2)(load_tokenizer)


@dataclass(frozen=True)
class Formats:
    """How the models of a run are asked.

    Args:
        default: for questions of no expert of the run.
        experts: by expert.
        tasks: by task, where that is given apart from the expert.
        warnings: what may not be as the user thinks.
    """

    default: Format
    experts: Mapping[str, Format] = field(default_factory=dict)
    tasks: Mapping[str, Format] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def of(self, sample: Sample) -> Format:
        """How a sample is asked."""
        return self.tasks.get(sample.task) or self.experts.get(sample.expert) or self.default

    @property
    def digest(self) -> str:
        """A digest of all that decides tokens."""
        named = {name: found.digest for name, found in (*self.experts.items(), *self.tasks.items())}
        return of_text(json.dumps([self.default.digest, named]))

    @property
    def named(self) -> dict[str, Format]:
        """By expert, and by task where that differs."""
        return {**self.experts, **{f"{TASK}{name}": found for name, found in self.tasks.items()}}

    @property
    def grouped(self) -> dict[str, Format]:
        """The same by all names that share a format, such as ``Chat, Code``."""
        groups: dict[str, list[str]] = {}
        for name, found in self.named.items():
            groups.setdefault(found.digest, []).append(name)
        return {", ".join(names): self.named[names[0]] for names in groups.values()}

    @property
    def record(self) -> dict[str, dict[str, str]]:
        """For files: where each format is from, and what it looks like."""
        return {name: one.record for name, one in self.named.items()}


def choose_formats(
    backbone: Backbone, plan: Plan, given: str | Mapping[str, str] | None = None, tokenizer: str = BASE
) -> Formats:
    """In whose words the models of a run are asked.

    An expert's are those that are given for it, else its own chat template's, else those that its family knows of the
    published checkpoint, else the base's.

    Args:
        backbone: the model family.
        plan: the checkpoints.
        given: a text with ``{question}`` in it for all, or texts by expert or task.
        tokenizer: whose tokens questions are cut into: ``base``, an expert's name or ``union``.

    Raises:
        InputError: a file that may hold a chat template cannot be read.
    """
    asking = backbone.asking
    if isinstance(given, str):
        only = Format.of_text(GIVEN, given, asking.end)
        return Formats(only, dict.fromkeys(plan.experts, only))
    texts = {name: Format.of_text(GIVEN, text, asking.end) for name, text in (given or {}).items()}
    of_base = read_template(plan.base.folder) if asking.reads_templates else None
    default, warnings, experts = asking.format_of(of_base), [], {}
    cutting = _cutting(plan, tokenizer)
    for name, expert in plan.experts.items():
        found = texts.pop(name, None)
        if found is None:
            found, problem = _of_expert(asking, cutting, of_base, expert)
            found = found or default
            if problem is not None:
                warnings.append(f"{problem}; expert {name} is asked in other words: {found.origin}")
        experts[name] = found
    without = [name for name, found in experts.items() if found is default]
    if of_base is not None and without and (fault := asking.fault(of_base)):
        warnings.insert(0, f"{fault}; in its place stands {default.origin}, for {', '.join(without)}")
    return Formats(default, experts, texts, tuple(warnings))


def _of_expert(
    asking: Asking, cutting: Checkpoint | None, of_base: ChatTemplate | None, expert: Checkpoint
) -> tuple[Format | None, str | None]:
    """The expert's own words, None where they are the base's; and what keeps its chat template from being used.

    ``cutting`` is the model whose tokenizer cuts questions, None for one that knows every expert's tokens.
    """
    known = asking.known_format(expert.folder, language_setting(expert.config, "vocab_size"))
    template = read_template(expert.folder) if asking.reads_templates else None
    if template is None:
        return known, None
    problem = asking.fault(template)
    if _same(template, of_base):
        return (known if problem else None), None
    if problem is None:
        own = Format.of_template(template, asking.end)
        other = None if cutting is None else other_tokens(cutting.folder, expert.folder, own.example)
        if cutting is None or other is None:
            return own, None
        whose = f"the tokenizer of {cutting.folder}"
        problem = f"{whose} makes other tokens of the chat template of {expert.folder} ({other})"
    return known, problem


def _same(one: ChatTemplate, other: ChatTemplate | None) -> bool:
    return other is not None and (one.text, one.special_tokens) == (other.text, other.special_tokens)


@cache
def other_tokens(base: Path, own: Path, text: str) -> str | None:
    """Where the tokens of a text begin to differ between two folders' tokenizers; None where they are the same.

    A folder without a tokenizer of its own has nothing that could differ.
    """
    files = [folder / "tokenizer.json" for folder in (base, own)]
    if all(file.is_file() for file in files) and filecmp.cmp(files[0], files[1], shallow=False):
        return None
    try:
        tokenizers = [_tokenizer(folder) for folder in (base, own)]
    except InputError:
        return None
    theirs, ours = (
        list(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True))
        for tokenizer in reversed(tokenizers)
        for ids in [tokenizer(text, add_special_tokens=False)["input_ids"]]
    )
    pairs = [*zip(theirs, ours, strict=False)]
    differing = next((pair for pair in pairs if pair[0] != pair[1]), None)
    if differing is None:
        return None if len(theirs) == len(ours) else f"{len(ours)} in place of {len(theirs)}"
    (number, token), (other_number, other) = differing
    return f"{other!r}, number {other_number}, in place of {token!r}, number {number}"


def check_given(given: str | Mapping[str, str] | None, experts: Mapping[str, object], tasks: set[str]) -> list[str]:
    """Problems of ``--prompt_template``.

    Args:
        given: a text for all, or texts by expert or task.
        experts: the experts by name.
        tasks: names of the tasks.
    """
    texts = {"": given} if isinstance(given, str) else (given or {})
    known = [*experts, *sorted(tasks - set(experts))]
    problems = [
        f"{GIVEN} must contain {QUESTION}, got {text!r}{f' for {name!r}' if name else ''}"
        for name, text in texts.items()
        if QUESTION not in text.partition("{response}")[0]
    ]
    problems += [
        f"{GIVEN} names {name!r}, which is no expert and no task. {near_name(name, known)}"
        for name in texts
        if name and name not in known
    ]
    return problems


@dataclass(frozen=True)
class Wording:
    """How the models of a run are asked, and what the merged folder says of it.

    Args:
        formats: the formats while experts run, of the base's tokens.
        asked: the formats of the merged model, of its own tokens.
        source: whose chat template the merged folder has: ``base``, ``family``, ``experts`` or an expert's name.
        template: the chat template that the merged folder gets; None where it keeps what the base has.
        merged: how the merged folder asks to be asked.
        has: what it has of chat templates, in words.
        reason: why that is not the base's, where the base's is of no use.
    """

    formats: Formats
    asked: Formats
    source: str
    template: ChatTemplate | None
    merged: Format
    has: str
    reason: str

    @property
    def of_merged(self) -> Formats:
        """How the merged model is asked: questions of an expert's task in the expert's words."""
        given = self.formats.default.origin == GIVEN
        return Formats(self.asked.default if given else self.merged, self.asked.experts, self.asked.tasks)

    @property
    def lines(self) -> list[str]:
        """Lines for the plan: the words of each expert."""
        return [f"{names}: asked with {found.described}" for names, found in self.formats.grouped.items()]

    @property
    def gets(self) -> list[str]:
        """A line for the plan where the merged folder does not have the base's chat template, or that is of no use."""
        return [f"the merged folder has {self.has}{self.reason}"] if self.template or self.reason else []

    @property
    def record(self) -> dict[str, object]:
        """For the run's ``config.json``."""
        return {"chat_template_from": self.source, "formats": self.formats.record}

    def card(self, kept: list[str]) -> str:
        """What the merged model's card says.

        Args:
            kept: names of the files that the base's chat template is in now.
        """
        former = f" The base's is kept in {' and '.join(f'`{name}`' for name in kept)}." if kept else ""
        words = {inline(names): f"{code(one.shown)}, {inline(one.origin)}" for names, one in self.asked.grouped.items()}
        if len(words) == 1:
            words = {"All tasks": next(iter(words.values()))}
        listed = "\n".join(f"- {names}: {text}" for names, text in words.items())
        return (
            f"It has {inline(self.has)}.{former} Ask it as the expert of the task is asked, with a line break for each "
            f"`\\n`:\n\n{listed}"
        )


def choose_wording(
    backbone: Backbone,
    plan: Plan,
    given: str | Mapping[str, str] | None,
    asked: str | None,
    tokenizer: str = BASE,
) -> Wording:
    """How the models of a run are asked, and the chat template of the merged folder.

    Args:
        backbone: the model family.
        plan: the checkpoints.
        given: ``--prompt_template``.
        asked: ``--chat_template_from``.
        tokenizer: whose tokenizer the merged model has: ``base``, an expert's name or ``union``.

    Raises:
        InputError: there is no such template, or it cannot be used.
    """
    source, template = _choose_template(backbone, plan, asked or _owner(backbone, plan, tokenizer), tokenizer)
    if template is None and tokenizer in plan.experts:  # the base's may lie in a tokenizer file, which is replaced
        template = read_template(plan.base.folder)
    held = template or read_template(plan.base.folder)
    has = "no chat template" if held is None else f"the chat template of {owner(held.name)}"
    fault = _fault_of_base(backbone.asking, plan)
    if held is not None and backbone.asking.reads_templates and backbone.asking.fault(held):
        has, reason = f"{has}, which asks nothing", "; --chat_template_from chooses another"
    else:
        reason = f", since {fault}" if fault else ""
    merged = backbone.asking.format_of(held)
    formats = choose_formats(backbone, plan, given)
    of_merged = formats if tokenizer == BASE else choose_formats(backbone, plan, given, tokenizer)
    return Wording(formats, of_merged, source, template, merged, has, reason)


def _fault_of_base(asking: Asking, plan: Plan) -> str | None:
    """Why the base's chat template cannot be used; None where it can or there is none."""
    own = read_template(plan.base.folder) if asking.reads_templates else None
    return None if own is None else asking.fault(own)


def _owner(backbone: Backbone, plan: Plan, tokenizer: str) -> str | None:
    """The expert whose tokenizer the merged model has, if it has a chat template that can be used too."""
    expert = plan.experts.get(tokenizer)
    template = read_template(expert.folder) if expert and backbone.asking.reads_templates else None
    return None if template is None or backbone.asking.fault(template) else tokenizer


def _choose_template(
    backbone: Backbone, plan: Plan, asked: str | None, tokenizer: str
) -> tuple[str, ChatTemplate | None]:
    """Whose template the merged folder gets, and the template where it is not the base's."""
    asking = backbone.asking
    if asked in plan.experts:
        return str(asked), _required(asking, str(asked), plan.experts[str(asked)].folder)
    published = asking.conversation.template if asking.conversation else None
    if asked == FAMILY:
        if published is None:
            known = ", ".join([BASE, *plan.experts])
            raise InputError(f"--chat_template_from family: {backbone.name} has none; choose among {known}")
        return FAMILY, published
    if asked not in (None, BASE):
        raise InputError(
            f"--chat_template_from {asked}: no such expert. {near_name(str(asked), [BASE, FAMILY, *plan.experts])}"
        )
    own = read_template(plan.base.folder) if asking.reads_templates else None
    if asked == BASE or not asking.reads_templates or (own is not None and asking.fault(own) is None):
        return BASE, None
    common = _common(asking, plan, tokenizer)
    if common is not None:
        return EXPERTS, common
    of_the_family = plan.base.model_type in backbone.evaluation
    return (BASE, None) if published is None or not of_the_family else (FAMILY, published)


def _required(asking: Asking, name: str, folder: Path) -> ChatTemplate:
    template = read_template(folder)
    reason = f"{folder} has no chat template" if template is None else asking.fault(template)
    if template is None or reason is not None:
        raise InputError(f"--chat_template_from {name}: {reason}; choose another")
    return template


def _common(asking: Asking, plan: Plan, tokenizer: str) -> ChatTemplate | None:
    """The template that all experts have, if it is one and the same and the merged tokenizer knows its tokens."""
    found = [read_template(expert.folder) for expert in plan.experts.values()]
    first = found[0]
    if first is None or asking.fault(first) is not None:
        return None
    if any(one is None or one.text != first.text for one in found):
        return None
    example = Format.of_template(first, asking.end).example
    cutting = _cutting(plan, tokenizer)
    if cutting is None:
        return first
    same = all(other_tokens(cutting.folder, expert.folder, example) is None for expert in plan.experts.values())
    return first if same else None


def _cutting(plan: Plan, tokenizer: str) -> Checkpoint | None:
    """The model whose tokenizer cuts texts; None for a union, which knows the tokens of all."""
    return {BASE: plan.base, **plan.experts}.get(tokenizer)
