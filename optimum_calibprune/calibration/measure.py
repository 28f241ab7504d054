# SPDX-License-Identifier: Apache-2.0
"""What samples are like: their likelihood under the dense model, and profiles of samples and of sources of any length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..records import SampleProfile, SourceProfile
from .metrics import (
    WAITING,
    Tally,
    collision_probability,
    compression_ratio,
    duplicate_rate,
    gram_keys,
    text_bytes,
    type_token_ratio,
    unigram_entropy,
)


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


LOGIT_BYTES = 2**26  # fp32 logits that may be in memory at once
Progress = Callable[[int, int, str], None]
LogitsOf = Callable[
    [Iterable["Tensor"]], Iterator["Tensor"]
]  # batches [samples, length] -> [samples, length, vocabulary]


# -------------------------------------------------------------------------------------- under the model


@dataclass(frozen=True, eq=False)
class Likelihood:
    """What the dense model says of samples, in nats a token, float64 `[samples]`, over tokens 2..length of each.

    `nll`: the mean negative log-likelihood, `-1/(n-1) sum over t of ln p(x_t | x_<t)`. Its exp is the perplexity. Source:
    Jelinek et al. 1977, "Perplexity: a Measure of the Difficulty of Speech Recognition Tasks", JASA 62.

    `entropy`: how open the model finds what comes next, `-1/(n-1) sum over t, v of p(v | x_<t) ln p(v | x_<t)`: 0 where it
    is sure, the log of the vocabulary's size where it has no idea. On text that the model itself draws at temperature 1 it
    is what `nll` is expected to be. Source: Malinin and Gales 2021, "Uncertainty Estimation in Autoregressive Structured
    Prediction", ICLR.
    """

    nll: np.ndarray
    entropy: np.ndarray

    def of(self, rows: Sequence[int] | np.ndarray) -> Likelihood:
        """That of some of the samples, by index or mask."""
        return Likelihood(self.nll[rows], self.entropy[rows])


def likelihood(
    model: PreTrainedModel,
    input_ids: np.ndarray,
    on_progress: Progress | None = None,
    logits_of: LogitsOf | None = None,
) -> Likelihood:
    """Likelihood and entropy of samples `[samples, length]`, from one forward pass; `logits_of` is another way to make it."""
    import torch

    vocabulary = model.get_input_embeddings().num_embeddings
    length = input_ids.shape[1]
    batch = max(1, LOGIT_BYTES // (4 * length * vocabulary))
    results = []
    with torch.inference_mode():
        batches = torch.from_numpy(input_ids.astype(np.int64)).split(batch)
        for ids, logits in zip(batches, (logits_of or partial(_logits, model))(batches), strict=True):
            targets = ids[:, 1:].to(logits.device)
            results += [_of_one(one, target) for one, target in zip(logits[:, :-1], targets, strict=True)]
            del logits
            if on_progress is not None:
                on_progress(len(results), len(input_ids), "perplexity")
    nll, entropy = np.array(results).reshape(-1, 2).T
    return Likelihood(nll, entropy)


def mean_nll(
    model: PreTrainedModel,
    input_ids: np.ndarray,
    on_progress: Progress | None = None,
    logits_of: LogitsOf | None = None,
) -> np.ndarray:
    """Mean negative log-likelihood (nats) of tokens 2..length of each sample `[samples, length]`; float64 `[samples]`."""
    return likelihood(model, input_ids, on_progress, logits_of).nll


def _logits(model: PreTrainedModel, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    device = model.get_input_embeddings().weight.device
    return (model(input_ids=ids.to(device), use_cache=False).logits for ids in batches)


def _of_one(logits: Tensor, targets: Tensor) -> tuple[float, float]:
    """Of one sample; `[length - 1, vocabulary]` is turned into fp32 a slice at a time."""
    import torch

    step = max(1, LOGIT_BYTES // (4 * logits.shape[1]))
    nll = entropy = 0.0
    for rows, wanted in zip(logits.split(step), targets.split(step), strict=True):
        logs = torch.log_softmax(rows, dim=-1, dtype=torch.float32)
        nll -= _sum(logs.gather(1, wanted[:, None]))
        logs.clamp_(min=torch.finfo(torch.float32).min)  # 0 ln 0 is 0
        entropy -= _sum(logs.exp().mul_(logs).sum(dim=-1))
    return nll / len(targets), entropy / len(targets)


def _sum(positions: Tensor) -> float:
    return float(positions.cpu().double().sum())


# ---------------------------------------------------------------------------------------------- 4-grams


def grams(input_ids: np.ndarray) -> np.ndarray:
    """An exact integer code for each token 4-gram, `[samples, length - 3]`; no window crosses a sample's border.

    Pairs of tokens are numbered, then pairs of those numbers that stand two positions apart.
    """
    ids = input_ids.astype(np.int64)
    pairs = ids[:, :-1] * (int(ids.max()) + 1) + ids[:, 1:]
    numbers = np.unique(pairs, return_inverse=True)[1].reshape(pairs.shape)
    quads = numbers[:, :-2] * (int(numbers.max()) + 1) + numbers[:, 2:]
    return np.unique(quads, return_inverse=True)[1].reshape(quads.shape)


# --------------------------------------------------------------------------------------------- profiles


def profile_samples(input_ids: np.ndarray, measured: Likelihood, texts: Iterable[str]) -> tuple[SampleProfile, ...]:
    """One profile a sample of `input_ids [samples, length]`; `texts` is what each says, special tokens included."""
    _require_grams(input_ids)
    return tuple(
        SampleProfile(
            perplexity=float(np.exp(nll)),
            duplicate_rate=duplicate_rate(codes),
            collision_probability=collision_probability(codes),
            tokens=len(ids),
            type_token_ratio=type_token_ratio(ids),
            unigram_entropy=unigram_entropy(ids),
            compression_ratio=compression_ratio([text]),
            model_entropy=float(entropy),
        )
        for ids, codes, nll, entropy, text in zip(
            input_ids, grams(input_ids), measured.nll, measured.entropy, texts, strict=True
        )
    )


def profile_source(
    name: str, capability: str, input_ids: np.ndarray, measured: Likelihood, texts: Iterable[str]
) -> SourceProfile:
    """One profile of all samples together."""
    profile = RunningProfile(name, capability)
    profile.add(input_ids, measured, texts)
    return profile.result()


class RunningProfile:
    """The profile of a source whose samples arrive in portions; neither their size nor their order changes a bit of it.

    Memory is bounded by the source's distinct 4-grams (see `metrics.Tally`) and 64 bytes a sample, however long it is.
    """

    def __init__(self, name: str, capability: str) -> None:
        self.name, self.capability = name, capability
        self._length: int | None = None
        self._tokens, self._grams = Tally(), Tally(numbers=2)
        self._nll: list[float] = []
        self._entropy: list[float] = []
        self._plain = self._packed = 0

    def add(self, input_ids: np.ndarray, measured: Likelihood, texts: Iterable[str]) -> None:
        """Adds samples `[samples, length]` and their texts, which are read one by one.

        Raises `ValueError` for samples of another length than those before: token and 4-gram rates depend on it.
        """
        _require_grams(input_ids)
        samples, length = input_ids.shape
        if length != (self._length or length):
            raise ValueError(
                f"Samples of {self.name!r} have {self._length} tokens; these have {length}. Cut them alike."
            )
        self._length = length
        portion = max(1, WAITING // length)
        for start in range(0, samples, portion):
            ids = input_ids[start : start + portion]
            self._tokens.add(ids.reshape(1, -1).astype(np.int64))
            self._grams.add(gram_keys(ids))
        for nll, entropy, text in zip(measured.nll, measured.entropy, texts, strict=True):
            self._nll.append(float(nll))
            self._entropy.append(float(entropy))
            plain, packed = text_bytes(text)
            self._plain += plain
            self._packed += packed

    def result(self) -> SourceProfile:
        """The profile of all samples so far; more may follow. Raises `ValueError` where there is none."""
        samples = len(self._nll)
        if samples == 0:
            raise ValueError(f"No sample of {self.name!r} was measured.")
        return SourceProfile(
            name=self.name,
            capability=self.capability,
            samples=samples,
            perplexity=float(np.exp(math.fsum(self._nll) / samples)),  # fsum rounds once, whatever the order
            duplicate_rate=duplicate_rate(self._grams),
            collision_probability=collision_probability(self._grams),
            type_token_ratio=type_token_ratio(self._tokens),
            unigram_entropy=unigram_entropy(self._tokens),
            compression_ratio=self._plain / self._packed,
            model_entropy=math.fsum(self._entropy) / samples,
        )


def _require_grams(input_ids: np.ndarray) -> None:
    if input_ids.shape[1] < 4:
        raise ValueError(f"Samples of {input_ids.shape[1]} tokens hold no 4-gram; give samples of 4 tokens or more.")
