# SPDX-License-Identifier: Apache-2.0
"""How many weights each matrix loses where the blocks differ: OWL, by their outliers, with the total kept exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..records import CalibrationSet
from . import blocks
from .blocks import Call, InputGroup
from .schedule import Cancelled, Progress, Settings
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
    device: torch.device | None = None,
    on_progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> dict[str, int]:
    """Outlier-weighted layer-wise sparsity (Yin et al. 2024, arXiv:2310.05175): the zeros of each module, by its full name.

    The more outliers a block has in the dense `model`, which is only read, the fewer weights it loses: each of its modules
    loses the same share less than `settings.sparsity`, which is unstructured, asks of it, or more. The total is that of
    `settings` without this.

    Args:
        groups: of `blocks.find_groups` with the same sparsity.
        on_progress: called with (blocks done, blocks, name of the block); cancelled: asked before each of them.
    """
    check_owl(groups)
    name, _ = blocks.find_blocks(model)
    shares = outlier_shares(model, calibration, settings.micro_batch, groups, device, on_progress, cancelled)
    matrices = {}
    for i, block in enumerate(groups):
        for module_name, module in _modules(block):
            full = f"{name}.{i}.{module_name}"
            shape = blocks.weight_of(module).shape
            zeros = sum(zeros_in_parts(settings.target_of(full), settings.method, *shape))
            matrices[full] = Matrix(i, shape.numel(), zeros)
    return dict(zip(matrices, move_zeros(list(matrices.values()), shares), strict=True))


def check_owl(groups: list[list[Stop]]) -> None:
    """Raises `ValueError` for mixtures of experts, whose outliers nothing here counts."""
    if any(isinstance(stop, Experts) for block in groups for stop in block):
        raise ValueError(
            "allocation='owl' is not known for mixtures of experts; take 'uniform', or a sparsity by module."
        )


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
    groups: list[list[InputGroup]],
    device: torch.device | None = None,
    on_progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> dict[int, float]:
    """By its number, the `outlier_share` of each block that has modules in `groups`, in one forward of the dense model."""
    model.eval()
    name, model_blocks = blocks.find_blocks(model)
    home = next(model_blocks.parameters()).device
    device = device or home
    ids = torch.from_numpy(calibration.input_ids.copy())
    weights = torch.tensor([row.weight for row in calibration.rows], device=device).split(micro_batch)
    hidden, calls = blocks.enter(model, ids, micro_batch, device)
    shares = {}
    for i, block in enumerate(blocks.brought(model_blocks, device)):
        try:
            if cancelled is not None and cancelled():
                raise Cancelled(f"Stopped before {name}.{i}, as asked.")
            squares = _pass(block, groups[i], hidden, [of_all[i] for of_all in calls], weights)
            if groups[i]:
                shares[i] = _checked(outlier_share(_with_squares(groups[i], squares)), f"{name}.{i}")
        finally:
            blocks.store(block, home)
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


def _modules(groups: Sequence[InputGroup]) -> Iterator[tuple[str, nn.Module]]:
    return (pair for group in groups for pair in zip(group.names, group.modules, strict=True))


def _with_squares(groups: Sequence[InputGroup], squares: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    pairs = zip(groups, squares, strict=True)
    return [(blocks.weight_of(module), of_input) for group, of_input in pairs for module in group.modules]


def _pass(
    block: nn.Module,
    groups: Sequence[InputGroup],
    hidden: list[Tensor],
    calls: Sequence[Call],
    weights: Sequence[Tensor],
) -> list[Tensor]:
    """Replaces the hidden states by the block's output, and returns each group's squared norms `[columns]` of its inputs,
    the samples with their weights."""
    squares = [torch.zeros(group.columns, dtype=torch.float64, device=hidden[0].device) for group in groups]
    for i, call in enumerate(calls):
        with ExitStack() as hooks:
            for group, total in zip(groups, squares, strict=True):
                hooks.enter_context(group.modules[0].register_forward_pre_hook(partial(_add, total, weights[i])))
            hidden[i] = blocks.run(block, hidden[i], call)
    return squares


def _add(total: Tensor, weights: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    of_each = args[0].float().square().reshape(len(weights), -1, len(total)).sum(dim=1)
    total.add_(weights.double() @ of_each.double())
