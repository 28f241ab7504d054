# SPDX-License-Identifier: Apache-2.0
"""Blocks that differ: outliers against a plain computation on the whole model, and totals that are exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum_calibprune import pocket
from optimum_calibprune.pruning import blocks
from optimum_calibprune.pruning.allocation import LAMBDA, Matrix, move_zeros, outlier_shares, owl
from optimum_calibprune.pruning.hessian import Hessian
from optimum_calibprune.pruning.schedule import Cancelled, Settings, prune_blocks
from optimum_calibprune.pruning.sparsegpt import METHODS, solve, zeros_in_parts
from optimum_calibprune.records import CalibrationRow, CalibrationSet, SparsityPattern


LINEAR = (nn.Linear, Conv1D)
SETTINGS = Settings(SparsityPattern(0.6), micro_batch=2)


def short_pocket() -> PreTrainedModel:
    """The first two blocks of the pocket model."""
    config = LlamaConfig.from_pretrained(pocket.MODEL, num_hidden_layers=2)
    return AutoModelForCausalLM.from_pretrained(pocket.MODEL, config=config, dtype=torch.float32).eval()


def tiny_gpt2() -> PreTrainedModel:
    """Three blocks of odd sizes, of which the second has the most outliers."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=36, n_inner=50, n_layer=3, n_head=4, n_positions=64)
    model = AutoModelForCausalLM.from_config(config).eval()
    for i, count in enumerate((40, 200, 7)):
        model.transformer.h[i].mlp.c_fc.weight.data.view(-1)[:count] *= 20
    return model


MODELS = [short_pocket, tiny_gpt2]


def calibration(weights: dict[int, float] | None = None) -> CalibrationSet:
    ids = np.random.default_rng(1).integers(0, 64, (5, 16))
    rows = (CalibrationRow("random", i, "general", (weights or {}).get(i, 1.0)) for i in range(5))
    return CalibrationSet(ids, tuple(rows))


def as_bytes(model: PreTrainedModel) -> dict[str, bytes]:
    return {key: value.contiguous().view(torch.uint8).numpy().tobytes() for key, value in model.state_dict().items()}


def zeros_of(model: PreTrainedModel, settings: Settings = SETTINGS, **options: Any) -> dict[str, int]:
    return owl(model, calibration(), settings, blocks.find_groups(model, settings.sparsity), **options)


# -------------------------------------------------------------------------------------------- outliers


@torch.no_grad()
def plain_shares(model: PreTrainedModel, chosen: CalibrationSet) -> list[float]:
    """By one forward of the whole model for each sample, with a hook on every linear layer of its blocks, in float64."""
    name, layers = blocks.find_blocks(model)
    shares = []
    for i in range(len(layers)):
        linear = {n: m for n, m in model.named_modules() if n.startswith(f"{name}.{i}.") and isinstance(m, LINEAR)}
        seen: dict[str, list[Tensor]] = {n: [] for n in linear}
        handles = [
            module.register_forward_hook(lambda _, args, __, inputs=seen[n]: inputs.append(args[0][0].double()))
            for n, module in linear.items()
        ]
        for row in chosen.input_ids:
            model(input_ids=torch.from_numpy(row.copy())[None], use_cache=False)
        for handle in handles:
            handle.remove()
        metrics = []
        for n, module in linear.items():
            W = module.weight.double().t() if isinstance(module, Conv1D) else module.weight.double()
            roots = [row.weight**0.5 for row in chosen.rows]
            norms = torch.cat([x * root for x, root in zip(seen[n], roots, strict=True)]).norm(dim=0)
            metrics.append((W.abs() * norms).flatten())
        metric = torch.cat(metrics)
        shares.append(float((metric > 5 * metric.mean()).double().mean()))
    return shares


@pytest.mark.parametrize("weights", [None, {1: 9.0, 4: 0.5}])
@pytest.mark.parametrize("make", MODELS)
def test_outliers_are_those_of_a_plain_computation(
    make: Callable[[], PreTrainedModel], weights: dict[int, float] | None
) -> None:
    model, chosen = make(), calibration(weights)
    before = as_bytes(model)
    expected = plain_shares(model, chosen)
    assert len(set(expected)) == len(expected), "blocks that do not differ would prove nothing"
    for micro_batch in (1, 2, 5):
        found = outlier_shares(model, chosen, micro_batch, blocks.find_groups(model))
        assert list(found) == list(range(len(expected)))
        assert list(found.values()) == pytest.approx(expected, rel=2e-3)
    assert as_bytes(model) == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_blocks_that_are_moved_one_by_one_have_the_same_outliers() -> None:
    model = tiny_gpt2()
    groups = blocks.find_groups(model)
    shares = [outlier_shares(model, calibration(), 2, groups, torch.device(place)) for place in ("cpu", "cpu:0")]
    assert shares[0] == shares[1]


def test_values_that_overflow_name_the_block() -> None:
    model = tiny_gpt2()
    model.transformer.wte.weight.data[3] = float("inf")
    chosen = CalibrationSet(np.full((1, 8), 3), (CalibrationRow("x", 0, "math"),))
    with pytest.raises(ValueError, match=r"^transformer\.h\.0 receives NaN, infinity or values"):
        outlier_shares(model, chosen, 1, blocks.find_groups(model))


def test_cancelling_stops_before_the_next_block() -> None:
    model, seen = tiny_gpt2(), []
    with pytest.raises(Cancelled, match=r"transformer\.h\.2"):
        zeros_of(model, on_progress=lambda *step: seen.append(step), cancelled=lambda: len(seen) == 2)
    assert seen == [(1, 3, "transformer.h.0"), (2, 3, "transformer.h.1")]


# --------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 300), (5, 131), (7, 128), (3, 259)])
def test_a_number_of_zeros_is_reached_exactly_and_spread_evenly(method: str, rows: int, columns: int) -> None:
    torch.manual_seed(0)
    W, H = torch.randn(rows, columns), Hessian(columns)
    H.add(torch.randn(2 * columns, columns))
    heights, widths = ([1] * rows, [columns]) if method == "wanda" else ([rows], [columns])
    if method == "sparsegpt":
        widths = [min(128, columns - start) for start in range(0, columns, 128)]
    for zeros in {0, 1, W.numel() // 3, W.numel() - 1, W.numel()}:
        solution = solve(W, H, zeros, method=method)
        assert solution.zeros_asked == solution.zeros_found == zeros
        found = [int(part.sum()) for part in _parts(solution.mask, heights, widths)]
        assert found == zeros_in_parts(zeros, method, rows, columns)
        for count, part in zip(found, _parts(solution.mask, heights, widths), strict=True):
            assert abs(count - zeros * part.numel() / W.numel()) <= 1


def _parts(mask: Tensor, heights: list[int], widths: list[int]) -> list[Tensor]:
    return [part for rows in mask.split(heights) for part in rows.split(widths, dim=1)]


def test_a_number_that_the_pattern_gives_removes_what_the_pattern_removes() -> None:
    torch.manual_seed(0)
    W, H = torch.randn(8, 256), Hessian(256)
    H.add(torch.randn(300, 256))
    for method in METHODS:
        by_pattern, by_number = (solve(W, H, target, method=method) for target in (SparsityPattern(0.5), 1024))
        assert torch.equal(by_pattern.weight, by_number.weight)


def test_zeros_move_to_blocks_with_few_outliers_the_same_share_in_each_matrix() -> None:
    matrices = [Matrix(block, size, size // 2) for block in range(3) for size in (100_000, 20_000)]
    counts = move_zeros(matrices, {0: 0.04, 1: 0.01, 2: 0.02})
    assert sum(counts) == sum(matrix.zeros for matrix in matrices)
    shares = [count / matrix.size for count, matrix in zip(counts, matrices, strict=True)]
    mean = (2 * LAMBDA + 0 + 2 * LAMBDA / 3) / 3
    expected = [0.5 - (kept - mean) for kept in (2 * LAMBDA, 0, 2 * LAMBDA / 3)]
    assert shares == pytest.approx([share for share in expected for _ in range(2)], abs=1e-4)


def test_blocks_with_equal_outliers_keep_what_they_have() -> None:
    matrices = [Matrix(block, 10, 3 + block) for block in range(3)]
    assert move_zeros(matrices, dict.fromkeys(range(3), 0.1)) == [3, 4, 5]


def test_totals_are_exact_and_no_matrix_loses_everything_or_less_than_nothing() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        shares = {block: float(random.random() ** 4) for block in range(int(random.integers(1, 9)))}
        sizes = [(block, int(random.integers(2, 5000))) for block in shares for _ in range(int(random.integers(1, 5)))]
        fraction = float(random.random())
        matrices = [Matrix(block, size, round(fraction * size)) for block, size in sizes]
        counts = move_zeros(matrices, shares)
        assert sum(counts) == sum(matrix.zeros for matrix in matrices)
        assert all(0 <= count <= matrix.size for count, matrix in zip(counts, matrices, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.5, 0.613, {"*.0.*": 0.7, "*.c_proj": "dense", "*.o_proj": "dense", "*": 0.3}])
@pytest.mark.parametrize("make", MODELS)
def test_the_total_is_exactly_that_without_owl(
    make: Callable[[], PreTrainedModel], sparsity: Any, method: str
) -> None:
    settings = Settings(sparsity, method, micro_batch=2)
    without = [report for part in prune_blocks(make(), calibration(), settings) for report in part]
    model = make()
    zeros = zeros_of(model, settings)
    with_owl = [
        report for part in prune_blocks(model, calibration(), replace(settings, zeros=zeros)) for report in part
    ]
    assert [report.module for report in with_owl] == [report.module for report in without] == list(zeros)
    assert [report.zeros_asked for report in with_owl] == list(zeros.values())
    assert sum(report.zeros_asked for report in with_owl) == sum(report.zeros_asked for report in without)
    assert [report.zeros_asked for report in with_owl] != [report.zeros_asked for report in without]
    assert all(report.zeros_found >= report.zeros_asked for report in with_owl)


@pytest.mark.parametrize("make", MODELS)
def test_the_block_with_most_outliers_loses_least(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    expected = plain_shares(model, calibration())
    zeros, (name, _) = zeros_of(model), blocks.find_blocks(model)
    found: dict[int, set[float]] = {}
    for module, count in zeros.items():
        share = count / model.get_submodule(module).weight.numel()
        found.setdefault(int(module.removeprefix(f"{name}.").split(".")[0]), set()).add(round(share, 2))
    assert all(len(shares) == 1 for shares in found.values()), "all modules of a block lose the same share"
    by_loss = sorted(found, key=lambda i: min(found[i]))
    assert by_loss == sorted(found, key=lambda i: -expected[i])
    assert min(found[by_loss[-1]]) - min(found[by_loss[0]]) == pytest.approx(2 * LAMBDA, abs=0.011)
