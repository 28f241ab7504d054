# SPDX-License-Identifier: Apache-2.0
"""What `calibprune compare` asks for and says."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from .terminal import say, table


if TYPE_CHECKING:
    from .records import RunComparison


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "first", metavar="RUN_A", help="folder of a saved run, or its repo on the Hub: ID, or ID@REVISION"
    )
    parser.add_argument("second", metavar="RUN_B", help="another run, measured on the same items")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: Namespace) -> None:
    from .comparing import compare_runs

    found = compare_runs(arguments.first, arguments.second)
    say(found.to_json().rstrip() if arguments.json else text(found))


def text(found: RunComparison) -> str:
    """The comparison as a person reads it: retention by capability, then each task."""
    rows = [["retention", "A", "B", "A - B", "95 % interval"]]
    for entry in found.capabilities:
        kept = [_percent(side.retention) for side in (entry.first, entry.second)]
        rows.append([entry.first.capability, *kept, _points(entry.difference), _points(*(entry.interval or ()))])
    if found.totals is not None:
        a, b = found.totals
        rows.append(["total", _percent(a), _percent(b), _points(a - b), ""])
    tasks = [["task", "items", "A", "B", "only A right", "only B right", "p (McNemar)"]]
    for task in found.tasks:
        p_value = f"{task.p_value:.2g}" if task.p_value is not None else "scores are not 0 or 1"
        right = [str(task.items), _percent(task.first), _percent(task.second)]
        tasks.append([task.task, *right, str(task.only_first), str(task.only_second), p_value])
    lines = [f"A: {found.first}", f"B: {found.second}", "", table(rows), "", table(tasks)]
    if found.totals is None:
        lines += ["", "No totals: retention is not defined for the same capabilities in both."]
    if found.unpaired:
        lines += ["", f"In one of the two only: {', '.join(found.unpaired)}"]
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "undefined" if value is None else f"{100 * value:.1f} %"


def _points(*values: float | None) -> str:
    return " to ".join(f"{100 * value:+.1f}" for value in values if value is not None)
