# SPDX-License-Identifier: Apache-2.0
"""Records of a few runs in, HTML out: what each kept, side by side. Colours come from style.css, one a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from figures import bar, percent, table_of
from limits import ALONE, CAPABILITIES
from optimum_calibprune import RunRecord


def names(records: Sequence[RunRecord]) -> list[str]:
    """Each run by its mix, and by what else tells them apart."""
    parts: list[Callable[[RunRecord], str]] = [
        lambda record: record.base.name,
        lambda record: str(record.config.mix).removeprefix(ALONE),
        lambda record: " ".join(record.config.sources),
        lambda record: str(record.config.sparsity),
        lambda record: f"{record.config.samples} samples",
    ]
    telling = [i for i, part in enumerate(parts) if i == 1 or len({part(record) for record in records}) > 1]
    return [", ".join(filter(None, (parts[i](record) for i in telling))) for record in records]


def summary(records: Sequence[RunRecord]) -> str:
    """A line a run: its colour, its total, and the capability of which it kept least."""
    lines = []
    for i, (name, record) in enumerate(zip(names(records), records, strict=True)):
        report = record.capabilities
        said = "nothing was measured"
        if report is not None and report.total is not None:
            said = f"<b>{percent(report.total)}</b> kept"
            worst = next((entry for entry in report.capabilities if entry.capability == report.worst), None)
            if worst is not None and worst.retention is not None and len(report.measured) > 1:
                said += f", least of <b>{worst.capability}</b>: {percent(worst.retention)}"
        lines.append(f'<li><i class="cp-chip cp-run-{i}"></i><b>{escape(name)}</b><span>{said}</span></li>')
    return f'<ul class="cp-runs">{"".join(lines)}</ul>{_caution(records)}'


def _caution(records: Sequence[RunRecord]) -> str:
    measured = {record.capabilities.measured for record in records if record.capabilities is not None}
    if len(measured) < 2:
        return ""
    return '<p class="cp-note">Not all of them were measured on the same capabilities, so compare no totals.</p>'


def bars(records: Sequence[RunRecord]) -> str:
    """A group a capability, in it a bar a run with its 95 % interval, and a line where the dense model is."""
    groups: dict[str, list[tuple[int, float, tuple[float, float] | None]]] = {}
    for i, record in enumerate(records):
        report = record.capabilities
        for entry in report.capabilities if report is not None else ():
            if entry.retention is not None:
                groups.setdefault(entry.capability, []).append((i, entry.retention, entry.interval))
    totals = [
        (i, report.total, report.total_interval)
        for i, report in enumerate(record.capabilities for record in records)
        if report is not None and report.total is not None and len(report.measured) > 1
    ]
    if totals:
        groups["total"] = totals
    values = [x for rows in groups.values() for _, value, ends in rows for x in (value, *(ends or ()))]
    end = max([1.0, *values])
    labels = names(records)
    body = "".join(
        f'<section class="cp-group"><h3 class="cp-name cp-{capability}">{capability}</h3>'
        + "".join(bar(labels[i], value, ends, end, fill=f"run-{i}", said=f"{capability}, ") for i, value, ends in rows)
        + "</section>"
        for capability, rows in groups.items()
    )
    note = "Dashed: the dense model. Lines on the bars: 95 % intervals over the items, of each run alone."
    return f'<div class="cp-bars" style="--cp-dense:{100 / end:.2f}%">{body}</div><p class="cp-note">{note}</p>'


def table(records: Sequence[RunRecord]) -> str:
    """Dense score, sparse score and retention of each capability in each run."""
    rows = [
        (f"{entry.capability}, {name}", entry.items, entry.dense, entry.sparse, entry.retention)
        for capability in CAPABILITIES
        for name, record in zip(names(records), records, strict=True)
        for entry in (record.capabilities.capabilities if record.capabilities is not None else ())
        if entry.capability == capability
    ]
    return table_of(rows)
