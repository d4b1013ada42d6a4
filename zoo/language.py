"""Questions in plain English whose right answers are known, for a model that has read some.

Word problems, Python expressions, the category of a noun, and facts to put into JSON. Experts learn all of them in the
form in which they are tested; the base has never seen that form, so there are no easy versions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

from zoo.tasks import Example, Task

NOUNS = Path(__file__).parent / "nouns.txt"
# Answers to longer texts take a language model some time on a processor.
TEST_QUESTIONS = 300


def listed(text: str) -> tuple[str, ...]:
    """The entries of a list that is separated by commas."""
    return tuple(" ".join(entry.split()) for entry in text.split(","))


PEOPLE = listed(
    """Ada, Ahmed, Alice, Amara, Anna, Ben, Bilal, Carla, Chen, Clara, Daniel, David, Elena, Emma, Fatima, Felix,
    George, Grace, Hannah, Hugo, Ida, Ivan, Jack, Julia, Karim, Kofi, Laura, Leo, Lucy, Maria, Mateo, Maya, Nina,
    Noah, Omar, Olga, Paul, Priya, Rosa, Ruth, Sam, Sofia, Tariq, Tom, Uma, Vera, Victor, Wendy, Yusuf, Zoe"""
)
CITIES = listed(
    """Athens, Berlin, Boston, Cairo, Chicago, Delhi, Denver, Dublin, Geneva, Hamburg, Helsinki, Istanbul, Jakarta,
    Kyoto, Lagos, Lima, Lisbon, London, Madrid, Manila, Melbourne, Milan, Mumbai, Nairobi, Oslo, Paris, Prague, Quito,
    Rome, Seattle, Seoul, Sydney, Tokyo, Toronto, Vienna, Warsaw"""
)
DAYS = listed("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
THINGS = listed(
    "apples, books, buttons, cards, coins, cups, eggs, flowers, marbles, oranges, pencils, plates, shells, stamps, toys"
)
GOODS = listed(
    "a bicycle, a chair, a clock, a coat, a guitar, a kettle, a lamp, a radio, a table, a tent, an umbrella, a watch"
)
WORDS = listed(
    "apple, bread, chair, cloud, dream, field, grape, house, light, mouse, night, paper, river, stone, table, water"
)


@cache
def nouns() -> tuple[tuple[str, str], ...]:
    """Every noun with its category."""
    lines = [line for line in NOUNS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    entries = [entry.partition(":") for entry in "\n".join(lines).strip().split("\n\n")]
    return tuple((noun, category) for category, _, listed in entries for noun in listed.split())


def category(draw: random.Random) -> Example:
    """The category of a noun."""
    noun, answer = draw.choice(nouns())
    return Example(f'What kind of thing does the word "{noun}" name?', answer)


def facts(draw: random.Random) -> Example:
    """Four facts from a sentence, as JSON."""
    name, city, day = draw.choice(PEOPLE), draw.choice(CITIES), draw.choice(DAYS)
    price, thing = draw.randint(5, 95), draw.choice(GOODS)
    sentence = draw.choice(
        (
            f"On {day}, {name} bought {thing} in {city} for {price} dollars.",
            f"{name} from {city} paid {price} dollars for {thing} last {day}.",
            f"For {price} dollars, {name} sold {thing} at the market of {city} on {day}.",
            f"It was {day} when {name} found {thing} for {price} dollars in a shop in {city}.",
            f"{thing.capitalize()} for {price} dollars will be sent to {name} in {city} next {day}.",
            f"In {city}, {name} spends {price} dollars on {thing} every {day}.",
        )
    )
    answer = json.dumps({"name": name, "city": city, "day": day, "price": price})
    return Example(f"Extract name, city, day and price as JSON.\n{sentence}", answer)


def problem(draw: random.Random) -> Example:
    """A word problem that takes two steps, with its working."""
    name, other = draw.sample(PEOPLE, 2)
    text, working = draw.choice(_PROBLEMS)(draw, name, other, draw.choice(THINGS))
    return Example(text, working)


_Problem = Callable[[random.Random, str, str, str], tuple[str, str]]


def _steps(first: int, sign: str, second: int, then: str, third: int) -> str:
    """The working of two steps, the second of which goes on with what the first gives."""
    between = _result(first, sign, second)
    return f"{first} {sign} {second} = {between}; {between} {then} {third} = {_result(between, then, third)}"


def _result(first: int, sign: str, second: int) -> int:
    return {"+": first + second, "-": first - second, "*": first * second, "/": first // second}[sign]


def _boxes(draw: random.Random, name: str, other: str, things: str) -> tuple[str, str]:
    boxes, each = draw.randint(2, 9), draw.randint(2, 9)
    given = draw.randint(1, boxes * each - 1)
    text = f"{name} buys {boxes} boxes with {each} {things} each and gives {given} {things} to {other}."
    return f"{text} How many {things} are left?", _steps(boxes, "*", each, "-", given)


def _bags(draw: random.Random, name: str, other: str, things: str) -> tuple[str, str]:
    bags, each, more = draw.randint(2, 9), draw.randint(2, 9), draw.randint(2, 40)
    text = f"{name} has {bags} bags of {each} {things}. {other} brings {more} more {things}."
    return f"{text} How many {things} are there?", _steps(bags, "*", each, "+", more)


def _together(draw: random.Random, name: str, other: str, things: str) -> tuple[str, str]:
    first, more = draw.randint(3, 40), draw.randint(2, 20)
    text = f"{name} has {first} {things}, and {other} has {more} more than {name}."
    return f"{text} How many {things} do they have together?", _steps(first, "+", more, "+", first)


def _lost(draw: random.Random, name: str, other: str, things: str) -> tuple[str, str]:
    first = draw.randint(20, 90)
    lost, found = draw.randint(2, first - 2), draw.randint(2, 30)
    text = f"{name} had {first} {things}, lost {lost} of them and got {found} from {other}."
    return f"{text} How many {things} does {name} have now?", _steps(first, "-", lost, "+", found)


def _shared(draw: random.Random, name: str, other: str, things: str) -> tuple[str, str]:
    friends, each, more = draw.randint(2, 9), draw.randint(2, 9), draw.randint(2, 30)
    text = f"{name} shares {friends * each} {things} equally among {friends} children. {other}, one of them, "
    text += f"already had {more}. How many {things} does {other} have now?"
    return text, _steps(friends * each, "/", friends, "+", more)


def _wages(draw: random.Random, name: str, other: str, things: str) -> tuple[str, str]:
    hours, wage = draw.randint(2, 9), draw.randint(5, 9)
    spent = draw.randint(2, hours * wage - 1)
    text = (
        f"{name} works {hours} hours for {wage} dollars each and then buys {things} from {other} for {spent} dollars."
    )
    return f"{text} How many dollars are left?", _steps(hours, "*", wage, "-", spent)


_PROBLEMS: tuple[_Problem, ...] = (_boxes, _bags, _together, _lost, _shared, _wages)


def expression(draw: random.Random) -> Example:
    """The value of a Python expression."""
    text, value = draw.choice(_EXPRESSIONS)(draw)
    return Example(f"What is the value of this Python expression?\n{text}", repr(value))


_Expression = Callable[[random.Random], tuple[str, object]]


def _numbers(draw: random.Random, smallest: int = 3) -> list[int]:
    return [draw.randint(1, 20) for _ in range(draw.randint(smallest, 5))]


def _calculation(draw: random.Random) -> tuple[str, object]:
    first, second, third = draw.randint(2, 9), draw.randint(2, 9), draw.randint(1, 30)
    return f"{first} * {second} + {third}", first * second + third


def _difference(draw: random.Random) -> tuple[str, object]:
    first, second = draw.randint(10, 99), draw.randint(10, 99)
    return f"{first} - {second}", first - second


def _remainder(draw: random.Random) -> tuple[str, object]:
    first, second = draw.randint(10, 60), draw.randint(3, 9)
    return draw.choice([(f"{first} % {second}", first % second), (f"{first} // {second}", first // second)])


def _comparison(draw: random.Random) -> tuple[str, object]:
    first, second, third = draw.randint(1, 60), draw.randint(1, 30), draw.randint(1, 30)
    return f"{first} > {second} + {third}", first > second + third


def _condition(draw: random.Random) -> tuple[str, object]:
    first, second = draw.sample(WORDS, 2)
    left, right = draw.randint(1, 99), draw.randint(1, 99)
    return f"{first!r} if {left} < {right} else {second!r}", first if left < right else second


def _element(draw: random.Random) -> tuple[str, object]:
    numbers = _numbers(draw)
    place = draw.randrange(-2, len(numbers))
    return f"{numbers}[{place}]", numbers[place]


def _slice(draw: random.Random) -> tuple[str, object]:
    numbers = _numbers(draw, smallest=4)
    start = draw.randrange(3)
    return f"{numbers}[{start}:{start + 2}]", numbers[start : start + 2]


_FUNCTIONS: dict[str, Callable[[list[int]], object]] = {
    "max": max,
    "min": min,
    "len": len,
    "sum": sum,
    "sorted": sorted,
}


def _whole_list(draw: random.Random) -> tuple[str, object]:
    numbers = _numbers(draw)
    name, function = draw.choice(list(_FUNCTIONS.items()))
    return f"{name}({numbers})", function(numbers)


def _word(draw: random.Random) -> tuple[str, object]:
    word, times, place = draw.choice(WORDS), draw.randint(2, 4), draw.randrange(5)
    return draw.choice(
        [
            (f"{word!r}.upper()", word.upper()),
            (f"{word!r} * {times}", word * times),
            (f"{word!r}[{place}]", word[place]),
            (f"len({word * times!r})", len(word * times)),
        ]
    )


def _words(draw: random.Random) -> tuple[str, object]:
    words, sign = draw.sample(WORDS, draw.randint(2, 4)), draw.choice("-+_/")
    return draw.choice(
        [
            (f"{sign!r}.join({words})", sign.join(words)),
            (f"sorted({words})[0]", min(words)),
            (f"{words[0]!r} + {words[1]!r}", words[0] + words[1]),
            (f"{words}[-1]", words[-1]),
        ]
    )


_EXPRESSIONS: tuple[_Expression, ...] = (
    *(_calculation, _difference, _remainder, _comparison, _condition),
    *(_element, _slice, _whole_list, _word, _words),
)

TASKS = {
    name: Task(version, version, test_questions=TEST_QUESTIONS)
    for name, version in {"Words": category, "Math": problem, "Code": expression, "JSON": facts}.items()
}
