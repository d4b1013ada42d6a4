"""The merged model's card: what it was made of, how, and how to load it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from expert_merging.backbone import Evaluation
from expert_merging.checkpoints.folders import origin, owner
from expert_merging.documents import parse_yaml, read_text
from expert_merging.errors import InputError, one_line
from expert_merging.records import method_in_words
from expert_merging.run import Run

CARD = "README.md"
# What Markdown may take for something else than text.
_MARKS = re.compile(r"[\\`*\[\]<>|#&~$!]|(?<![^\W_])_|_(?![^\W_])")
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\n---", re.DOTALL)
# What every card has after its front matter.
_CONTENTS = """
# {title}

{made} by `{method}`.{about}

| role | checkpoint |
|---|---|
{table}

## Options

```json
{options}
```
"""

_CARD = """---
{licence}library_name: transformers
pipeline_tag: {task}
base_model:
{sources}
base_model_relation: merge
tags:
- merge
- expert-merging
---
{contents}{command}
{origin}

## Use

{layout}:

```python
{example}
```
{asking}"""

_ADAPTER_CARD = """---
{licence}library_name: peft
base_model: {base_name}
tags:
- merge
- lora
- expert-merging
---
{contents}
## Use

It belongs on its base alone, whose modules must have the names that they have for the adapters above. Where the base is
loaded otherwise than here, load it as for them:

```python
from peft import PeftModel
from transformers import {classes}

base = {model}
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""

_MADE = "{merged} of {tensors} tensors were merged; the others are the base's or the experts', or were made for it."
_KEPT = (
    "{merged} of {tensors} tensors were merged; the others, and every other file of this folder, are the base's{but}."
)
_LAYOUTS = {
    True: "This folder has the layout, tensor names and types of its base and loads the same way",
    False: "This folder is a model of its own kind, which its config.json names",
}

_COMMAND = """
This command made it, with checkpoints by their names and without other paths of the machine:

```
{command}
```
"""

_EXAMPLE = """from transformers import {classes}

model = {model}
{second} = {processor}"""


def model_card(
    description: Mapping[str, Any],
    *,
    title: str,
    loading: tuple[str, str],
    merged: int,
    tensors: int,
    is_mirror: bool = True,
    keeps_others: bool = True,
    about: str = "",
    asking: str = "",
    task: str = "text-generation",
    command: str = "",
) -> str:
    """Text of the merged folder's ``README.md``.

    Args:
        description: the run's ``config.json``.
        title: the run's name.
        loading: expressions that load model and processor, with ``{model}`` for the folder.
        merged: number of tensors that were merged.
        tensors: number of all tensors.
        is_mirror: the model has the base's layout.
        keeps_others: what is not merged is the base's.
        about: what else is to be said of the model, in Markdown.
        asking: in which words it is to be asked, in Markdown.
        task: what the Hub calls what the model does.
        command: the command that makes it again; empty where it is not known.
    """
    options = dict(description["options"])
    experts = options.pop("expert")
    base = options.pop("base_model_path")
    names = {"base": base, **experts}
    made = f"{code(checkpoint_name(base))} merged with {len(experts)} experts"
    own = {**options, "seed": description["seed"]}
    origin_form = _KEPT if is_mirror else _MADE
    return _CARD.format(
        licence=_licence_line(names.values()),
        task=task,
        command=_COMMAND.format(command=one_line(command)) if command else "",
        sources="\n".join(map(_front_matter_entry, names.values())),
        contents=_contents(
            made,
            names,
            description.get("adapters", ()),
            title=title,
            method=method_in_words(description),
            options=own,
            about=about,
        ),
        origin=origin_form.format(
            merged=merged, tensors=tensors, but="" if keeps_others else ", but for embeddings, head and tokenizer"
        ),
        layout=_LAYOUTS[is_mirror],
        asking=f"\n{asking}\n" if asking else "",
        example=_example(loading),
    )


def adapter_card(
    base: Path, adapters: Mapping[str, Path], *, title: str, method: str, options: Mapping[str, Any], loading: str
) -> str:
    """Text of the ``README.md`` of a merged adapter.

    Args:
        base: the base's folder.
        adapters: folders of the adapters by name.
        title: the run's name.
        method: the method's.
        options: its options.
        loading: expression that loads the base, with ``{model}`` for it.
    """
    names = {"base": str(base), **{name: str(folder) for name, folder in adapters.items()}}
    base_name = checkpoint_name(str(base))
    made = f"A LoRA adapter of {code(base_name)}, merged of {len(adapters)} adapters"
    return _ADAPTER_CARD.format(
        licence=_licence_line(names.values()),
        base_name=json.dumps(one_line(base_name), ensure_ascii=False),
        contents=_contents(made, names, [*adapters], title=title, method=method, options=options),
        classes=loading.split(".")[0],
        model=loading.format(model="path/to/the/base"),
    )


def _contents(
    made: str,
    names: Mapping[str, str],
    adapters: Container[str],
    *,
    title: str,
    method: str,
    options: Mapping[str, Any],
    about: str = "",
) -> str:
    """What it is, what it was made of, and with which options."""
    shown = {name: value for name, value in options.items() if is_shown(value)}
    return _CONTENTS.format(
        title=inline(title),
        made=made,
        method=method,
        about=f"\n\n{about}" if about else "",
        table=_table(names, adapters),
        options=json.dumps(shown, indent=2),
    )


def _licence_line(paths: Iterable[str]) -> str:
    """The line of the front matter that says the licence; nothing where it is not known."""
    licence = _common_licence(paths)
    return f"license: {json.dumps(licence)}\n" if licence else ""


def _front_matter_entry(path: str) -> str:
    """A checkpoint in the front matter's list of sources."""
    return f"- {json.dumps(one_line(checkpoint_name(path)), ensure_ascii=False)}"


def _table(names: Mapping[str, str], adapters: Container[str]) -> str:
    """Rows of the table of sources.

    Args:
        names: path of each source by its role.
        adapters: roles of those that are adapters.
    """
    return "\n".join(
        f"| {inline(role)} | {cell(checkpoint_name(path))}{_details(path, is_adapter=role in adapters)} |"
        for role, path in names.items()
    )


def _example(loading: tuple[str, str]) -> str:
    """Code that loads the model and what goes before it, given the expressions for both."""
    model, processor = (expression.format(model="path/to/this/folder") for expression in loading)
    return _EXAMPLE.format(
        second="tokenizer" if processor.startswith("AutoTokenizer") else "processor",
        classes=", ".join(expression.split(".")[0] for expression in loading),
        model=model,
        processor=processor,
    )


def vlmeval_config(evaluation: Evaluation, name: str, folder: Path) -> bytes:
    """Content of a file for ``python run.py --config FILE`` of VLMEvalKit.

    Args:
        evaluation: how models of the kind are evaluated.
        name: what the model is called in its tables.
        folder: where the model is.
    """
    benchmarks = evaluation.benchmarks.items()
    data = {benchmark: {"class": dataset, "dataset": benchmark} for benchmark, dataset in benchmarks}
    config = {"model": {name: {**evaluation.vlmeval, "model_path": str(folder)}}, "data": data}
    return (json.dumps(config, indent=2) + "\n").encode()


def inline(text: str) -> str:
    """Text in Markdown that shows as it is, whatever it may be taken for: a heading, a link, HTML, a table's border."""
    return _MARKS.sub(r"\\\g<0>", one_line(text))


def code(text: str) -> str:
    """Text in Markdown as code, whatever backticks are in it."""
    shown = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def cell(text: str) -> str:
    """The same inside of a table."""
    return code(text).replace("|", r"\|")


def is_shown(value: Any) -> bool:
    """Whether an option's value goes into the card: where files lie on this machine helps nobody else."""
    is_place = isinstance(value, str) and os.path.isabs(value) and os.path.exists(Path(*Path(value).parts[:2]))
    return value is not None and not is_place  # a text that begins with a slash may be a prompt


def checkpoint_name(path: str) -> str:
    """A checkpoint's name without the folders of the machine where it was merged."""
    run = Run.found_at(Path(path))
    return owner(path) if run is None else run.name


def _details(path: str, *, is_adapter: bool) -> str:
    """Kind, revision and licence of a checkpoint, as far as they are known."""
    repository, licence = origin(path), _licence(Path(path) / CARD)
    known = ["LoRA adapter"] if is_adapter else []
    known += [f"revision {inline(repository[1])}"] if repository else []
    known += [f"licence {inline(licence)}"] if licence else []
    return f" ({', '.join(known)})" if known else ""


def _common_licence(paths: Iterable[str]) -> str | None:
    """The licence of what is made of checkpoints: theirs if it is one, ``other`` if they differ, None if unknown."""
    licences = [_front_matter(Path(path) / CARD).get("license") for path in paths]
    if not all(isinstance(licence, str) and licence.strip() for licence in licences):
        return None
    return licences[0] if len({*licences}) == 1 else "other"


def _licence(file: Path) -> str | None:
    """The licence that a model card names in its front matter, by its own name if it has one."""
    data = _front_matter(file)
    licence = data.get("license_name") or data.get("license")
    return " ".join(licence.split()) if isinstance(licence, str) else None


def _front_matter(file: Path) -> Mapping[str, Any]:
    """What a model card says of itself; nothing where there is none, or nobody can read it."""
    try:
        front = _FRONT_MATTER.match(read_text(file))
        data = parse_yaml(front[1]) if front else None
    except (InputError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
