"""Edits of coefficients against a plain way that asks of every coefficient which edits are about it."""

from __future__ import annotations

import re

import pytest
import torch

from expert_merging.errors import InputError
from expert_merging.learned.coefficients import Coefficients
from expert_merging.learned.edits import edited, read_edits

EXPERTS = ("Math", "Code", "my expert", "late")
NAMES = tuple(
    [
        f"model.layers.{layer}.{name}.weight"
        for layer in range(12)
        for name in ("self_attn.q_proj", "mlp.up_proj", "norm")
    ]
    + ["model.norm.weight", "visual.blocks.0.qkv.weight"]
)


def depth(name):
    found = re.search(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def deep(name, first, last):
    return depth(name) is not None and first <= depth(name) <= last


# What is written, and of each edit its factor and whose coefficients of which parameter it is about.
CASES = {
    "Math: 1.2": [(1.2, lambda expert, name: expert == "Math")],
    "Math Code: 0": [(0, lambda expert, name: expert in ("Math", "Code"))],
    '"my expert" : -0.5': [(-0.5, lambda expert, name: expert == "my expert")],
    "'late': 2": [(2, lambda expert, name: expert == "late")],
    "layers 9-: 0.8": [(0.8, lambda expert, name: deep(name, 9, 11))],
    "layers 0-3 7 10-: 0.8": [(0.8, lambda expert, name: deep(name, 0, 3) or depth(name) == 7 or deep(name, 10, 11))],
    "early: 3": [(3, lambda expert, name: deep(name, 0, 3))],
    "early layer 11: 3": [(3, lambda expert, name: deep(name, 0, 3) or depth(name) == 11)],
    "outside: 3": [(3, lambda expert, name: depth(name) is None)],
    "attention: 3": [(3, lambda expert, name: "q_proj" in name)],
    "mlp q: 3": [(3, lambda expert, name: "_proj" in name)],
    "other: 3": [(3, lambda expert, name: "_proj" not in name)],
    "*: 1e-1": [(0.1, lambda expert, name: True)],
    "mlp model.norm.weight *.q_*: 3": [(3, lambda expert, name: "_proj" in name or name == "model.norm.weight")],
    "Math layers 2-4 mlp: 0.8": [(0.8, lambda expert, name: expert == "Math" and deep(name, 2, 4) and "mlp" in name)],
    "mlp  layers 2-4 Math :0.8": [(0.8, lambda expert, name: expert == "Math" and deep(name, 2, 4) and "mlp" in name)],
    "Math: 1.2, layers 9-: 0.8,Code:.5": [
        (1.2, lambda expert, name: expert == "Math"),
        (0.8, lambda expert, name: deep(name, 9, 11)),
        (0.5, lambda expert, name: expert == "Code"),
    ],
}


@pytest.mark.parametrize("text", CASES)
def test_edits_are_those_of_the_plain_twin(text):
    generator = torch.Generator().manual_seed(3)
    values = {name: torch.rand(4, 1 + number % 3, generator=generator) for number, name in enumerate(NAMES)}
    before = {name: value.clone() for name, value in values.items()}
    given = Coefficients(EXPERTS, values, (1.0, 2.0, 3.0, 4.0), fixed=NAMES[:2])
    found = edited(given, read_edits(text, EXPERTS, NAMES))
    for name, value in before.items():
        for row, expert in enumerate(EXPERTS):
            for chunk, number in enumerate(value[row].tolist()):
                for factor, is_about in CASES[text]:
                    number *= factor if is_about(expert, name) else 1
                assert found.values[name][row, chunk].item() == torch.tensor(number, dtype=torch.float32).item()
        assert given.values[name].equal(value), "what is edited stays as it was"
    assert (found.experts, found.task_vector_scale, found.fixed) == (EXPERTS, (1.0, 2.0, 3.0, 4.0), NAMES[:2])


FORM = "--edit takes WHAT: FACTOR, several with commas between them, such as 'Math: 1.2, layers 20- mlp: 0.8', got "


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("", [FORM + "''"]),
        ("Math", [FORM + "'Math'"]),
        (": 2", [FORM + "': 2'"]),
        ("Math:", [FORM + "'Math:'"]),
        ("Math: 1: 2", [FORM + "'Math: 1: 2'"]),
        ("Math: 1,", [FORM + "''"]),
        ("Math: 1 2", [FORM + "'Math: 1 2'"]),
        ("Math: nan", ["--edit 'Math: nan': the factor must be a number in [-1000, 1000]"]),
        ("Math: 1001", ["--edit 'Math: 1001': the factor must be a number in [-1000, 1000]"]),
        ("'Math: 1", ['--edit "\'Math: 1": a quotation mark has no other']),
        ("Mat: 1", ["--edit: 'Mat' means nothing here. Did you mean 'Math'?"]),
        ("'mlp': 1", ["--edit: 'mlp' means nothing here. Known: Code, Math, late, my expert."]),
        ("atention: 1", ["--edit: 'atention' means nothing here. Did you mean 'attention'?"]),
        ("layers: 1", ["--edit: 'layers' means nothing here. Did you mean 'layers 0-'?"]),
        ("layers 12: 1", ["--edit layers 12: layers are 0-11 here; 5- is all from 5 on"]),
        ("layers 9-3: 1", ["--edit layers 9-3: layers are 0-11 here; 5- is all from 5 on"]),
        ("layers 3-12: 1", ["--edit layers 3-12: layers are 0-11 here; 5- is all from 5 on"]),
        ("*x*: 1", ["--edit '*x*: 1': no merged parameter is that (a name looks like " + NAMES[0] + ")"]),
        (
            "outside mlp: 1",
            ["--edit 'outside mlp: 1': no merged parameter is that (a name looks like " + NAMES[0] + ")"],
        ),
        (
            "late: 1",
            [
                "--edit: late is an expert and a part of the model; put the expert's name in quotation marks, and name "
                "the part by layers or by a pattern"
            ],
        ),
        (
            "Mat layers 40-: x, Math: 1, Code",
            [
                "--edit 'Mat layers 40-: x': the factor must be a number in [-1000, 1000]",
                "--edit: 'Mat' means nothing here. Did you mean 'Math'?",
                "--edit layers 40-: layers are 0-11 here; 5- is all from 5 on",
                FORM + "'Code'",
            ],
        ),
    ],
)
def test_all_that_is_wrong_with_edits_is_told_at_once(text, problems):
    with pytest.raises(InputError) as raised:
        read_edits(text, EXPERTS, NAMES)
    assert list(raised.value.problems) == problems


def test_layers_without_numbers_cannot_be_named():
    with pytest.raises(InputError, match="no merged parameter has the number of a layer in its name"):
        read_edits("layers 3: 1", ("A",), ("first.weight",))
