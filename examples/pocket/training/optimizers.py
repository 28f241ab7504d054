# SPDX-License-Identifier: Apache-2.0
"""Muon for the matrices inside the blocks, AdamW for embeddings and norms."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer


def make_optimizers(model: nn.Module, muon_rate: float, adamw_rate: float) -> list[Optimizer]:
    """Two optimizers that share the model's parameters; the rates are peaks, which `set_learning_rate` scales."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed_tokens" not in name else others).append(parameter)
    optimizers: list[Optimizer] = [
        Muon(matrices, lr=muon_rate, weight_decay=0.05, momentum=0.95),
        AdamW(others, lr=adamw_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    for group in _groups(optimizers):
        group["peak"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: Iterable[Optimizer], part: float) -> None:
    """Each group's learning rate becomes this part of its peak."""
    for group in _groups(optimizers):
        group["lr"] = group["peak"] * part


def step(model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """One step along gradients of norm 1 at most; the gradients are gone afterwards."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _groups(optimizers: Iterable[Optimizer]) -> list[dict]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]
