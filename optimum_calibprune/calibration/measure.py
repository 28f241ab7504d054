# SPDX-License-Identifier: Apache-2.0
"""What a set of samples is like: perplexity under the dense model, and how much its token 4-grams repeat."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..records import SampleProfile, SourceProfile


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


LOGIT_BYTES = 2**28  # fp32 logits that may be in memory at once
Progress = Callable[[int, int, str], None]


def mean_nll(model: PreTrainedModel, input_ids: np.ndarray, on_progress: Progress | None = None) -> np.ndarray:
    """Mean negative log-likelihood (nats) of tokens 2..length of each sample `[samples, length]`; float64 `[samples]`."""
    import torch

    device = model.get_input_embeddings().weight.device
    vocabulary = model.get_input_embeddings().num_embeddings
    length = input_ids.shape[1]
    batch = max(1, LOGIT_BYTES // (4 * length * vocabulary))
    results = []
    with torch.inference_mode():
        for start in range(0, len(input_ids), batch):
            ids = torch.from_numpy(input_ids[start : start + batch].astype(np.int64)).to(device)
            logits = model(input_ids=ids, use_cache=False).logits
            results += [_sample_nll(one, target) for one, target in zip(logits[:, :-1], ids[:, 1:], strict=True)]
            if on_progress is not None:
                on_progress(len(results), len(input_ids), "perplexity")
    return np.array(results)


def _sample_nll(logits: Tensor, targets: Tensor) -> float:
    """Of one sample; `[length - 1, vocabulary]` is turned into fp32 a slice at a time."""
    import torch

    step = max(1, LOGIT_BYTES // (4 * logits.shape[1]))
    total = 0.0
    for rows, wanted in zip(logits.split(step), targets.split(step), strict=True):
        loss = torch.nn.functional.cross_entropy(rows.float(), wanted, reduction="sum")
        total += float(loss)
    return total / len(targets)


def grams(input_ids: np.ndarray) -> np.ndarray:
    """An exact integer code for each token 4-gram, `[samples, length - 3]`; no window crosses a sample's border.

    Pairs of tokens are numbered, then pairs of those numbers that stand two positions apart.
    """
    ids = input_ids.astype(np.int64)
    pairs = ids[:, :-1] * (int(ids.max()) + 1) + ids[:, 1:]
    numbers = np.unique(pairs, return_inverse=True)[1].reshape(pairs.shape)
    quads = numbers[:, :-2] * (int(numbers.max()) + 1) + numbers[:, 2:]
    return np.unique(quads, return_inverse=True)[1].reshape(quads.shape)


def duplicate_rate(codes: np.ndarray) -> float:
    """4-gram aggregation as 1 - distinct / total: 0 where nothing repeats. The paper does not give its formula; this
    reading is the one that selection minimises."""
    return 1.0 - len(np.unique(codes)) / codes.size


def collision_probability(codes: np.ndarray) -> float:
    """4-gram aggregation as sum p(g)^2: the chance that two 4-grams drawn at random are the same (Simpson 1949)."""
    counts = np.unique(codes, return_counts=True)[1] / codes.size
    return float((counts**2).sum())


def profile_samples(input_ids: np.ndarray, nll: np.ndarray) -> tuple[SampleProfile, ...]:
    """One profile a sample."""
    codes = grams(input_ids)
    return tuple(
        SampleProfile(float(np.exp(loss)), duplicate_rate(row), collision_probability(row), input_ids.shape[1])
        for row, loss in zip(codes, nll, strict=True)
    )


def profile_source(name: str, capability: str, input_ids: np.ndarray, nll: np.ndarray) -> SourceProfile:
    """One profile of all samples together."""
    codes = grams(input_ids)
    return SourceProfile(
        name=name,
        capability=capability,
        samples=len(input_ids),
        perplexity=float(np.exp(nll.mean())),
        duplicate_rate=duplicate_rate(codes),
        collision_probability=collision_probability(codes),
    )
