# SPDX-License-Identifier: Apache-2.0
"""COLA's choice of samples: one from each cluster of what the dense model's activations look like.

Stage 3 of He et al. 2025 (arXiv 2510.10618): activations, a random projection, k-means with as many clusters as samples,
and the sample nearest each centre. Their stages 1 and 2 choose data sets and rewrite texts; here the user's sources are
taken as they are. K-means stands here because scikit-learn's adds up its threads' sums in the order in which they end, and the
same seed must give the same samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from transformers import PreTrainedModel


DIMENSIONS = 64
RESTARTS = 5
ITERATIONS = 100
ACTIVATION_BYTES = 2**28  # hidden states of all layers that may be in memory at once
Progress = Callable[[int, int, str], None]


def pooled_activations(
    model: PreTrainedModel, input_ids: np.ndarray, layers: int = 1, on_progress: Progress | None = None
) -> np.ndarray:
    """Mean over the tokens of each sample `[samples, length]` of the hidden states behind the last `layers` blocks (the last
    of them behind the final norm), side by side: float64 `[samples, layers x width]`.

    0 takes all blocks, as does a number above theirs. The paper speaks of activations layer by layer and does not say how
    they are pooled; the default is the last one alone.
    """
    import torch

    decoder, text_config = model.get_decoder(), model.config.get_text_config(decoder=True)
    depth, width = text_config.num_hidden_layers, text_config.hidden_size
    device = model.get_input_embeddings().weight.device
    batch = max(1, ACTIVATION_BYTES // (4 * (depth + 1) * input_ids.shape[1] * width))
    pooled = []
    with torch.inference_mode():
        for start in range(0, len(input_ids), batch):
            ids = torch.from_numpy(input_ids[start : start + batch].astype(np.int64)).to(device)
            states = decoder(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
            behind_blocks = states[1:][-layers or None :]  # states[0] are the embeddings
            means = [state.mean(dim=1, dtype=torch.float32).cpu() for state in behind_blocks]
            pooled.append(torch.cat(means, dim=1).double().numpy())
            if on_progress is not None:
                on_progress(start + len(ids), len(input_ids), "activations")
    return np.concatenate(pooled)


def select_by_clusters(activations: np.ndarray, samples: int, seed: int) -> list[int]:
    """The indices, ascending, of the sample nearest the centre of each of `samples` clusters of `activations`
    `[candidates, features]`: each feature standardised, then projected to `DIMENSIONS` dimensions by `seed`.

    Raises `ValueError` where there are fewer candidates than samples.
    """
    if len(activations) < samples:
        raise ValueError(
            f"{samples} samples were asked for and {len(activations)} are candidates; name more or larger sources."
        )
    generator = np.random.default_rng([seed, DIMENSIONS])
    deviation = activations.std(axis=0)
    standard = (activations - activations.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
    projection = generator.normal(0.0, DIMENSIONS**-0.5, (activations.shape[1], DIMENSIONS))
    points = standard @ projection
    runs = [_kmeans(points, samples, generator) for _ in range(RESTARTS)]
    cluster, distances = min(runs, key=lambda run: run[1].sum())
    return sorted(int(min(np.flatnonzero(cluster == j), key=lambda i: distances[i])) for j in range(samples))


def _kmeans(points: np.ndarray, k: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's algorithm from a k-means++ start (Arthur and Vassilvitskii 2007): the cluster of each point `[points]` and
    its squared distance to that cluster's centre; every cluster has at least one point."""
    centres = _spread(points, k, generator)
    before = None
    for _ in range(ITERATIONS):
        table = _squared_distances(points, centres)
        cluster = table.argmin(axis=1)
        _fill_empty(cluster, table[np.arange(len(points)), cluster], k)
        if before is not None and np.array_equal(cluster, before):
            break
        before = cluster
        centres = np.stack([points[cluster == j].mean(axis=0) for j in range(k)])
    return cluster, ((points - centres[cluster]) ** 2).sum(axis=1)


def _spread(points: np.ndarray, k: int, generator: np.random.Generator) -> np.ndarray:
    """k of the points, each drawn with a chance that grows with its squared distance from those before it."""
    chosen = [int(generator.integers(len(points)))]
    nearest = ((points - points[chosen[0]]) ** 2).sum(axis=1)
    while len(chosen) < k:
        total = nearest.sum()
        chance = nearest / total if total > 0 else None  # no distance left: the others are copies
        chosen.append(int(generator.choice(len(points), p=chance)))
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
    return points[chosen]


def _squared_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    squares = (points**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1)
    return np.maximum(squares - 2 * points @ centres.T, 0.0)


def _fill_empty(cluster: np.ndarray, distances: np.ndarray, k: int) -> None:
    """Moves to each empty cluster the point that lies farthest from its centre, among those that are not alone."""
    sizes = np.bincount(cluster, minlength=k)
    for empty in np.flatnonzero(sizes == 0):
        moved = int(np.where(sizes[cluster] > 1, distances, -1.0).argmax())
        sizes[cluster[moved]] -= 1
        sizes[empty] = 1
        cluster[moved] = empty
