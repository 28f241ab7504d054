# SPDX-License-Identifier: Apache-2.0
"""The GPUs that Hugging Face Jobs lends: what they hold and cost, as the Hub lists it, and how fast they are."""

from __future__ import annotations

import re
from dataclasses import dataclass

from huggingface_hub import HfApi
from huggingface_hub.utils import httpx

from optimum_calibprune import Machine


GB = 10**9
KEPT_FREE = 0.05  # of a GPU's memory, for what CUDA itself needs
SWEPT_BYTES = 32  # that move for one weight in the solver's sweep
PER_HOUR = {"second": 3600, "minute": 60, "hour": 1}


@dataclass(frozen=True)
class Rates:
    """Of one GPU, from its maker's data sheet: dense bf16 and fp32 FLOP/s, bytes of its memory a second."""

    products: float
    exact_products: float
    bandwidth: float


RATES = {  # GPUs without bf16 are left out
    "L4": Rates(121e12, 30e12, 0.30e12),
    "A10G": Rates(70e12, 31e12, 0.60e12),
    "L40S": Rates(362e12, 91e12, 0.86e12),
    "A100": Rates(312e12, 19.5e12, 2.0e12),
    "H100": Rates(989e12, 67e12, 3.3e12),
    "H200": Rates(989e12, 67e12, 4.8e12),
    "RTX PRO 6000": Rates(504e12, 125e12, 1.6e12),
    "half an RTX PRO 6000": Rates(252e12, 63e12, 0.8e12),  # as ZeroGPU lends it
}


@dataclass(frozen=True)
class Flavor:
    """What can be rented with one GPU: its name on the Hub, the GPU, bytes of its memory, of the host's and of the disk, and
    dollars an hour."""

    name: str
    gpu: str
    memory: int
    host_memory: int
    disk: int
    dollars_per_hour: float

    @property
    def rates(self) -> Rates:
        return RATES[self.gpu]

    @property
    def machine(self) -> Machine:
        free, rates = round((1 - KEPT_FREE) * self.memory), self.rates
        sweep = rates.bandwidth / SWEPT_BYTES
        return Machine("cuda", free, self.host_memory, rates.products, rates.exact_products, sweep)


def flavors() -> tuple[Flavor, ...]:
    """Those with one GPU whose rates are known, and with a price, as the Hub lists them today.

    Raises `ValueError` where the list cannot be had.
    """
    try:
        listed = HfApi(token=False).list_jobs_hardware()
    except (OSError, httpx.HTTPError, ValueError, LookupError, TypeError):  # no Hub, or a list of another kind
        raise ValueError("The Hub's list of hardware cannot be had; try again later.") from None
    found = []
    for entry in listed:
        gpu = entry.accelerator
        model = next((name for name in RATES if gpu is not None and name in gpu.model.upper()), None)
        if gpu is None or model is None or str(gpu.quantity) != "1":
            continue
        sizes = _bytes(gpu.vram), _bytes(entry.ram), _bytes(entry.ephemeral_storage)
        dollars = (entry.unit_cost_usd or 0) * PER_HOUR.get(entry.unit_label, 0)
        if all(sizes) and dollars:
            found.append(Flavor(entry.name, model, *sizes, dollars))
    return tuple(found)


def _bytes(text: str) -> int:
    """`"80 GB"` -> 80,000,000,000; 0 for what is no size."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|TB)", str(text))
    return round(float(found[1]) * GB * (1000 if found[2] == "TB" else 1)) if found else 0
