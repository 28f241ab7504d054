# SPDX-License-Identifier: Apache-2.0
"""Visitors, and what belongs to each alone: one run at a time, its result, and the folders, which go with them."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from answers import AnswerRun
from limits import COMPARED, KEPT_RESULTS, KEPT_SECONDS, Job, Question
from optimum_calibprune import RunRecord
from runs import NO_RESULT, CompareRun, PruneRun, Run
from watch import STOPPED


R = TypeVar("R", bound=Run)


@dataclass
class Visitor:
    """What belongs to one session: the latest run, the latest pruned model with its folder, and a few records."""

    run: Run | None = None
    pruned: PruneRun | None = None
    records: list[RunRecord] = field(default_factory=list)
    seen: float = field(default_factory=time.monotonic)

    def keep(self, record: RunRecord) -> None:
        """The latest of each config, and of these the latest few."""
        self.records = [*(other for other in self.records if other.config != record.config), record][-COMPARED[1] :]


class Visitors:
    """All sessions, by their key; their folders are below `root`, and below `files`, which is served, archives in folders
    whose names nobody can guess. A key is never part of a path."""

    def __init__(self, root: Path, files: Path) -> None:
        self.root, self.files = root, files
        self._visitors: dict[str, Visitor] = {}
        self._declined: dict[tuple[str, type[Run]], float] = {}  # what is not wanted any more, since when
        self._lock = threading.Lock()
        shutil.rmtree(root, ignore_errors=True)  # of a server that was killed
        root.mkdir(parents=True, mode=0o700)

    def prune(self, key: str, job: Job) -> PruneRun:
        """A new run of a visitor, whose result takes the place of the one before; `ValueError` while another run is going on."""

        def make(visitor: Visitor) -> PruneRun:
            def keep(record: RunRecord) -> None:
                visitor.keep(record)
                before, visitor.pruned = visitor.pruned, run
                if before is not None:
                    before.remove()

            run = PruneRun(job, self._folder(), self.files / secrets.token_urlsafe(16), keep)
            return run

        return self._begin(key, PruneRun, make)

    def compare(self, key: str, jobs: Sequence[Job]) -> CompareRun:
        """A new comparison of a visitor; `ValueError` as above."""
        return self._begin(key, CompareRun, lambda visitor: CompareRun(jobs, self._folder(), visitor.keep))

    def answer(self, key: str, question: Question) -> AnswerRun:
        """A visitor's question to their result and to its dense model; `ValueError` as above, and without a result."""
        result = self.result(key)
        return self._begin(key, AnswerRun, lambda _: AnswerRun(question, result))

    def _begin(self, key: str, kind: type[R], make: Callable[[Visitor], R]) -> R:
        self._forget_old()
        if (key, kind) in self._declined:
            raise ValueError(STOPPED)
        with self._lock:
            visitor = self._visitors.setdefault(key, Visitor())
            if visitor.run is not None and not visitor.run.finished:
                raise ValueError("You have a run going on; wait for its end, or stop it first.")
            run = visitor.run = make(visitor)
            visitor.seen = time.monotonic()
        run.start()
        return run

    def _folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.root))

    def result(self, key: str) -> PruneRun:
        """The pruned model of a visitor; `ValueError` where there is none."""
        visitor = self._visitors.get(key)
        if visitor is None or visitor.pruned is None or visitor.pruned.record is None:
            raise ValueError(NO_RESULT)
        visitor.seen = time.monotonic()
        return visitor.pruned

    def has_result(self, key: str) -> bool:
        visitor = self._visitors.get(key)
        return visitor is not None and visitor.pruned is not None

    def records(self, key: str) -> list[RunRecord]:
        """Of the latest finished runs of a visitor."""
        visitor = self._visitors.get(key)
        return [] if visitor is None else visitor.records

    def forget_records(self, key: str) -> None:
        if key in self._visitors:
            self._visitors[key].records = []

    def stop(self, key: str) -> bool:
        """Stops the run of a visitor; whether there was one going on."""
        visitor = self._visitors.get(key)
        run = visitor.run if visitor is not None else None
        if run is None or run.finished:
            return False
        run.stop()
        return True

    def expect(self, key: str, kind: type[Run]) -> None:
        """A visitor asks for a run of this kind, whose turn comes later."""
        self._declined.pop((key, kind), None)

    def decline(self, key: str, kind: type[Run]) -> None:
        """A visitor does not want it any more, whether its turn has come or not. Runs of other kinds go on."""
        visitor = self._visitors.get(key)
        if visitor is None or not isinstance(visitor.run, kind) or not self.stop(key):
            self._declined[key, kind] = time.monotonic()

    def leave(self, key: str) -> None:
        """A visitor goes, and all that is theirs; what of it waits for its turn does not begin."""
        with self._lock:
            self._declined |= {(key, kind): time.monotonic() for kind in (PruneRun, CompareRun, AnswerRun)}
        self._remove(key)

    def _remove(self, key: str) -> None:
        """Stops what a visitor has running, and removes their folders."""
        with self._lock:
            visitor = self._visitors.pop(key, None)
        for run in (visitor.run, visitor.pruned) if visitor is not None else ():
            if run is not None:
                run.stop()
                run.remove()

    def close(self) -> None:
        """All leave, as the server ends."""
        for key in list(self._visitors):
            self._remove(key)

    def _forget_old(self) -> None:
        """Those who have not come back for long, and of the others who have a result all but the latest."""
        limit = time.monotonic() - KEPT_SECONDS
        with self._lock:
            self._declined = {entry: since for entry, since in self._declined.items() if since >= limit}
        latest = sorted(self._visitors.items(), key=lambda entry: entry[1].seen, reverse=True)
        done = [key for key, visitor in latest if visitor.run is not None and visitor.run.finished]
        for key in {key for key, visitor in latest if visitor.seen < limit} | set(done[KEPT_RESULTS:]):
            self._remove(key)
