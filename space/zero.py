# SPDX-License-Identifier: Apache-2.0
"""Where tasks are done. On a Space with ZeroGPU, CUDA is there in a decorated function alone, which runs in a forked process, for
as many seconds as were asked for; elsewhere the same function runs in this process. Import this before torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import spaces
from huggingface_hub import snapshot_download

from estimate import OVER_RATES, work_seconds
from hardware import GB, Flavor
from limits import POCKET, SECONDS, Job
from optimum_calibprune import ModelShape, Plan
from watch import Watch, sentence


FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
LENT = os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")
EVERY = 0.1  # seconds between two looks at a task
GPU = Flavor("zero-gpu", "half an RTX PRO 6000", 48 * GB, 48 * GB, 100 * GB, 0.0)
LOADS = 20.0  # seconds until the models are loaded; supposed, as all that the estimate supposes
ASKS = 10.0  # seconds for the questions of a capability, which are answered token by token


def planned(job: Job, cache: Path) -> tuple[Plan, int]:
    """The plan, from the model's config alone, since there is no GPU yet on which to look; for how many seconds one is asked."""
    shape = ModelShape.from_pretrained(job.model, token=False, cache_dir=cache, **job.config)
    plan = shape.plan(GPU.machine)
    work = work_seconds(shape, plan, GPU)
    return plan, min(SECONDS, round(LOADS + OVER_RATES[1] * work + ASKS * len(plan.capabilities)))


def seconds_of(job: Job, cache: Path) -> int:
    """For which a GPU is asked. The model is fetched before, so that nobody pays for that."""
    if job.model != POCKET:
        snapshot_download(job.model, cache_dir=cache, token=False, allow_patterns=FILES)
    return planned(job, cache)[1]


def do(run: Watch, seconds: Callable[[], int], task: Callable[..., Any], *given: Any) -> Any:
    """What the task returns, which takes a watch first; meanwhile the run shows what that watch shows. `seconds` are asked for
    where a GPU is lent.

    Raises `ValueError` with what the task, or ZeroGPU, has to say where it fails, and what `check` of the run raises.
    """
    steps = _on_gpu(seconds, run.seconds, task, given)
    found = None
    try:
        for kind, value in steps:
            if kind == "seen":
                run.show(value)
                run.check()
            elif kind == "failed":
                raise ValueError(value)
            else:
                found = value
    except gr.Error as error:  # as ZeroGPU says that a quota is used up, or that the time is over
        raise ValueError(str(error.message)) from None
    finally:
        steps.close()
    return found


@spaces.GPU(duration=lambda seconds, *_: seconds())
def _on_gpu(
    seconds: Callable[[], int], limit: float, task: Callable[..., Any], given: tuple[Any, ...]
) -> Iterator[tuple[str, Any]]:
    """What is seen of the task, time and again; at last what it returned, or why it failed. All of it goes between processes."""
    watch = Watch(limit)
    ended: list[tuple[str, Any]] = []
    thread = threading.Thread(target=lambda: ended.append(_end_of(task, watch, given)), name="task", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(EVERY)
            yield "seen", watch.seen
    finally:
        watch.end()
        thread.join()
    yield ended[0]


def _end_of(task: Callable[..., Any], watch: Watch, given: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "returned", task(watch, *given)
    except Exception as error:
        return "failed", sentence(error)
