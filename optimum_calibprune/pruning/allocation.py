# SPDX-License-Identifier: Apache-2.0
"""How many weights each matrix loses where the blocks differ: OWL, by their outliers, with the total kept exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..records import CalibrationSet
from . import blocks
from .activations import Activations
from .blocks import Call
from .homes import Home, InMemory
from .ranks import ALONE, Ranks
from .schedule import Cancelled, Progress, Settings, own_micro_batches
from .sparsegpt import zeros_in_parts
from .stops import Experts, Stop


OUTLIER = 5.0  # M: a weight whose metric exceeds so many times its block's mean is an outlier
LAMBDA = 0.08  # from the block with most outliers to the one with fewest, sparsity grows by twice this


@dataclass(frozen=True)
class Matrix:
    """A weight matrix that is pruned: its block, its size, and the zeros that it gets where blocks do not differ."""

    block: int
    size: int
    zeros: int


@torch.no_grad()
def owl(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    settings: Settings,
    groups: list[list[Stop]],
    *,
    home: Home | None = None,
    device: torch.device | None = None,
    hidden: Activations | None = None,
    ranks: Ranks = ALONE,
    on_progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> dict[str, int]:
    """Outlier-weighted layer-wise sparsity (Yin et al. 2024, arXiv:2310.05175): the zeros of each module, by its full name.

    The more outliers a block has in the dense `model`, which is only read, the fewer weights it loses: each of its modules
    loses the same share less than `settings.sparsity`, which is unstructured, asks of it, or more. The total is that of
    `settings` without this.

    Args:
        groups: of `blocks.find_groups` with the same sparsity.
        home: where the blocks are, as in `prune_blocks`; hidden: what keeps the hidden states (default: the device).
        ranks: the processes that do this together, each with a part of the samples.
        on_progress: called with (blocks done, blocks, name of the block); cancelled: asked before each of them.
    """
    name, _ = blocks.find_blocks(model)
    shares = outlier_shares(
        model,
        calibration,
        settings.micro_batch,
        groups,
        device,
        on_progress,
        cancelled,
        home=home,
        hidden=hidden,
        ranks=ranks,
    )
    matrices = {}
    for i, block in enumerate(groups):
        for matrix_name, shape in ((n, W.shape) for stop in block for n, W in stop.matrices.items()):
            full = f"{name}.{i}.{matrix_name}"
            zeros = sum(zeros_in_parts(settings.target_of(full), settings.method, *shape))
            matrices[full] = Matrix(i, shape.numel(), zeros)
    return dict(zip(matrices, move_zeros(list(matrices.values()), shares), strict=True))


def move_zeros(matrices: Sequence[Matrix], shares: Mapping[int, float]) -> list[int]:
    """The zeros of each matrix, moved from the blocks with a large share of outliers to those with a small one.

    `shares` are scaled to lie between 0 and 2 `LAMBDA`, or the room that is left above none and below all weights of any matrix,
    where that is less. Each block keeps so large a part of its weights more, less the mean of that over all weights: so
    the total does not change. Counts are rounded where the matrices' running sum is, and what one loses by that the next one gains.
    """
    room = min(min(matrix.zeros, matrix.size - matrix.zeros) / matrix.size for matrix in matrices)
    lowest, highest = min(shares.values()), max(shares.values())
    scale = min(2 * LAMBDA, room) / (highest - lowest) if highest > lowest else 0.0
    kept = {block: (share - lowest) * scale for block, share in shares.items()}
    mean = sum(matrix.size * kept[matrix.block] for matrix in matrices) / sum(matrix.size for matrix in matrices)
    exact = (matrix.zeros - matrix.size * (kept[matrix.block] - mean) for matrix in matrices)
    counts = [stop - start for start, stop in pairwise(round(end) for end in accumulate(exact, initial=0.0))]
    assert sum(counts) == sum(matrix.zeros for matrix in matrices)
    return counts


# -------------------------------------------------------------------------------------------- outliers


@torch.no_grad()
def outlier_shares(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    micro_batch: int,
    groups: list[list[Stop]],
    device: torch.device | None = None,
    on_progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    *,
    home: Home | None = None,
    hidden: Activations | None = None,
    ranks: Ranks = ALONE,
) -> dict[int, float]:
    """By its number, the `outlier_share` of each block that has modules in `groups`, in one forward of the dense model."""
    model.eval()
    name, model_blocks = blocks.find_blocks(model)
    home = home or InMemory(model)
    device = device or home.device
    own = own_micro_batches(calibration, micro_batch, ranks)
    ids = torch.from_numpy(calibration.input_ids[own.start * micro_batch : own.stop * micro_batch].copy())
    weights = torch.tensor([row.weight for row in calibration.rows], device=device).split(micro_batch)
    weights = weights[own.start : own.stop]
    first, calls = blocks.enter(model, ids, micro_batch, device)
    hidden = (hidden or Activations("device", device)).fill(first)
    shares = {}
    with home.only_blocks():
        for i, block in enumerate(home.brought(device)):
            try:
                if cancelled is not None and cancelled():
                    raise Cancelled(f"Stopped before {name}.{i}, as asked.")
                squares = _pass(block, groups[i], hidden, [of_all[i] for of_all in calls], weights)
                for of_matrix in squares.values():
                    ranks.add_up(of_matrix)
                if groups[i]:
                    shares[i] = _checked(outlier_share(_with_squares(groups[i], squares)), f"{name}.{i}")
            finally:
                home.put_back(i)
            hidden.turn()
            if on_progress is not None:
                on_progress(i + 1, len(model_blocks), f"{name}.{i}")
    return shares


def outlier_share(matrices: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The share of the weights of a block whose |W_ij| ||X_j||_2 exceeds `OUTLIER` times the mean of that over all of them.

    Args:
        matrices: weights `[rows, columns]`, each with the squared norms `[columns]` of its inputs over all tokens.
    """
    size = sum(W.numel() for W, _ in matrices)
    mean = sum(float(W.abs().sum(dim=0, dtype=torch.float64) @ squares.sqrt()) for W, squares in matrices) / size
    if not math.isfinite(mean):
        return math.nan
    over = ((W.abs().float() * squares.sqrt().float() > OUTLIER * mean).sum() for W, squares in matrices)
    return sum(int(count) for count in over) / size


def _checked(share: float, name: str) -> float:
    if math.isnan(share):
        raise ValueError(
            f"{name} receives NaN, infinity or values whose squares overflow from the calibration samples. The model "
            "overflows in this dtype; try dtype='bfloat16' or 'float32'."
        )
    return share


def _with_squares(stops: Sequence[Stop], squares: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(W, squares[name]) for stop in stops for name, W in stop.matrices.items()]


def _pass(
    block: nn.Module,
    stops: Sequence[Stop],
    hidden: Activations,
    calls: Sequence[Call],
    weights: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Replaces the hidden states by the block's output, and returns for each matrix, by its name, the squared norms
    `[columns]` of its inputs, the samples with their weights."""
    shapes = {name: W.shape for stop in stops for name, W in stop.matrices.items()}
    squares = {
        name: torch.zeros(shape[1], dtype=torch.float64, device=hidden.device) for name, shape in shapes.items()
    }
    for i, call in enumerate(calls):
        with ExitStack() as hooks:
            for stop in stops:
                add = partial(_add, stop, squares, weights[i])
                hooks.enter_context(stop.gate.register_forward_pre_hook(add, with_kwargs=True))
            hidden[i] = blocks.run(block, hidden[i], call)
    return squares


def _add(
    stop: Stop,
    squares: Mapping[str, Tensor],
    weights: Tensor,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Adds what arrives at a stop to the squared norms of each of its matrices."""
    if not isinstance(stop, Experts):
        of_each = stop.read(args, kwargs).float().square().reshape(len(weights), -1, stop.columns).sum(dim=1)
        _add_to(squares, stop.names, weights.double() @ of_each.double())
        return
    x, index = stop.read(args, kwargs)
    of_token = weights.double().repeat_interleave(len(x) // len(weights))
    for expert in range(stop.count):
        mine = (index == expert).any(dim=1)
        sent = x[mine]
        for names, rows in zip(stop.pruned(expert), (sent, stop.between(expert, sent)), strict=True):
            _add_to(squares, names, of_token[mine] @ rows.double().square())


def _add_to(squares: Mapping[str, Tensor], names: Iterable[str], more: Tensor) -> None:
    for name in names:
        squares[name].add_(more)
