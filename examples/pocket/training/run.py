# SPDX-License-Identifier: Apache-2.0
"""The training loop: a corpus and settings in, a trained model out; goes on where a checkpoint stands."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from . import checkpoint, optimizers
from .batches import Batches, held_out_windows
from .corpus import Corpus
from .schedule import Budget, learning_rate
from .shape import Shape, make_model


logger = logging.getLogger("train")

HELD_OUT_WINDOWS = 64  # of each source, at most


@dataclass(frozen=True)
class Settings:
    """All that decides what a run learns; a checkpoint continues only a run of equal settings.

    `batch` sequences of `length` tokens make a step, `micro_batch` of them are on the device at once. The rates are peaks for
    the pocket's width. Raises `ValueError` where the batch is not a multiple of the micro-batch.
    """

    shape: Shape
    budget: Budget
    length: int
    batch: int
    micro_batch: int
    seed: int = 0
    warmup: int = 100
    muon_rate: float = 0.02
    adamw_rate: float = 4e-3

    def __post_init__(self) -> None:
        if min(self.length, self.batch, self.micro_batch, self.warmup) < 1:
            raise ValueError("length, batch, micro-batch and warm-up steps must be at least 1.")
        if self.batch % self.micro_batch:
            raise ValueError(f"A batch of {self.batch} cannot be cut into micro-batches of {self.micro_batch} evenly.")


def train(
    corpus: Corpus,
    settings: Settings,
    state: Path,
    device: torch.device,
    *,
    compiled: bool = False,
    log_every: int = 25,
    save_every: int = 500,
) -> LlamaForCausalLM:
    """Trains until the budget is used up, and returns the model, float32, on the device.

    Args:
        state: the checkpoint, written every `save_every` steps; where it is there already, the run goes on from it.
        compiled: lets torch.compile fuse forward and backward.

    Raises:
        `ValueError` for a corpus that is too short or a checkpoint of another run; `FloatingPointError` where the loss is no
        longer finite.
    """
    batches = Batches(corpus, settings.length, settings.seed, device)
    model = make_model(settings.shape, corpus.vocabulary, settings.length, settings.seed).to(device).train()
    rates = settings.muon_rate, settings.adamw_rate * settings.shape.width_factor
    updates = optimizers.make_optimizers(model, *rates)
    identity = asdict(settings)
    before = checkpoint.restore(state, identity, model, updates) if state.is_file() else checkpoint.Progress()
    if before.step:
        logger.info("going on at step %d", before.step)
    loss_of: Callable[[LlamaForCausalLM, Tensor], Tensor] = torch.compile(_loss) if compiled else _loss
    meter = Meter(settings, corpus.vocabulary, log_every)
    began = time.monotonic() - before.seconds
    step, tokens_a_step = before.step, settings.batch * settings.length
    while (used := settings.budget.used(step * tokens_a_step, time.monotonic() - began)) < 1:
        optimizers.set_learning_rate(updates, learning_rate(step, used, settings.warmup))
        total = torch.zeros((), device=device)
        for windows in batches.draw(step, settings.batch).split(settings.micro_batch):
            loss = loss_of(model, windows) * (settings.micro_batch / settings.batch)
            loss.backward()
            total += loss.detach()
        optimizers.step(model, updates)
        step += 1
        meter.add(step, total)
        if step % save_every == 0:
            checkpoint.save(state, checkpoint.Progress(step, time.monotonic() - began), identity, model, updates)
    checkpoint.save(state, checkpoint.Progress(step, time.monotonic() - began), identity, model, updates)
    return model


def held_out_losses(model: LlamaForCausalLM, corpus: Corpus, length: int, micro_batch: int) -> dict[str, float]:
    """Mean loss a token, in nats, on the first held-out windows of each source that has any."""
    losses = {}
    model.eval()
    for name in corpus.held_out.spans:
        windows = held_out_windows(corpus.held_out, name, length, HELD_OUT_WINDOWS)
        if windows is None:
            continue
        with torch.no_grad():
            parts = [_loss(model, part.to(model.device)) * len(part) for part in windows.split(micro_batch)]
        losses[name] = (torch.stack(parts).sum() / len(windows)).item()
    return losses


def _loss(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Mean cross-entropy of windows `[count, length + 1]`; matrix products in bf16, the loss itself in float32."""
    with torch.autocast(windows.device.type, torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


class Meter:
    """Logs the mean loss and the speed every few steps. Only then does the host wait for the device."""

    def __init__(self, settings: Settings, vocabulary: int, every: int) -> None:
        self.every, self.tokens_a_step = every, settings.batch * settings.length
        self.operations_a_token = 6 * settings.shape.parameters(vocabulary)
        self.since, self.losses = time.monotonic(), []

    def add(self, step: int, loss: Tensor) -> None:
        """`loss` stays on its device until it is shown."""
        self.losses.append(loss)
        if step % self.every:
            return
        mean = torch.stack(self.losses).mean().item()
        seconds = time.monotonic() - self.since
        speed = len(self.losses) * self.tokens_a_step / seconds
        logger.info(
            "step %d, %.2f M tokens, loss %.3f, %.0f tokens/s (%.3f TFLOP/s)",
            *(step, step * self.tokens_a_step / 1e6, mean, speed, speed * self.operations_a_token / 1e12),
        )
        if not torch.isfinite(torch.tensor(mean)):
            raise FloatingPointError(f"The loss at step {step} is {mean}; begin anew with lower learning rates.")
        self.since, self.losses = time.monotonic(), []
