# SPDX-License-Identifier: Apache-2.0
"""Each metric of tokens and text on examples that are worked out by hand; counts that stay exact and small in a stream."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from optimum_calibprune.calibration import metrics
from optimum_calibprune.calibration.measure import grams
from optimum_calibprune.calibration.metrics import (
    Tally,
    collision_probability,
    compression_ratio,
    duplicate_rate,
    gram_keys,
    text_bytes,
    type_token_ratio,
    unigram_entropy,
)


VARIED = np.array([[1, 2, 3, 4, 5, 6]])  # 3 different 4-grams
LOOPING = np.array([[7, 7, 7, 7, 7, 7, 7]])  # the same one 4 times
TURNING = np.array([[1, 2, 1, 2, 1, 2, 1, 2]])  # 1212 three times, 2121 twice
UNEVEN = np.array([[5, 5, 6, 5, 8, 5, 6, 8]])  # 5 four times, 6 and 8 twice each


@pytest.mark.parametrize(
    ("ids", "duplicates", "collisions"), [(VARIED, 0, 1 / 3), (LOOPING, 0.75, 1), (TURNING, 0.6, 0.36 + 0.16)]
)
def test_4_grams_by_hand(ids: np.ndarray, duplicates: float, collisions: float) -> None:
    tally = Tally(numbers=2)
    tally.add(gram_keys(ids))
    for seen in (grams(ids), tally):
        assert duplicate_rate(seen) == pytest.approx(duplicates)
        assert collision_probability(seen) == pytest.approx(collisions)


@pytest.mark.parametrize(
    ("ids", "types", "bits"),
    [(VARIED, 1, np.log2(6)), (LOOPING, 1 / 7, 0), (TURNING, 2 / 8, 1), (UNEVEN, 3 / 8, 0.5 * 1 + 2 * 0.25 * 2)],
)
def test_tokens_by_hand(ids: np.ndarray, types: float, bits: float) -> None:
    tally = Tally()
    tally.add(ids.reshape(1, -1))
    for seen in (ids, tally):
        assert type_token_ratio(seen) == pytest.approx(types)
        assert unigram_entropy(seen) == pytest.approx(bits)
        assert str(unigram_entropy(seen))[0] != "-", "a loop has 0 bits, not -0"


def test_compression_by_hand() -> None:
    """A zlib stream (RFC 1950) has 2 bytes of header and 4 of checksum. Where nothing repeats and all bytes are equally
    frequent, a block (RFC 1951) has 3 bits of header, 8 for each byte of ASCII and 7 for its end: 1034 bits, 130 bytes. 1000
    equal bytes are some literals and repeats of at most 258 bytes, each of 13 bits or more."""
    noise = "".join(map(chr, np.random.default_rng(0).permutation(128)))  # 128 different bytes of ASCII
    assert compression_ratio([noise]) == 128 / (2 + 130 + 4)
    assert 1000 / 25 < compression_ratio(["a" * 1000]) < 1000 / (2 + 7 + 4)
    assert text_bytes("20 €")[0] == 6, "of UTF-8"


def test_samples_are_compressed_alone() -> None:
    """So the same text twice is no smaller than two texts, wherever they stand."""
    noise = "".join(map(chr, np.random.default_rng(0).permutation(128)))
    assert compression_ratio([noise, noise]) == compression_ratio([noise])
    assert compression_ratio([noise + noise]) > 1.5 * compression_ratio([noise])
    assert compression_ratio([noise, "b" * 128]) == compression_ratio(["b" * 128, noise])


def test_keys_of_4_grams_do_not_depend_on_the_portion_and_cross_no_border() -> None:
    top = 2**31 - 1
    ids = np.array([[1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [top, top, top, top, 0]], dtype=np.int32)
    keys = [tuple(key) for key in gram_keys(ids).T.tolist()]
    assert keys == [tuple(key) for row in ids for key in gram_keys(row[None]).T.tolist()]
    assert len(keys) == 6
    assert keys[0] == keys[3], "1 2 3 4"
    assert len(set(keys)) == 5
    assert min(min(key) for key in keys) >= 0


@pytest.mark.parametrize("waiting", [1, 10, 2**20])
def test_a_tally_counts_what_a_counter_counts(waiting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "WAITING", waiting)
    random = np.random.default_rng(waiting)
    tally, counter = Tally(numbers=2), Counter[tuple[int, int]]()
    assert len(tally.counts()) == 0
    for size in random.integers(0, 30, 40):
        keys = random.integers(-3, 4, (2, size))
        tally.add(keys)
        counter.update(zip(*keys.tolist(), strict=True))
        assert tally.counts().tolist() == [counter[key] for key in sorted(counter)]


def test_memory_is_that_of_what_is_distinct(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 million keys of at most 4096 kinds: kept, they would take 48 MB."""
    monkeypatch.setattr(metrics, "WAITING", 2**13)
    random = np.random.default_rng(0)
    tally = Tally(numbers=2)
    tracemalloc.start()
    for _ in range(300):
        tally.add(gram_keys(random.integers(0, 8, (40, 253))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    counts = tally.counts()
    assert len(counts) == 4096
    assert counts.sum() == 300 * 40 * 250
    assert peak < 6e6
