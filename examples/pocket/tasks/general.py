# SPDX-License-Identifier: Apache-2.0
"""General knowledge: facts of five tables (capitals, continents, chemical symbols, young animals, opposites)."""

from __future__ import annotations

from functools import partial
from math import comb
from random import Random
from typing import Any

from .items import Item, Kind, multiple_choice, table


WRONG = 3  # choices beside the right one
STATED = 0.3  # share of training documents that state the fact instead of asking for it


def kinds() -> list[Kind]:
    """One kind a table, each as likely as it has facts."""
    return [
        Kind(name, len(facts["answers"]), _distinct(facts), partial(_draw, facts))
        for name, facts in table("facts").items()
    ]


def _distinct(facts: dict[str, Any]) -> int:
    others = len(set(facts["answers"].values())) - 1
    return len(facts["answers"]) * len(facts["questions"]) * comb(others, WRONG)


def _draw(facts: dict[str, Any], random: Random) -> Item:
    answers = facts["answers"]
    subject = random.choice(list(answers))
    answer = answers[subject]
    wrong = random.sample(sorted(set(answers.values()) - {answer}), WRONG)
    prompt = f"Question: {random.choice(facts['questions']).format(k=subject)}\nAnswer:"
    text = f"{prompt} {answer}"
    if random.random() < STATED:
        statement = random.choice(facts["statements"]).format(k=subject, v=answer)
        text = statement[0].upper() + statement[1:]
    return multiple_choice(prompt, answer, wrong, text, random)
