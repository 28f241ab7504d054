# SPDX-License-Identifier: Apache-2.0
"""What a run elsewhere may take: memory from its plan; hours and dollars as a range, with what it supposes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hardware import GB, Flavor
from limits import BigJob
from optimum_calibprune import ModelShape, Plan


# Nothing of this is measured on these GPUs: each is what we suppose, at best and at worst.
STARTS = (120, 900)  # seconds until the job has its machine and its libraries
NETWORK = (1.0 * GB, 0.1 * GB)  # bytes a second, of the checkpoint down, and up again
OVER_RATES = (1.5, 6.0)  # a run's seconds, over those of its products at the rates of the data sheet
ASKED_TOKENS = 1_000_000  # of all questions of the quick suite, which the dense and the pruned model read
COPIES = 2  # of the checkpoint on the disk: the dense and the pruned one
TOGETHER = 32  # documents that the model writes at once, for each of which a token reads all weights once
ASSUMED = (
    f"Estimates, not measurements: no run on these GPUs has been timed. They suppose {OVER_RATES[0]:g} to {OVER_RATES[1]:g} times "
    "what the products take at the rates of the maker's data sheet, "
    f"{STARTS[0] // 60} to {STARTS[1] // 60} minutes until the job starts, and a network of {NETWORK[1] / GB:g} to "
    f"{NETWORK[0] / GB:g} GB a second."
)


@dataclass(frozen=True)
class Estimate:
    """A run on rented hardware: bytes on the GPU, hours at best and at worst."""

    flavor: Flavor
    plan: Plan
    gpu_bytes: int
    hours: tuple[float, float]

    @property
    def dollars(self) -> tuple[float, float]:
        low, high = self.hours
        return self.flavor.dollars_per_hour * low, self.flavor.dollars_per_hour * high

    @property
    def told(self) -> dict[str, Any]:
        """It as a script reads it."""
        machine = {"flavor": self.flavor.name, "gpu": self.flavor.gpu, "gpu_bytes": self.gpu_bytes}
        return machine | {"streamed": self.plan.streamed, "hours": self.hours, "dollars": self.dollars}


def shape_of(job: BigJob, token: str | None, root: Path) -> ModelShape:
    """The model of a job, of which only the config is fetched: with the visitor's token, or with none."""
    with tempfile.TemporaryDirectory(dir=root) as cache:
        return ModelShape.from_pretrained(job.model, token=token or False, cache_dir=cache, **job.options)


def estimates(shape: ModelShape, flavors: Sequence[Flavor]) -> list[Estimate]:
    """Of all flavors whose GPU holds what the plan needs, the cheapest first.

    Raises `ValueError` where none of them can do the run.
    """
    found, refused = [], ""
    for flavor in flavors:
        try:
            plan = shape.plan(flavor.machine)
        except ValueError as error:  # it would be streamed, and is to write its own text
            refused = str(error)
            continue
        on_gpu = sum(size for place, size in plan.memory.items() if place.endswith("on cuda"))
        if on_gpu <= flavor.machine.free and COPIES * shape.weight_bytes <= flavor.disk:
            found.append(Estimate(flavor, plan, on_gpu, _hours(shape, plan, flavor)))
    if not found:
        raise ValueError(
            refused or f"None of the {len(flavors)} GPUs that are for rent one at a time holds this model."
        )
    return sorted(found, key=lambda entry: entry.dollars)


def work_seconds(shape: ModelShape, plan: Plan, flavor: Flavor) -> float:
    """Of the GPU, at the rates of its data sheet: pruning, reading questions, writing texts."""
    asked = 2 * ASKED_TOKENS if plan.capabilities else 0
    read = 2.0 * shape.parameters * asked / flavor.rates.products
    written = plan.written / TOGETHER * shape.weight_bytes / flavor.rates.bandwidth
    return plan.seconds + read + written


def _hours(shape: ModelShape, plan: Plan, flavor: Flavor) -> tuple[float, float]:
    work = work_seconds(shape, plan, flavor)
    low, high = (
        starts + 2 * shape.weight_bytes / network + over * work
        for starts, network, over in zip(STARTS, NETWORK, OVER_RATES, strict=True)
    )
    return low / 3600, high / 3600
