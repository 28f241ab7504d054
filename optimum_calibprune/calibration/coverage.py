# SPDX-License-Identifier: Apache-2.0
"""Which token 4-grams a growing and changing set of samples covers, and what each sample would add or take away."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


GRAM = 4
BLOCK = 512  # samples that are hashed at once


def gram_codes(input_ids: np.ndarray) -> np.ndarray:
    """A 64-bit code of each token 4-gram, uint64 `[samples, length - 3]`, for ids in 0..2^32 - 1.

    The first two ids, as one 64-bit number, go through SplitMix64's finaliser (Steele, Lea and Flood 2014), a bijection
    that scatters them; the last two, as one number, are added. 4-grams with the same first or the same last half never
    share a code. Two others do with a chance of 2^-64: among 41 million different 4-grams (20,000 samples of 2048 tokens),
    the chance that any two share a code is below n^2 / 2^65 = 5e-5, and each that did would move the count of distinct
    4-grams by one.
    """
    ids = input_ids.astype(np.uint64)
    pairs = ids[:, :-1] << np.uint64(32) | ids[:, 1:]
    return _scattered(pairs[:, :-2]) + pairs[:, 2:]


def _scattered(values: np.ndarray) -> np.ndarray:
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


class Coverage:
    """The 4-grams of a set of chosen samples, kept exact while samples are added and removed.

    Of the pool's 4-grams only those that two samples or more hold can overlap; they alone are indexed, in both directions:
    sample -> its 4-grams, 4-gram -> the samples that hold it. Any other 4-gram only counts.

    Attributes:
        windows: 4-grams of one sample, repeats included.
        distinct: different 4-grams of the chosen samples.
        alone `[samples]`: different 4-grams of a sample that no *other* chosen sample holds: what it would add, or, where it
            is chosen itself, what its removal would take away.
    """

    def __init__(self, input_ids: np.ndarray) -> None:
        """`input_ids` is `[samples, length]`, with length 4 or more."""
        samples, length = input_ids.shape
        assert length >= GRAM
        self.windows = length - GRAM + 1
        self.distinct = 0
        codes, self.alone = _distinct_codes(input_ids)
        sample_of = np.repeat(np.arange(samples, dtype=np.int32), self.alone)
        order = np.argsort(codes)  # the order among equal codes has no influence
        codes = codes[order]
        first = np.flatnonzero(np.concatenate(([True], codes[1:] != codes[:-1])))
        held = np.diff(np.append(first, len(codes)))
        del codes
        order, held = order[np.repeat(held > 1, held)], held[held > 1]
        self._samples, self._first_sample = sample_of[order], _offsets(held)  # of one shared 4-gram after the other
        number = np.full(len(sample_of), -1, dtype=np.int32)
        number[order] = np.repeat(np.arange(len(held), dtype=np.int32), held)
        of_sample = np.bincount(self._samples, minlength=samples)
        self._grams, self._first_gram = number[number >= 0], _offsets(of_sample)  # of one sample after the other
        self._holders = np.zeros(len(held), dtype=np.int32)  # chosen samples that hold a 4-gram
        self._sum = np.zeros(len(held), dtype=np.int64)  # of the indices of those samples: of one sample, its index
        self._own: dict[int, np.ndarray] = {}

    def overlap(self, chosen: int) -> np.ndarray:
        """How many of the 4-grams that only `chosen` holds among the chosen ones each sample of the pool holds: `[samples]`."""
        return self._own[chosen]

    def add(self, sample: int) -> None:
        """Chooses a sample that is not chosen."""
        grams = self._grams[self._first_gram[sample] : self._first_gram[sample + 1]]
        holders = self._holders[grams]
        new = self._count(grams[holders == 0])
        self.distinct += int(self.alone[sample])
        self._shift(sample, new, -1)
        self._own[sample] = new
        self._shift_owners(grams[holders == 1], 0, -1)
        self._holders[grams] += 1
        self._sum[grams] += sample

    def remove(self, sample: int) -> None:
        """Gives a chosen sample back."""
        grams = self._grams[self._first_gram[sample] : self._first_gram[sample + 1]]
        self._shift(sample, self._own.pop(sample), 1)
        self.distinct -= int(self.alone[sample])
        self._shift_owners(grams[self._holders[grams] == 2], sample, 1)
        self._holders[grams] -= 1
        self._sum[grams] -= sample

    def _shift(self, sample: int, counts: np.ndarray, sign: int) -> None:
        """All samples but `sample` lose (gain) those of their 4-grams that it covers."""
        before = self.alone[sample]
        self.alone += sign * counts
        self.alone[sample] = before

    def _shift_owners(self, grams: np.ndarray, leaving: int, sign: int) -> None:
        """4-grams with one holder beside the sample that comes or leaves: that holder is alone with them no more, or again."""
        owners = self._sum[grams] - leaving
        for owner in np.unique(owners):
            counts = self._count(grams[owners == owner])
            self._own[int(owner)] += sign * counts
            self.alone[owner] += sign * int(counts[owner])

    def _count(self, grams: np.ndarray) -> np.ndarray:
        """How many of these 4-grams each sample holds: `[samples]`."""
        first, held = self._first_sample[grams], self._first_sample[grams + 1] - self._first_sample[grams]
        places = np.arange(held.sum()) + np.repeat(first - np.cumsum(held) + held, held)
        return np.bincount(self._samples[places], minlength=len(self.alone))


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(counts)))


def distinct_grams(input_ids: np.ndarray) -> np.ndarray:
    """How many different 4-grams each sample of `[samples, length]` holds: int64 `[samples]`."""
    return np.concatenate([new.sum(axis=1) for _, new in _sorted_codes(input_ids)])


def _distinct_codes(input_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different codes of each sample, one sample after the other, and how many each has."""
    codes, counts = zip(*[(codes[new], new.sum(axis=1)) for codes, new in _sorted_codes(input_ids)], strict=True)
    return np.concatenate(codes), np.concatenate(counts)


def _sorted_codes(input_ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The codes of some samples at a time, each sample's in ascending order, and which of them are not the one before."""
    for start in range(0, len(input_ids), BLOCK):
        codes = np.sort(gram_codes(input_ids[start : start + BLOCK]), axis=1)
        new = np.ones(codes.shape, dtype=bool)
        new[:, 1:] = codes[:, 1:] != codes[:, :-1]
        yield codes, new
