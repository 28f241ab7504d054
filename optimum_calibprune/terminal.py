# SPDX-License-Identifier: Apache-2.0
"""How a command speaks, waits and ends: tables, progress bars, interrupts, and one sentence for each expected failure."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


FAILED, BAD_ARGUMENTS = 1, 2


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line breaks


def say(text: str, to_stderr: bool = False) -> None:
    """Prints a text without the control characters that a name from elsewhere may hold."""
    stream = sys.stderr if to_stderr else sys.stdout
    stream.write(CONTROL.sub("", text) + "\n")
    stream.flush()


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(str(cell).ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


@contextmanager
def interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C raises KeyboardInterrupt; what is yielded raises it again where a library has swallowed it."""
    seen: list[int] = []

    def arrive(number: int, frame: object) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    def check() -> None:
        if seen:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, arrive)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def progress(check: Callable[[], None]) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar a stage on a terminal; silent elsewhere. An interrupt is noticed at the latest here."""
    from tqdm import tqdm

    bars: dict[str, Any] = {}
    quiet = not sys.stderr.isatty()

    def show(done: int, total: int, text: str) -> None:
        check()
        stage, _, detail = text.partition(": ")
        bar = bars.get(stage)
        if bar is None or bar.total != total or done < bar.n:  # the next task of a stage
            for other in bars.values():
                other.close()
            bar = bars[stage] = tqdm(total=total, desc=stage, leave=False, disable=quiet)
        bar.set_postfix_str(detail, refresh=False)
        bar.update(done - bar.n)

    try:
        yield show
        check()
    finally:
        for bar in bars.values():
            bar.close()


def quiet_libraries() -> None:
    """Progress of our own replaces that of the libraries below, except of downloads."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


@contextmanager
def errors(code: int, interrupted: str = "nothing was left behind") -> Iterator[None]:
    """Every expected failure becomes one sentence on stderr and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"Interrupted; {interrupted}.", to_stderr=True)
        sys.exit(FAILED)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        say(f"Error: {' '.join(str(error).split()) or type(error).__name__}", to_stderr=True)
        sys.exit(code)
    except RuntimeError as error:
        kind = type(error).__name__  # this module imports no torch
        if kind == "RankLost":
            if not getattr(error, "told", False):
                say(f"Error: {error}.", to_stderr=True)
            sys.exit(FAILED)
        if kind != "OutOfMemoryError":
            raise
        say(
            f"Error: out of GPU memory; try --device cpu, or while it prunes a smaller --micro-batch. {error}",
            to_stderr=True,
        )
        sys.exit(FAILED)
