# SPDX-License-Identifier: Apache-2.0
"""Which texts go through a model together: those of similar length, and those that begin with the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any


SHARED_TOKENS = 64  # at the beginning of prompts, from which on it pays to compute them once
Tokens = tuple[int, ...]


def of_similar_length(rows: Sequence[Any], length: Callable[[Any], int]) -> Iterator[list[Any]]:
    """The rows by length, the longest first, parted so that padding stays below a fifth of the tokens or so."""
    group: list[Any] = []
    for row in sorted(rows, key=length, reverse=True):
        if group and 1.25 * length(row) + 2 < length(group[0]):
            yield group
            group = []
        group.append(row)
    yield group


def by_beginning(prompts: list[Tokens]) -> list[tuple[int, list[Tokens]]]:
    """Sorted prompts, parted by what they begin with, and how many tokens that are: 0 for those that share too few. None
    joins a part that would share half as much with it."""
    groups: list[tuple[int, list[Tokens]]] = []
    for prompt in prompts:
        common = min(_common(groups[-1][1][0], prompt), groups[-1][0]) if groups else 0
        if groups and common >= max(SHARED_TOKENS, groups[-1][0] // 2):
            groups[-1][1].append(prompt)
            groups[-1] = (common, groups[-1][1])
        else:
            groups.append((len(prompt) - 1, [prompt]))
    alone = [group[0] for _, group in groups if len(group) == 1]
    return ([(0, alone)] if alone else []) + [(common, group) for common, group in groups if len(group) > 1]


def shared_beginning(prompts: Sequence[Tokens]) -> int:
    """How many tokens all prompts begin with; 0 where they are too few."""
    common = min(_common(prompts[0], prompt) for prompt in prompts)
    return common if common >= SHARED_TOKENS else 0


def _common(first: Tokens, second: Tokens) -> int:
    """How many tokens two prompts begin with; each keeps one of its own."""
    alike = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))
    return min(alike, len(first) - 1, len(second) - 1)
