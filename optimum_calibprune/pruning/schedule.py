# SPDX-License-Identifier: Apache-2.0
"""The walk over the blocks: let the calibration set arrive at each input, solve there, go on with the pruned weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..records import CalibrationSet, LayerReport, Sparsity
from . import blocks
from .balance import Arrived, Balance, improve_worst
from .blocks import Call
from .experts import Routed
from .forward import Forward, wait_before
from .hessian import NotFinite
from .sparsegpt import Solution, Target, solve_together
from .stops import Experts, Stop, matrix


Progress = Callable[[int, int, str], None]


class Cancelled(Exception):
    """The caller asked to stop; modules that were finished stay pruned, the others are as they were."""


@dataclass(frozen=True)
class Settings:
    """How to walk: see `CalibPruneConfig`. `resident` micro-batches wait inside the block; the others are replayed.
    `zeros` says how many each module gets, where `allocation.owl` has counted them; else its pattern says so."""

    sparsity: Sparsity
    method: str = "sparsegpt"
    damping: float = 0.01
    sequential: str = "module"
    micro_batch: int = 1
    resident: int | None = None
    zeros: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", Sparsity.parse(self.sparsity))

    def target_of(self, module: str) -> Target:
        """What a module that is in a group is pruned to."""
        target = self.sparsity.of(module) if self.zeros is None else self.zeros[module]
        assert target is not None, f"{module} is left dense, and yet in a group"
        return target


def resident_micro_batches(model: PreTrainedModel, stops: list[list[Stop]], tokens: int, device: torch.device) -> int:
    """How many micro-batches of `tokens` tokens may wait inside a block at once: half of the free memory, measured.

    A waiting micro-batch is counted with the inputs and outputs of all linear layers of the largest block.
    """
    width = max(sum(stop.width for stop in block) for block in stops)
    size = torch.finfo(model.dtype).bits // 8
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = _free_memory()
    return max(0, int(free / 2 / (width * tokens * size)))


def _free_memory() -> int:
    """What this process may still take: of the machine, or of the container that it runs in."""
    import psutil  # here, so that a GPU machine can do without

    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    free = psutil.virtual_memory().available
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


@torch.no_grad()
def prune_blocks(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    settings: Settings,
    *,
    groups: list[list[Stop]] | None = None,
    device: torch.device | None = None,
    on_progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Iterator[tuple[LayerReport, ...]]:
    """Prunes `model` in place, block by block, and yields the reports of each block's modules.

    Args:
        model: in memory, put into eval mode; on another device than `device`, its blocks are moved there one at a time.
        calibration: token ids `[samples, length]`, used in their order.
        groups: of `blocks.find_groups` with the same sparsity, where the caller has them already.
        on_progress: called with (modules done, modules in all, name of the module).
        cancelled: asked before each group of modules; True raises `Cancelled`.

    Raises:
        `ValueError` that names the module (and the sample) for a NaN, and for a Hessian that cannot be factored.
    """
    model.eval()
    name, model_blocks = blocks.find_blocks(model)
    home = next(model_blocks.parameters()).device
    device = device or home
    groups = groups if groups is not None else blocks.find_groups(model, settings.sparsity)
    step = settings.micro_batch
    ids = torch.from_numpy(calibration.input_ids.copy())
    balance = Balance.of(calibration, step, device)
    hidden, calls = blocks.enter(model, ids, step, device)
    resident = settings.resident
    if resident is None:
        resident = resident_micro_batches(model, groups, step * ids.shape[1], device)
    total = sum(len(stop.names) for block in groups for stop in block)
    done = 0
    for i, block in enumerate(blocks.brought(model_blocks, device)):
        walk = _BlockWalk(
            block=block,
            name=f"{name}.{i}",
            stops=groups[i],
            hidden=hidden,
            calls=[of_all[i] for of_all in calls],
            balance=balance,
            step=step,
            resident=min(resident, len(hidden)),
            settings=settings,
        )
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


@dataclass
class _BlockWalk:
    """One block: its micro-batches, of which the first `resident` wait at the gates while the others are replayed."""

    block: nn.Module
    name: str
    stops: Sequence[Stop]
    hidden: list[Tensor]
    calls: Sequence[Call]
    balance: Balance
    step: int
    resident: int
    settings: Settings
    waiting: list[Forward] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.gates = [wait_before(stop.gate, stop.read) for stop in self.stops]

    def solve_groups(self, cancelled: Callable[[], bool] | None) -> Iterator[LayerReport]:
        def ask(name: str) -> None:
            if cancelled is not None and cancelled():
                raise Cancelled(f"Stopped before {self.name}.{name}, as asked.")

        two_passes = self.settings.sequential == "block"
        dense = self._dense_block() if two_passes else []
        for position, stop in enumerate(self.stops):
            ask(stop.names[0])
            arrived = dense[position] if two_passes else self._arrive_at(position)
            if isinstance(arrived, Routed):
                yield from arrived.solve_in_turn(self._solve, dense=two_passes, ask=ask)
            else:
                yield from self._solve(stop.matrices, arrived)

    def _solve(self, matrices: dict[str, Tensor], arrived: Arrived) -> Iterator[LayerReport]:
        """Prunes matrices `[rows, columns]` of one input in place."""
        names, started = [f"{self.name}.{name}" for name in matrices], time.perf_counter()
        try:
            solutions = self._solutions(names, list(matrices.values()), arrived)
        except NotFinite as error:
            raise ValueError(self._not_finite(names[0], arrived)) from error
        seconds = time.perf_counter() - started
        rows = sum(map(len, matrices.values()))
        for name, weight, solution in zip(names, matrices.values(), solutions, strict=True):
            weight.copy_(solution.weight)
            yield LayerReport(
                module=name,
                shape=(solution.weight.shape[0], solution.weight.shape[1]),
                zeros_asked=solution.zeros_asked,
                zeros_found=solution.zeros_found,
                why=solution.why,
                relative_error=solution.relative_error,
                damping=solution.damping,
                rescue=solution.rescue,
                tokens=sum(hessian.tokens for hessian in arrived.hessians),
                seconds=seconds * len(solution.weight) / rows,
                kernel=arrived.hessians[0].kernels.name,
            )

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
            forward.drop()

    def _start(self, i: int) -> Forward:
        return Forward(partial(blocks.run, self.block, self.hidden[i], self.calls[i]))

    @contextmanager
    def _replay(self, i: int) -> Iterator[Forward]:
        forward = self._start(i)
        try:
            yield forward
        finally:
            forward.drop()

    def _next(self, forward: Forward, position: int) -> Any:
        """What `forward` brings to the gate at `position`, which must be the next one on its way."""
        brought = forward.switch()
        stop = self.stops[position]
        if forward.dead or forward.gate is not stop.gate:
            raise ValueError(
                f"{self.name}.{stop.names[0]} is not reached by every sample, or not in the same order. A block whose "
                "path depends on its input cannot be pruned, unless transformers fuses its experts."
            )
        return brought

    def _arrive_at(self, position: int) -> Arrived | Routed:
        """At one stop, behind the pruned modules before it; a resident micro-batch goes on from the gate before."""
        if position == 0:
            self.waiting = [self._start(i) for i in range(self.resident)]
        arrived = self._empty(position)
        for i in range(len(self.hidden)):
            if i < len(self.waiting):
                arrived.add(i, self._next(self.waiting[i], position))
            else:
                with self._replay_to(position, i) as brought:
                    arrived.add(i, brought)
        return arrived

    def _dense_block(self) -> list[Arrived | Routed]:
        arrived = [self._empty(position) for position in range(len(self.stops))]
        for i in range(len(self.hidden)):
            with self._replay(i) as forward:
                for position, at_stop in enumerate(arrived):
                    at_stop.add(i, self._next(forward, position))
        return arrived

    @contextmanager
    def _replay_to(self, position: int, i: int) -> Iterator[Any]:
        with self._replay(i) as forward:
            for gate in range(position):
                self._next(forward, gate)
            yield self._next(forward, position)

    def _empty(self, position: int) -> Arrived | Routed:
        stop = self.stops[position]
        if isinstance(stop, Experts):
            return Routed(stop, self.balance, length=self.hidden[0].shape[1])
        return Arrived(
            self.balance, self.balance.empty(stop.columns, self.hidden[0].device), partial(self._again, position)
        )

    def _again(self, position: int, i: int) -> tuple[Tensor, Tensor]:
        """What micro-batch `i` brings to the linear layers at `position`, as `Arrived.again` gives it."""
        with self._replay_to(position, i) as x:
            rows = x.flatten(0, -2)
        return rows, torch.arange(len(rows), device=rows.device) // (len(rows) // len(self.hidden[i]))

    def _not_finite(self, name: str, arrived: Arrived) -> str:
        """Names the module, and the first sample after which its Hessian was not finite."""
        micro_batch, sample = arrived.not_finite_from()
        return (
            f"{name} receives NaN, infinity or values whose squares overflow from calibration sample "
            f"{micro_batch * self.step + sample}. The model overflows on it in this dtype; try dtype='bfloat16' or "
            "'float32', or leave the sample out."
        )

    def _solutions(self, names: Sequence[str], weights: Sequence[Tensor], arrived: Arrived) -> list[Solution]:
        method, damping = self.settings.method, self.settings.damping
        targets = [self.settings.target_of(name) for name in names]
        hessian = self.balance.combine(arrived.hessians)
        solutions = solve_together(weights, hessian, targets, method=method, damping=damping, names=names)
        if self.balance.normalise != "minimax":
            return solutions
        shares = self.balance.weights
        return [
            improve_worst(W, first, arrived.hessians, shares, target, method=method, damping=damping)
            for W, first, target in zip(weights, solutions, targets, strict=True)
        ]


def recount(model: PreTrainedModel, layers: Sequence[LayerReport]) -> tuple[LayerReport, ...]:
    """The reports with the zeros that the model holds at the end, counted anew."""
    return tuple(replace(layer, zeros_found=int((matrix(model, layer.module) == 0).sum())) for layer in layers)
