# SPDX-License-Identifier: Apache-2.0
"""What is measured of a sample equals what its definition says, computed by hand or by the plainest code."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_calibprune import pocket
from optimum_calibprune.calibration import measure
from optimum_calibprune.calibration.measure import (
    collision_probability,
    duplicate_rate,
    grams,
    mean_nll,
    profile_samples,
    profile_source,
)


if TYPE_CHECKING:
    from transformers import PreTrainedModel


VOCABULARY = 2048


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(pocket.MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, (5, 24))


@pytest.fixture(scope="module")
def expected(model: PreTrainedModel, samples: np.ndarray) -> np.ndarray:
    """Token by token: the log-probability of each of tokens 2..length after those before it."""
    losses = np.zeros((5, 23))
    with torch.no_grad():
        for i, sample in enumerate(samples):
            for t in range(1, 24):
                logits = model(input_ids=torch.from_numpy(sample[None, :t])).logits[0, -1].double()
                losses[i, t - 1] = torch.logsumexp(logits, 0) - logits[sample[t]]
    return losses.mean(axis=1)


def test_loss_is_that_of_tokens_2_to_length(model: PreTrainedModel, samples: np.ndarray, expected: np.ndarray) -> None:
    found = mean_nll(model, samples)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_batches_change_nothing(
    rows: int, model: PreTrainedModel, samples: np.ndarray, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "LOGIT_BYTES", rows * 4 * 24 * VOCABULARY)
    seen: list[tuple[int, int, str]] = []
    np.testing.assert_allclose(mean_nll(model, samples, lambda *step: seen.append(step)), expected, rtol=1e-5)
    assert [done for done, *_ in seen] == [min(i + rows, 5) for i in range(0, 5, rows)]
    assert seen[-1] == (5, 5, "perplexity")


@pytest.mark.parametrize("positions", [0, 1, 7, 23])
def test_slices_of_one_sample_change_nothing(
    positions: int,
    model: PreTrainedModel,
    samples: np.ndarray,
    expected: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "LOGIT_BYTES", positions * 4 * VOCABULARY)
    np.testing.assert_allclose(mean_nll(model, samples), expected, rtol=1e-5)


def test_loss_takes_any_integers_and_leaves_them_alone(model: PreTrainedModel, samples: np.ndarray) -> None:
    frozen = samples.astype(np.int32)
    frozen.setflags(write=False)
    assert np.array_equal(mean_nll(model, frozen), mean_nll(model, samples))


def test_loss_of_16_bit_logits_is_summed_in_32(model: PreTrainedModel) -> None:
    """Of 3000 tokens: a bfloat16 sum would stop growing at some 2000."""
    logits = torch.zeros(1, 3001, 8, dtype=torch.bfloat16)
    embedding = SimpleNamespace(weight=torch.zeros(8, 1), num_embeddings=8)
    flat = SimpleNamespace(logits=logits)

    class Flat:
        def get_input_embeddings(self) -> SimpleNamespace:
            return embedding

        def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            return flat

    assert mean_nll(Flat(), np.zeros((1, 3001), dtype=np.int64))[0] == pytest.approx(math.log(8), rel=1e-6)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- 4-grams


def tuples(sample: np.ndarray) -> list[tuple[int, ...]]:
    ids = sample.tolist()
    return [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]


@pytest.mark.parametrize(("vocabulary", "length"), [(2, 40), (3, 4), (50, 5), (2048, 64)])
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_codes_are_equal_where_the_tuples_are(vocabulary: int, length: int, dtype: type) -> None:
    for seed in range(5):
        ids = np.random.default_rng(seed).integers(0, vocabulary, (7, length)).astype(dtype)
        codes = grams(ids)
        assert codes.shape == (7, length - 3)
        flat = [gram for sample in ids for gram in tuples(sample)]
        pairs = set(zip(flat, codes.reshape(-1).tolist(), strict=True))
        counts = Counter(flat)
        assert len(pairs) == len(counts) == len(np.unique(codes)), "one code a tuple, one tuple a code"
        assert duplicate_rate(codes) == pytest.approx(1 - len(counts) / len(flat))
        assert collision_probability(codes) == pytest.approx(sum((c / len(flat)) ** 2 for c in counts.values()))


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_a_large_vocabulary_does_not_overflow(dtype: type) -> None:
    top = 2**18 - 1
    ids = np.random.default_rng(0).integers(top - 5000, top + 1, (4, 4096)).astype(dtype)
    ids[0, :4] = ids[1, :4] = top
    ids[2, :4] = [0, 0, 0, top]
    ids[3, :4] = [top, 0, 0, 0]
    ids[2, 9:13], ids[3, 9:13] = [1, 1, 1, 1], [1 + 2**14, 1, 1, 1]  # the same in 32 bits
    codes = grams(ids)
    assert len(np.unique(codes)) == len({gram for sample in ids for gram in tuples(sample)})
    assert codes[0, 0] == codes[1, 0]
    assert codes[2, 9] != codes[3, 9]
    assert codes.min() >= 0


def test_no_window_crosses_a_samples_border() -> None:
    ids = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 1, 2], [3, 4, 5, 6, 7]])  # joined, 1 2 3 4 and 4 5 6 7 would repeat
    assert duplicate_rate(grams(ids)) == 0.0
    assert collision_probability(grams(ids)) == pytest.approx(1 / 6)


def test_rates_of_small_samples_by_hand() -> None:
    varied = grams(np.array([[1, 2, 3, 4, 5, 6]]))  # 3 different 4-grams
    looping = grams(np.array([[7, 7, 7, 7, 7, 7, 7]]))  # the same one 4 times
    turning = grams(np.array([[1, 2, 1, 2, 1, 2, 1, 2]]))  # 1212 three times, 2121 twice
    assert [duplicate_rate(codes) for codes in (varied, looping, turning)] == [0.0, 0.75, pytest.approx(0.6)]
    assert [collision_probability(codes) for codes in (varied, looping, turning)] == [
        pytest.approx(1 / 3),
        1.0,
        pytest.approx(0.36 + 0.16),
    ]


def test_profiles_of_samples_and_of_their_source() -> None:
    ids = np.array([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9, 9], [7, 7, 7, 7, 7, 7]])
    nll = np.log([2.0, 4.0, 8.0])
    one, two, three = profile_samples(ids, nll)
    assert [p.perplexity for p in (one, two, three)] == pytest.approx([2, 4, 8])
    assert [p.duplicate_rate for p in (one, two, three)] == pytest.approx([0, 0, 2 / 3])
    assert [p.collision_probability for p in (one, two, three)] == pytest.approx([1 / 3, 1 / 3, 1])
    assert {p.tokens for p in (one, two, three)} == {6}
    whole = profile_source("a", "code", ids, nll)
    assert (whole.name, whole.capability, whole.samples) == ("a", "code", 3)
    assert whole.perplexity == pytest.approx(4)  # exp of the mean log, not the mean of the perplexities
    assert whole.duplicate_rate == pytest.approx(1 - 6 / 9)  # 1234 stands in two samples, 7777 three times in one
    assert whole.collision_probability == pytest.approx((2**2 + 3**2 + 4) / 81)
