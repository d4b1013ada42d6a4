"""Damaged contents of files of every kind that users give, as strategies of hypothesis."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

# What stands in a text for what `json.dumps` does not write.
_RAW = {
    "@deep@": "[" * 3000 + "]" * 3000,
    "@level@": '{"a":' * 99 + "0" + "}" * 99,
    "@digits@": "9" * 5000,
    "@large@": "9" * 299,
    "@infinite@": "1e999",
    "@half@": '"\\ud800"',
    "@nul@": '"a\\u0000b"',
}
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 10**9, 2**31, 2**63, 2**64, 10**30, -(10**30)),
    *(0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf")),
    *(
        "",
        " ",
        "x",
        "[/red]",
        "[bold]",
        "\x1b[31m",
        "a\nb",
        "../x",
        "/etc/passwd",
        "~nosuchuser/x",
        "x" * 300,
        "é",
        "\U0001f600",
    ),
    *([], {}, [[]], [{}], [1, 2], ["a"], {"a": 1}, {"": {}}, {"content": 3}, [None]),
    *_RAW,
]
NAMES = ["", "x", "__metadata__", "[/red]", "a/b", "a\nb", "\x00", "dtype", "shape", "weight", "type", "layers", "é"]
TEMPLATES = [
    "{{ raise_exception('no') }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ messages }}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 9 ** 9 ** 9 ** 9 }}",
    "{{ 'a'.ljust(10000000000) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ range(10000000) }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ cycler() }}{{ lipsum() }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{% include 'x' %}",
    "{% import 'x' as x %}",
    "{% extends 'x' %}",
    "{{ messages[0]['content'] | tojson(indent=999999999) }}",
    "{{ messages | map(attribute='x') | sum }}",
    "{% set x = namespace(a=1) %}{% for m in messages %}{% set x.a = m.content %}{% endfor %}{{ x.a / 0 }}",
    "{{ strftime_now('\\ud800%') }}",
    "{{ messages.append(1) }}",
    "{{ (1).real.bit_length(3) }}",
    "{{ dict(a=1) | items | first | join }}",
    "{% generation %}x{% endgeneration %}",
    "{% break %}",
    "{{ loop.index }}",
    "{{ self.x() }}",
    "{{ caller() }}",
    "{{ 1 | random }}{{ [] | random }}{{ [] | max }}{{ '' | round }}{{ 'x' | batch(0) | list }}",
    "{{ 'x' | slice(0) | list }}",
    "{{ 'x' | filesizeformat }}{{ 'x' | truncate(-1) }}{{ 'x' | wordwrap(0) }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "{% if a %}" * 300,
]
YAML = [
    "method: [/red]\n",
    "a: &a [1, 1, 1]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n",
    "? [a, b]\n: 1\n",
    "seed: 2020-01-01\n",
    "seed: !!python/object/apply:os.system [ls]\n",
    "seed: !!int abc\n",
    "seed: !!int ''\n",
    "seed: !!float x\n",
    "seed: !!bool x\n",
    "seed: !!null x\n",
    "seed: !!binary aGk=\n",
    "seed: !!timestamp x\n",
    "seed: !!set {a, b}\n",
    "seed: 1:30:59\n",
    "seed: 0x" + "f" * 3000 + "\n",
    "seed: 1e999\n",
    "<<: {seed: 1}\n",
    "<<: 3\n",
    "expert: {1: 2, null: 3, true: 4}\n",
    'output_path: "a\\0b"\n',
    'output_path: "\\ud800"\n',
    "output_path: ~nosuchuser/x\n",
    "--- 1\n--- 2\n",
    "%YAML 3.0\n---\na: 1\n",
    "\t- 1\n",
    "a: |\n  x\n ?",
    "[" * 1000,
    "- " * 1000,
    "{a: " * 300,
]


@st.composite
def documents(draw: st.DrawFn, seed: Any) -> str:
    """A text in JSON, or nearly, of a value with some of its parts exchanged."""
    content = [copy.deepcopy(seed)]
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        _exchange(draw, content)
    text = json.dumps(content[0], ensure_ascii=draw(st.booleans()))
    for name, raw in _RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text


def _exchange(draw: st.DrawFn, place: Any) -> None:
    """Go down into a value some way and change what is there."""
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        inside = place[key]
        if not (isinstance(inside, dict | list) and inside and draw(st.integers(0, 3))):
            break
        place = inside
    change = draw(st.integers(0, 9))
    if change == 0 and isinstance(place, dict):
        place[draw(st.sampled_from(NAMES))] = place.pop(key)
    elif change == 1 and len(place) > 1:
        del place[key]
    elif change == 2 and isinstance(place, dict):
        place[draw(st.sampled_from(NAMES))] = inside
    elif change == 3 and isinstance(inside, int):
        place[key] = inside + draw(st.sampled_from([-1, 1, 7]))
    elif change == 4 and isinstance(inside, str):
        place[key] = draw(st.text(max_size=8))
    else:
        place[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with some of them changed, lost, added, or in another encoding."""
    change = draw(st.integers(0, 6))
    place = draw(st.integers(0, max(0, len(content) - 1)))
    some = draw(st.binary(min_size=1, max_size=8))
    if change == 0:
        return content[:place]
    if change <= 2:
        return content[:place] + some + content[place + len(some) :]
    if change == 3:
        return content[:place] + some + content[place:]
    if change == 4:
        return b"\xef\xbb\xbf" + content
    if change == 5:
        return content.decode("utf-8", errors="replace").encode(
            draw(st.sampled_from(["utf-16", "utf-32", "utf-16-le"]))
        )
    return draw(st.binary(max_size=64))


def _mostly(draw: st.DrawFn, content: bytes) -> bytes:
    return content if draw(st.integers(0, 3)) else draw(damaged(content))


@st.composite
def json_files(draw: st.DrawFn, content: bytes) -> bytes:
    """A file in JSON."""
    return _mostly(draw, draw(documents(json.loads(content))).encode("utf-8", errors="surrogatepass"))


@st.composite
def line_files(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with a text in JSON in every line."""
    lines = content.decode().splitlines()
    number = draw(st.integers(0, len(lines) - 1))
    lines[number] = draw(documents(json.loads(lines[number])))
    return _mostly(draw, "\n".join(lines).encode("utf-8", errors="surrogatepass"))


@st.composite
def safetensors_files(draw: st.DrawFn, content: bytes) -> bytes:
    """A file whose header is another; the length of the header is mostly right."""
    length = struct.unpack("<Q", content[:8])[0]
    described, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    types = ("F32", "BF16", "F64", "U8", "I64", "K32", "F4", "F6_E2M3", "F8_E8M0", "C64", "BOOL", "f32", "")
    if not draw(st.integers(0, 3)):
        entry = draw(st.sampled_from([value for value in described.values() if "dtype" in value]))
        entry["dtype"] = draw(st.sampled_from(types))
    header = draw(documents(described)).encode("utf-8", errors="surrogatepass")
    header = _mostly(draw, header)
    length = len(header) if draw(st.integers(0, 5)) else draw(st.sampled_from([0, 1, len(header) - 1, 2**32, 2**63]))
    return _mostly(draw, struct.pack("<Q", length % 2**64) + header + data)


@st.composite
def templates(draw: st.DrawFn, content: bytes) -> bytes:
    """A chat template: pieces of one, and pieces that hang, raise or take memory."""
    text = content.decode()
    place = draw(st.integers(0, len(text)))
    pieces = [text[:place], draw(st.sampled_from(TEMPLATES)), text[place:]]
    chosen = draw(st.lists(st.sampled_from([*pieces, text, "{{ messages[0].content }}"]), max_size=3))
    return _mostly(draw, "".join(pieces if draw(st.booleans()) else chosen).encode())


@st.composite
def yaml_files(draw: st.DrawFn, content: bytes) -> bytes:
    """A file of options: lines of one, lines in which YAML differs from JSON, or JSON."""
    if draw(st.booleans()):
        return _mostly(draw, draw(documents(json.loads(content))).encode("utf-8", errors="surrogatepass"))
    lines = [f"{name}: {json.dumps(value)}\n" for name, value in json.loads(content).items()]
    chosen = draw(st.lists(st.sampled_from([*lines, *YAML]), min_size=1, max_size=4))
    return _mostly(draw, "".join(chosen).encode())


@st.composite
def settings_files(draw: st.DrawFn, content: bytes) -> bytes:
    """A file of variables, as ``.env`` is."""
    values = [
        "x",
        "'x",
        '"a\\0b"',
        "~nosuchuser/x",
        "$CACHE_DIR",
        "${CACHE_DIR}",
        "é",
        "x" * 5000,
        "",
        "a\x00b",
        "\x7f",
    ]
    lines = [f"CACHE_DIR={value}" for value in values]
    lines += [content.decode(), "export", "=", "A", "CACHE_DIR", "# é", "A=${A:-${A}}"]
    return _mostly(draw, "\n".join(draw(st.lists(st.sampled_from(lines), max_size=4))).encode())


# By the ending of a file's name; what has none of these is damaged byte by byte.
KINDS: dict[str, Callable[[bytes], st.SearchStrategy[bytes]]] = {
    ".json": json_files,
    ".jsonl": line_files,
    ".safetensors": safetensors_files,
    ".jinja": templates,
    ".yaml": yaml_files,
    ".env": settings_files,
}
