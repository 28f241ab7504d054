# SPDX-License-Identifier: Apache-2.0
"""One weight matrix and its Hessian: our solver, the algorithm as published, and llm-compressor's, in turn.

    python benchmarks/solver.py [--device cuda] [--shapes 4096x4096 ...] [--patterns 0.6 2:4] [--repeats 5]

Layers are made up: bf16 weights, correlated bf16 inputs of 8192 tokens whose sizes differ from column to column. First the
results are checked (exact counts, masks and error against our float64 solver, errors of all three from the inputs
themselves), then each is timed, in turn; medians, ratios, stages, memory, launches, and the floor of the products that our
solve is made of at the rate of a large product measured in between. llm-compressor runs in an environment of its own,

    python3 -m venv .venv-llmcompressor && .venv-llmcompressor/bin/pip install torch==2.13.0
    .venv-llmcompressor/bin/pip install -r benchmarks/peers/requirements-llmcompressor.txt

and is left out, and said to be, where that is missing. Needs torch, transformers and safetensors alone (from the repo's root,
with PYTHONPATH=. where this package is not installed). Writes `benchmarks/results/solver-DEVICE.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peers import launches, published
from peers.measuring import Stopwatch, machine, measured, product_rate
from safetensors.torch import load_file, save_file
from torch import Tensor

from optimum_calibprune.pruning import sparsegpt
from optimum_calibprune.pruning.hessian import Hessian
from optimum_calibprune.records import SparsityPattern


HERE = Path(__file__).parent
PEER = Path(".venv-llmcompressor/bin/python")
SHAPES = ["4096x4096", "14336x4096", "4096x14336", "1024x4096"]
TOKENS = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="ROWSxCOLUMNS; none: only launches are counted")
    parser.add_argument("--patterns", nargs="+", default=["0.6", "2:4"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", type=Path, default=PEER, help="the python that has llm-compressor")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/solver-DEVICE.json")
    given = parser.parse_args()
    device = torch.device(given.device)
    output = given.output or HERE / "results" / f"solver-{device.type}.json"
    results = {"machine": machine(device), "tokens": TOKENS}
    results["launches a column block"] = {
        pattern: count_launches(pattern, device, given.peer) for pattern in ("0.6", "2:4")
    }
    results["layers"] = rows_from(output, results["machine"])
    output.write_text(json.dumps(results, indent=1) + "\n")
    for shape in given.shapes:
        for pattern in given.patterns:
            rows, columns = map(int, shape.split("x"))
            results["layers"][f"{shape} {pattern}"] = compare(
                rows, columns, pattern, device, given.repeats, given.peer
            )
            print_row(f"{shape} {pattern}", results["layers"][f"{shape} {pattern}"])
            output.write_text(json.dumps(results, indent=1) + "\n")


def rows_from(output: Path, here: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call measured on such a machine; a call replaces the rows that it measures again."""
    if not output.exists():
        return {}
    before = json.loads(output.read_text())
    return before["layers"] if before["machine"] == here else {}


def make_layer(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights `[rows, columns]` and inputs `[TOKENS, columns]`: a part of low rank, noise, and columns of all sizes."""
    generator = torch.Generator(device).manual_seed(rows + columns)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    X = noise(TOKENS, 256) @ noise(256, columns) / 16 + noise(TOKENS, columns)
    return (0.02 * noise(rows, columns)).bfloat16(), (X * (0.7 * noise(columns)).exp()).bfloat16()


def compare(rows: int, columns: int, pattern: str, device: torch.device, repeats: int, peer: Path) -> dict[str, Any]:
    W, X = make_layer(rows, columns, device)
    asked = SparsityPattern.parse(pattern)
    seconds: dict[str, dict[str, list[float]]] = {}
    memory: dict[str, int] = {}
    pruned: dict[str, Tensor] = {}
    rates: list[float] = []
    runs: dict[str, Callable[[], tuple[dict[str, float], int, Tensor]]] = {
        "ours": lambda: run_ours(W, X, asked),
        "published": lambda: run_published(W, X, asked),
    }
    with tempfile.TemporaryDirectory() as folder:
        if peer.exists():
            save_file({"W": W.cpu(), "X": X.cpu()}, f"{folder}/layer.safetensors")
            runs["llm-compressor"] = lambda: run_llmcompressor(peer, Path(folder), pattern, device)
        run_ours(W, X, asked)  # warm
        for _ in range(repeats):
            for name, run in runs.items():
                spent, extra, pruned[name] = run()
                memory[name] = max(memory.get(name, 0), extra)
                for stage, value in spent.items():
                    seconds.setdefault(name, {}).setdefault(stage, []).append(value)
            rates.append(product_rate(torch.float32, device))
    medians = {
        name: {stage: statistics.median(values) for stage, values in stages.items()}
        for name, stages in seconds.items()
    }
    floor = flops(rows, columns)
    rate = statistics.median(rates)
    return {
        "repeats": repeats,
        "checks": check(W, X, asked, pruned),
        "seconds": medians,
        "all seconds of the solve": {name: stages["solve"] for name, stages in seconds.items()},
        "times faster": {
            name: {stage: medians[name][stage] / medians["ours"][stage] for stage in ("hessian", "solve")}
            for name in medians
            if name != "ours"
        },
        "stages of our solve": stages_of_ours(W, X, asked),
        "peak memory beyond weights and inputs in MiB": {name: extra / 2**20 for name, extra in memory.items()},
        "floor of our solve": {
            "GFLOP": {stage: value / 1e9 for stage, value in floor.items()},
            "fp32 product in GFLOP/s": rate / 1e9,
            "seconds": sum(floor.values()) / rate,
            "ours over floor": medians["ours"]["solve"] * rate / sum(floor.values()),
            "MiB": (rows * columns * (2 + 2) + columns**2 * 4) / 2**20,
        },
    }


def flops(rows: int, columns: int) -> dict[str, float]:
    """Operations of the products that a solve needs, each triangle once."""
    return {
        "factor": 2 / 3 * columns**3,
        "updates": rows * columns**2,
        "errors of the report": 2 * rows * columns**2,
    }


# ------------------------------------------------------------------------------------------- the three


def run_ours(W: Tensor, X: Tensor, asked: SparsityPattern) -> tuple[dict[str, float], int, Tensor]:
    gc.collect()
    with measured(W.device) as hessian:
        H = Hessian(W.shape[1], W.device)
        for sample in X.split(2048):
            H.add(sample)
    with measured(W.device) as solve:
        solution = sparsegpt.solve(W, H, asked)
    size = H.sum.numel() * 4
    return (
        {"hessian": hessian.seconds, "solve": solve.seconds},
        max(hessian.extra, size + solve.extra),
        solution.weight,
    )


def run_published(W: Tensor, X: Tensor, asked: SparsityPattern) -> tuple[dict[str, float], int, Tensor]:
    gc.collect()
    with measured(W.device) as hessian:
        solver = published.PublishedSparseGPT(W)
        for sample in X.split(2048):
            solver.add_batch(sample)
    size = solver.H.numel() * 4
    with measured(W.device) as solve:
        weight = solver.fasterprune(asked.fraction, (asked.m or 0) - (asked.n or 0), asked.m or 0)
    return {"hessian": hessian.seconds, "solve": solve.seconds}, max(hessian.extra, size + solve.extra), weight


def run_llmcompressor(
    peer: Path, folder: Path, pattern: str, device: torch.device
) -> tuple[dict[str, float], int, Tensor]:
    files = {"tensors": str(folder / "layer.safetensors"), "weights": str(folder / "pruned.safetensors")}
    answer = ask(peer, folder, {"mode": "solver", "pattern": as_zeros(pattern), "device": device.type} | files)
    weight = load_file(folder / "pruned.safetensors")["W"].to(device)
    stages = {stage: values[0] for stage, values in answer["seconds"].items()}
    size = weight.shape[1] ** 2 * 4
    extra = answer["extra_bytes"]
    return stages, max(extra["hessian"], size + extra["solve"]), weight


def as_zeros(pattern: str) -> str:
    """As llm-compressor's users write it: of n:m they name what is removed."""
    asked = SparsityPattern.parse(pattern)
    return pattern if asked.m is None else f"{asked.m - asked.n}:{asked.m}"


def ask(peer: Path, folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Has llm-compressor do it in a process of its own, with the files of `folder`."""
    request = request | {"result": str(folder / "answer.json")}
    (folder / "request.json").write_text(json.dumps(request))
    command = [peer, HERE / "peers/llmcompressor_worker.py", folder / "request.json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads((folder / "answer.json").read_text())


# ------------------------------------------------------------------------------------ what is looked at


def check(W: Tensor, X: Tensor, asked: SparsityPattern, pruned: dict[str, Tensor]) -> dict[str, Any]:
    """Counts, errors from the inputs, and our agreement with float64."""
    H = Hessian(W.shape[1], W.device)
    H.add(X)
    solution = sparsegpt.solve(W, H, asked)
    exact = Hessian(W.shape[1], W.device, torch.float64)
    exact.add(X)
    double = sparsegpt.solve(W.double(), exact, asked)
    agreement = float((solution.mask == double.mask).double().mean())
    assert solution.zeros_asked == double.zeros_asked == zeros_wanted(*W.shape, asked)
    assert agreement >= 0.999, agreement
    unrounded = sparsegpt.solve(W.float(), H, asked).relative_error
    assert abs(unrounded / double.relative_error - 1) < 5e-3, (unrounded, double.relative_error)
    return {
        "masks equal to float64": agreement,
        "relative error": {
            "ours, reported": solution.relative_error,
            "ours in fp32": unrounded,
            "ours in float64": double.relative_error,
            **{f"{name}, from the inputs": error_from_inputs(W, weight, X) for name, weight in pruned.items()},
        },
        "zeros wanted": zeros_wanted(*W.shape, asked),
        "zeros": {name: int((weight == 0).sum()) for name, weight in pruned.items()},
    }


def zeros_wanted(rows: int, columns: int, asked: SparsityPattern) -> int:
    widths = [min(128, columns - start) for start in range(0, columns, 128)]
    return sum(round(asked.fraction * rows * width) for width in widths)


def error_from_inputs(W: Tensor, weight: Tensor, X: Tensor) -> float:
    """Squared error of the layer's outputs over their energy."""
    change = energy = 0.0
    for sample in X.float().split(1024):
        change += float((sample @ (weight.float() - W.float()).t()).square().sum(dtype=torch.float64))
        energy += float((sample @ W.float().t()).square().sum(dtype=torch.float64))
    return change / energy


def stages_of_ours(W: Tensor, X: Tensor, asked: SparsityPattern) -> dict[str, float]:
    """Seconds inside one solve, by stage; stages wait for the device, so together they are a little slower."""
    H = Hessian(W.shape[1], W.device)
    H.add(X)
    watch = Stopwatch(W.device)
    kernels = H.kernels
    H.kernels = type(kernels)(
        kernels.name,
        watch.wrap("select", kernels.select_),
        watch.wrap("sweep", kernels.sweep_),
        kernels.add_gram_,
    )
    H.factor = watch.wrap("factor", H.factor)
    with watch.replacing(sparsegpt, "_energies", "errors of the report"), watch.stage("all"):
        sparsegpt.solve(W, H, asked)
    named = sum(seconds for stage, seconds in watch.seconds.items() if stage != "all")
    return watch.seconds | {"updates, copies and the rest": watch.seconds["all"] - named}


def count_launches(pattern: str, device: torch.device, peer: Path) -> dict[str, Any]:
    """What one more window of 128 columns costs a solve of 64 rows."""
    asked = SparsityPattern.parse(pattern)

    def inputs(columns: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        W = torch.randn(64, columns, generator=generator)
        return W.to(device), torch.randn(2 * columns, columns, generator=generator).to(device)

    def ours(columns: int) -> Callable[[], object]:
        W, X = inputs(columns)
        H = Hessian(columns, device)
        H.add(X)
        U, by_column = H.factor().U, W.t().contiguous()
        return lambda: sparsegpt.sweep_windows_(by_column, U, [asked], [len(W)], H.kernels)

    def theirs(columns: int) -> Callable[[], object]:
        W, X = inputs(columns)
        H = 2 / len(X) * X.t() @ X
        return lambda: published.solve(W, H, asked.fraction, (asked.m or 0) - (asked.n or 0), asked.m or 0)

    counted = {
        name: asdict(launches.of_solve(run, device)) for name, run in {"ours": ours, "published": theirs}.items()
    }
    if peer.exists():
        with tempfile.TemporaryDirectory() as folder:
            request = {"mode": "launches", "pattern": as_zeros(pattern), "device": device.type}
            counted["llm-compressor"] = ask(peer, Path(folder), request)["launches"]
    return {
        name: {"counted": c["counted"], "launches": c["per_block"], "by name": c["per_block_by_name"]}
        for name, c in counted.items()
    }


def print_row(name: str, found: dict[str, Any]) -> None:
    ours = found["seconds"]["ours"]["solve"]
    others = ", ".join(f"{name} {ratio['solve']:.1f}x" for name, ratio in found["times faster"].items())
    over = found["floor of our solve"]["ours over floor"]
    print(f"{name}: {ours:.3f} s, {over:.2f} of the floor; {others}", flush=True)


if __name__ == "__main__":
    main()
