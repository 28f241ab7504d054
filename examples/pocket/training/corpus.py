# SPDX-License-Identifier: Apache-2.0
"""A prepared corpus on disk: all sources' tokens in one array a split, what belongs to whom, and in which shares."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np


SPLITS = ("train", "held_out")
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Split:
    """Token ids `tokens` `[total]`, uint16, and for each source the half-open span that is its own."""

    tokens: np.ndarray
    spans: dict[str, tuple[int, int]]

    def starts(self, shares: dict[str, float], count: int, width: int, random: np.random.Generator) -> np.ndarray:
        """Where `count` windows of `width` tokens begin: the source by its share, the place in it uniformly."""
        first, end = np.array([self.spans[name] for name in shares]).T
        weights = np.array(list(shares.values()), dtype=np.float64)
        source = random.choice(len(shares), count, p=weights / weights.sum())
        return random.integers(first[source], end[source] - width + 1)


@dataclass(frozen=True)
class Corpus:
    """What `prepare.py` leaves in a folder. `shares`: how much of the training each source gets, up to a constant."""

    folder: Path
    vocabulary: int
    shares: dict[str, float]
    train: Split
    held_out: Split

    def check_width(self, width: int) -> None:
        """`ValueError` where a source has no window of so many tokens."""
        for name, (start, end) in self.train.spans.items():
            if end - start < width:
                raise ValueError(
                    f"Source {name!r} has {end - start} tokens, fewer than one window of {width}; give it more text, "
                    "leave it out, or train on a shorter --length."
                )


def save(
    folder: Path, vocabulary: int, seed: int, shares: dict[str, float], tokens: dict[str, dict[str, np.ndarray]]
) -> None:
    """Writes `tokens`, split -> source -> ids `[n]`. The description comes last: with it the corpus is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.json").unlink(missing_ok=True)
    for split, sources in tokens.items():
        np.save(folder / f"{split}.npy", np.concatenate(list(sources.values())))
    counts = {split: {name: len(ids) for name, ids in sources.items()} for split, sources in tokens.items()}
    described = {"vocabulary": vocabulary, "seed": seed, "shares": shares, "tokens": counts}
    (folder / "corpus.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> Corpus:
    """The corpus of a folder, its tokens memory-mapped; `ValueError` where there is none or its files disagree."""
    if not (folder / "corpus.json").is_file():
        raise ValueError(
            f"{folder} holds no prepared corpus (no corpus.json); make one with examples/pocket/prepare.py."
        )
    described = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    splits = [_split(folder / f"{split}.npy", described["tokens"][split]) for split in SPLITS]
    return Corpus(folder, described["vocabulary"], described["shares"], *splits)


def _split(path: Path, counts: dict[str, int]) -> Split:
    tokens = np.load(path, mmap_mode="r")
    ends = np.cumsum(list(counts.values())).tolist()
    if tokens.dtype != np.uint16 or ends[-1] != len(tokens):
        raise ValueError(
            f"{path} has {len(tokens)} tokens, but corpus.json beside it speaks of {ends[-1]}; prepare again."
        )
    return Split(tokens, {name: (end - counts[name], end) for name, end in zip(counts, ends, strict=True)})
