# SPDX-License-Identifier: Apache-2.0
"""Between a run and those who look at it: how it goes, whether it is to end, and why it has ended."""

from __future__ import annotations

import re
import threading
import time
import traceback
from pathlib import Path
from typing import Any


STAGES = ("load", "read", "measure", "measure dense", "prune", "measure sparse", "save")
STATES = ("dense", "sparse")  # of a model
EXPECTED = (ValueError, OSError, ImportError, MemoryError)  # what the package raises for a visitor to read
PATHS = re.compile(r"(?<![\w/:.])/(?:[\w.@+-]+/)+[\w.@+-]*")
STOPPED = "The run was stopped; of what it had not finished, nothing is left."
TOO_LONG = "This took longer than the {:,} s that this page allows; ask for less."
UNEXPECTED = "This failed in a way that nobody expected; try other settings."


class Stopped(Exception):
    """The run ends before its end; its text says why. Not an OSError, which the package may try again."""


class Watch:
    """`stage`, `done`, `total` and `detail` tell where a run is, `plan_text` what it does, `texts` what both models have said."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.stage, self.done, self.total, self.detail = STAGES[0], 0, 0, ""
        self.plan_text = ""
        self.texts = dict.fromkeys(STATES, "")
        self._stop = threading.Event()
        self.restart_clock()

    @property
    def seen(self) -> dict[str, Any]:
        """All that is shown of it, as a copy in another process takes it over."""
        names = ("stage", "done", "total", "detail", "plan_text")
        return {name: getattr(self, name) for name in names} | {"texts": dict(self.texts)}

    def show(self, seen: dict[str, Any]) -> None:
        """Takes over what is `seen` of another."""
        vars(self).update(seen)

    def restart_clock(self) -> None:
        self._deadline = time.monotonic() + self.seconds

    def end(self) -> None:
        """Asks it to end, which it does at the next module or batch."""
        self._stop.set()

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


def sentence(error: BaseException, folder: Path | None = None) -> str:
    """An error as one sentence or two, without a path of this machine. What nobody expected goes to the log."""
    if not isinstance(error, (Stopped, *EXPECTED)):
        traceback.print_exception(error)
        return UNEXPECTED
    text = " ".join(str(error).split()) or type(error).__name__
    if folder is not None:
        text = text.partition(f" {folder}")[0]
    return PATHS.sub("(a file)", text)[:400]
