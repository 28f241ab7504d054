# SPDX-License-Identifier: Apache-2.0
"""Visitors and their runs: each run has a thread and a private folder, can be stopped, and leaves nothing behind."""

from __future__ import annotations

import gc
import re
import secrets
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from limits import KEPT_RESULTS, KEPT_SECONDS, SECONDS, Job, check_size
from optimum_calibprune import CalibPruner, RunRecord


STAGES = ("load", "read", "measure", "measure dense", "prune", "measure sparse", "save")
EXPECTED = (ValueError, OSError, ImportError, MemoryError)  # what the package raises for a visitor to read
PATHS = re.compile(r"(?<![\w/:.])/(?:[\w.@+-]+/)+[\w.@+-]*")
STOPPED = "The run was stopped, and nothing of it is left."


class Stopped(Exception):
    """The run ends before its end; its text says why. Not an OSError, which the package may try again."""


@dataclass
class Run:
    """One job in a thread of its own. `stage`, `done` and `total` tell where it is; in the end there is a `record` with the
    `folder` that holds the pruned model and the `shelf` for its archive, or an `error` in one sentence."""

    job: Job
    folder: Path
    shelf: Path
    plan_text: str = ""
    stage: str = "load"
    done: int = 0
    total: int = 0
    detail: str = ""
    record: RunRecord | None = None
    error: str = ""
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _deadline: float = 0.0

    @property
    def finished(self) -> bool:
        return self.record is not None or bool(self.error)

    def start(self) -> None:
        self._deadline = time.monotonic() + SECONDS
        self._thread = threading.Thread(target=self._run, name="run", daemon=True)
        self._thread.start()

    def stop(self, wait: float = 60.0) -> None:
        """Asks it to stop, which it does at the next module or batch, and waits for that."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(wait)

    def remove(self) -> None:
        """Removes all that it has written."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.shelf, ignore_errors=True)

    def wait(self, seconds: float) -> bool:
        """Whether it is still going after that time."""
        assert self._thread is not None
        self._thread.join(seconds)
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._prune()
        except Stopped as stopped:
            self.error = str(stopped)
        except EXPECTED as error:
            self.error = sentence(error, self.folder)
        finally:
            if self.record is None:
                self.error = self.error or "The run failed in a way that nobody expected; try other settings."
                self.remove()
            gc.collect()

    def _prune(self) -> None:
        check_size(self.job.model)
        self._check()
        cache = self.folder / "downloads"
        pruner = CalibPruner.from_pretrained(self.job.model, cache_dir=cache, **self.job.options)
        self._check()
        self.plan_text = plan_text(pruner)
        record = pruner.prune(on_progress=self._progress, cancelled=self._check)
        self._progress(0, 1, "save")
        pruner.save_pretrained(self.folder / "model")
        shutil.rmtree(cache, ignore_errors=True)
        name = f"{self.job.model.split('/')[-1]}-{self.job.sparsity.strip('%').replace(':', 'of')}"
        self.shelf.mkdir(parents=True)
        shutil.make_archive(str(self.shelf / name), "zip", self.folder / "model")
        self._progress(1, 1, "save")
        self.record = record

    def _progress(self, done: int, total: int, text: str) -> None:
        self._check()
        stage, _, detail = text.partition(": ")
        self.stage = stage if stage in STAGES else self.stage  # perplexity is a part of measuring
        self.done, self.total, self.detail = done, total, detail

    def _check(self) -> bool:
        """Raises where the run is to end; it never lets the pruner end by itself."""
        if self._stop.is_set():
            raise Stopped(STOPPED)
        if time.monotonic() > self._deadline:
            raise TimeoutError(
                f"The run took longer than the {SECONDS:,} s that this page allows; take fewer samples."
            )
        return False


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


@dataclass
class Visitor:
    """What belongs to one session: at most one run, and with it one folder."""

    run: Run | None = None
    seen: float = field(default_factory=time.monotonic)


class Visitors:
    """All sessions, by their key; their folders are below `root`, and below `files`, which is served, archives in folders
    whose names nobody can guess. A key is never part of a path."""

    def __init__(self, root: Path, files: Path) -> None:
        self.root, self.files = root, files
        self._visitors: dict[str, Visitor] = {}
        self._declined: set[str] = set()
        self._lock = threading.Lock()
        shutil.rmtree(root, ignore_errors=True)  # of a server that was killed
        root.mkdir(parents=True, mode=0o700)

    def begin(self, key: str, job: Job) -> Run:
        """A new run of a visitor, in place of the one before; `ValueError` while that is going on."""
        self._forget_old()
        if key in self._declined:
            raise ValueError(STOPPED)
        with self._lock:
            visitor = self._visitors.setdefault(key, Visitor())
            earlier = visitor.run
            if earlier is not None and not earlier.finished:
                raise ValueError("You have a run going on; wait for its end, or stop it first.")
            run = visitor.run = Run(job, Path(tempfile.mkdtemp(dir=self.root)), self.files / secrets.token_urlsafe(16))
            visitor.seen = time.monotonic()
        if earlier is not None:
            earlier.remove()
        run.start()
        return run

    def result(self, key: str) -> Run:
        """The finished run of a visitor; `ValueError` where there is none."""
        visitor = self._visitors.get(key)
        if visitor is None or visitor.run is None or visitor.run.record is None:
            raise ValueError("There is no result yet in this session; prune a model first.")
        visitor.seen = time.monotonic()
        return visitor.run

    def stop(self, key: str) -> bool:
        """Stops the run of a visitor; whether there was one going on."""
        visitor = self._visitors.get(key)
        run = visitor.run if visitor is not None else None
        if run is None or run.finished:
            return False
        run.stop()
        return True

    def expect(self, key: str) -> None:
        """A visitor asks for a run, whose turn comes later."""
        self._declined.discard(key)

    def decline(self, key: str) -> None:
        """A visitor does not want it any more, whether its turn has come or not."""
        if not self.stop(key):
            self._declined.add(key)

    def leave(self, key: str) -> None:
        """Stops what a visitor has running, and removes their folder."""
        with self._lock:
            self._declined.discard(key)
            visitor = self._visitors.pop(key, None)
        if visitor is not None and visitor.run is not None:
            visitor.run.stop()
            visitor.run.remove()

    def _forget_old(self) -> None:
        """Those who have not come back for long, and of the others who have a result all but the latest."""
        limit = time.monotonic() - KEPT_SECONDS
        latest = sorted(self._visitors.items(), key=lambda entry: entry[1].seen, reverse=True)
        done = [key for key, visitor in latest if visitor.run is not None and visitor.run.finished]
        for key in {key for key, visitor in latest if visitor.seen < limit} | set(done[KEPT_RESULTS:]):
            self.leave(key)
