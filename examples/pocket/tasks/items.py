# SPDX-License-Identifier: Apache-2.0
"""What a generated task is: one item, and the kind it was drawn from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any


DATA = Path(__file__).parents[1] / "data"


@dataclass(frozen=True)
class Item:
    """One task.

    Args:
        text: The task with its solution, as a training document shows it.
        prompt: What the model is asked.
        probe: The other columns of a probe file: `choices` and `answer` (the index), `target`, or `target`, `tests` and
            `entry_point`.
    """

    text: str
    prompt: str
    probe: dict[str, Any]

    @property
    def key(self) -> tuple[str, frozenset[str]]:
        """Items of one key ask the same: a model scores choices one by one, so their order is no difference."""
        return self.prompt, frozenset(self.probe.get("choices", ()))


@dataclass(frozen=True)
class Kind:
    """A stratum of a capability's tasks.

    Args:
        name: Unique among the kinds of a capability.
        weight: Share of the capability's items, up to a constant.
        distinct: How many different items `draw` can return.
        draw: Returns one item; every one of the `distinct` has a chance.
    """

    name: str
    weight: float
    distinct: int
    draw: Callable[[Random], Item]


def table(name: str) -> Any:
    """The content of `data/<name>.json`: everything that the tasks know."""
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def multiple_choice(prompt: str, right: str, wrong: list[str], text: str, random: Random) -> Item:
    """A question with its choices in random order. Each choice begins with the space that follows the prompt."""
    choices = [f" {choice}" for choice in (right, *wrong)]
    random.shuffle(choices)
    return Item(text, prompt, {"choices": choices, "answer": choices.index(f" {right}")})
