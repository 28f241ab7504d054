# SPDX-License-Identifier: Apache-2.0
"""Windows of a corpus as tensors: drawn by seed and step alone, so that a run can go on anywhere without stored state."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .corpus import Corpus, Split


@dataclass
class Batches:
    """Draws training batches `[count, length + 1]`, int64, on a device.

    On CUDA the whole corpus lies in GPU memory (4 bytes a token) and only the places of the windows travel; on the CPU it stays
    memory-mapped.
    """

    corpus: Corpus
    length: int
    seed: int
    device: torch.device

    def __post_init__(self) -> None:
        self.corpus.check_width(self.length + 1)
        self._offsets = np.arange(self.length + 1)
        self._resident: Tensor | None = None
        if self.device.type == "cuda":
            self._resident = torch.from_numpy(self.corpus.train.tokens.astype(np.int32)).to(self.device)
            self._offsets_there = torch.from_numpy(self._offsets).to(self.device)

    def draw(self, step: int, count: int) -> Tensor:
        random = np.random.default_rng([self.seed, step])
        starts = self.corpus.train.starts(self.corpus.shares, count, self.length + 1, random)
        if self._resident is None:
            return _windows(self.corpus.train, starts, self._offsets)
        there = torch.from_numpy(starts).pin_memory().to(self.device, non_blocking=True)
        return self._resident[there[:, None] + self._offsets_there].long()


def held_out_windows(split: Split, name: str, length: int, most: int) -> Tensor | None:
    """The first windows `[n, length + 1]` of a source that do not overlap, at most `most`; None where it has none."""
    start, end = split.spans[name]
    count = min(most, (end - start) // (length + 1))
    if count == 0:
        return None
    return _windows(split, start + np.arange(count) * (length + 1), np.arange(length + 1))


def _windows(split: Split, starts: np.ndarray, offsets: np.ndarray) -> Tensor:
    return torch.from_numpy(split.tokens[starts[:, None] + offsets].astype(np.int64))
