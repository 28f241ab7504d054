# SPDX-License-Identifier: Apache-2.0
"""The state of a run on disk, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Progress:
    """Optimizer steps done, and the seconds that they took."""

    step: int = 0
    seconds: float = 0.0


def save(
    path: Path, progress: Progress, settings: dict[str, Any], model: nn.Module, optimizers: Sequence[Optimizer]
) -> None:
    """Replaces the file in one stroke: after a kill at any moment it holds this state or the one before."""
    state = {
        "step": progress.step,
        "seconds": progress.seconds,
        "settings": settings,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def restore(path: Path, settings: dict[str, Any], model: nn.Module, optimizers: Sequence[Optimizer]) -> Progress:
    """Brings model and optimizers to the state of the file; `ValueError` where it belongs to another run."""
    state = torch.load(path, map_location=next(model.parameters()).device, weights_only=True)
    for name, value in settings.items():
        if state["settings"].get(name) != value:
            raise ValueError(
                f"{path} was written with {name} {state['settings'].get(name)!r}, this run has {value!r}; give the same "
                "options to go on, or another --output to begin anew."
            )
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return Progress(state["step"], state["seconds"])
