# SPDX-License-Identifier: Apache-2.0
"""What a run will do, its memory by place, and an estimate of its time from the rates of a machine."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from .pruning import blocks, schedule
from .pruning.balance import ROUNDS
from .pruning.hessian import DIVIDED
from .pruning.homes import Absent, Home
from .pruning.kernels import kernels_for
from .pruning.memory import free_memory
from .pruning.sparsegpt import BLOCK
from .pruning.stops import Experts, Input, Stop
from .records import CalibPruneConfig, Plan
from .values import CAPABILITIES


if TYPE_CHECKING:
    from transformers import PreTrainedModel


COLUMN_SECONDS = 20e-6  # of one column step of the sweep on a matrix without rows, measured on a CPU


@dataclass(frozen=True)
class Machine:
    """What a plan reckons with: the kind of `device` ("cuda", "cpu"), bytes of memory that are `free` on it and on the
    `free_host`, FLOP/s of products in the model's dtype and of `exact_products` in fp32, and how many weights a second the
    solver can `sweep` over."""

    device: str
    free: int
    free_host: int
    products: float
    exact_products: float
    sweep: float


def make_plan(
    home: Home | Absent,
    config: CalibPruneConfig,
    groups: list[list[Stop]],
    sources: Sequence[str],
    written: int,
    capabilities: Sequence[str],
    processes: int = 1,
    machine: Machine | None = None,
) -> Plan:
    """The plan of a run whose config has all defaults filled in; the model writes `written` windows first. The `machine` is,
    unless one is given, that of the model, whose rates are measured here and now."""
    assert config.samples and config.length and config.micro_batch
    model, device = home.model, home.device
    machine = machine or _measured(model.dtype, device, groups)
    micro_batches = math.ceil(math.ceil(config.samples / config.micro_batch) / processes)
    hidden = _hidden_states(model, config) // processes
    fixed = _fixed_memory(home, groups, config, processes)
    left = machine.free - sum(fixed.values())
    activations = schedule.place_of_activations(hidden, device.type, home.streamed, left, machine.free_host)
    left -= hidden if activations == "device" else 0
    fits = schedule.resident_micro_batches(model, groups, config.micro_batch * config.length, left)
    resident = min(fits, micro_batches) if config.sequential == "module" else 0
    replayed = 1.0 - resident / micro_batches
    most_groups = max(len(block) for block in groups)
    replays = 0 if replayed == 0 else 1 if config.sequential == "block" else most_groups
    stops = [stop for block in groups for stop in block]
    width = max(sum(stop.width for stop in block) for block in groups)
    waiting = resident * config.micro_batch * config.length * width * model.dtype.itemsize
    where = f"on {device.type}" if activations == "device" else f"in {'a ' * (activations == 'file')}{activations}"
    model_in_memory = (
        {} if home.streamed else {f"model on {device.type}": model.get_memory_footprint(return_buffers=False)}
    )
    return Plan(
        model=config.model,
        pattern=config.sparsity,
        allocation=config.allocation,
        method=config.method,
        mix=config.mix,
        sources=tuple(sources),
        samples=config.samples,
        length=config.length,
        written=written * config.length,
        blocks=len(groups),
        modules=sum(len(stop.names) for stop in stops),
        experts=sum(any(stop.pruned(i)) for stop in stops if isinstance(stop, Experts) for i in range(stop.count)),
        weights=sum(given.rows * given.columns for stop in stops for given in stop.inputs),
        untouched=blocks.untouched(model, groups, config.sparsity),
        capabilities=tuple(capabilities),
        micro_batch=config.micro_batch,
        resident=resident,
        replays=replays,
        device=str(device),
        memory={
            **model_in_memory,
            **fixed,
            f"hidden states {where}": hidden,
            f"waiting micro-batches on {device.type}": waiting,
        },
        seconds=_seconds(machine, groups, config, replays * replayed, processes),
        processes=processes,
        streamed=home.streamed,
        activations=activations,
    )


def _hidden_states(model: PreTrainedModel, config: CalibPruneConfig) -> int:
    """Bytes of the hidden states of the calibration set between two blocks."""
    assert config.samples and config.length
    hidden = model.config.get_text_config(decoder=True).hidden_size
    return config.samples * config.length * hidden * model.dtype.itemsize


def _fixed_memory(
    home: Home | Absent, groups: list[list[Stop]], config: CalibPruneConfig, processes: int
) -> dict[str, int]:
    """What a walk needs on the device whatever else is there, in bytes."""
    assert config.samples and config.length
    place, size = home.device.type, home.model.dtype.itemsize
    stops = [stop for block in groups for stop in block]
    inputs = [given for stop in stops for given in stop.inputs]
    hessians = 1 + len(CAPABILITIES) if config.mix.kind == "balanced" else 1  # one a capability, and their sum
    squares = (1 + hessians) * max(given.columns for given in inputs) ** 2
    if config.sequential == "block":  # which holds all Hessians of a block at once, and what the experts are sent
        held = [[stop.columns for stop in block if not isinstance(stop, Experts)] for block in groups]
        squares += hessians * max(sum(columns**2 for columns in block) for block in held)
    ahead = 1 if place == "cpu" else 2  # a GPU's next block is on its way
    blocks_at_once = ahead * max(_bytes(block) for block in home.blocks)
    solved = max(given.rows * given.columns for given in inputs)
    sent = max((stop.columns for stop in stops if isinstance(stop, Experts)), default=0)
    memory = {
        **({f"blocks on {place}": blocks_at_once} if home.streamed else {}),
        f"Hessians and factor on {place}": 4 * squares,
        f"weights being solved on {place}": 4 * solved // processes + (1 + size) * solved,  # fp32; mask, and new ones
    }
    if sent:
        memory[f"inputs of the experts on {place}"] = config.samples * config.length * sent * size // processes
    return memory


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _seconds(
    machine: Machine, groups: list[list[Stop]], config: CalibPruneConfig, replays: float, processes: int
) -> float:
    """Of the pruning stage: products and the sweep at the rates of the machine. Of several processes each has its part of
    the tokens, of the rows, and of each factor that is large enough to be divided."""
    assert config.samples and config.length
    tokens = config.samples * config.length / processes
    forwards = 1 + replays + (config.allocation == "owl")
    solutions = 1 + ROUNDS if config.mix.kind == "balanced" and config.mix.option("worst") else 1
    seconds = 0.0
    for given in _inputs(groups):
        columns, outputs, arriving = given.columns, given.rows, tokens * given.share
        own = outputs / processes
        factor = 2 / 3 * columns**3 / (processes if columns > DIVIDED else 1)
        seconds += forwards * 2 * arriving * columns * outputs / machine.products
        seconds += arriving * columns**2 / machine.exact_products  # one triangle of the Hessian
        seconds += solutions * (factor + 3 * own * columns**2) / machine.exact_products  # factor, updates, errors
        seconds += solutions * (own * columns / machine.sweep + columns * COLUMN_SECONDS)
    return seconds


def _inputs(groups: list[list[Stop]]) -> list[Input]:
    return [given for block in groups for stop in block for given in stop.inputs]


def _measured(dtype: torch.dtype, device: torch.device, groups: list[list[Stop]]) -> Machine:
    """The machine that this is."""
    return Machine(
        device=device.type,
        free=schedule.free_on(device),
        free_host=free_memory(),
        products=_product_rate(dtype, device),
        exact_products=_product_rate(torch.float32, device),
        sweep=_sweep_rate(min(max(given.rows for given in _inputs(groups)), 8192), device),
    )


def _product_rate(dtype: torch.dtype, device: torch.device, size: int = 1024) -> float:
    """FLOP/s of a square matrix product, the best of three."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = math.inf
    for _ in range(3):
        started = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _sweep_rate(rows: int, device: torch.device) -> float:
    """Weights a second of the solver's choice and sweep in one window of columns, the better of two."""
    kernels = kernels_for(device, torch.float32)
    W, U = torch.rand(BLOCK, rows, device=device), torch.eye(BLOCK, device=device)
    errors, mask = torch.empty_like(W), torch.empty_like(W, dtype=torch.bool)
    best = math.inf
    for _ in range(2):
        started = time.perf_counter()
        kernels.select_(mask.t(), W.t(), U.diagonal(), [rows], [W.numel() // 2])
        kernels.sweep_(W.t(), errors.t(), mask.t(), U)
        W[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return W.numel() / best
