# SPDX-License-Identifier: Apache-2.0
"""What is measured of samples and sources equals what its definition says, computed by hand or by the plainest code."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_calibprune import pocket
from optimum_calibprune.calibration import measure
from optimum_calibprune.calibration.measure import (
    Likelihood,
    RunningProfile,
    grams,
    likelihood,
    mean_nll,
    profile_samples,
    profile_source,
)
from optimum_calibprune.calibration.metrics import collision_probability, duplicate_rate
from optimum_calibprune.records import SampleProfile, SourceProfile


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


class Says:
    """A model that answers every text with the same logits `[length, vocabulary]`."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def get_input_embeddings(self) -> SimpleNamespace:
        return SimpleNamespace(weight=torch.zeros(1), num_embeddings=self.logits.shape[1])

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(len(input_ids), -1, -1))


def told(logits: torch.Tensor, ids: list[int]) -> tuple[float, float]:
    found = likelihood(Says(logits), np.array([ids]))  # type: ignore[arg-type]
    return float(found.nll[0]), float(found.entropy[0])


def test_loss_of_16_bit_logits_is_summed_in_32() -> None:
    """Of 3000 tokens: a bfloat16 sum would stop growing at some 2000."""
    nll, entropy = told(torch.zeros(3001, 8, dtype=torch.bfloat16), [0] * 3001)
    assert (nll, entropy) == (pytest.approx(math.log(8), rel=1e-6), pytest.approx(math.log(8), rel=1e-6))


# ---------------------------------------------------------------------------------------------- entropy


def test_entropy_of_distributions_by_hand() -> None:
    """The last position predicts a token that is not there: it counts for nothing."""
    last = torch.tensor([[5.0, 0, 0, 0]])
    even, sure = torch.zeros(1, 4), torch.tensor([[1000.0, 0, 0, 0]])
    half = torch.tensor([[0.0, 0, -math.inf, -math.inf]])  # two tokens can never come
    three_to_one = torch.tensor([[math.log(3), 0, -math.inf, -math.inf]])
    of_three_to_one = math.log(4) - 0.75 * math.log(3)
    assert told(torch.cat([even, last]), [0, 3]) == (pytest.approx(math.log(4)), pytest.approx(math.log(4)))
    assert told(torch.cat([sure, last]), [0, 0]) == (0.0, 0.0)
    assert told(torch.cat([half, last]), [0, 1]) == (pytest.approx(math.log(2)), pytest.approx(math.log(2)))
    assert told(torch.cat([three_to_one, last]), [0, 1]) == (
        pytest.approx(math.log(4)),
        pytest.approx(of_three_to_one),
    )
    both = told(torch.cat([even, three_to_one, last]), [0, 0, 0])
    assert both[1] == pytest.approx((math.log(4) + of_three_to_one) / 2)


def test_entropy_equals_float64(samples: np.ndarray) -> None:
    exact = AutoModelForCausalLM.from_pretrained(pocket.MODEL, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = exact(input_ids=torch.from_numpy(samples)).logits[:, :-1].numpy()
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    expected = -(shares * np.log(shares)).sum(axis=-1).mean(axis=-1)
    loaded = AutoModelForCausalLM.from_pretrained(pocket.MODEL, dtype=torch.float32).eval()
    found = likelihood(loaded, samples).entropy
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_entropy_is_what_the_loss_of_the_models_own_text_is_expected_to_be(model: PreTrainedModel) -> None:
    """64 texts drawn at temperature 1: the two differ by chance alone (a standard error of some 0.03 nats)."""
    torch.manual_seed(0)
    start = torch.full((64, 1), model.config.bos_token_id or 0)
    drawn = model.generate(
        start, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, min_new_tokens=47, max_new_tokens=47
    )
    own = likelihood(model, drawn.numpy())
    assert own.nll.mean() == pytest.approx(own.entropy.mean(), abs=0.1)
    assert own.entropy.mean() > 0.5


@pytest.mark.parametrize(("rows", "positions"), [(1, None), (2, None), (None, 1), (None, 7)])
def test_bounded_memory_changes_no_entropy(
    rows: int | None,
    positions: int | None,
    model: PreTrainedModel,
    samples: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = likelihood(model, samples).entropy
    monkeypatch.setattr(measure, "LOGIT_BYTES", 4 * VOCABULARY * (positions or rows * 24))
    np.testing.assert_allclose(likelihood(model, samples).entropy, expected, rtol=1e-5)


def test_likelihood_of_some_samples() -> None:
    whole = Likelihood(np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0]))
    for rows in ([2, 0], np.array([2, 0])):
        part = whole.of(rows)
        assert (part.nll.tolist(), part.entropy.tolist()) == ([3, 1], [6, 4])


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


# --------------------------------------------------------------------------------------------- profiles


def test_profiles_of_samples_and_of_their_source() -> None:
    ids = np.array([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9, 9], [7, 7, 7, 7, 7, 7]])
    measured = Likelihood(np.log([2.0, 4.0, 8.0]), np.array([0.5, 1.0, 3.0]))
    texts = ["abcdefgh", "xyz" * 50, "aaaaaaaa"]
    packed = [len(zlib.compress(text.encode(), 9)) for text in texts]
    one, two, three = found = profile_samples(ids, measured, texts)
    assert [p.perplexity for p in found] == pytest.approx([2, 4, 8])
    assert [p.duplicate_rate for p in found] == pytest.approx([0, 0, 2 / 3])
    assert [p.collision_probability for p in found] == pytest.approx([1 / 3, 1 / 3, 1])
    assert [p.type_token_ratio for p in found] == pytest.approx([1, 5 / 6, 1 / 6])
    assert [p.unigram_entropy for p in found] == pytest.approx([math.log2(6), math.log2(6) - 1 / 3, 0])
    assert [p.compression_ratio for p in found] == [8 / packed[0], 150 / packed[1], 8 / packed[2]]
    assert [p.model_entropy for p in found] == [0.5, 1.0, 3.0]
    assert (one.tokens, two.tokens, three.tokens) == (6, 6, 6)
    whole = profile_source("a", "code", ids, measured, texts)
    assert (whole.name, whole.capability, whole.samples) == ("a", "code", 3)
    assert whole.perplexity == pytest.approx(4)  # exp of the mean log, not the mean of the perplexities
    assert whole.duplicate_rate == pytest.approx(1 - 6 / 9)  # 1234 stands in two samples, 7777 three times in one
    assert whole.collision_probability == pytest.approx((2**2 + 3**2 + 4) / 81)
    assert whole.type_token_ratio == pytest.approx(8 / 18)
    by_hand = 4 * 2 / 18 * math.log2(9) + 2 * 1 / 18 * math.log2(18) + 2 / 18 * math.log2(9) + 6 / 18 * math.log2(3)
    assert whole.unigram_entropy == pytest.approx(by_hand)  # 1, 2, 3, 4 and 9 twice; 5 and 6 once; 7 six times
    assert whole.compression_ratio == pytest.approx(166 / sum(packed))
    assert whole.model_entropy == pytest.approx(1.5)


@pytest.mark.parametrize("seed", range(12))
def test_a_source_in_portions_in_any_order_has_the_same_profile_to_the_bit(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the profile is that of the metrics over everything at once."""
    random = np.random.default_rng(seed)
    samples, length = int(random.integers(1, 60)), int(random.integers(4, 40))
    ids = random.integers(0, random.choice([2, 9, 2**18]), (samples, length)) + random.choice([0, 2**30])
    measured = Likelihood(random.uniform(0, 9, samples), random.uniform(0, 9, samples))
    texts = ["".join(random.choice([*"ab é"], 50)) for _ in range(samples)]
    whole = profile_source("s", "math", ids, measured, texts)
    codes = grams(ids)
    assert whole.duplicate_rate == duplicate_rate(codes)
    assert whole.collision_probability == collision_probability(codes)
    for waiting in (1, 50, 2**20):
        monkeypatch.setattr("optimum_calibprune.calibration.metrics.WAITING", waiting)
        monkeypatch.setattr(measure, "WAITING", waiting)
        running = RunningProfile("s", "math")
        for rows in portions(random.permutation(samples), random):
            running.add(ids[rows], measured.of(rows), (texts[i] for i in rows))
            if len(rows) and random.random() < 0.2:
                running.result()  # a look on the way changes nothing
        assert astuple(running.result()) == astuple(whole)


def portions(rows: np.ndarray, random: np.random.Generator) -> Iterator[np.ndarray]:
    while len(rows):
        size = int(random.integers(0, len(rows) + 1))
        yield rows[:size]
        rows = rows[size:]


def test_a_profile_of_nothing_or_of_unlike_samples_is_refused() -> None:
    def add(profile: RunningProfile, length: int) -> None:
        profile.add(np.zeros((1, length), dtype=np.int64), Likelihood(np.zeros(1), np.zeros(1)), ["a"])

    profile = RunningProfile("s", "math")
    with pytest.raises(ValueError, match="No sample of 's'"):
        profile.result()
    with pytest.raises(ValueError, match="Samples of 3 tokens hold no 4-gram"):
        add(profile, 3)
    add(profile, 4)
    with pytest.raises(ValueError, match="Samples of 's' have 4 tokens; these have 5"):
        add(profile, 5)
    assert profile.result().samples == 1


def test_profiles_of_the_first_release_can_still_be_read() -> None:
    rates = {"perplexity": 4.0, "duplicate_rate": 0.5, "collision_probability": 0.25}
    sample = SampleProfile.from_dict({**rates, "tokens": 32})
    source = SourceProfile.from_dict({"name": "a", "capability": "code", "samples": 3, **rates})
    for old in (sample, source):
        assert (old.perplexity, old.duplicate_rate, old.collision_probability) == (4.0, 0.5, 0.25)
        assert [old.type_token_ratio, old.unigram_entropy, old.compression_ratio, old.model_entropy] == [None] * 4
