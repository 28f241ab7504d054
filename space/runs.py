# SPDX-License-Identifier: Apache-2.0
"""Runs: each has a thread and a private folder, can be stopped, ends in time, and leaves nothing behind."""

from __future__ import annotations

import gc
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from limits import GRACE, SECONDS, Job, check_size
from optimum_calibprune import CalibPruner, RunRecord


STAGES = ("load", "read", "measure", "measure dense", "prune", "measure sparse", "save")
EXPECTED = (ValueError, OSError, ImportError, MemoryError)  # what the package raises for a visitor to read
PATHS = re.compile(r"(?<![\w/:.])/(?:[\w.@+-]+/)+[\w.@+-]*")
STOPPED = "The run was stopped; of what it had not finished, nothing is left."
TOO_LONG = "This took longer than the {:,} s that this page allows; ask for less."


Keep = Callable[[RunRecord], None]


class Stopped(Exception):
    """The run ends before its end; its text says why. Not an OSError, which the package may try again."""


class Run:
    """Work in a thread of its own. `stage`, `done` and `total` tell where it is; `error` says in one sentence why it ended
    without success."""

    seconds = SECONDS

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stage, self.done, self.total, self.detail = STAGES[0], 0, 0, ""
        self.error = ""
        self.finished = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="run", daemon=True)
        self._deadline = 0.0

    def work(self) -> None:
        """What is done, with calls of `check` in between."""
        raise NotImplementedError

    def start(self) -> None:
        self.restart_clock()
        self._thread.start()

    def restart_clock(self) -> None:
        self._deadline = time.monotonic() + self.seconds

    def stop(self, wait: float = 60.0) -> None:
        """Asks it to stop, which it does at the next module or batch, and waits for that."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(wait)

    def wait(self, seconds: float) -> bool:
        """Whether it is still going after that time. One that does not look at the clock is given up."""
        self._thread.join(seconds)
        if self._thread.is_alive() and time.monotonic() > self._deadline + GRACE:
            self._stop.set()  # for when it looks again
            self._end(TOO_LONG.format(self.seconds))
        return not self.finished

    def remove(self) -> None:
        """Removes all that it has written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def check(self) -> bool:
        """Raises where the run is to end; it never lets the pruner end by itself."""
        if self._stop.is_set():
            raise Stopped(STOPPED)
        if time.monotonic() > self._deadline:
            raise TimeoutError(TOO_LONG.format(self.seconds))
        return False

    def progress(self, done: int, total: int, text: str) -> None:
        self.check()
        stage, _, detail = text.partition(": ")
        self.stage = stage if stage in STAGES else self.stage  # perplexity is a part of measuring
        self.done, self.total, self.detail = done, total, detail

    def _run(self) -> None:
        failed = "The run failed in a way that nobody expected; try other settings."
        try:
            self.work()
            failed = ""
        except Stopped as stopped:
            failed = str(stopped)
        except EXPECTED as error:
            failed = sentence(error, self.folder)
        finally:
            gc.collect()
            self._end(failed)

    def _end(self, error: str) -> None:
        self.error = self.error or error
        if self.error:
            self.remove()
        self.finished = True


class PruneRun(Run):
    """One job; in the end there is a `record`, the pruned model in `folder`, and its archive in `shelf`. `keep` is called
    with the record."""

    def __init__(self, job: Job, folder: Path, shelf: Path, keep: Keep) -> None:
        super().__init__(folder)
        self.job, self.shelf, self._keep = job, shelf, keep
        self.plan_text = ""
        self.record: RunRecord | None = None

    def work(self) -> None:
        check_size(self.job.model)
        self.check()
        cache = self.folder / "downloads"
        pruner = CalibPruner.from_pretrained(self.job.model, cache_dir=cache, **self.job.options)
        self.check()
        self.plan_text = plan_text(pruner)
        record = pruner.prune(on_progress=self.progress, cancelled=self.check)
        self.progress(0, 1, "save")
        pruner.save_pretrained(self.folder / "model")
        shutil.rmtree(cache, ignore_errors=True)
        name = f"{self.job.model.split('/')[-1]}-{self.job.sparsity.strip('%').replace(':', 'of')}"
        self.shelf.mkdir(parents=True)
        shutil.make_archive(str(self.shelf / name), "zip", self.folder / "model")
        self.progress(1, 1, "save")
        self.record = record
        self._keep(record)

    def remove(self) -> None:
        super().remove()
        shutil.rmtree(self.shelf, ignore_errors=True)


class CompareRun(Run):
    """Jobs of one model after each other, each with the time of a run; the dense model is measured once. `keep` is called
    with each record; of the pruned models nothing is kept."""

    def __init__(self, jobs: Sequence[Job], folder: Path, keep: Keep) -> None:
        super().__init__(folder)
        self.jobs, self._keep = jobs, keep
        self.records: list[RunRecord] = []

    def work(self) -> None:
        check_size(self.jobs[0].model)
        dense: dict[str, Any] = {}
        for job in self.jobs:
            self.restart_clock()
            self.progress(0, 0, "load")
            record, dense = self._pruned(job, dense)
            self.records.append(record)
            self._keep(record)
        self.remove()

    def _pruned(self, job: Job, dense: dict[str, Any]) -> tuple[RunRecord, dict[str, Any]]:
        """The record, and the dense model's scores as the next run takes them. The model goes with this frame."""
        pruner = CalibPruner.from_pretrained(job.model, cache_dir=self.folder, **job.options)
        record = pruner.prune(on_progress=self.progress, cancelled=self.check, **dense)
        return record, {"dense_scores": pruner.scores["dense"]}


def plan_text(pruner: CalibPruner) -> str:
    """What a run will do, in a few lines of Markdown."""
    plan = pruner.plan()
    memory = sum(plan.memory.values()) / 2**20
    written = f" The model writes {plan.written:,} tokens first." if plan.written else ""
    return (
        f"**{plan.modules} linear layers** in {plan.blocks} blocks, {plan.weights / 1e6:,.1f} million weights, to "
        f"**{plan.pattern}**. Calibrated on {plan.samples} × {plan.length} tokens (`{plan.mix}` of "
        f"{', '.join(plan.sources)}).{written} Memory: **{memory:,.0f} MiB**. Pruning takes about "
        f"**{max(1, round(plan.seconds)):,} s**; measuring before and after comes on top "
        f"({', '.join(plan.capabilities) or 'nothing is measured'})."
    )


def plan_of(job: Job, root: Path) -> str:
    """The plan of a job that is not started. Raises what `CalibPruner.from_pretrained` does."""
    check_size(job.model)
    with tempfile.TemporaryDirectory(dir=root) as cache:
        return plan_text(CalibPruner.from_pretrained(job.model, cache_dir=cache, **job.options))


def sentence(error: BaseException, folder: Path | None = None) -> str:
    """An error as one sentence or two, without a path of this machine."""
    text = " ".join(str(error).split()) or type(error).__name__
    if folder is not None:
        text = text.partition(f" {folder}")[0]
    return PATHS.sub("(a file)", text)[:400]
