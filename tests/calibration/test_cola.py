# SPDX-License-Identifier: Apache-2.0
"""COLA: pooled activations against plain hooks, one sample a cluster, and clusters that anyone can see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from optimum_calibprune.calibration import cola
from optimum_calibprune.calibration.cola import pooled_activations, select_by_clusters


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return AutoModelForCausalLM.from_config(config).eval()


IDS = np.random.default_rng(0).integers(0, 50, (5, 12))


# ------------------------------------------------------------------------------------------- activations


def by_hooks(model: PreTrainedModel) -> list[np.ndarray]:
    """Mean over tokens behind each block, the last behind the norm."""
    seen: list[np.ndarray] = []
    modules = [*model.model.layers[:-1], model.model.norm]

    def record(_: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        state = output[0] if isinstance(output, tuple) else output
        seen.append(state.double().mean(dim=1).numpy())

    handles = [module.register_forward_hook(record) for module in modules]
    with torch.no_grad():
        model(input_ids=torch.from_numpy(IDS), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("layers", "taken"), [(1, 1), (2, 2), (3, 3), (0, 3), (40, 3)])
def test_activations_are_those_behind_the_last_blocks(model: PreTrainedModel, layers: int, taken: int) -> None:
    found = pooled_activations(model, IDS, layers)
    assert found.shape == (5, 16 * taken)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, np.concatenate(by_hooks(model)[-taken:], axis=1), rtol=1e-4, atol=1e-5)


def test_memory_decides_the_batch_and_not_the_result(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pooled_activations(model, IDS)
    one = 4 * (3 + 1) * 12 * 16
    seen: list[tuple[int, int, str]] = []
    for batch in (1, 2, 3):
        seen.clear()
        monkeypatch.setattr(cola, "ACTIVATION_BYTES", batch * one)
        found = pooled_activations(model, IDS, 1, lambda *step: seen.append(step))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert seen == [(min(done, 5), 5, "activations") for done in range(batch, 5 + batch, batch)]


def test_sixteen_bit_states_are_averaged_in_more(model: PreTrainedModel) -> None:
    half = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16).eval()
    half.load_state_dict(model.state_dict())
    found, expected = pooled_activations(half, IDS), pooled_activations(model, IDS)
    assert np.abs(found - expected).max() < 0.05
    assert not np.array_equal(found, torch.from_numpy(found).bfloat16().double().numpy())


# --------------------------------------------------------------------------------------------- clusters


def clouds(sizes: list[int], features: int = 30, spread: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Points around far centres, in an order that tells nothing, and the cloud of each."""
    generator = np.random.default_rng(7)
    centres = generator.normal(0, 1, (len(sizes), features))
    cloud = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return centres[cloud] + spread * generator.normal(0, 1, (len(cloud), features)), cloud


@pytest.mark.parametrize("seed", range(10))
def test_each_cloud_gives_one_sample_whatever_its_size(seed: int) -> None:
    points, cloud = clouds([40, 3, 1, 12, 7])
    chosen = select_by_clusters(points, 5, seed)
    assert sorted(cloud[chosen]) == [0, 1, 2, 3, 4]
    assert chosen == sorted(chosen)
    assert all(type(i) is int for i in chosen)


def test_the_sample_is_the_one_nearest_the_centre() -> None:
    """On a line nothing is lost in the projection: of -3, 0, 1 and of 100, 104, 107 the ones next to the means."""
    points = np.array([[107.0], [-3.0], [0.0], [100.0], [1.0], [104.0]])
    assert select_by_clusters(points, 2, 0) == [2, 5]


def test_the_scale_and_the_place_of_a_feature_do_not_matter() -> None:
    points, _ = clouds([9] * 6, spread=0.8)
    expected = select_by_clusters(points, 10, 0)
    scale = np.exp(np.random.default_rng(1).normal(0, 4, points.shape[1]))
    assert select_by_clusters(points * scale + 1000 * scale, 10, 0) == expected
    with_constant = np.concatenate([points, np.full((len(points), 1), 5.0)], axis=1)
    assert len(select_by_clusters(with_constant, 10, 0)) == 10


@pytest.mark.parametrize("samples", [1, 2, 17, 59, 60])
def test_as_many_samples_as_asked_all_different(samples: int) -> None:
    points = np.random.default_rng(2).normal(0, 1, (60, 100))
    for seed in range(3):
        chosen = select_by_clusters(points, samples, seed)
        assert len(set(chosen)) == len(chosen) == samples


def test_copies_make_clusters_of_their_own_where_too_few_points_differ() -> None:
    points = np.repeat(np.random.default_rng(3).normal(0, 1, (3, 20)), 5, axis=0)
    chosen = select_by_clusters(points, 8, 0)
    assert len(set(chosen)) == 8
    assert {i // 5 for i in chosen} == {0, 1, 2}
    assert len(set(select_by_clusters(np.zeros((6, 4)), 6, 0))) == 6


def test_the_seed_decides_and_nothing_else() -> None:
    points = np.random.default_rng(4).normal(0, 1, (80, 70))
    expected = select_by_clusters(points, 20, 5)
    np.random.seed(1)
    assert select_by_clusters(points.copy(), 20, 5) == expected
    assert select_by_clusters(points, 20, 6) != expected


def test_clusters_are_tighter_than_those_around_a_random_draw() -> None:
    points = np.random.default_rng(5).normal(0, 1, (200, 8))

    def looseness(chosen: list[int]) -> float:
        return float(((points[:, None] - points[chosen]) ** 2).sum(axis=2).min(axis=1).mean())

    draws = [looseness(np.random.default_rng(i).permutation(200)[:30].tolist()) for i in range(50)]
    assert looseness(select_by_clusters(points, 30, 0)) < min(draws)


def test_fewer_candidates_than_samples_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"7 samples were asked for and 6 are candidates; name more or larger sources\."
    ):
        select_by_clusters(np.zeros((6, 4)), 7, 0)
