# SPDX-License-Identifier: Apache-2.0
"""Code: small Python functions by their signature and docstring."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Any

from .items import Item, Kind, table


NO_NUMBER = [0, 0]  # the range of {n} where a family has none


def kinds() -> list[Kind]:
    """One kind a family of functions, all equally likely; a family has several names and docstrings, and most a number."""
    return [Kind(family["names"][0], 1, _distinct(family), partial(_draw, family)) for family in table("functions")]


def _distinct(family: dict[str, Any]) -> int:
    least, most = family.get("n", NO_NUMBER)
    return len(family["names"]) * len(family["docs"]) * (most - least + 1)


def _draw(family: dict[str, Any], random: Random) -> Item:
    number = random.randint(*family.get("n", NO_NUMBER))
    name = random.choice(family["names"]).replace("{n}", str(number))
    doc = random.choice(family["docs"]).replace("{n}", str(number))
    body = family["body"].replace("{n}", str(number))
    prompt = f'def {name}({family["arguments"]}):\n    """{doc}"""'
    target = f"\n    {body}\n"
    inputs = [tuple(number if value == "{n}" else value for value in values) for values in family["inputs"]]
    tests = "\n".join(_tests(prompt + target, name, inputs))
    return Item(prompt + target, prompt, {"target": target, "tests": tests, "entry_point": name})


def _tests(solution: str, name: str, inputs: list[tuple[Any, ...]]) -> list[str]:
    """One assertion an input: what the solution, which comes from our own table, returns for it."""
    scope: dict[str, Any] = {}
    exec(solution, scope)
    return [f"assert {name}(*{values!r}) == {scope[name](*values)!r}" for values in inputs]
