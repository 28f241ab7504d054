# SPDX-License-Identifier: Apache-2.0
"""Runs llm-compressor's SparseGPT in its own virtual environment (requirements-llmcompressor.txt) and measures it.

    .venv-llmcompressor/bin/python benchmarks/peers/llmcompressor_worker.py REQUEST.json

The request says what to do, and in `result` where the answer goes, as JSON. In all modes:

    mode        "solver", "model" or "launches"
    result      path of the answer
    pattern     a share of weights ("0.6") or zeros:group ("2:4"), default "0.6"
    device      "cpu" (default) or "cuda"; with "cpu" start it with CUDA_VISIBLE_DEVICES= set empty, for "model" takes any GPU
    threads     of torch on the CPU, default torch's own
    block_size  default 128; damping, default 0.01

"solver", the library's own functions on one matrix:

    tensors     safetensors file with W [rows, columns] and X [tokens, columns], bf16 or fp32
    repeats     default 1; warmups, unmeasured runs before (one on a small matrix comes first anyway), default 1 on CUDA, 0 else
    tokens_per_sample   how the library gets X to see, default 2048
    weights     path for the pruned W and, with "save_hessian": true, for H

"model", `oneshot` with `SparseGPTModifier` as its users call it:

    checkpoint  a folder; or config, of a Llama with random bf16 weights, and seed (default 0)
    ids         safetensors file with ids [samples, tokens]
    placement   where the model is before, "cpu" (default, as its users load it) or "cuda"
    weights     optional path for the pruned weights of all linear layers

"launches": rows (default 64).
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any


os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries below are imported

import torch
from datasets import Dataset
from launches import of_solve
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify as library
from measuring import measured
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


LIBRARIES = ("llmcompressor", "compressed-tensors", "torch", "transformers", "datasets")


def main(request: dict[str, Any]) -> dict[str, Any]:
    if request.get("threads"):
        torch.set_num_threads(request["threads"])
    device = torch.device(request.get("device", "cpu"))
    warnings: list[str] = []
    library.logger.add(
        lambda message: warnings.append(message.record["message"]),
        filter=lambda record: record["level"].name in ("WARNING", "ERROR", "CRITICAL"),  # their METRIC ranks higher
    )
    modes = {"solver": solver, "model": whole_model, "launches": launches}
    answer = modes[request["mode"]](request, device)
    precision = torch.backends.cuda.matmul.fp32_precision  # "none" or "ieee": TF32 is off
    return {
        "request": request,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "matmul_fp32_precision": precision,
        "warnings": warnings,
        **answer,
    }


# ------------------------------------------------------------------------------------------ one matrix


def solver(request: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Hessian and solve, `repeats` times, each with its seconds and the memory it took beyond what was there before."""
    small_solve(256, 256, request, device)()
    tensors = {name: tensor.clone() for name, tensor in load_file(request["tensors"]).items()}  # no mapped pages
    layer = linear(tensors["W"].to(device))
    samples = tensors["X"].to(device).split(request.get("tokens_per_sample", 2048))
    del tensors
    seconds: dict[str, list[float]] = {"hessian": [], "solve": []}
    peaks: dict[str, list[int]] = {"hessian": [], "solve": []}

    warmups = request.get("warmups", int(device.type == "cuda"))
    for run in range(warmups + request.get("repeats", 1)):
        H = pruned = None
        with measured(device) as spent:
            H = hessian(layer, samples)
        if run >= warmups:
            seconds["hessian"].append(spent.seconds)
            peaks["hessian"].append(spent.extra)
        hessians = {layer: H.clone() if request.get("save_hessian") else H}
        if not request.get("save_hessian"):
            del H  # the library must hold the only reference, to free it
        with measured(device) as spent:
            loss, pruned = solve(layer, hessians, request)
        if run >= warmups:
            seconds["solve"].append(spent.seconds)
            peaks["solve"].append(spent.extra)

    found = {"W": pruned.cpu()} | ({"H": H.cpu()} if request.get("save_hessian") else {})
    save_file(found, request["weights"])
    return {
        "seconds": seconds,
        "extra_bytes": {stage: max(peak) for stage, peak in peaks.items()},
        "zeros": int((pruned == 0).sum()),
        "weights": pruned.numel(),
        "loss": loss,
    }


def linear(W: Tensor) -> nn.Linear:
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(W, requires_grad=False)
    return layer


@torch.no_grad()
def hessian(layer: nn.Linear, samples: tuple[Tensor, ...]) -> Tensor:
    """What the library's hook does on every forward pass of the layer."""
    H, seen = library.make_empty_hessian(layer), 0
    for sample in samples:
        H, seen = library.accumulate_hessian(sample.unsqueeze(0), layer, H, seen)
    return H


@torch.no_grad()
def solve(layer: nn.Linear, hessians: dict[nn.Module, Tensor], request: dict[str, Any]) -> tuple[float, Tensor]:
    sparsity, n, m = pattern(request)
    return library.sparsify_weight(
        module=layer,
        hessians_dict=hessians,
        sparsity=sparsity,
        prune_n=n,
        prune_m=m,
        block_size=request.get("block_size", 128),
        dampening_frac=request.get("damping", 0.01),
        preserve_sparsity_mask=False,
    )


def launches(request: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Kernels of the library's solve; `launches.py` says what is counted."""
    rows = request.get("rows", 64)
    counted = of_solve(
        lambda columns: small_solve(rows, columns, request, device), device, request.get("block_size", 128)
    )
    return {"launches": asdict(counted)}


def small_solve(rows: int, columns: int, request: dict[str, Any], device: torch.device) -> Callable[[], object]:
    """A solve of random numbers, to be called once."""
    generator = torch.Generator().manual_seed(0)
    layer = linear(torch.randn(rows, columns, generator=generator).to(device))
    hessians = {layer: hessian(layer, (torch.randn(2 * columns, columns, generator=generator).to(device),))}
    return lambda: solve(layer, hessians, request)


# ------------------------------------------------------------------------------------------ whole models


def whole_model(request: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """`oneshot` from token ids to pruned weights: seconds in all and of each block, memory, zeros."""
    if device.type == "cpu" and torch.accelerator.is_available():
        raise ValueError("the library uses the GPU wherever it sees one; set CUDA_VISIBLE_DEVICES= to run on the CPU")
    ids = load_file(request["ids"])["ids"]
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
    dataset = Dataset.from_list(rows)
    sparsity, n, m = pattern(request)
    recipe = SparseGPTModifier(
        sparsity=sparsity,
        mask_structure=f"{n}:{m}",
        block_size=request.get("block_size", 128),
        dampening_frac=request.get("damping", 0.01),
        ignore=["re:.*lm_head"],
    )
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(request, device, folder)
        clock = BlockClock(model.model.layers, len(ids), device)
        with measured(device) as spent:
            oneshot(
                model=model,
                recipe=recipe,
                dataset=dataset,
                processor=object(),  # must be there, is never used: the ids are ready
                num_calibration_samples=len(ids),
                max_seq_length=ids.shape[1],
                shuffle_calibration_samples=False,
            )
    layers = {name: module.weight.data for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if request.get("weights"):
        save_file({name: W.cpu().contiguous() for name, W in layers.items()}, request["weights"])
    blocks = clock.seconds()
    return {
        "seconds": spent.seconds,
        "blocks": blocks,
        "seconds_outside_blocks": spent.seconds - sum(sum(block.values()) for block in blocks),
        "extra_bytes": spent.extra,
        "sparsity": {name: float((W == 0).float().mean()) for name, W in layers.items()},
    }


def make_model(request: dict[str, Any], device: torch.device, folder: str) -> nn.Module:
    """The model, in evaluation mode; `folder` gets a configuration, for the library reads one from disk."""
    if request.get("checkpoint"):
        return AutoModelForCausalLM.from_pretrained(request["checkpoint"], dtype="auto").to(
            request.get("placement", "cpu")
        )
    config = LlamaConfig(**request["config"], dtype=torch.bfloat16)
    torch.manual_seed(request.get("seed", 0))
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    config.save_pretrained(folder)
    model.config._name_or_path = folder
    return model.eval().to(request.get("placement", "cpu"))


class BlockClock:
    """Seconds of each decoder block, read from hooks on the blocks alone: every sample passes twice, in between is the solve."""

    def __init__(self, blocks: nn.ModuleList, samples: int, device: torch.device) -> None:
        self.samples, self.device = samples, device
        self.calls = [0] * len(blocks)
        self.marks: list[list[float]] = [[] for _ in blocks]
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, index=index: self.enter(index))
            block.register_forward_hook(lambda *_, index=index: self.leave(index))

    def enter(self, index: int) -> None:
        if self.calls[index] == 0:
            self.marks[index].clear()  # tracing the model enters some blocks without going through them
        if self.calls[index] in (0, self.samples):
            self.mark(index)

    def leave(self, index: int) -> None:
        self.calls[index] += 1
        if self.calls[index] in (self.samples, 2 * self.samples):
            self.mark(index)

    def mark(self, index: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.marks[index].append(time.perf_counter())

    def seconds(self) -> list[dict[str, float]]:
        if any(calls != 2 * self.samples for calls in self.calls):
            raise ValueError(f"each block should have run {2 * self.samples} times, ran {self.calls}")
        stages = ("calibrate", "solve", "propagate")
        return [
            {stage: end - begin for stage, begin, end in zip(stages, marks, marks[1:], strict=False)}
            for marks in self.marks
        ]


# ------------------------------------------------------------------------------------------ requests


def pattern(request: dict[str, Any]) -> tuple[float, int, int]:
    """Sparsity, zeros in a group, size of a group; 0, 0 for unstructured."""
    given = str(request.get("pattern", "0.6"))
    if ":" in given:
        n, m = map(int, given.split(":"))
        return n / m, n, m
    return float(given), 0, 0


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    Path(given["result"]).write_text(json.dumps(main(given), indent=2) + "\n")
