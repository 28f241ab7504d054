# SPDX-License-Identifier: Apache-2.0
"""The figure of the card: what each capability kept, with its interval."""

from __future__ import annotations

from pathlib import Path

from ..records import RunRecord
from . import plots
from .card import FIGURE_NAME


def retention(run: RunRecord, folder: Path) -> bool:
    """Draws the run's retention by capability into `folder`; whether there was anything to draw, and the means to.

    The total stands out; capabilities whose retention is undefined are left out.
    """
    report = run.capabilities
    if report is None or report.total is None or not plots.available():
        return False
    points = [
        plots.Point(row.capability, row.retention, row.interval)
        for row in report.capabilities
        if row.retention is not None
    ]
    points.append(plots.Point("total", report.total, report.total_interval, strong=True))
    plots.intervals(folder / FIGURE_NAME, "What was kept", "retention in per cent, with 95 % intervals", points)
    return True
