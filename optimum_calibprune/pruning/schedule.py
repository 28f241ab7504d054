# SPDX-License-Identifier: Apache-2.0
"""The walk over the blocks: let the calibration set arrive at each input, solve there, go on with the pruned weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import psutil
import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..records import CalibrationSet, LayerReport, SparsityPattern
from . import blocks
from .blocks import Call, InputGroup
from .hessian import Hessian
from .sparsegpt import solve


Progress = Callable[[int, int, str], None]


class Cancelled(Exception):
    """The caller asked to stop; blocks that were finished stay pruned, the others are as they were."""


class Forward(greenlet):
    """One micro-batch on its way through a block. Each `switch()` runs it to the next gate, where it hands over the
    tensor that is about to be read there, and at last returns the block's output; `throw()` drops it earlier.

    A gate is the first module of an input group. So many micro-batches wait at the same gate until its modules are
    solved, and then go on with the pruned weights: one forward in all, with the arithmetic of micro-batches.
    """

    def __init__(self, block: nn.Module, hidden: Tensor, call: Call) -> None:
        super().__init__()
        self._block, self._hidden, self._call = block, hidden, call

    def run(self) -> Tensor:
        return blocks.run(self._block, self._hidden, self._call)


def _gate(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    current = getcurrent()
    if isinstance(current, Forward):
        current.parent.switch(args[0])


@dataclass(frozen=True)
class Settings:
    """How to walk: see `CalibPruneConfig`. `resident` micro-batches wait inside the block; the others are replayed."""

    pattern: SparsityPattern
    method: str = "sparsegpt"
    damping: float = 0.01
    sequential: str = "module"
    micro_batch: int = 1
    resident: int | None = None


def resident_micro_batches(
    model: PreTrainedModel, groups: list[list[InputGroup]], tokens: int, device: torch.device
) -> int:
    """How many micro-batches of `tokens` tokens may wait inside a block at once: half of the free memory, measured.

    A waiting micro-batch is counted with the inputs and outputs of all linear layers of the largest block.
    """
    width = max(
        sum(g.columns + sum(blocks.weight_of(m).shape[0] for m in g.modules) for g in block) for block in groups
    )
    size = torch.finfo(model.dtype).bits // 8
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    return max(0, int(free / 2 / (width * tokens * size)))


@torch.no_grad()
def prune_blocks(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    settings: Settings,
    *,
    groups: list[list[InputGroup]] | None = None,
    device: torch.device | None = None,
    on_progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Iterator[tuple[LayerReport, ...]]:
    """Prunes `model` in place, block by block, and yields the reports of each block's modules.

    Args:
        model: in memory; on another device than `device`, its blocks are moved there one at a time.
        calibration: token ids `[samples, length]`, used in their order.
        groups: of `blocks.find_groups`, where the caller has them already.
        on_progress: called with (modules done, modules in all, name of the module).
        cancelled: asked before each group of modules; True raises `Cancelled`.

    Raises:
        `ValueError` that names the module (and the sample) for a NaN, and for a Hessian that cannot be factored.
    """
    name, model_blocks = blocks.find_blocks(model)
    home = next(model_blocks.parameters()).device
    device = device or home
    groups = groups if groups is not None else blocks.find_groups(model)
    step = settings.micro_batch
    ids = torch.from_numpy(calibration.input_ids.copy())
    batches = list(ids.split(step))
    weights = _row_weights(calibration, step, device)
    calls = {len(batch): blocks.capture(model, batch, device)[1] for batch in (batches[0], batches[-1])}
    hidden = [blocks.embed(model, batch, device) for batch in batches]
    resident = settings.resident
    if resident is None:
        resident = resident_micro_batches(model, groups, step * ids.shape[1], device)
    total = sum(len(group.modules) for block in groups for group in block)
    done = 0
    for i, block in enumerate(model_blocks):
        walk = _BlockWalk(
            block=block,
            name=f"{name}.{i}",
            groups=groups[i],
            hidden=hidden,
            calls=[calls[len(batch)][i] for batch in batches],
            weights=weights,
            step=step,
            resident=min(resident, len(batches)),
            settings=settings,
        )
        blocks.load(block, device)
        reports: list[LayerReport] = []
        try:
            for report in walk.solve_groups(cancelled):
                reports.append(report)
                done += 1
                if on_progress is not None:
                    on_progress(done, total, report.module)
            walk.propagate()
        finally:
            walk.drop()
            blocks.store(block, home)
        yield tuple(reports)


def _row_weights(calibration: CalibrationSet, step: int, device: torch.device) -> list[Tensor | None]:
    values = torch.tensor([row.weight for row in calibration.rows], device=device)
    parts = values.split(step)
    return list(parts) if bool((values != 1).any()) else [None] * len(parts)


@dataclass
class _BlockWalk:
    """One block: its micro-batches, of which the first `resident` wait at the gates while the others are replayed."""

    block: nn.Module
    name: str
    groups: Sequence[InputGroup]
    hidden: list[Tensor]
    calls: Sequence[Call]
    weights: Sequence[Tensor | None]
    step: int
    resident: int
    settings: Settings

    def __post_init__(self) -> None:
        self.waiting: list[Forward] = []
        self.gates = [group.modules[0].register_forward_pre_hook(_gate) for group in self.groups]

    def solve_groups(self, cancelled: Callable[[], bool] | None) -> Iterator[LayerReport]:
        if self.settings.sequential == "block":
            hessians = self._hessians_in_one_pass()
            for group, hessian in zip(self.groups, hessians, strict=True):
                yield from self._solve(group, hessian)
            return
        self.waiting = [self._start(i) for i in range(self.resident)]
        for position, group in enumerate(self.groups):
            if cancelled is not None and cancelled():
                raise Cancelled(f"Stopped before {self.name}.{group.names[0]}, as asked.")
            hessian = self._hessian(group)
            for i in range(len(self.hidden)):
                self._add(hessian, group, i, self._input(i, position))
            yield from self._solve(group, hessian)

    def propagate(self) -> None:
        """Replaces the hidden states by the pruned block's output, micro-batch by micro-batch."""
        for i in range(len(self.hidden)):
            if i < len(self.waiting):
                self.hidden[i] = self.waiting[i].switch()
            else:
                self.hidden[i] = blocks.run(self.block, self.hidden[i], self.calls[i])

    def drop(self) -> None:
        for gate in self.gates:
            gate.remove()
        for forward in self.waiting:
            if not forward.dead:
                forward.throw()

    def _start(self, i: int) -> Forward:
        return Forward(self.block, self.hidden[i], self.calls[i])

    def _input(self, i: int, position: int) -> Tensor:
        """What micro-batch `i` brings to the gate at `position`; a resident one goes on from the gate before."""
        if i < len(self.waiting):
            return self.waiting[i].switch()
        forward = self._start(i)
        for _ in range(position):
            forward.switch()
        x = forward.switch()
        forward.throw()
        return x

    def _hessians_in_one_pass(self) -> list[Hessian]:
        hessians = [self._hessian(group) for group in self.groups]
        for i in range(len(self.hidden)):
            forward = self._start(i)
            for group, hessian in zip(self.groups, hessians, strict=True):
                self._add(hessian, group, i, forward.switch())
            forward.throw()
        return hessians

    def _hessian(self, group: InputGroup) -> Hessian:
        return Hessian(group.columns, self.hidden[0].device)

    def _add(self, hessian: Hessian, group: InputGroup, i: int, x: Tensor) -> None:
        hessian.add(x, self.weights[i])
        if not hessian.finite:
            rows = x.reshape(len(self.hidden[i]), -1).isfinite().all(dim=1)
            sample = i * self.step + int((~rows).nonzero()[0]) if not bool(rows.all()) else i * self.step
            raise ValueError(
                f"{self.name}.{group.names[0]} receives NaN or infinity from calibration sample {sample}. "
                "The model overflows on it in this dtype; try dtype='bfloat16' or 'float32', or leave the sample out."
            )

    def _solve(self, group: InputGroup, hessian: Hessian) -> Iterator[LayerReport]:
        for name, module in zip(group.names, group.modules, strict=True):
            started = time.perf_counter()
            weight = blocks.weight_of(module)
            settings = self.settings
            try:
                solution = solve(weight, hessian, settings.pattern, method=settings.method, damping=settings.damping)
            except ValueError as error:
                raise ValueError(f"{self.name}.{name}: {error}") from error
            weight.copy_(solution.weight)
            yield LayerReport(
                module=f"{self.name}.{name}",
                shape=(weight.shape[0], weight.shape[1]),
                zeros_asked=solution.zeros_asked,
                zeros_found=solution.zeros_found,
                why=solution.why,
                relative_error=solution.relative_error,
                damping=solution.damping,
                rescue=solution.rescue,
                tokens=hessian.tokens,
                seconds=time.perf_counter() - started,
                kernel="torch",
            )
