# SPDX-License-Identifier: Apache-2.0
"""SparseGPT as its authors published it (Frantar and Alistarh 2023), operation for operation, in our own words.

The peer of the benchmarks: the same torch calls in the same order as IST-DASLab/sparsegpt, with its faults (the threshold
takes ties and one weight too many a window, the factorisation is unguarded, every module has a Hessian of its own). Only
what `transformers` 5 needs is new: a block gets the arguments that the model gave it. Needs torch alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn


class PublishedSparseGPT:
    """One linear layer: its Hessian grows with `add_batch`, `fasterprune` uses it up and returns the pruned weight.

    Args:
        weight: `[rows, columns]`, of any floating-point type; it is not changed.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.rows, self.columns = weight.shape
        self.H = torch.zeros((self.columns, self.columns), dtype=torch.float32, device=weight.device)
        self.samples = 0
        self.loss = math.nan

    def add_batch(self, x: Tensor) -> None:
        """Takes the layer's input, `[tokens, columns]` or `[samples, tokens, columns]`, into the running mean of 2 X^T X."""
        if x.ndim == 2:
            x = x.unsqueeze(0)
        added = x.shape[0]
        x = x.reshape((-1, x.shape[-1])).t()
        with full_precision():
            self.H *= self.samples / (self.samples + added)
            self.samples += added
            x = math.sqrt(2 / self.samples) * x.float()
            self.H += x.matmul(x.t())

    def fasterprune(
        self, sparsity: float, prunen: int = 0, prunem: int = 0, blocksize: int = 128, percdamp: float = 0.01
    ) -> Tensor:
        """The pruned weight, in the type of the old one.

        Args:
            sparsity: the share of weights to remove, not read with n:m.
            prunen, prunem: of every `prunem` neighbours in a row `prunen` are removed; 0 for unstructured.
            blocksize: columns in a window. percdamp: the damping as a share of the Hessian's mean diagonal.
        """
        with full_precision():
            return self._solve(sparsity, prunen, prunem, blocksize, percdamp)

    def _solve(self, sparsity: float, prunen: int, prunem: int, blocksize: int, percdamp: float) -> Tensor:
        device = self.weight.device
        W = self.weight.detach().clone()
        W = W.float()
        H = self.H
        del self.H

        dead = torch.diag(H) == 0
        H[dead, dead] = 1
        W[:, dead] = 0
        row_losses = torch.zeros(self.rows, device=device)

        damping = percdamp * torch.mean(torch.diag(H))
        diagonal = torch.arange(self.columns, device=device)
        H[diagonal, diagonal] += damping
        H = torch.linalg.cholesky(H)
        H = torch.cholesky_inverse(H)
        U = H = torch.linalg.cholesky(H, upper=True)

        for start in range(0, self.columns, blocksize):
            stop = min(start + blocksize, self.columns)
            window = W[:, start:stop].clone()  # [rows, width]
            kept = torch.zeros_like(window)
            errors = torch.zeros_like(window)
            losses = torch.zeros_like(window)
            u = U[start:stop, start:stop]

            if prunen:
                mask = torch.zeros_like(window) == 1
            else:
                scores = window**2 / (torch.diag(u).reshape((1, -1))) ** 2
                threshold = torch.sort(scores.flatten())[0][int(scores.numel() * sparsity)]
                mask = scores <= threshold

            for j in range(stop - start):
                w = window[:, j]
                d = u[j, j]
                if prunen and j % prunem == 0:
                    group = slice(j, j + prunem)
                    scores = window[:, group] ** 2 / (torch.diag(u)[group].reshape((1, -1))) ** 2
                    mask.scatter_(1, j + torch.topk(scores, prunen, dim=1, largest=False)[1], True)
                q = w.clone()
                q[mask[:, j]] = 0
                kept[:, j] = q
                losses[:, j] = (w - q) ** 2 / d**2
                error = (w - q) / d
                window[:, j:] -= error.unsqueeze(1).matmul(u[j, j:].unsqueeze(0))
                errors[:, j] = error

            W[:, start:stop] = kept
            row_losses += torch.sum(losses, 1) / 2
            W[:, stop:] -= errors.matmul(U[start:stop, stop:])

        synchronise(device)
        self.loss = torch.sum(row_losses).item()
        return W.reshape(self.weight.shape).to(self.weight.dtype)


def solve(
    W: Tensor,
    H: Tensor,
    sparsity: float,
    prunen: int = 0,
    prunem: int = 0,
    blocksize: int = 128,
    percdamp: float = 0.01,
) -> Tensor:
    """The pruned weight for a given Hessian `[columns, columns]`, which is copied first: measure memory with the class."""
    solver = PublishedSparseGPT(W)
    solver.H = H.float().clone()
    return solver.fasterprune(sparsity, prunen, prunem, blocksize, percdamp)


# ------------------------------------------------------------------------------------------------- models


@torch.no_grad()
def prune_block(
    block: nn.Module,
    inputs: Tensor,
    outputs: Tensor,
    arguments: dict[str, Any],
    sparsity: float,
    prunen: int = 0,
    prunem: int = 0,
    blocksize: int = 128,
    percdamp: float = 0.01,
) -> dict[str, float]:
    """Prunes every linear layer of a decoder block in place, with the two passes of the published scheme.

    Args:
        inputs: `[samples, tokens, hidden]`, what enters the block. outputs: the same shape, overwritten by what leaves it
            once it is pruned; the next block's inputs.
        arguments: the keyword arguments that the model gives the block, for one sample (see `capture`).

    Returns:
        Seconds: `calibrate` (first pass, with the Hessians), `solve`, `propagate` (second pass).
    """
    layers = {name: module for name, module in block.named_modules() if type(module) is nn.Linear}
    solvers = {name: PublishedSparseGPT(layer.weight.data) for name, layer in layers.items()}
    marks = [now(inputs.device)]

    handles = [
        layer.register_forward_hook(lambda _, given, __, solver=solvers[name]: solver.add_batch(given[0].data))
        for name, layer in layers.items()
    ]
    forward(block, inputs, outputs, arguments)
    for handle in handles:
        handle.remove()
    marks.append(now(inputs.device))

    for name, layer in layers.items():
        layer.weight.data = solvers[name].fasterprune(sparsity, prunen, prunem, blocksize, percdamp)
    marks.append(now(inputs.device))

    forward(block, inputs, outputs, arguments)
    marks.append(now(inputs.device))
    stages = ("calibrate", "solve", "propagate")
    return {stage: end - begin for stage, begin, end in zip(stages, marks, marks[1:], strict=False)}


@torch.no_grad()
def prune_model(
    model: nn.Module,
    ids: Tensor,
    sparsity: float,
    prunen: int = 0,
    prunem: int = 0,
    blocksize: int = 128,
    percdamp: float = 0.01,
    device: torch.device | str | None = None,
    blocks: int | None = None,
) -> dict[str, Any]:
    """Prunes a Llama's decoder blocks in place, one after the other, as published.

    Args:
        ids: `[samples, tokens]`. device: where the work is done; each block is moved there and back, default where the
            model is. blocks: only so many of them, from the first.

    Returns:
        `capture`: seconds until the first block's inputs are there; `blocks`: what `prune_block` returns and `move`, for
        each block; `seconds`: all in all.
    """
    device = torch.device(device or model.device)
    begin = now(device)
    inputs, arguments = capture(model, ids, device)
    outputs = torch.zeros_like(inputs)
    captured = now(device) - begin

    seconds = []
    for block in model.model.layers[:blocks]:
        home = next(block.parameters()).device
        moving = now(device)
        block.to(device)
        moved = now(device) - moving
        spent = prune_block(block, inputs, outputs, arguments, sparsity, prunen, prunem, blocksize, percdamp)
        moving = now(device)
        block.to(home)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        spent["move"] = moved + now(device) - moving
        seconds.append(spent)
        inputs, outputs = outputs, inputs
    return {"capture": captured, "blocks": seconds, "seconds": now(device) - begin}


@torch.no_grad()
def capture(model: nn.Module, ids: Tensor, device: torch.device | str) -> tuple[Tensor, dict[str, Any]]:
    """What enters a Llama's first block, `[samples, tokens, hidden]`, and the keyword arguments that go with one sample."""
    inner = model.model
    outside = [inner.embed_tokens, inner.norm, inner.rotary_emb]
    home = model.device
    for module in outside:
        module.to(device)
    inputs = torch.zeros((*ids.shape, model.config.hidden_size), dtype=model.dtype, device=device)
    found: dict[str, Any] = {"sample": 0}

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[found["sample"]] = args[0] if args else kwargs["hidden_states"]
        found["sample"] += 1
        found["arguments"] = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        raise Caught

    handle = inner.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for row in ids:
            with suppress(Caught):
                inner(row.unsqueeze(0).to(device), use_cache=False)
    finally:
        handle.remove()
    for module in outside:
        module.to(home)
    return inputs, found["arguments"]


def forward(block: nn.Module, inputs: Tensor, outputs: Tensor, arguments: dict[str, Any]) -> None:
    """The samples go through the block one at a time."""
    for j in range(len(inputs)):
        outputs[j] = block(inputs[j].unsqueeze(0), **arguments)[0]


class Caught(Exception):
    """The first block was reached; the rest of the forward pass is not wanted."""


# ------------------------------------------------------------------------------------------------ machine


@contextmanager
def full_precision() -> Iterator[None]:
    """TF32 off, as published, and afterwards as it was."""
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    synchronise(device)
    return time.perf_counter()
