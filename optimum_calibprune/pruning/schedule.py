# SPDX-License-Identifier: Apache-2.0
"""The walk over the blocks: let the calibration set arrive at each input, solve there, go on with the pruned weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..records import CalibrationSet, LayerReport, Sparsity
from . import blocks
from .activations import Activations
from .balance import Arrived, Balance, improve_worst
from .blocks import Call
from .experts import Routed
from .forward import Forward, wait_before
from .hessian import NotFinite
from .homes import OUTSIDE, Home, InMemory, part_state
from .journal import Journal
from .memory import free_memory, give_back
from .ranks import ALONE, Ranks
from .sparsegpt import Solution, Target, solve_together
from .stops import Experts, Stop, matrix


Progress = Callable[[int, int, str], None]


class Cancelled(Exception):
    """The caller asked to stop; modules that were finished stay pruned, the others are as they were."""


@dataclass(frozen=True)
class Settings:
    """How to walk: see `CalibPruneConfig`. `resident` micro-batches wait inside the block; the others are replayed.
    `zeros` says how many each module gets, where `allocation.owl` has counted them; else its pattern says so.
    `activations` is one of `activations.PLACES`."""

    sparsity: Sparsity
    method: str = "sparsegpt"
    damping: float = 0.01
    sequential: str = "module"
    micro_batch: int = 1
    resident: int | None = None
    zeros: Mapping[str, int] | None = None
    activations: str = "device"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", Sparsity.parse(self.sparsity))

    def target_of(self, module: str) -> Target:
        """What a module that is in a group is pruned to."""
        target = self.sparsity.of(module) if self.zeros is None else self.zeros[module]
        assert target is not None, f"{module} is left dense, and yet in a group"
        return target


def free_on(device: torch.device) -> int:
    """Bytes of memory that are free there now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


def resident_micro_batches(model: PreTrainedModel, stops: list[list[Stop]], tokens: int, free: int) -> int:
    """How many micro-batches of `tokens` tokens may wait inside a block at once: half of the bytes that are `free`.

    A waiting micro-batch is counted with the inputs and outputs of all linear layers of the largest block.
    """
    width = max(sum(stop.width for stop in block) for block in stops)
    return max(0, free // 2 // (width * tokens * model.dtype.itemsize))


def place_of_activations(size: int, device: str, with_file: bool, free: int, free_host: int) -> str:
    """Where hidden states of `size` bytes are kept: on the kind of device, where they take at most half of the bytes that are
    `free` there; else in host memory by the same rule; else in a file, where there is a folder for it."""
    if size <= free / 2:
        return "device"
    if device == "cuda" and (size <= free_host / 2 or not with_file):
        return "pinned host memory"
    return "file" if with_file else "device"


@torch.no_grad()
def prune_blocks(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    settings: Settings,
    *,
    groups: list[list[Stop]] | None = None,
    home: Home | None = None,
    device: torch.device | None = None,
    journal: Journal | None = None,
    ranks: Ranks = ALONE,
    on_progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Iterator[tuple[LayerReport, ...]]:
    """Prunes `model` block by block, and yields the reports of each block's modules.

    Args:
        model: put into eval mode; pruned in place, or, if its `home` says that it is streamed, in the shards of `journal`.
        calibration: token ids `[samples, length]`, used in their order.
        groups: of `blocks.find_groups` with the same sparsity, where the caller has them already.
        home: where the blocks are (default: in memory); from elsewhere than `device` they are brought one at a time.
        journal: keeps each block as soon as it is finished; the walk begins behind those that it holds, and yields
            their reports first.
        ranks: the processes that do this together, each with a part of the samples and of the solves; all of them have
            the pruned model in the end.
        on_progress: called with (modules done, modules in all, name of the module).
        cancelled: asked before each group of modules; True raises `Cancelled`.

    Raises:
        `ValueError` that names the module (and the sample) for a NaN, and for a Hessian that cannot be factored; `OSError`
        where a block cannot be kept.
    """
    model.eval()
    name, model_blocks = blocks.find_blocks(model)
    home = home or InMemory(model)
    assert journal is not None or not home.streamed, "a streamed model is pruned on disk"
    device = device or home.device
    groups = groups if groups is not None else blocks.find_groups(model, settings.sparsity)
    progress = _Counted(sum(len(stop.names) for block in groups for stop in block), on_progress)
    for i in range(journal.done if journal is not None else 0):
        yield progress.count(_taken_up(journal, home, i))
    start = journal.done if journal is not None else 0
    if start == len(model_blocks):
        return
    if journal is not None and not journal.outside:
        journal.commit_outside(lambda: part_state(model, OUTSIDE))
    step, own = settings.micro_batch, own_micro_batches(calibration, settings.micro_batch, ranks)
    ids = torch.from_numpy(calibration.input_ids[own.start * step : own.stop * step].copy())
    balance = Balance.of(calibration, step, device).part(own)
    first, calls = blocks.enter(model, ids, step, device)
    hidden = Activations(settings.activations, device, journal.hidden_states(start) if journal is not None else None)
    hidden = hidden.fill(first) if start == 0 or journal is None else journal.take_up(hidden)
    resident = settings.resident
    if resident is None:
        resident = resident_micro_batches(model, groups, step * ids.shape[1], free_on(device))
    with home.only_blocks():
        for i, block in enumerate(home.brought(device, start), start):
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
                first=own.start * step,
                ranks=ranks,
                frugal=home.streamed,
            )
            try:
                reports = [progress.one(report) for report in walk.solve_groups(cancelled)]
                if i + 1 < len(model_blocks):
                    walk.propagate()
                counted = recount(model, reports)
                if journal is not None:
                    journal.commit(i, partial(part_state, model, i), hidden, counted)
                    if home.streamed:
                        home.take(i, journal.checkpoint(i))
            finally:
                walk.drop()
                home.put_back(i)
            yield counted


def own_micro_batches(calibration: CalibrationSet, micro_batch: int, ranks: Ranks) -> range:
    """Which micro-batches are this rank's."""
    count = math.ceil(len(calibration.rows) / micro_batch)
    if count < ranks.size:
        raise ValueError(
            f"{len(calibration.rows)} samples in micro-batches of {micro_batch} are {count} for {ranks.size} processes; each "
            "needs one. Launch fewer of them, or choose a smaller micro-batch."
        )
    return ranks.part(count)


def _taken_up(journal: Journal, home: Home, i: int) -> tuple[LayerReport, ...]:
    """A block that an earlier run has finished."""
    home.take(i, journal.checkpoint(i))
    return journal.reports(i)


@dataclass
class _Counted:
    """Tells `on_progress` how many of `total` modules are done."""

    total: int
    on_progress: Progress | None
    done: int = 0

    def one(self, report: LayerReport) -> LayerReport:
        self.done += 1
        if self.on_progress is not None:
            self.on_progress(self.done, self.total, report.module)
        return report

    def count(self, reports: tuple[LayerReport, ...]) -> tuple[LayerReport, ...]:
        return tuple(self.one(report) for report in reports)


@dataclass
class _BlockWalk:
    """One block, and this rank's micro-batches, whose samples are counted from `first` on. Of them the first `resident` wait at the gates while the others are replayed. A
    `frugal` one gives what it no longer uses back to the system before it goes on and before it solves."""

    block: nn.Module
    name: str
    stops: Sequence[Stop]
    hidden: Activations
    calls: Sequence[Call]
    balance: Balance
    step: int
    resident: int
    settings: Settings
    first: int
    ranks: Ranks
    frugal: bool = False
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
            if self.frugal:
                give_back()
            arrived = dense.pop(0) if two_passes else self._arrive_at(position)
            if self.frugal:
                give_back()
            if isinstance(arrived, Routed):
                yield from arrived.solve_in_turn(self._solve, dense=two_passes, ask=ask, ranks=self.ranks)
            else:
                for hessian in arrived.hessians:
                    hessian.add_up(self.ranks)
                yield from self._solve(stop.matrices, arrived, self.ranks)
            del arrived  # before the next one takes its room

    def _solve(self, matrices: dict[str, Tensor], arrived: Arrived, ranks: Ranks = ALONE) -> Iterator[LayerReport]:
        """Prunes matrices `[rows, columns]` of one input in place; several `ranks` have the same Hessians."""
        names, started = [f"{self.name}.{name}" for name in matrices], time.perf_counter()
        try:
            solutions = self._solutions(names, list(matrices.values()), arrived, ranks)
        except NotFinite as error:
            raise ValueError(self._not_finite(names[0], arrived, ranks)) from error
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
            return Routed(stop, self.balance, length=self.hidden.length)
        return Arrived(
            self.balance, self.balance.empty(stop.columns, self.hidden.device), partial(self._again, position)
        )

    def _again(self, position: int, i: int) -> tuple[Tensor, Tensor]:
        """What micro-batch `i` brings to the linear layers at `position`, as `Arrived.again` gives it."""
        with self._replay_to(position, i) as x:
            rows = x.flatten(0, -2)
        return rows, torch.arange(len(rows), device=rows.device) // (len(rows) // self.hidden.samples(i))

    def _not_finite(self, name: str, arrived: Arrived, ranks: Ranks) -> str:
        """Names the module, and the first sample after which its Hessian was not finite."""
        found = arrived.not_finite_from()
        here = None if found is None else self.first + found[0] * self.step + found[1]
        known = [sample for sample in ranks.everywhere(here) if sample is not None]
        where = f"calibration sample {known[0]}" if known else "all calibration samples together"
        return (
            f"{name} receives NaN, infinity or values whose squares overflow from {where}. The model overflows on it in this "
            "dtype; try dtype='bfloat16' or 'float32', or leave the sample out."
        )

    def _solutions(
        self, names: Sequence[str], weights: Sequence[Tensor], arrived: Arrived, ranks: Ranks
    ) -> list[Solution]:
        method, damping = self.settings.method, self.settings.damping
        targets = [self.settings.target_of(name) for name in names]
        hessian = self.balance.combine(arrived.hessians)
        solutions = solve_together(weights, hessian, targets, method=method, damping=damping, names=names, ranks=ranks)
        if self.balance.normalise != "minimax":
            return solutions
        shares = self.balance.weights
        return [
            improve_worst(W, first, arrived.hessians, shares, target, method=method, damping=damping, ranks=ranks)
            for W, first, target in zip(weights, solutions, targets, strict=True)
        ]


def recount(model: PreTrainedModel, layers: Sequence[LayerReport]) -> tuple[LayerReport, ...]:
    """The reports with the zeros that the model holds in the end, counted anew."""
    return tuple(replace(layer, zeros_found=int((matrix(model, layer.module) == 0).sum())) for layer in layers)
