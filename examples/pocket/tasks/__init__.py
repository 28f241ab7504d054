# SPDX-License-Identifier: Apache-2.0
"""The tasks of the four capabilities: what they know is in `data/`, how they are worded stands here."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from . import code, commonsense, general, math
from .items import DATA, Item, Kind


__all__ = ["DATA", "KINDS", "Item", "distinct", "draw"]

KINDS: dict[str, list[Kind]] = {
    "general": general.kinds(),
    "commonsense": commonsense.kinds(),
    "code": code.kinds(),
    "math": math.kinds(),
}


def draw(capability: str, random: Random) -> Item:
    """One item, independent of those before it."""
    return _kind(KINDS[capability], random).draw(random)


def distinct(capability: str, random: Random) -> Iterator[Item]:
    """Items without end, by the same shares of kinds. None comes twice before its kind has shown all that it has; then that
    kind begins anew."""
    shown: dict[str, set] = {kind.name: set() for kind in KINDS[capability]}
    while True:
        kind = _kind(KINDS[capability], random)
        if len(shown[kind.name]) == kind.distinct:
            shown[kind.name].clear()
        item = kind.draw(random)
        while item.key in shown[kind.name]:
            item = kind.draw(random)
        shown[kind.name].add(item.key)
        yield item


def _kind(kinds: list[Kind], random: Random) -> Kind:
    return random.choices(kinds, [kind.weight for kind in kinds])[0]
