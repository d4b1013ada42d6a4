"""The merged model's card: what it was made of, how, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_CARD = """---
base_model:
{sources}
tags:
- merge
- expert-merging
---

# {title}

`{base}` merged with {count} experts by `{method}`.

| role | checkpoint |
|---|---|
{table}

## Options

```json
{options}
```

{merged} of {tensors} tensors were merged; the others, and every other file of this folder, are the base's.

## Use

This folder has the layout, tensor names and types of its base and loads the same way:

```python
{example}
```
"""

_TEXT_EXAMPLE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")"""


def model_card(description: Mapping[str, Any], *, title: str, merged: int, tensors: int) -> str:
    """Text of the merged folder's ``README.md``.

    Args:
        description: the run's ``config.json``.
        title: the run's name.
        merged: number of tensors that were merged.
        tensors: number of all tensors.
    """
    options = dict(description["options"])
    for place in ("data_dir", "coefficients"):  # where files lie on this machine helps nobody else
        options.pop(place, None)
    experts = options.pop("expert")
    base = options.pop("base_model_path")
    names = {"base": base, **experts}
    return _CARD.format(
        sources="\n".join(f"- {json.dumps(_name(path), ensure_ascii=False)}" for path in names.values()),
        title=title,
        base=_name(base),
        count=len(experts),
        method=description["method"],
        table="\n".join(f"| {role} | `{_name(path)}` |" for role, path in names.items()),
        options=json.dumps({**options, "seed": description["seed"]}, indent=2),
        merged=merged,
        tensors=tensors,
        example=_TEXT_EXAMPLE,
    )


def _name(path: str) -> str:
    """A checkpoint's name without the folders of the machine where it was merged."""
    return path.rstrip("/").rsplit("/", 1)[-1]
