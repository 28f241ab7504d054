# SPDX-License-Identifier: Apache-2.0
"""A record in, HTML out: what was kept, what changed in each module, the card. Colours come from style.css."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from optimum_calibprune import CalibrationSource, RunRecord


BLOCK = re.compile(r"(.*?\.\d+)\.(.+)")  # of a module's name: the block, and the rest
PICTURES = re.compile(r"<picture>.*?</picture>|!\[[^\]]*\]\([^)]*\)", re.DOTALL)
STAGE_NAMES = {
    "load": "Load the model",
    "read": "Read calibration text",
    "measure": "Measure the text",
    "measure dense": "Score the dense model",
    "prune": "Prune block by block",
    "measure sparse": "Score the sparse model",
    "save": "Save model and card",
}


# ---------------------------------------------------------------------------------------------- progress


def waiting() -> str:
    return '<p class="cp-note" role="status">Waiting for a turn: one run at a time.</p>'


def progress(stage: str, done: int, total: int, detail: str) -> str:
    """The stages of a run under each other, with a bar in the one that is going on."""
    names = list(STAGE_NAMES)
    here = names.index(stage) if stage in names else 0
    items = []
    for i, name in enumerate(names):
        state = "done" if i < here else "now" if i == here else "later"
        share = 100 * done / total if state == "now" and total else 100 if state == "done" else 0
        text = f"{done:,} of {total:,}" if state == "now" and total else ""
        more = f" <small>{escape(detail)}</small>" if state == "now" and detail else ""
        items.append(
            f'<li class="cp-stage cp-{state}"><span>{STAGE_NAMES[name]}{more}</span><span class="cp-count">{text}</span>'
            f'<div class="cp-track"><div class="cp-fill" style="width:{share:.0f}%"></div></div></li>'
        )
    said = f"{STAGE_NAMES[names[here]]}" + (f", {done} of {total}" if total else "")
    return f'<ol class="cp-stages" aria-label="{escape(said)}">{"".join(items)}</ol>'


def message(text: str, kind: str = "note") -> str:
    return f'<p class="cp-{kind}" role="status">{escape(text)}</p>'


def link(text: str, address: str) -> str:
    safe = escape(address) if address.startswith(("https://", "http://")) else "#"
    return (
        f'<p class="cp-note" role="status">{escape(text)}: <a href="{safe}" rel="noopener">{escape(address)}</a></p>'
    )


def legend(sources: Mapping[str, CalibrationSource]) -> str:
    """Which source serves which capability, under which licence."""
    groups: dict[str, list[str]] = {}
    for name, source in sources.items():
        licence = escape(source.licence or "licence: see its card")
        groups.setdefault(source.capability, []).append(f"<li>{escape(name)} <small>{licence}</small></li>")
    parts = [
        f'<div><b class="cp-{capability}">{capability}</b><ul>{"".join(rows)}</ul></div>'
        for capability, rows in groups.items()
    ]
    return f'<div class="cp-legend">{"".join(parts)}</div>'


# ------------------------------------------------------------------------------------------------ result


def headline(record: RunRecord) -> str:
    report = record.capabilities
    name, zeros = escape(record.base.name), record.prune.zeros / record.prune.weights
    if report is None or report.total is None:
        return f'<p class="cp-headline">{name} at {escape(str(record.config.sparsity))}: nothing was measured.</p>'
    worst = f"; most is lost in <b>{report.worst}</b>" if report.worst and len(report.measured) > 1 else ""
    return (
        f'<p class="cp-headline"><b class="cp-big">{percent(report.total)}</b> of what {name} could do is kept at '
        f"{escape(str(record.config.sparsity))} sparsity, on average over {', '.join(report.measured)}{worst}.</p>"
        f'<p class="cp-note">{zeros:.2%} of the pruned weights are zero. {sum(record.seconds.values()):,.0f} s.</p>'
    )


def retention(record: RunRecord) -> str:
    """A bar a capability, its 95 % interval, and a line where the dense model is."""
    report = record.capabilities
    if report is None or not (report.capabilities or report.not_measured):
        return ""
    rows = [
        (entry.capability, entry.retention, entry.interval, "undefined: the dense model is at chance")
        for entry in report.capabilities
    ]
    known = {name for name, *_ in rows}
    rows += [(name, None, None, why) for name, why in report.not_measured.items() if name not in known]
    if report.total is not None and len(report.measured) > 1:
        rows.append(("total", report.total, report.total_interval, ""))
    end = max([1.0, *(x for _, value, ends, _ in rows for x in (value, *(ends or ())) if x is not None)])
    drawn = [
        bar(name, value, ends, end, fill=name)
        if value is not None
        else f'<div class="cp-row">{_label(name, name)}<span class="cp-why">{escape(why)}</span></div>'
        for name, value, ends, why in rows
    ]
    return f'<div class="cp-bars" style="--cp-dense:{100 / end:.2f}%">{"".join(drawn)}</div>'


def bar(name: str, value: float, interval: Sequence[float] | None, end: float, *, fill: str, said: str = "") -> str:
    """One bar of a figure that reaches to `end`, with its name and its number; `said` stands before what is read aloud."""
    drawn = f'<div class="cp-fill cp-fill-{fill}" style="width:{100 * value / end:.2f}%"></div>'
    between = ""
    if interval is not None:
        low, high = interval
        drawn += f'<div class="cp-interval" style="left:{100 * low / end:.2f}%;width:{100 * (high - low) / end:.2f}%"></div>'
        between = f" <small>{100 * low:.1f} to {100 * high:.1f}</small>"
    said = f"{said}{name}: {percent(value)} kept"
    return (
        f'<div class="cp-row" role="img" aria-label="{escape(said)}">{_label(name, fill)}<div class="cp-track cp-wide">{drawn}</div>'
        f'<span class="cp-number">{percent(value)}{between}</span></div>'
    )


def _label(name: str, colour: str) -> str:
    return f'<span class="cp-name cp-{escape(colour)}">{escape(name)}</span>'


def table(record: RunRecord) -> str:
    """Dense score, sparse score and retention of each capability and task."""
    report = record.capabilities
    if report is None or not report.capabilities:
        return ""
    rows = [
        (entry.capability, entry.items, entry.dense, entry.sparse, entry.retention) for entry in report.capabilities
    ]
    rows += [(task.task, task.items, task.dense, task.sparse, None) for task in record.tasks]
    return table_of(rows)


def table_of(rows: Iterable[tuple[str, int, float, float, float | None]]) -> str:
    """Rows of name, items, dense score, sparse score and retention."""
    body = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{items:,}</td><td>{percent(dense)}</td><td>{percent(sparse)}</td>"
        f"<td>{'' if kept is None else percent(kept)}</td></tr>"
        for name, items, dense, sparse, kept in rows
    )
    head = "".join(f"<th scope='col'>{name}</th>" for name in ("", "items", "dense", "sparse", "retention"))
    return f'<div class="cp-scroll"><table class="cp-table"><tr>{head}</tr>{body}</table></div>'


def heat_map(record: RunRecord) -> str:
    """Every module by block: its share of zeros, and its relative error as shade and number."""
    cells: dict[str, dict[str, list[tuple[float, float, int]]]] = {}
    for layer in record.prune.layers:
        found = BLOCK.fullmatch(layer.module)
        block, module = (found[1], found[2]) if found else (layer.module, "")
        size = math.prod(layer.shape)
        cells.setdefault(block, {}).setdefault(re.sub(r"\.\d+\.", ".*.", module), []).append(
            (layer.zeros_found, layer.relative_error, size)
        )
    columns = list(dict.fromkeys(name for row in cells.values() for name in row))
    most = max(
        (sum(e for _, e, _ in found) / len(found) for row in cells.values() for found in row.values()), default=0
    )
    head = "".join(f"<th scope='col'>{escape(name.rpartition('.')[2] or name)}</th>" for name in columns)
    body = "".join(
        f"<tr><th scope='row'>{escape(block.rpartition('.')[2])}</th>"
        + "".join(_cell(f"{block}.{name}", row.get(name, []), most) for name in columns)
        + "</tr>"
        for block, row in cells.items()
    )
    return (
        f'<div class="cp-scroll"><table class="cp-heat"><tr><th scope="col">block</th>{head}</tr>{body}</table></div>'
        '<p class="cp-note">Shade and first number: relative error of the module\'s outputs on the calibration set, per cent. '
        "Second number: weights that are zero, per cent.</p>"
    )


def _cell(name: str, found: Iterable[tuple[float, float, int]], most: float) -> str:
    found = list(found)
    if not found:
        return "<td></td>"
    error = sum(entry[1] for entry in found) / len(found)
    zeros = sum(entry[0] for entry in found) / sum(entry[2] for entry in found)
    shade = 100 * error / most if most else 0
    said = escape(f"{name}: relative error {error:.2%}, {zeros:.2%} zeros")
    return f'<td style="--cp-shade:{0.8 * shade:.0f}%" title="{said}">{100 * error:.1f}<small>{100 * zeros:.1f}</small></td>'


def card(folder: Path) -> str:
    """The model card as Markdown, without its front matter and its pictures, which stand above."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    return PICTURES.sub("", re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)).strip()


def answer(title: str, text: str, other: str) -> str:
    """What a model has written so far; the word in which it parts from the `other` answer is marked."""
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), len(text))
    start = max(text.rfind(" ", 0, same), text.rfind("\n", 0, same)) + 1
    word = re.match(r"\S*", text[start:])[0] if same < len(text) else ""
    shown = (
        f"{escape(text[:start])}<mark>{escape(word)}</mark>{escape(text[start + len(word) :])}"
        if word
        else escape(text)
    )
    return f'<h3 class="cp-name">{escape(title)}</h3><div class="cp-answer" dir="auto">{shown}</div>'


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
