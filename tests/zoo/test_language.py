"""Questions in English: every answer found another way, and no question both asked and learned."""

from __future__ import annotations

import ast
import itertools
import json
import operator
import random
import re
from collections import Counter

import pytest

from zoo import tasks
from zoo.language import CITIES, DAYS, NOUNS, PEOPLE, TASKS, nouns

BINARY = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Mod: operator.mod,
    ast.FloorDiv: operator.floordiv,
}  # fmt: skip
COMPARISONS = {ast.Gt: operator.gt, ast.Lt: operator.lt}
FUNCTIONS = {"len": len, "max": max, "min": min, "sum": sum, "sorted": sorted}
METHODS = {"upper": str.upper, "join": str.join}


def value_of(node):
    """The value of an expression, of the few kinds that there are."""
    match node:
        case ast.Expression(body):
            return value_of(body)
        case ast.Constant(value):
            return value
        case ast.List(elements):
            return [value_of(element) for element in elements]
        case ast.UnaryOp(ast.USub(), operand):
            return -value_of(operand)
        case ast.BinOp(left, sign, right):
            return BINARY[type(sign)](value_of(left), value_of(right))
        case ast.Compare(left, [sign], [right]):
            return COMPARISONS[type(sign)](value_of(left), value_of(right))
        case ast.IfExp(test, body, orelse):
            return value_of(body if value_of(test) else orelse)
        case ast.Subscript(value, ast.Slice(lower, upper)):
            return value_of(value)[value_of(lower) : value_of(upper)]
        case ast.Subscript(value, place):
            return value_of(value)[value_of(place)]
        case ast.Call(ast.Name(name), arguments):
            return FUNCTIONS[name](*map(value_of, arguments))
        case ast.Call(ast.Attribute(value, name), arguments):
            return METHODS[name](value_of(value), *map(value_of, arguments))
    raise AssertionError(ast.dump(node))


def answer_of_expression(question):
    instruction, expression = question.split("\n")
    assert instruction == "What is the value of this Python expression?"
    return repr(value_of(ast.parse(expression, mode="eval")))


# What the numbers of a text, in their order, come to.
PROBLEMS = {
    r".* buys .* boxes .* gives .* How many \w+ are left\?": lambda boxes, each, given: boxes * each - given,
    r".* bags of .* brings .* are there\?": lambda bags, each, more: bags * each + more,
    r".* more than .* have together\?": lambda first, more: first + first + more,
    r".* lost .* of them and got .* have now\?": lambda first, lost, found: first - lost + found,
    r".* shares .* equally among .* already had .* have now\?": lambda all_, friends, more: all_ // friends + more,
    r".* works .* dollars each .* How many dollars are left\?": lambda hours, wage, spent: hours * wage - spent,
}
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def check_problem(question, working):
    (found,) = [result for pattern, result in PROBLEMS.items() if re.fullmatch(pattern, question)]
    steps = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+); (\d+) ([-+*/]) (\d+) = (\d+)", working)
    first, sign, second, between, again, then, third, result = steps.groups()
    assert SIGNS[sign](int(first), int(second)) == int(between)
    assert between == again
    assert SIGNS[then](int(between), int(third)) == int(result)
    assert int(result) == found(*map(int, re.findall(r"\d+", question)))
    assert int(result) >= 0


def check_facts(question, answer):
    words = re.findall(r"\w+", question.split("\n")[1])
    found = json.loads(answer)
    assert list(found) == ["name", "city", "day", "price"]
    for key, known in {"name": PEOPLE, "city": CITIES, "day": DAYS}.items():
        assert [found[key]] == [word for word in words if word in known]
    assert [str(found["price"])] == [word for word in words if word.isdigit()]


def check_category(question, answer):
    noun = re.fullmatch(r'What kind of thing does the word "(\w+)" name\?', question)[1]
    paragraphs = NOUNS.read_text().split("\n\n")
    (listed,) = [
        paragraph for paragraph in paragraphs if re.search(rf"[: \n]{noun}\b", paragraph) and paragraph[0] != "#"
    ]
    assert listed.startswith(f"{answer}: ")


def check_expression(question, answer):
    assert answer == answer_of_expression(question)


CHECKS = {"Words": check_category, "Math": check_problem, "Code": check_expression, "JSON": check_facts}


def drawn(name, seed, count):
    return list(itertools.islice(tasks.training_examples(TASKS, name, seed), count))


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_right(name):
    for example in drawn(name, 0, 100 if name == "Words" else 500):
        CHECKS[name](example.question, example.response)


def test_worked_examples():
    assert answer_of_expression("What is the value of this Python expression?\n[4, 16, 19, 11][-1]") == "11"
    assert answer_of_expression("What is the value of this Python expression?\n'a' if 3 < 2 else 'b'") == "'b'"
    check_problem("Ben had 83 apples, lost 44 of them and got 9 from Victor. How many apples does Ben have now?",
                  "83 - 44 = 39; 39 + 9 = 48")  # fmt: skip
    with pytest.raises(AssertionError):
        check_problem("Ben had 83 apples, lost 44 of them and got 9 from Victor. How many apples does Ben have now?",
                      "83 - 44 = 39; 39 - 9 = 30")  # fmt: skip


def test_every_kind_of_question_is_drawn():
    questions = [example.question for example in drawn("Math", 0, 200)]
    problems = {pattern for question in questions for pattern in PROBLEMS if re.match(pattern, question)}
    assert problems == set(PROBLEMS)
    kinds = {type(value) for example in drawn("Code", 0, 200) for value in [ast.literal_eval(example.response)]}
    assert kinds == {int, bool, str, list}


def test_nouns_have_one_category_each():
    counted = Counter(category for _, category in nouns())
    assert len(counted) == 10
    assert min(counted.values()) > 70
    assert ("salmon", "animal") in nouns()
    assert len({noun for noun, _ in nouns()}) == len(nouns()), "no noun is listed twice"


@pytest.mark.parametrize("name", TASKS)
def test_held_out_questions_are_all_different_and_never_learned(name):
    parts = tasks.held_out(TASKS[name], name, 0)
    questions = [example.question for examples in parts.values() for example in examples]
    assert [len(examples) for examples in parts.values()] == [128, 300]
    assert len(set(questions)) == len(questions)
    assert not set(questions) & {example.question for example in drawn(name, 0, 3000)}


@pytest.mark.parametrize("name", TASKS)
def test_the_seed_decides(name):
    assert drawn(name, 0, 20) == drawn(name, 0, 20) != drawn(name, 1, 20)
    assert TASKS[name].hard(random.Random(3)) == TASKS[name].hard(random.Random(3))
