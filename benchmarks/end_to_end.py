# SPDX-License-Identifier: Apache-2.0
"""From calibration ids to pruned weights: our walk, the published two passes, and llm-compressor's `oneshot`, in turn.

    python benchmarks/end_to_end.py 8b-block                        # one block of Llama-3.1-8B's shape, 2 x 2048 tokens (CPU)
    python benchmarks/end_to_end.py 1b --device cuda                # Llama-3.2-1B's shape, 128 x 2048 tokens
    python benchmarks/end_to_end.py 8b --device cuda --peer-blocks 4

Random bf16 weights are made on the spot. The peers may run on the first few blocks only (`--peer-blocks`); their time for
all of them is then extrapolated from the mean of these, and the result says so. First the zeros of every module are
counted, and the errors of the first block's modules are compared with those of the published algorithm. Then all are timed
in turn; medians, stages, peak memory, and the floor: the products that the job consists of at rates measured in between.
Needs torch, transformers and safetensors alone (from the repo's root, with PYTHONPATH=. where this package is not
installed); llm-compressor as in `solver.py`. Writes `benchmarks/results/end_to_end-SHAPE-DEVICE.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import published
from peers.measuring import Stopwatch, machine, measured, product_rate
from safetensors.torch import save_file
from solver import HERE, PEER, ask, flops
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_calibprune.pruning import blocks, hessian, schedule, sparsegpt
from optimum_calibprune.pruning.kernels import Kernels, kernels_for
from optimum_calibprune.pruning.kernels.precision import exact_bf16_inputs
from optimum_calibprune.records import CalibrationRow, CalibrationSet, LayerReport, SparsityPattern


EIGHT = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
ONE = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
SHAPES: dict[str, tuple[dict[str, int], int, int]] = {  # config, samples, length
    "8b-block": (EIGHT | {"num_hidden_layers": 1, "vocab_size": 1024}, 2, 2048),
    "1b": (ONE | {"num_hidden_layers": 16, "vocab_size": 128256}, 128, 2048),
    "8b": (EIGHT | {"num_hidden_layers": 32, "vocab_size": 128256}, 128, 2048),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pattern", default="0.6")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--micro-batch", type=int, help="samples; default: 2048 tokens on a CPU, 16384 on a GPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-blocks", type=int, help="the peers run so many blocks; default: all")
    parser.add_argument("--peer", type=Path, default=PEER, help="the python that has llm-compressor")
    parser.add_argument("--without-published", action="store_true")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/end_to_end-SHAPE-DEVICE.json")
    given = parser.parse_args()
    device = torch.device(given.device)
    config, samples, length = SHAPES[given.shape]
    job = Job(config, given.samples or samples, length, given.pattern, device, given.micro_batch)
    results = compare(job, given)
    output = given.output or HERE / "results" / f"end_to_end-{given.shape}-{device.type}.json"
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


class Job:
    """A model of random weights, ids, and what is asked of them."""

    def __init__(
        self,
        config: dict[str, int],
        samples: int,
        length: int,
        pattern: str,
        device: torch.device,
        micro_batch: int | None,
    ) -> None:
        self.config, self.device, self.pattern = config, device, SparsityPattern.parse(pattern)
        self.micro_batch = micro_batch or max(1, min(samples, (16384 if device.type == "cuda" else 2048) // length))
        self.ids = np.random.default_rng(0).integers(0, config["vocab_size"], (samples, length))

    @property
    def blocks(self) -> int:
        return self.config["num_hidden_layers"]

    def model(self, count: int | None = None) -> LlamaForCausalLM:
        """The same weights each time, of `count` blocks or of all."""
        config = LlamaConfig(**self.config | {"num_hidden_layers": count or self.blocks}, dtype=torch.bfloat16)
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with self.device:
            model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        return model.eval()

    def calibration(self) -> CalibrationSet:
        rows = tuple(CalibrationRow("random", i, "general") for i in range(len(self.ids)))
        return CalibrationSet(self.ids, rows)


def compare(job: Job, given: argparse.Namespace) -> dict[str, Any]:
    count = min(given.peer_blocks or job.blocks, job.blocks)
    seconds: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    found: dict[str, Any] = {}
    runs: dict[str, Callable[[], tuple[float, int, Any]]] = {"ours": lambda: run_ours(job)}
    if not given.without_published:
        runs["published"] = lambda: run_published(job, count)
    if given.peer.exists():
        runs["llm-compressor"] = lambda: run_llmcompressor(job, count, given.peer)
    run_ours(job, only_first=True)  # warm
    floors = []
    for _ in range(given.repeats):
        for name, run in runs.items():
            gc.collect()
            spent, extra, found[name] = run()
            seconds.setdefault(name, []).append(spent)
            memory[name] = max(memory.get(name, 0), extra)
        floors.append(floor(job))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    lowest = {part: statistics.median(each[part] for each in floors) for part in floors[0]}
    return {
        "machine": machine(job.device),
        "config": job.config,
        "tokens": list(job.ids.shape),
        "pattern": str(job.pattern),
        "micro_batch": job.micro_batch,
        "blocks of the peers": count,
        "extrapolated": count < job.blocks,
        "seconds": medians,
        "all seconds": seconds,
        "times faster": {name: medians[name] / medians["ours"] for name in medians if name != "ours"},
        "peak memory beyond the model in MiB": {name: extra / 2**20 for name, extra in memory.items()},
        "floor in seconds": lowest | {"all": sum(lowest.values())},
        "ours over floor": medians["ours"] / sum(lowest.values()),
        "stages of ours": stages(job),
        "relative errors of the first block": errors(found),
    }


# ------------------------------------------------------------------------------------------- the three


def walk(job: Job, model: LlamaForCausalLM) -> Iterator[tuple[LayerReport, ...]]:
    settings = schedule.Settings(job.pattern, micro_batch=job.micro_batch)
    return schedule.prune_blocks(
        model, job.calibration(), settings, groups=blocks.find_groups(model), device=job.device
    )


def run_ours(job: Job, only_first: bool = False) -> tuple[float, int, list[LayerReport]]:
    model = job.model(1 if only_first else None)
    with measured(job.device) as spent:
        reports = [report for part in walk(job, model) for report in part]
    for report in reports:
        zeros = int((model.get_submodule(report.module).weight == 0).sum())
        assert zeros == report.zeros_found >= report.zeros_asked, report.module
    return spent.seconds, spent.extra, reports


def run_published(job: Job, count: int) -> tuple[float, int, dict[str, float]]:
    model = job.model(count)
    dense = {name: module.weight.clone() for name, module in linears(model.model.layers[0]).items()}
    grams = first_grams(job, model)
    removed = (job.pattern.m or 0) - (job.pattern.n or 0)
    with measured(job.device) as spent:
        took = published.prune_model(
            model, torch.from_numpy(job.ids.copy()).to(job.device), job.pattern.fraction, removed, job.pattern.m or 0
        )
    first = linears(model.model.layers[0])
    found = {
        f"model.layers.0.{name}": sparsegpt.relative_error(dense[name], first[name].weight, H)
        for name, H in grams.items()
    }
    return extrapolated(took["seconds"], took["blocks"], job.blocks), spent.extra, found


def run_llmcompressor(job: Job, count: int, peer: Path) -> tuple[float, int, dict[str, Any]]:
    n, m = job.pattern.n, job.pattern.m
    request = {
        "mode": "model",
        "config": job.config | {"num_hidden_layers": count},
        "pattern": f"{m - n}:{m}" if m else str(job.pattern.fraction),
        "device": job.device.type,
        "placement": "cpu",
    }
    with tempfile.TemporaryDirectory() as folder:
        save_file({"ids": torch.from_numpy(job.ids)}, f"{folder}/ids.safetensors")
        answer = ask(peer, Path(folder), request | {"ids": f"{folder}/ids.safetensors"})
    return extrapolated(answer["seconds"], answer["blocks"], job.blocks), answer["extra_bytes"], answer["sparsity"]


def extrapolated(seconds: float, of_blocks: list[dict[str, float]], count: int) -> float:
    """Seconds for `count` blocks: what was measured, and the mean block for each that is missing."""
    mean = statistics.mean(sum(stages.values()) for stages in of_blocks)
    return seconds + (count - len(of_blocks)) * mean


# ------------------------------------------------------------------------------------ what is looked at


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def first_grams(job: Job, model: LlamaForCausalLM) -> dict[str, hessian.Hessian]:
    """What the attention inputs of the dense first block bring; the same for both schemes."""
    H = hessian.Hessian(job.config["hidden_size"], job.device)
    layer = model.model.layers[0].self_attn
    handle = layer.q_proj.register_forward_pre_hook(lambda _, args: H.add(args[0]))
    for batch in torch.from_numpy(job.ids.copy()).split(job.micro_batch):
        hidden, calls = blocks.capture(model, batch, job.device)
        blocks.run(model.model.layers[0], hidden, calls[0])
    handle.remove()
    return {f"self_attn.{name}": H for name in ("q_proj", "k_proj", "v_proj")}


def errors(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Ours of all modules, and the published algorithm's where both see the same inputs."""
    table = {r.module: {"ours": r.relative_error} for r in found["ours"] if r.module.startswith("model.layers.0.")}
    for module, value in found.get("published", {}).items():
        table[module]["published"] = value
    return table


def stages(job: Job) -> dict[str, float]:
    """Seconds of one more run, by stage; each waits for the device, so together they take longer than the run above."""
    watch, model = Stopwatch(job.device), job.model()
    with ExitStack() as stack:
        stack.enter_context(watch.replacing(schedule._BlockWalk, "_next", "forward"))
        stack.enter_context(watch.replacing(schedule._BlockWalk, "propagate", "forward"))
        stack.enter_context(watch.replacing(hessian.Hessian, "add", "Hessian"))
        stack.enter_context(watch.replacing(hessian.Hessian, "factor", "factor"))
        stack.enter_context(watch.replacing(sparsegpt, "_energies", "errors of the report"))
        stack.enter_context(timed_kernels(watch))
        with watch.stage("all"):
            for _ in walk(job, model):
                pass
    named = sum(seconds for stage, seconds in watch.seconds.items() if stage != "all")
    return watch.seconds | {"updates, copies and the rest": watch.seconds["all"] - named}


@contextmanager
def timed_kernels(watch: Stopwatch) -> Iterator[None]:
    def choose(device: torch.device, dtype: torch.dtype) -> Kernels:
        k = kernels_for(device, dtype)
        return Kernels(k.name, watch.wrap("select", k.select_), watch.wrap("sweep", k.sweep_), k.add_gram_)

    hessian.kernels_for = choose
    try:
        yield
    finally:
        hessian.kernels_for = kernels_for


def floor(job: Job) -> dict[str, float]:
    """Seconds of the products that the job consists of, each at the rate of a large one of its kind, triangles once."""
    c, (samples, length) = job.config, job.ids.shape
    hidden, wide = c["hidden_size"], c["intermediate_size"]
    shared = hidden * c["num_key_value_heads"] // c["num_attention_heads"]
    tokens = samples * length
    groups = [(hidden + 2 * shared, hidden), (hidden, hidden), (2 * wide, hidden), (hidden, wide)]  # rows, columns
    forward = sum(2 * tokens * rows * columns for rows, columns in groups) + samples * 2 * length**2 * hidden
    gram = sum(tokens * columns**2 for _, columns in groups)
    with exact_bf16_inputs():
        gram_rate = product_rate(torch.float32 if job.device.type == "cpu" else torch.bfloat16, job.device)
    rates = {"forward": product_rate(torch.bfloat16, job.device), "Hessian": gram_rate}
    single = product_rate(torch.float32, job.device)
    parts = {"forward": forward / rates["forward"], "Hessian": gram / rates["Hessian"]}
    for rows, columns in groups:
        for part, operations in flops(rows, columns).items():
            parts[part] = parts.get(part, 0.0) + operations / single
    return {part: job.blocks * seconds for part, seconds in parts.items()}


if __name__ == "__main__":
    main()
