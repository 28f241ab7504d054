# SPDX-License-Identifier: Apache-2.0
"""Runs: each has a thread and a private folder, can be stopped, ends in time, and leaves nothing behind."""

from __future__ import annotations

import ctypes
import gc
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

import work
import zero
from limits import GRACE, SECONDS, Job, check_size
from optimum_calibprune import CalibPruner, RunRecord
from watch import TOO_LONG, Watch, sentence


Keep = Callable[[RunRecord], None]
NO_RESULT = "There is no result yet in this session; prune a model first."
TURN = threading.Lock()  # of the one run that works, whatever the queue of the page lets through


class Run(Watch):
    """Work in a thread of its own; `error` says in one sentence why it ended without success."""

    limit = SECONDS

    def __init__(self, folder: Path) -> None:
        super().__init__(self.limit)
        self.folder = folder
        self.error = ""
        self.finished = False
        self._has_turn = False
        asked = copy_context()  # in which ZeroGPU finds out who asks
        self._thread = threading.Thread(target=asked.run, args=(self._run,), name="run", daemon=True)

    def perform(self) -> None:
        """What is done, with calls of `check` in between."""
        raise NotImplementedError

    def start(self) -> None:
        self.restart_clock()
        self._thread.start()

    def stop(self, wait: float = 60.0) -> None:
        """Asks it to stop, and waits for that."""
        self.end()
        if self._thread.ident is not None:
            self._thread.join(wait)

    def wait(self, seconds: float) -> bool:
        """Whether it is still going after that time. One that does not look at the clock is given up."""
        self._thread.join(seconds)
        if self._thread.is_alive() and time.monotonic() > self._deadline + GRACE:
            self.end()  # for when it looks again
            self._end(TOO_LONG.format(self.seconds))
        return not self.finished

    def looks(self, every: float) -> Iterator[None]:
        """A turn at each look at it, as long as it goes on. It ends when nobody looks any more."""
        try:
            while self.wait(every):
                yield
        finally:
            self.end()

    def remove(self) -> None:
        """Removes all that it has written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self) -> None:
        failed = ""
        try:
            while not TURN.acquire(timeout=0.2):
                self.check()
            self._has_turn = True
            self.restart_clock()
            self.perform()
        except Exception as error:
            failed = sentence(error, self.folder)
        finally:
            _give_back()
            self._end(failed)

    def _end(self, error: str) -> None:
        self.error = self.error or error
        if self.error:
            self.remove()
        if self._has_turn:
            self._has_turn = False
            TURN.release()
        self.finished = True


class PruneRun(Run):
    """One job; in the end there is a `record`, the pruned model in `folder`, and its archive in `shelf`. `keep` is called
    with the record."""

    def __init__(self, job: Job, folder: Path, shelf: Path, keep: Keep) -> None:
        super().__init__(folder)
        self.job, self.shelf, self._keep = job, shelf, keep
        self.record: RunRecord | None = None
        self._users, self._removed = 0, False
        self._use = threading.Lock()

    def perform(self) -> None:
        check_size(self.job.model)
        record = zero.do(self, _gpu_seconds(self.job, self.folder), work.prune, self.job, self.folder)
        work.pack(self, self.job, self.folder, self.shelf)
        self.record = record
        self._keep(self.record)

    @contextmanager
    def in_use(self) -> Iterator[Path]:
        """The folder of the pruned model. It stays until the end of this, should the run be removed meanwhile; `ValueError` where
        it has been."""
        with self._use:
            if self._removed:
                raise ValueError(NO_RESULT)
            self._users += 1
        try:
            yield self.folder / "model"
        finally:
            with self._use:
                self._users -= 1
            if self._removed:
                self.remove()

    def remove(self) -> None:
        with self._use:
            self._removed = True
            if self._users:
                return  # the last of them does it
        super().remove()
        shutil.rmtree(self.shelf, ignore_errors=True)


class CompareRun(Run):
    """Jobs of one model after each other, each with the time of a run; the dense model is measured once. `keep` is called
    with each record; of the pruned models nothing is kept."""

    def __init__(self, jobs: Sequence[Job], folder: Path, keep: Keep) -> None:
        super().__init__(folder)
        self.jobs, self._keep = jobs, keep
        self.records: list[RunRecord] = []

    def perform(self) -> None:
        check_size(self.jobs[0].model)
        dense: dict[str, Any] = {}
        for job in self.jobs:
            self.restart_clock()
            record, dense = zero.do(self, _gpu_seconds(job, self.folder), work.compare, job, self.folder, dense)
            self.records.append(record)
            self._keep(record)
        self.remove()


def _give_back() -> None:
    """What a run has freed goes back to the system. Each thread allocates in a heap of its own, where glibc would keep it."""
    gc.collect()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def _gpu_seconds(job: Job, folder: Path) -> Callable[[], int]:
    return partial(zero.seconds_of, job, work.downloads(folder))


def plan_of(job: Job, root: Path) -> str:
    """The plan of a job that is not started. Raises what `CalibPruner.from_pretrained` does."""
    check_size(job.model)
    with tempfile.TemporaryDirectory(dir=root) as cache:
        if zero.LENT:
            plan, seconds = zero.planned(job, Path(cache))
            return f"{work.plan_text(plan)} A GPU is asked for {seconds} s."
        return work.plan_text(CalibPruner.from_pretrained(job.model, cache_dir=cache, **job.options).plan())
