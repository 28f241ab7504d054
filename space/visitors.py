# SPDX-License-Identifier: Apache-2.0
"""Visitors, and what belongs to each alone: one run at a time, its result, and the folders, which go with them."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from limits import KEPT_RESULTS, KEPT_SECONDS, Job
from runs import STOPPED, PruneRun


@dataclass
class Visitor:
    """What belongs to one session: at most one run, and with it one folder."""

    run: PruneRun | None = None
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

    def prune(self, key: str, job: Job) -> PruneRun:
        """A new run of a visitor, in place of the one before; `ValueError` while that is going on."""
        self._forget_old()
        if key in self._declined:
            raise ValueError(STOPPED)
        with self._lock:
            visitor = self._visitors.setdefault(key, Visitor())
            earlier = visitor.run
            if earlier is not None and not earlier.finished:
                raise ValueError("You have a run going on; wait for its end, or stop it first.")
            shelf = self.files / secrets.token_urlsafe(16)
            run = visitor.run = PruneRun(job, Path(tempfile.mkdtemp(dir=self.root)), shelf)
            visitor.seen = time.monotonic()
        if earlier is not None:
            earlier.remove()
        run.start()
        return run

    def result(self, key: str) -> PruneRun:
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
