# SPDX-License-Identifier: Apache-2.0
"""What several processes spare each of them: CPU-seconds of the walk and of a factor, and how far masks and perplexity are
those of one.

    python benchmarks/ranks.py [--processes 1 2 4] [--models pocket 2048] [--factors 1024 2048 4096 8192]

Each process has one thread. `pocket`: the bundled model, 64 x 256 tokens of its texts. `2048`: two blocks of hidden 2048, MLP
5632, random bf16 weights, 16 x 512 tokens. `--factors`: columns of a Hessian that is factored, with the operations of each process's
products and what it sends or is sent; the median of three. With two cores the wall time of four processes says nothing; their
CPU-seconds do, since a process that waits for others sleeps. Writes `benchmarks/results/ranks.json`; what is not asked for stays as it
was there.
"""

from __future__ import annotations

import argparse
import json
import resource
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from optimum_calibprune import machine, pocket
from optimum_calibprune.capabilities.perplexity import cut, perplexity
from optimum_calibprune.pruning import blocks
from optimum_calibprune.pruning.hessian import Hessian
from optimum_calibprune.pruning.ranks import Ranks
from optimum_calibprune.pruning.schedule import Settings, prune_blocks
from optimum_calibprune.pruning.stops import matrices_in
from optimum_calibprune.records import CalibrationRow, CalibrationSet, SparsityPattern


RESULT = Path(__file__).parent / "results" / "ranks.json"
SHAPES = {"pocket": (64, 256, 8), "2048": (16, 512, 4)}  # samples, length, micro-batch


def text() -> str:
    files = sorted((pocket.MODEL.parent / "texts").glob("*.jsonl"))
    lines = (line for file in files for line in file.read_text(encoding="utf-8").splitlines()[:400])
    return "\n".join(json.loads(line)["text"] for line in lines)


def model_of(name: str) -> PreTrainedModel:
    if name == "pocket":
        return AutoModelForCausalLM.from_pretrained(pocket.MODEL, dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=2048,
        max_position_embeddings=2048,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def run(name: str) -> dict[str, Any]:
    """Prunes with the processes that there are; what this one has needed, and the masks and the perplexity."""
    model, tokenizer = model_of(name), AutoTokenizer.from_pretrained(pocket.MODEL)
    samples, length, micro_batch = SHAPES[name]
    windows = cut(text(), tokenizer, length)
    windows = windows[np.random.default_rng(0).permutation(len(windows))]
    rows = tuple(CalibrationRow("texts", i, "general") for i in range(samples))
    settings = Settings(SparsityPattern(0.5), micro_batch=micro_batch)
    groups = blocks.find_groups(model)
    before = resource.getrusage(resource.RUSAGE_SELF)
    chosen = CalibrationSet(windows[:samples], rows)
    for _ in prune_blocks(model, chosen, settings, groups=groups, ranks=Ranks.current()):
        pass
    after = resource.getrusage(resource.RUSAGE_SELF)
    _, layers = blocks.find_blocks(model)
    masks = [(W == 0).numpy() for block in layers for W in matrices_in(block).values()]
    first = Ranks.current().first
    return {
        "cpu seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "perplexity": perplexity(model, windows[samples : samples + 64]) if first and name == "pocket" else None,
        "masks": masks if first else None,
    }


def factor(columns: int) -> dict[str, Any]:
    """Factors one Hessian with the processes that there are; what this one has needed."""
    ranks, hessian = Ranks.current(), Hessian(columns)
    hessian.add(torch.randn(512, columns, generator=torch.Generator().manual_seed(0)))
    hessian.factor(ranks=ranks)
    seconds, sent = [], []
    for _ in range(3):
        ranks.wait()
        with communication() as spent:
            before = time.process_time()
            hessian.factor(ranks=ranks)
            seconds.append(time.process_time() - before)
        sent.append(spent)
    counted = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        hessian.factor(ranks=ranks)
    return {
        "cpu seconds": statistics.median(seconds),
        "of it for sending": statistics.median(spent["seconds"] for spent in sent),
        "MiB": sent[0]["bytes"] / 2**20,
        "GFLOP": counter.get_total_flops() / 1e9,
    }


@contextmanager
def communication() -> Iterator[dict[str, float]]:
    """Bytes and CPU-seconds of what is broadcast or added up meanwhile."""
    spent = {"bytes": 0, "seconds": 0.0}

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
            before = time.process_time()
            done = call(tensor, *args, **options)
            spent["seconds"] += time.process_time() - before
            spent["bytes"] += tensor.nbytes
            return done

        return counted

    with (
        patch.object(dist, "broadcast", counting(dist.broadcast)),
        patch.object(dist, "all_reduce", counting(dist.all_reduce)),
    ):
        yield spent


def _rank(rank: int, size: int, port: int, queue: Any, measure: Callable[..., Any], of: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    queue.put((rank, measure(of)))
    dist.destroy_process_group()


def launch(size: int, measure: Callable[..., dict[str, Any]], of: Any) -> list[dict[str, Any]]:
    """What `measure(of)` returns in each of `size` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_rank, args=(i, size, port, queue, measure, of)) for i in range(size)]
    for process in processes:
        process.start()
    found = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    return [found[i] for i in range(size)]


def model_rows(name: str, sizes: list[int]) -> Iterator[dict[str, Any]]:
    alone: dict[str, Any] = {}
    for size in sizes:
        found = launch(size, run, name)
        alone = alone or found[0]
        pairs = list(zip(alone["masks"], found[0]["masks"], strict=True))
        yield {
            "model": name,
            "processes": size,
            "cpu seconds of each": [round(each["cpu seconds"], 2) for each in found],
            "most, to one process": round(max(each["cpu seconds"] for each in found) / alone["cpu seconds"], 3),
            "masks alike": sum(int((a == b).sum()) for a, b in pairs) / sum(a.size for a, _ in pairs),
            "perplexity": found[0]["perplexity"],
        }


def factor_rows(columns: int, sizes: list[int]) -> Iterator[dict[str, Any]]:
    for size in sizes:
        found = launch(size, factor, columns)
        yield {
            "columns": columns,
            "processes": size,
            "cpu seconds of each": [round(each["cpu seconds"], 3) for each in found],
            "of it for sending": [round(each["of it for sending"], 3) for each in found],
            "GFLOP of each": [round(each["GFLOP"], 1) for each in found],
            "MiB sent or received by each": round(found[0]["MiB"], 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--models", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--factors", nargs="*", type=int, default=[1024, 2048, 4096, 8192])
    given = parser.parse_args()
    rows = {f"walk {name}": model_rows(name, given.processes) for name in given.models}
    rows |= {f"factor {columns}": factor_rows(columns, given.processes) for columns in given.factors}
    result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    for name, of_name in rows.items():
        result[name] = []
        for row in of_name:
            result[name].append(row)
            print(json.dumps(row), flush=True)
        result |= {"versions": machine.versions(), "hardware": machine.hardware(torch.device("cpu"))}
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
