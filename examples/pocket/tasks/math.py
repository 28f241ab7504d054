# SPDX-License-Identifier: Apache-2.0
"""Math: sums of two numbers, and word problems of one or two steps."""

from __future__ import annotations

from functools import cache, partial
from math import comb
from random import Random
from typing import Any

from .items import Item, Kind, table


LARGEST_TERM, LARGEST_FACTOR = 99, 12
START = (2, 40)  # what somebody has first
LARGEST_GAIN = 30
LARGEST_DOUBLED = 40
STEPS = [1, 1, 2]  # two problems in three have one step


def kinds() -> list[Kind]:
    problems = table("problems")
    terms = LARGEST_TERM + 1
    return [
        Kind("plus", 2 * 2, terms**2, _plus),
        Kind("minus", 2 * 2, comb(terms + 1, 2), _minus),
        Kind("times", 2 * 1, (LARGEST_FACTOR + 1) ** 2, _times),
        Kind("word problem", 3 * 5, _distinct_problems(problems), partial(_word_problem, problems)),
    ]


def _plus(random: Random) -> Item:
    a, b = random.randint(0, LARGEST_TERM), random.randint(0, LARGEST_TERM)
    return _arithmetic(a, "+", b, a + b)


def _minus(random: Random) -> Item:
    b, a = sorted((random.randint(0, LARGEST_TERM), random.randint(0, LARGEST_TERM)))
    return _arithmetic(a, "-", b, a - b)


def _times(random: Random) -> Item:
    a, b = random.randint(0, LARGEST_FACTOR), random.randint(0, LARGEST_FACTOR)
    return _arithmetic(a, "*", b, a * b)


def _arithmetic(a: int, sign: str, b: int, result: int) -> Item:
    return _item(f"Question: What is {a} {sign} {b}?\nAnswer:", [f"{a} {sign} {b} = {result}"], result)


def _item(prompt: str, steps: list[str], result: int) -> Item:
    answer = f" {'. '.join(steps)} #### {result}"
    return Item(prompt + answer, prompt, {"target": str(result)})


def _word_problem(problems: dict[str, Any], random: Random) -> Item:
    name, friend = random.sample(problems["names"], 2)
    things = random.choice(problems["things"])
    total = random.randint(*START)
    story, steps = [f"{name} has {total} {things}."], []
    for _ in range(random.choice(STEPS)):
        event = _possible(random.choice(["buy", "find", "give", "lose", "double"]), total)
        if event == "double":
            story.append(f"Then the number of {things} doubles.")
            steps.append(f"{total} * 2 = {total * 2}")
            total *= 2
        elif event in ("buy", "find"):
            k = random.randint(1, LARGEST_GAIN)
            story.append(f"{name} buys {k} more {things}." if event == "buy" else f"{name} finds {k} {things}.")
            steps.append(f"{total} + {k} = {total + k}")
            total += k
        else:
            k = random.randint(1, total)
            story.append(
                f"{name} gives {k} {things} to {friend}." if event == "give" else f"{name} loses {k} {things}."
            )
            steps.append(f"{total} - {k} = {total - k}")
            total -= k
    prompt = f"Question: {' '.join(story)} How many {things} does {name} have now?\nAnswer:"
    return _item(prompt, steps, total)


def _possible(event: str, total: int) -> str:
    """The event, or the one that takes its place where the numbers would grow too large or too small."""
    if event == "double" and total > LARGEST_DOUBLED:
        return "buy"
    if event in ("give", "lose") and total < 2:
        return "find"
    return event


def _distinct_problems(problems: dict[str, Any]) -> int:
    """The friend is named only where something is given."""
    names, things = len(problems["names"]), len(problems["things"])
    count = 0
    for steps in set(STEPS):
        for start in range(START[0], START[1] + 1):
            without_friend = _continuations(start, steps, friend=False)
            with_friend = _continuations(start, steps, friend=True) - without_friend
            count += without_friend + with_friend * (names - 1)
    return count * names * things


@cache
def _continuations(total: int, steps: int, *, friend: bool) -> int:
    """How many stories of `steps` events can follow, for one name, one thing and one friend, or without giving."""
    if steps == 0:
        return 1
    gains = sum(_continuations(total + k, steps - 1, friend=friend) for k in range(1, LARGEST_GAIN + 1))
    losses = sum(_continuations(total - k, steps - 1, friend=friend) for k in range(1, total + 1)) if total >= 2 else 0
    doubled = _continuations(total * 2, steps - 1, friend=friend) if total <= LARGEST_DOUBLED else 0
    return 2 * gains + (2 if friend else 1) * losses + doubled
