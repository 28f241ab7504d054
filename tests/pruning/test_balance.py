# SPDX-License-Identifier: Apache-2.0
"""Hessians by group: which sample goes into which, their sum by trace, and weights that serve the group that loses most."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from optimum_calibprune import pocket
from optimum_calibprune.pruning.balance import Balance, improve_worst
from optimum_calibprune.pruning.hessian import Hessian
from optimum_calibprune.pruning.sparsegpt import Solution, relative_error, solve
from optimum_calibprune.records import CalibrationRow, CalibrationSet, SparsityPattern


HALF = SparsityPattern(0.5)
CPU = torch.device("cpu")
Layer = tuple[Tensor, list[Hessian]]


def rows_of(groups: str, weights: Sequence[float] | None = None) -> tuple[CalibrationRow, ...]:
    """One letter a row."""
    values = weights or [1.0] * len(groups)
    return tuple(CalibrationRow("s", i, g, w) for i, (g, w) in enumerate(zip(groups, values, strict=True)))


def balance_of(groups: str, normalise: str, micro_batch: int, weights: Sequence[float] | None = None) -> Balance:
    chosen = CalibrationSet(np.zeros((len(groups), 8)), rows_of(groups, weights), normalise)
    return Balance.of(chosen, micro_batch, CPU)


def shares_of(balance: Balance) -> list[list[tuple[int, list[int] | None, list[float] | None]]]:
    def as_list(values: Tensor | None) -> list[float] | None:
        return None if values is None else values.tolist()

    return [[(s.hessian, as_list(s.samples), as_list(s.weights)) for s in batch] for batch in balance.batches]


def inputs(samples: int, length: int = 7, columns: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(samples, length, columns, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ shares


def test_without_normalising_all_rows_make_one_hessian_whatever_their_groups() -> None:
    balance = balance_of("abab", "none", 3)
    assert shares_of(balance) == [[(0, None, None)], [(0, None, None)]]
    assert balance.weights == (1.0,)
    hessians = balance.empty(6, CPU)
    assert balance.combine(hessians) is hessians[0]


def test_a_micro_batch_that_mixes_groups_is_divided() -> None:
    balance = balance_of("baabbbc", "trace", 3)
    assert shares_of(balance) == [
        [(0, [0], None), (1, [1, 2], None)],
        [(0, None, None)],
        [(2, None, None)],
    ]
    assert balance.weights == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("normalise", ["trace", "minimax"])
def test_a_group_weighs_as_its_rows_do_on_average(normalise: str) -> None:
    balance = balance_of("abab", normalise, 4, weights=[1.0, 0.5, 2.0, 0.25])
    assert balance.weights == (1.5, 0.375)
    assert shares_of(balance) == [[(0, [0, 2], [1.0, 2.0]), (1, [1, 3], [0.5, 0.25])]]


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0, 1.0, 3.0, 0.1, 0.7]])
def test_each_hessian_holds_its_own_rows_in_any_micro_batch(micro_batch: int, weights: list[float] | None) -> None:
    groups, X = "baabbca", inputs(7)
    balance = balance_of(groups, "trace", micro_batch, weights)
    hessians = balance.empty(6, CPU)
    for i, x in enumerate(X.split(micro_batch)):
        assert balance.add(hessians, i, x)
    assert len(hessians) == 3
    share = torch.tensor(weights or [1.0] * 7, dtype=torch.float64)
    for name, hessian in zip("bac", hessians, strict=True):
        mine = [i for i, group in enumerate(groups) if group == name]
        total = 7 * float(share[mine].sum())
        expected = 2 / total * torch.einsum("s,stc,std->cd", share[mine], X[mine].double(), X[mine].double())
        assert hessian.tokens == pytest.approx(total)
        torch.testing.assert_close(hessian.matrix.double(), expected, rtol=1e-5, atol=1e-6)


def test_what_is_not_finite_is_told_wherever_it_stands() -> None:
    balance, X = balance_of("abab", "trace", 4), inputs(4)
    for sample in range(4):
        bad = X.clone()
        bad[sample, 3, 2] = float("nan")
        assert not balance.add(balance.empty(6, CPU), 0, bad)
    assert balance.add(balance.empty(6, CPU), 0, X)


# ------------------------------------------------------------------------------------------- the worst


def two_groups(rows: int = 24, columns: int = 48) -> tuple[Tensor, list[Hessian]]:
    """A layer, and two groups with inputs in directions of their own, one much harder to prune for than the other."""
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(rows, columns, generator=generator)
    hessians = []
    for rank, noise in ((4, 0.1), (40, 1.0)):
        H = Hessian(columns)
        basis = torch.randn(rank, columns, generator=generator)
        scores = torch.randn(500, rank, generator=generator)
        H.add(scores @ basis + noise * torch.randn(500, columns, generator=generator))
        hessians.append(H)
    return W, hessians


def worst(W: Tensor, solution: Solution, hessians: Sequence[Hessian]) -> float:
    return max(relative_error(W, solution.weight, hessian) for hessian in hessians)


def test_the_worst_group_comes_near_the_best_of_a_grid_of_weights() -> None:
    W, hessians = two_groups()
    grid = [a / 40 for a in range(1, 40)]
    errors = [worst(W, solve(W, Hessian.balanced(hessians, [a, 1 - a]), HALF), hessians) for a in grid]
    first = solve(W, Hessian.balanced(hessians, [1, 1]), HALF)
    before, least = worst(W, first, hessians), min(errors)
    assert least < 0.9 * before, "or there is nothing to find"
    after = worst(W, improve_worst(W, first, hessians, [1.0, 1.0], HALF), hessians)
    assert after < before - 0.8 * (before - least)


def test_more_rounds_never_make_it_worse_and_none_is_the_first_solution() -> None:
    W, hessians = two_groups()
    kept = W.clone()
    first = solve(W, Hessian.balanced(hessians, [1, 1]), HALF)
    assert improve_worst(W, first, hessians, [1, 1], HALF, rounds=0) is first
    found = [worst(W, improve_worst(W, first, hessians, [1, 1], HALF, rounds=n), hessians) for n in range(5)]
    assert found == sorted(found, reverse=True)
    assert torch.equal(W, kept)


def test_a_group_without_energy_is_no_obstacle() -> None:
    W, hessians = two_groups()
    dead = Hessian(W.shape[1])
    dead.add(torch.zeros(10, W.shape[1]))
    parts = [*hessians, dead]
    first = solve(W, Hessian.balanced(parts, [1, 1, 1]), HALF)
    found = improve_worst(W, first, parts, [1.0, 1.0, 1.0], HALF)
    assert worst(W, found, hessians) < worst(W, first, hessians)


def test_where_no_group_loses_anything_the_first_solution_stays() -> None:
    W, hessians = two_groups()
    W[:, ::2] = 0.0
    first = solve(W, Hessian.balanced(hessians, [1, 1]), SparsityPattern.parse("2:4"))
    assert worst(W, first, hessians) == 0.0
    assert improve_worst(W, first, hessians, [1, 1], SparsityPattern.parse("2:4")) is first


@pytest.mark.parametrize("pattern", ["50%", "70%", "2:4"])
@pytest.mark.parametrize("layer", ["self_attn.q_proj", "mlp.down_proj"])
def test_on_a_real_layer_the_worst_capability_loses_less(layer: str, pattern: str, layers: dict[str, Layer]) -> None:
    W, hessians = layers[layer]
    asked = SparsityPattern.parse(pattern)
    first = solve(W, Hessian.balanced(hessians, [1] * 4), asked)
    found = improve_worst(W, first, hessians, [1] * 4, asked)
    assert worst(W, found, hessians) < 0.99 * worst(W, first, hessians)
    assert found.zeros_found == first.zeros_found


@pytest.fixture(scope="module")
def layers() -> dict[str, Layer]:
    """Two layers of the pocket's first block, with one Hessian for each capability of its real texts."""
    tokenizer = AutoTokenizer.from_pretrained(pocket.MODEL)
    config = LlamaConfig.from_pretrained(pocket.MODEL, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(pocket.MODEL, config=config, dtype=torch.float32).eval()
    found: dict[str, Layer] = {}
    arrived: dict[str, Tensor] = {}
    texts = pocket.sources()
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        module = model.model.layers[0].get_submodule(name)
        module.register_forward_pre_hook(lambda _, x, name=name: arrived.update({name: x[0]}))
        found[name] = (module.weight.data, [])
    for source in ("textbooks", "piqa", "thealgorithms", "gsm8k"):
        lines = Path(texts[source].path).read_text(encoding="utf-8").splitlines()[:60]
        ids = tokenizer(" ".join(json.loads(line)["text"] for line in lines)[:12000])["input_ids"]
        with torch.no_grad():
            model(input_ids=torch.tensor(ids[:1000]).view(-1, 100), use_cache=False)
        for name, (W, hessians) in found.items():
            hessians.append(Hessian(W.shape[1]))
            hessians[-1].add(arrived[name])
    return found
