# SPDX-License-Identifier: Apache-2.0
"""What pruning a 70B model takes, on paper: bytes, FLOPs and seconds of each stage, from the rates of the hardware.

    python benchmarks/plan_70b.py

Llama-3.1-70B's shape in bf16, 128 x 2048 tokens, unstructured. Prints the tables of `docs/scale.md`. Nothing is run.
"""

from __future__ import annotations

from dataclasses import dataclass


HIDDEN, MLP, KEYS, BLOCKS, VOCABULARY = 8192, 28_672, 1024, 80, 128_256
SAMPLES, LENGTH = 128, 2048
TOKENS = SAMPLES * LENGTH
GIB = 2**30
# (columns, rows of all matrices that read them)
INPUTS = ((HIDDEN, HIDDEN + 2 * KEYS), (HIDDEN, HIDDEN), (HIDDEN, 2 * MLP), (MLP, HIDDEN))


@dataclass(frozen=True)
class Machine:
    """FLOP/s of bf16 and fp32 products, bytes a second between GPUs, to and from the disk; and how many GPUs there are."""

    name: str
    bf16: float
    fp32: float
    link: float
    read: float
    write: float
    gpus: int = 1


# bf16 of the H200: measured (788 TFLOP/s, a product of 8192 x 8192 on random data, torch 2.11). fp32, links and all of the
# RTX 4090: the vendor's figures. Disk: assumed, an NVMe drive of the data centre, and of a desktop.
MACHINES = (
    Machine("1 x H200", 788e12, 67e12, 450e9, 5e9, 3e9),
    Machine("8 x H200", 788e12, 67e12, 450e9, 5e9, 3e9, gpus=8),
    Machine("1 x RTX 4090 (24 GB)", 165e12, 83e12, 0, 5e9, 3e9),
)


def weights() -> int:
    """Of one block."""
    return sum(columns * rows for columns, rows in INPUTS)


def flops() -> dict[str, tuple[float, str]]:
    """Of one block: FLOPs, all of which several GPUs divide, and what they are computed in."""
    attention = 2 * TOKENS * LENGTH * HIDDEN  # scores and values, the causal half
    cubes = sum(columns**3 for columns, _ in INPUTS)
    squares = sum(columns**2 for columns, _ in INPUTS)
    rows = sum(columns**2 * rows for columns, rows in INPUTS)
    return {
        "forward": (2.0 * TOKENS * weights() + attention, "bf16"),
        "Hessians (one triangle)": (float(TOKENS * squares), "bf16"),
        "factors": (2 / 3 * cubes, "fp32"),
        "updates": (float(rows), "fp32"),
        "relative errors": (2.0 * rows, "fp32"),
    }


def traffic() -> dict[str, tuple[float, str]]:
    """Bytes of one block, and what moves them."""
    hidden = 2 * TOKENS * HIDDEN
    squares = sum(columns**2 for columns, _ in INPUTS)
    return {
        "read the block": (2.0 * weights(), "read"),
        "write its shard": (2.0 * weights(), "write"),
        "write the hidden states": (float(hidden), "write"),
        "add up Hessians (one triangle)": (2.0 * squares, "sum"),
        "send factors": (4.0 * squares, "send"),
    }


def seconds(machine: Machine, stage: str) -> float:
    """Of one block, at the rate of the hardware: the floor."""
    if stage in flops():
        amount, kind = flops()[stage]
        return amount / getattr(machine, kind) / machine.gpus
    amount, kind = traffic()[stage]
    if kind in ("sum", "send"):
        times = 2 * (machine.gpus - 1) / machine.gpus if kind == "sum" else 1.0
        return times * amount / machine.link if machine.gpus > 1 else 0.0
    return amount / getattr(machine, kind)


def memory() -> dict[str, float]:
    """On one GPU of the largest input, in bytes, with micro-batches of 16,384 tokens, none of which waits."""
    columns, rows = INPUTS[-1]
    gates = INPUTS[2]
    return {
        "two blocks, of which one is on its way": 4.0 * weights(),
        "Hessian and factor of down_proj": 8.0 * columns**2,
        "weights in fp32, mask, new weights": 7.0 * max(columns * rows, gates[0] * gates[1]),
        "a micro-batch inside the block": 2.0 * 16_384 * (2 * HIDDEN + 3 * MLP),
    }


def tables() -> str:
    amounts = {stage: f"{amount / 1e12:,.1f} TFLOP" for stage, (amount, _) in flops().items()}
    amounts |= {stage: f"{amount / GIB:,.2f} GiB" for stage, (amount, _) in traffic().items()}
    lines = [
        f"| of one block of {BLOCKS} | amount | {' | '.join(m.name for m in MACHINES)} |",
        f"|---|---|{'---|' * len(MACHINES)}",
    ]
    for stage, amount in amounts.items():
        lines.append(f"| {stage} | {amount} | {' | '.join(f'{seconds(m, stage):.2f} s' for m in MACHINES)} |")
    disk = [stage for stage, (_, kind) in traffic().items() if kind in ("read", "write")]
    links = [stage for stage in traffic() if stage not in disk]
    for title, stages in (("compute", flops()), ("links", links), ("disk", disk)):
        totals = (BLOCKS * sum(seconds(machine, stage) for stage in stages) for machine in MACHINES)
        lines.append(f"| **{title}, all blocks** | | {' | '.join(f'**{total / 60:.1f} min**' for total in totals)} |")
    lines += ["", "| on a GPU | GiB |", "|---|---|"]
    lines += [f"| {name} | {size / GIB:.1f} |" for name, size in memory().items()]
    lines.append(f"| **all** | **{sum(memory().values()) / GIB:.1f}** |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
