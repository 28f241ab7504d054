# SPDX-License-Identifier: Apache-2.0
"""What is done with the models of a job. Each takes the watch of its run first, and what goes between processes after it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from limits import Job
from optimum_calibprune import CalibPruner, Plan, RunRecord
from watch import Watch


def downloads(folder: Path) -> Path:
    """Where a run keeps what it fetches."""
    return folder / "downloads"


def prune(watch: Watch, job: Job, folder: Path) -> RunRecord:
    """The record; the pruned model goes into `folder`."""
    watch.check()
    pruner = CalibPruner.from_pretrained(job.model, cache_dir=downloads(folder), **job.options)
    watch.check()
    watch.plan_text = plan_text(pruner.plan())
    record = pruner.prune(on_progress=watch.progress, cancelled=watch.check)
    watch.progress(0, 1, "save")
    pruner.save_pretrained(folder / "model")
    return record


def pack(watch: Watch, job: Job, folder: Path, shelf: Path) -> None:
    """An archive of the pruned model goes into `shelf`."""
    watch.progress(0, 1, "save")
    shutil.rmtree(downloads(folder), ignore_errors=True)
    name = f"{job.model.split('/')[-1]}-{job.sparsity.strip('%').replace(':', 'of')}"
    shelf.mkdir(parents=True)
    shutil.make_archive(str(shelf / name), "zip", folder / "model")
    watch.progress(1, 1, "save")


def compare(watch: Watch, job: Job, folder: Path, dense: dict[str, Any]) -> tuple[RunRecord, dict[str, Any]]:
    """The record, and the dense model's scores as the next job of that model takes them; nothing else is kept."""
    watch.progress(0, 0, "load")
    pruner = CalibPruner.from_pretrained(job.model, cache_dir=downloads(folder), **job.options)
    record = pruner.prune(on_progress=watch.progress, cancelled=watch.check, **dense)
    return record, {"dense_scores": pruner.scores["dense"]}


def plan_text(plan: Plan) -> str:
    """What a run will do, in a few lines of Markdown."""
    memory = sum(plan.memory.values()) / 2**20
    written = f" The model writes {plan.written:,} tokens first." if plan.written else ""
    return (
        f"**{plan.modules} linear layers** in {plan.blocks} blocks, {plan.weights / 1e6:,.1f} million weights, to "
        f"**{plan.pattern}**. Calibrated on {plan.samples} × {plan.length} tokens (`{plan.mix}` of "
        f"{', '.join(plan.sources)}).{written} Memory: **{memory:,.0f} MiB**. Pruning takes about "
        f"**{max(1, round(plan.seconds)):,} s**; measuring before and after comes on top "
        f"({', '.join(plan.capabilities) or 'nothing is measured'})."
    )
