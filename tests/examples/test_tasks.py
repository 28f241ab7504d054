# SPDX-License-Identifier: Apache-2.0
"""Generated tasks: the answers are right by readers that know nothing of the writers, and the counts are exact."""

from __future__ import annotations

import json
import operator
import re
from collections import Counter
from itertools import islice
from random import Random
from typing import Any

import pytest
import tasks
from tasks import math

from optimum_calibprune import pocket


def _items(capability: str, count: int = 2000) -> list[tasks.Item]:
    return list(islice(tasks.distinct(capability, Random(3)), count))


def _right(item: tasks.Item) -> str:
    return item.probe["choices"][item.probe["answer"]].strip()


@pytest.fixture(scope="module")
def functions() -> list[tasks.Item]:
    """Every code item that there is."""
    random = Random(0)
    items: dict[Any, tasks.Item] = {}
    for kind in tasks.KINDS["code"]:
        drawn = [kind.draw(random) for _ in range(12 * kind.distinct)]
        items |= {item.key: item for item in drawn}
    return list(items.values())


def test_every_function_passes_its_own_tests_and_fails_with_another_body(functions: list[tasks.Item]) -> None:
    assert len(functions) == sum(kind.distinct for kind in tasks.KINDS["code"]) == 962
    for item in functions:
        assert item.text == item.prompt + item.probe["target"]
        exec(f"{item.text}\n{item.probe['tests']}", {})
        with pytest.raises(AssertionError):
            exec(f"{item.prompt}\n    return NotImplemented\n{item.probe['tests']}", {})


def test_the_bundled_code_probes_are_among_them(functions: list[tasks.Item]) -> None:
    known = {item.prompt: item.probe for item in functions}
    rows = [json.loads(line) for line in pocket.probes()["code"].read_text().splitlines()]
    assert [row["id"] for row in rows if known[row["prompt"]]["tests"] != row["tests"]] == []
    assert [row["id"] for row in rows if known[row["prompt"]]["target"] != row["target"]] == []


def test_sums_and_word_problems_come_out_as_asked() -> None:
    signs = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    problems = 0
    for item in _items("math"):
        question = item.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
        steps, _, shown = item.text.removeprefix(item.prompt).partition(" #### ")
        if found := re.fullmatch(r"What is (\d+) ([+*-]) (\d+)\?", question):
            value = signs[found[2]](int(found[1]), int(found[3]))
        else:
            value, problems = _read_word_problem(question), problems + 1
        assert str(value) == item.probe["target"] == shown
        for step in steps.strip().split(". "):
            left, _, result = step.partition(" = ")
            a, sign, b = left.split()
            assert signs[sign](int(a), int(b)) == int(result)
    assert problems > 1000


def _read_word_problem(question: str) -> int:
    total = 0
    for sentence in re.findall(r"[^.?]+[.?]", question):
        numbers = [int(number) for number in re.findall(r"\d+", sentence)]
        if " has " in sentence and numbers:
            total = numbers[0]
        elif "doubles" in sentence:
            total *= 2
        elif " buys " in sentence or " finds " in sentence:
            total += numbers[0]
        elif " gives " in sentence or " loses " in sentence:
            total -= numbers[0]
        else:
            assert "How many" in sentence
    assert total >= 0
    return total


def test_stories_have_the_answer_that_a_reader_gives() -> None:
    reactions = dict(tasks.commonsense.table("stories")["reactions"])
    kinds: Counter[str] = Counter()
    for item in _items("commonsense"):
        if "Which is the" in item.prompt:
            bigger = re.findall(r"The (\w+) is bigger than the (\w+)\.", item.prompt)
            largest = ({a for a, _ in bigger} - {b for _, b in bigger}).pop()
            smallest = ({b for _, b in bigger} - {a for a, _ in bigger}).pop()
            assert _right(item) == (largest if "biggest" in item.prompt else smallest)
            kinds["size"] += 1
        elif "Where is" in item.prompt:
            assert _right(item) == _follow(item.prompt)
            kinds["location"] += 1
        else:
            name, cause = re.fullmatch(r"(?:.* )?([A-Z]\w+) (.+)\. So \1", item.prompt).groups()
            assert name in item.text and _right(item) == f"{reactions[cause]}."
            kinds["reaction"] += 1
        assert len(set(item.probe["choices"])) == 4
    shares = [kinds[name] / 2000 for name in ("reaction", "location", "size")]
    assert shares == pytest.approx([5 / 11, 4 / 11, 2 / 11], abs=0.05)


def _follow(story: str) -> str:
    """Where the thing is: with its bearer until it is left."""
    where, carried = "", True
    bearer = re.search(r"(\w+) took the", story)[1]
    for sentence in re.findall(r"[^.\n]+\.", story):
        if f"{bearer} left" in sentence:
            carried = False
        elif carried and (moved := re.search(rf"{bearer} (?:went to|took the \w+ in) the (\w+)\.", sentence)):
            where = moved[1]
    return where


def test_facts_have_the_answer_of_the_table() -> None:
    facts = tasks.general.table("facts")
    answers = {
        f"Question: {question.format(k=subject)}\nAnswer:": answer
        for table in facts.values()
        for question in table["questions"]
        for subject, answer in table["answers"].items()
    }
    for item in _items("general"):
        assert _right(item) == answers[item.prompt]
        assert len(set(item.probe["choices"])) == 4


@pytest.mark.parametrize("capability, name", [("general", "continent"), ("commonsense", "size"), ("math", "times")])
def test_kinds_have_as_many_distinct_items_as_they_say(capability: str, name: str) -> None:
    kind = next(kind for kind in tasks.KINDS[capability] if kind.name == name)
    random = Random(0)
    assert len({kind.draw(random).key for _ in range(16 * kind.distinct)}) == kind.distinct


def test_word_problems_are_counted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"START": (2, 3), "LARGEST_GAIN": 1, "LARGEST_DOUBLED": 3}.items():
        monkeypatch.setattr(math, name, value)
    problems, random = {"names": ["Ann", "Ben", "Tom"], "things": ["cups"]}, Random(0)
    math._continuations.cache_clear()
    counted = math._distinct_problems(problems)
    math._continuations.cache_clear()
    assert len({math._word_problem(problems, random).key for _ in range(50_000)}) == counted


def test_names_of_kinds_are_unique() -> None:
    for kinds in tasks.KINDS.values():
        assert len({kind.name for kind in kinds}) == len(kinds)
