# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from optimum_calibprune.calibration.coverage import BLOCK, Coverage, distinct_grams, gram_codes


def four_grams(sample: np.ndarray) -> list[tuple[int, ...]]:
    ids = sample.tolist()
    return [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]


# ------------------------------------------------------------------------------------------------ codes


@pytest.mark.parametrize("scale", [1, 1000, 2**16, 2**28])
def test_codes_are_equal_where_the_four_grams_are(scale: int) -> None:
    ids = np.random.default_rng(scale).integers(0, 8, (60, 50)) * scale
    codes = gram_codes(ids)
    assert (codes.shape, codes.dtype) == ((60, 47), np.uint64)
    pairs = {
        (gram, code)
        for row, some in zip(ids, codes.tolist(), strict=True)
        for gram, code in zip(four_grams(row), some, strict=True)
    }
    grams, found = {gram for gram, _ in pairs}, {code for _, code in pairs}
    assert 1000 < len(grams) == len(found) == len(pairs)


@pytest.mark.parametrize("step", [1, 2**12])
def test_a_million_regular_four_grams_share_no_code(step: int) -> None:
    digits = np.indices((32, 32, 32, 32)).reshape(4, -1).T * step  # every 4-gram over 32 ids
    codes = gram_codes(digits)
    assert len(np.unique(codes)) == len(digits) == 2**20
    counting = gram_codes(step * np.arange(2**18)[None, :])
    assert len(np.unique(counting)) == 2**18 - 3


def test_the_order_of_the_tokens_counts() -> None:
    codes = gram_codes(np.array([[1, 2, 3, 4], [4, 3, 2, 1], [3, 4, 1, 2], [2, 1, 4, 3], [1, 3, 2, 4]]))
    assert len(np.unique(codes)) == 5


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])
def test_the_type_of_the_ids_has_no_say(dtype: type) -> None:
    ids = np.random.default_rng(0).integers(0, 2**31, (3, 9))
    assert np.array_equal(gram_codes(ids), gram_codes(ids.astype(dtype)))


def test_different_four_grams_are_counted_for_each_sample() -> None:
    ids = np.random.default_rng(0).integers(0, 3, (BLOCK + 7, 30))
    assert distinct_grams(ids).tolist() == [len(set(four_grams(row))) for row in ids]


# --------------------------------------------------------------------------------------------- coverage


def assert_exact(cover: Coverage, ids: np.ndarray, chosen: Iterable[int]) -> None:
    """Against sets of tuples."""
    grams = [set(four_grams(row)) for row in ids]
    chosen = set(chosen)
    assert cover.distinct == len(set().union(*(grams[i] for i in chosen)))
    others = [set().union(*(grams[i] for i in chosen - {j})) for j in range(len(ids))]
    assert cover.alone.tolist() == [len(grams[j] - others[j]) for j in range(len(ids))]
    for i in chosen:
        own = grams[i] - others[i]
        found = cover.overlap(i)
        assert [found[j] for j in range(len(ids)) if j not in chosen] == [
            len(own & grams[j]) for j in range(len(ids)) if j not in chosen
        ]


@pytest.mark.parametrize("seed", range(25))
def test_coverage_stays_exact_while_samples_come_and_go(seed: int) -> None:
    generator = np.random.default_rng(seed)
    samples, length = int(generator.integers(1, 12)), int(generator.integers(4, 20))
    ids = generator.integers(0, generator.integers(1, 5), (samples, length))
    cover = Coverage(ids)
    assert cover.windows == length - 3
    chosen: set[int] = set()
    assert_exact(cover, ids, chosen)
    for i in generator.integers(0, samples, 30).tolist():
        if i in chosen:
            cover.remove(i)
        else:
            cover.add(i)
        chosen ^= {i}
        assert_exact(cover, ids, chosen)


def test_a_swap_is_known_before_it_is_made() -> None:
    ids = np.random.default_rng(1).integers(0, 3, (12, 16))
    cover = Coverage(ids)
    for i in range(5):
        cover.add(i)
    for out in range(5):
        for into in range(5, 12):
            known = cover.distinct - cover.alone[out] + cover.alone[into] + cover.overlap(out)[into]
            after = set().union(*(set(four_grams(ids[i])) for i in {0, 1, 2, 3, 4, into} - {out}))
            assert known == len(after)


def test_samples_with_nothing_in_common_and_samples_that_are_one() -> None:
    apart = Coverage(np.arange(40).reshape(4, 10))
    alike = Coverage(np.tile(np.arange(10), (4, 1)))
    for i in range(4):
        apart.add(i)
        alike.add(i)
    assert (apart.distinct, apart.alone.tolist()) == (28, [7] * 4)
    assert (alike.distinct, alike.alone.tolist()) == (7, [0] * 4)
