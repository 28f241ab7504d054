# SPDX-License-Identifier: Apache-2.0
"""How many evaluated items the calibration set gives away: those that share 13 words in a row with it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..records import CalibrationSource, TaskOverlap


WORDS = 13  # in a row, as in the decontamination of GPT-3 (arXiv:2005.14165, appendix C)
WORD = re.compile(r"\w+")


def count_overlaps(
    texts: Mapping[str, Iterable[str]], items: Mapping[str, Sequence[str]], *, exempt: Iterable[str] = ()
) -> tuple[TaskOverlap, ...]:
    """The items of each task that share 13 lower-cased words in a row with a text.

    Args:
        texts: source -> the samples of the calibration set that are from it; no window crosses a sample's border.
        items: task -> the text of each item that is evaluated.
        exempt: sources whose overlaps are counted by source, but not in `overlapping`.
    """
    known = {source: {window for text in several for window in _windows(text)} for source, several in texts.items()}
    exempt = set(exempt)
    found = []
    for task, evaluated in items.items():
        windows = [set(_windows(text)) for text in evaluated]
        hits = {source: {i for i, own in enumerate(windows) if own & grams} for source, grams in known.items()}
        counted = set().union(*(hit for source, hit in hits.items() if source not in exempt))
        found.append(
            TaskOverlap(
                task=task,
                items=len(evaluated),
                overlapping=len(counted),
                short=sum(not own for own in windows),
                sources={source: len(hit) for source, hit in hits.items() if hit},
            )
        )
    return tuple(found)


def exempt_sources(sources: Iterable[CalibrationSource]) -> set[str]:
    """Text of a probe generator, which says so by its label, and text that the model wrote itself: it knew that before."""
    return {source.name for source in sources if source.upper_bound or source.written}


def check_overlaps(overlaps: Iterable[TaskOverlap], exempt: Iterable[str], most: float) -> None:
    """Raises `ValueError` for the first task of which more than the share `most` of the items overlap."""
    exempt = set(exempt)
    for entry in overlaps:
        share = entry.overlapping / entry.items
        if share > most:
            sources = ", ".join(name for name in entry.sources if name not in exempt)
            raise ValueError(
                f"{entry.overlapping} of {entry.items} items of task {entry.task!r} share {WORDS} words in a row with the "
                f"calibration text of {sources}: {share:.1%}, and max_overlap allows {most:.1%}. Calibrate with other text, or "
                f"allow it with max_overlap={math.ceil(share * 1000) / 1000:.3f} or more (--max-overlap)."
            )


def item_text(item: Mapping[str, Any]) -> str:
    """What a calibration text would give away of an item: its prompt, the right answer, its tests."""
    choices, answer = item.get("choices"), item.get("answer")
    right = choices[answer] if choices and isinstance(answer, int) else item.get("target", "")
    return f"{item['prompt']}{right}\n{item.get('tests', '')}"


def _windows(text: str) -> Iterator[str]:
    words = WORD.findall(text.lower())
    return (" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1))
