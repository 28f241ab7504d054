# SPDX-License-Identifier: Apache-2.0
"""How figures look: bars, a heat map, intervals in a row, correlations, curves. Plain numbers in, PNG or SVG files out."""

from __future__ import annotations

import functools
import importlib.util
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
Interval = tuple[float, float] | Sequence[float] | None

# Okabe and Ito 2008, some of them darker so that they can be read as text: told apart without telling red from green.
COLOURS = {"general": "#0072B2", "commonsense": "#C65500", "code": "#00805D", "math": "#A8548A"}  # everywhere the same
LINES = ("#0072B2", "#D55E00", "#009E73", "#A8548A", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, FAINT, PAPER = "#222222", "#8A8A8A", "#FFFFFF"
GRID, NOTE = "#E4E4E4", "#555555"
DPI = 200
MISSING = (
    "Figures need matplotlib: run `pip install 'optimum-calibprune[plots]'` and then the same command again, which repeats "
    "nothing that is finished."
)


@dataclass(frozen=True)
class Theme:
    """The colours of a figure: for a light page, or for a dark one."""

    ink: str = INK
    faint: str = FAINT
    paper: str = PAPER
    grid: str = GRID
    note: str = NOTE
    capabilities: Mapping[str, str] = field(default_factory=lambda: COLOURS)


# On dark the lighter ones of Okabe and Ito.
ON_DARK = {"general": "#56B4E9", "commonsense": "#E69F00", "code": "#1FBF8F", "math": "#CC79A7"}
THEMES = {"light": Theme(), "dark": Theme("#E6EDF3", "#8B949E", "#0D1117", "#30363D", "#A5ADB6", ON_DARK)}


def available() -> bool:
    """Whether figures can be drawn here; where not, `MISSING` says what to do."""
    return importlib.util.find_spec("matplotlib") is not None


@dataclass(frozen=True)
class Bar:
    """A labelled share with its interval; without a value, `text` says why. `capability` gives it its colour."""

    label: str
    value: float | None
    interval: Interval = None
    capability: str = ""
    text: str = ""


@dataclass(frozen=True)
class Pair:
    """A share before and after, and that of guessing; `capability` gives it its colour."""

    label: str
    before: float
    after: float
    chance: float = 0.0
    capability: str = ""


@dataclass(frozen=True)
class Point:
    """A labelled number with its interval. `strong` points stand out; `hollow` ones are of another kind than the rest."""

    label: str
    value: float
    interval: Interval = None
    strong: bool = False
    hollow: bool = False


# ---------------------------------------------------------------------------------------------- figures


def _as_written(draw: Callable[P, Path]) -> Callable[P, Path]:
    """Text in the figure is shown as it is written: names are chosen by others, and a `$` in them begins no formula."""

    @functools.wraps(draw)
    def drawn(*arguments: P.args, **options: P.kwargs) -> Path:
        from matplotlib import rc_context

        with rc_context({"text.parse_math": False}):
            return draw(*arguments, **options)

    return drawn


@_as_written
def bars(
    path: Path, title: str, axis: str, rows: Sequence[Bar], note: str = "", theme: Theme = THEMES["light"]
) -> Path:
    """Shares as bars under each other, in per cent, with their intervals and numbers, and a line at 100 per cent."""
    axes, figure = _rows(title, axis, [row.label for row in rows], note, theme, room=1.55)
    ends = [end for row in rows for end in (row.value, *(row.interval or ())) if end is not None]
    axes.set_xlim(0, 104 * max([1.0, *ends]))
    for i, row in enumerate(rows):
        if row.value is None:
            axes.text(1, i, row.text, va="center", fontsize=9, color=theme.faint, backgroundcolor=theme.paper)
            continue
        axes.barh(i, 100 * row.value, 0.62, color=theme.capabilities.get(row.capability, theme.faint), zorder=2)
        text = f"{100 * row.value:.1f}"
        if row.interval is not None:
            low, high = (100 * end for end in row.interval)
            for colour, width in ((theme.paper, 4.5), (theme.ink, 1.8)):  # a rim, so that it is seen on the bar
                axes.plot((low, high), (i, i), color=colour, linewidth=width, solid_capstyle="butt", zorder=4)
            text += f"  ({low:.1f} to {high:.1f})"
        _beside(axes, i, text, theme)
    axes.axvline(100, color=theme.ink, linewidth=1.2, linestyle=(0, (4, 2)), zorder=3)
    axes.annotate(
        "dense", (100, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points", ha="center",
        fontsize=9, color=theme.ink,
    )  # fmt: skip
    _title(figure, title, note, theme)
    return _saved(figure, path)


@_as_written
def pairs(
    path: Path, title: str, axis: str, rows: Sequence[Pair], note: str = "", theme: Theme = THEMES["light"]
) -> Path:
    """Shares before (hollow) and after (filled), a line between them, and a tick at the score of guessing."""
    axes, figure = _rows(title, axis, [row.label for row in rows], note, theme, room=1.15)
    axes.set_xlim(-2, 102)
    for i, row in enumerate(rows):
        colour = theme.capabilities.get(row.capability, theme.faint)
        before, after = 100 * row.before, 100 * row.after
        axes.plot((before, after), (i, i), color=colour, linewidth=1.8, zorder=2)
        axes.plot(
            [before], [i], "o", color=colour, markersize=7, markeredgewidth=1.6, markerfacecolor=theme.paper, zorder=3
        )
        axes.plot([after], [i], "o", color=colour, markersize=7, zorder=4)
        if row.chance > 0:
            axes.plot([100 * row.chance] * 2, (i - 0.3, i + 0.3), color=theme.ink, linewidth=1.2, zorder=1)
        _beside(axes, i, f"{before:.1f} → {after:.1f}", theme)
    _title(figure, title, note, theme)
    return _saved(figure, path)


@_as_written
def heat_map(
    path: Path,
    title: str,
    columns: Sequence[str],
    groups: Sequence[tuple[str, Sequence[tuple[str, Sequence[float | None]]]]],
    note: str = "",
) -> Path:
    """Shares `[rows, columns]` as colours and numbers in per cent, white to blue; None stays empty.

    `groups` are (heading, rows) with rows as (label, values): they stand under each other with a gap between. A column that
    is a capability has its colour, and so has a heading that begins with one.
    """
    from matplotlib.patches import Rectangle

    wide, high, gap = 0.95, 0.29, 0.95  # inches a column, inches a row, rows between groups
    height = sum(len(members) for _, members in groups) + gap * len(groups)
    left = _width([label for _, members in groups for label, _ in members]) + 0.35
    figure, bottom = _figure(left + wide * len(columns) + 0.3, high * height, above=0.45, below=0.1, note=note)
    size = figure.get_size_inches()
    axes = figure.add_axes((left / size[0], bottom / size[1], wide * len(columns) / size[0], high * height / size[1]))
    shades = _shades()
    places = [j + 0.12 * (name == "total") for j, name in enumerate(columns)]  # a total stands apart
    top = 0.0
    for heading, members in groups:
        top += gap
        colour = COLOURS.get(heading.split()[0], INK)
        axes.text(
            *(-0.13, top - 0.4, heading),
            **{"color": colour, "weight": "bold", "va": "center", "ha": "right", "fontsize": 9},
        )
        axes.add_patch(
            Rectangle((-0.07, top + 0.03), 0.03, len(members) - 0.06, color=colour, clip_on=False, linewidth=0)
        )
        for label, values in members:
            axes.text(-0.13, top + 0.5, label, va="center", ha="right", fontsize=9, color=INK)
            for x, name, value in zip(places, columns, values, strict=True):
                _shaded(axes, shades, x, top, value, bold=name == "total")
            top += 1
    for x, name in zip(places, columns, strict=True):
        axes.text(
            *(x + 0.5, gap - 0.4, name),
            **{"ha": "center", "va": "center", "fontsize": 9, "weight": "bold"},
            color=COLOURS.get(name, INK),
        )
    axes.set(xlim=(0, len(columns)), ylim=(height, 0))
    axes.axis("off")
    _title(figure, title, note)
    return _saved(figure, path)


@_as_written
def intervals(path: Path, title: str, axis: str, points: Sequence[Point], note: str = "", share: bool = True) -> Path:
    """Points under each other in the order given, each with its interval and its number; shares in per cent."""
    factor = 100.0 if share else 1.0
    left, wide, high = _width([point.label for point in points]) + 0.4, 4.6, 0.27
    figure, bottom = _figure(left + wide + 0.7, high * len(points), above=0.45, below=0.55, note=note)
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, bottom / height, wide / width, high * len(points) / height))
    for i, point in enumerate(points):
        colour = LINES[0] if point.strong else INK if point.hollow else FAINT
        ends = [factor * end for end in point.interval or ()]
        _whisker(axes, factor * point.value, i, ends, colour, filled=not point.hollow)
        axes.annotate(
            f"{factor * point.value:.1f}",
            *((1, i), (8, 0)),
            **{"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center", "fontsize": 9},
            **{"color": INK, "weight": "bold" if point.strong else "normal"},
        )
    axes.set_yticks(range(len(points)), [point.label for point in points])
    for label, point in zip(axes.get_yticklabels(), points, strict=True):
        label.set_weight("bold" if point.strong else "normal")
    axes.set_ylim(len(points) - 0.4, -0.6)
    axes.set_xlabel(axis)
    _plain(axes, grid="x")
    _title(figure, title, note)
    return _saved(figure, path)


@_as_written
def correlations(
    path: Path,
    title: str,
    metrics: Sequence[str],
    panels: Mapping[str, Sequence[tuple[float | None, Interval, float | None]]],
    note: str = "",
) -> Path:
    """One panel an outcome, one row a metric: (rho, interval, p-value). Filled where p < 0.05."""
    left, wide, high, between = _width(metrics) + 0.35, 1.45, 0.32, 0.16
    across = len(panels) * wide + (len(panels) - 1) * between
    figure, bottom = _figure(left + across + 0.2, high * len(metrics), above=0.72, below=0.55, note=note)
    width, height = figure.get_size_inches()
    for i, (outcome, found) in enumerate(panels.items()):
        place = ((left + i * (wide + between)) / width, bottom / height, wide / width, high * len(metrics) / height)
        axes = figure.add_axes(place)
        colour = COLOURS.get(outcome, INK)
        axes.axvline(0, color=FAINT, linewidth=0.8, zorder=1)
        for row, (rho, interval, p_value) in enumerate(found):
            if rho is None:
                axes.text(0, row, "undefined", color=FAINT, fontsize=8, ha="center", va="center")
                continue
            _whisker(axes, rho, row, interval or (), colour, filled=p_value is not None and p_value < 0.05)
        axes.set(xlim=(-1.06, 1.06), ylim=(len(metrics) - 0.4, -0.6))
        axes.set_xticks((-1, -0.5, 0, 0.5, 1), ("−1", "", "0", "", "1"))
        axes.set_yticks(range(len(metrics)), metrics if i == 0 else [])
        axes.set_title(outcome, color=colour, fontsize=9, weight="bold", pad=6)
        _plain(axes, grid="both")
    figure.text(
        *((left + across / 2) / width, (bottom - 0.4) / height, "Spearman's rho"),
        **{"ha": "center", "va": "center", "fontsize": 9, "color": INK},
    )
    _title(figure, title, note)
    return _saved(figure, path)


@_as_written
def curves(
    path: Path,
    title: str,
    x_label: str,
    panels: Sequence[tuple[str, Mapping[str, Sequence[tuple[float, float, Interval]]]]],
    note: str = "",
) -> Path:
    """One panel a (y label, name -> points), each point (x, y, interval) as shares; a name keeps its colour and its mark."""
    names = list(dict.fromkeys(name for _, series in panels for name in series))
    figure, bottom = _figure(0.5 + 3.7 * len(panels), 2.5, above=0.68, below=0.55, note=note)
    width, height = figure.get_size_inches()
    for i, (y_label, series) in enumerate(panels):
        axes = figure.add_axes(((0.55 + 3.7 * i) / width, bottom / height, 3.3 / width, 2.5 / height))
        places = sorted({x for points in series.values() for x, _, _ in points})
        for k, (name, points) in enumerate(series.items()):
            colour, marker = LINES[names.index(name) % len(LINES)], MARKERS[names.index(name) % len(MARKERS)]
            shift = 0.35 * (k - (len(series) - 1) / 2)  # points of sparsity, so that intervals do not hide each other
            xs = [100 * x + shift for x, _, _ in points]
            axes.plot(
                xs,
                [100 * y for _, y, _ in points],
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.6,
                label=name,
            )
            for x, (_, _, interval) in zip(xs, points, strict=True):
                if interval is not None:
                    axes.plot((x, x), [100 * end for end in interval], color=colour, linewidth=1.2, alpha=0.8)
        if min(y for points in series.values() for _, y, _ in points) < 0 or "minus" in y_label:
            axes.axhline(0, color=FAINT, linewidth=0.8, zorder=1)
        axes.set_xticks([100 * x for x in places], [f"{100 * x:g}" for x in places])
        axes.set_xlabel(x_label)
        axes.set_title(y_label, fontsize=9, loc="left", color=INK, pad=6)
        _plain(axes, grid="y")
        if i == 0 or list(series) != list(panels[0][1]):
            axes.legend(frameon=False, fontsize=8.5, loc="best", handlelength=2.2)
    _title(figure, title, note)
    return _saved(figure, path)


# ------------------------------------------------------------------------------------------------- style


def _rows(title: str, axis: str, labels: Sequence[str], note: str, theme: Theme, room: float) -> tuple[Axes, Figure]:
    """Axes with a row for each label, and room on the right, in inches, for what stands beside them."""
    left, wide, high = _width(labels) + 0.4, 3.9, 0.34
    figure, bottom = _figure(left + wide + room, high * len(labels), above=0.62, below=0.5, note=note, theme=theme)
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, bottom / height, wide / width, high * len(labels) / height))
    axes.set_facecolor(theme.paper)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel(axis)
    _plain(axes, grid="x", theme=theme)
    return axes, figure


def _beside(axes: Axes, row: float, text: str, theme: Theme) -> None:
    """Text on the right of a row."""
    axes.annotate(
        text, (1, row), (8, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
        fontsize=9, color=theme.ink,
    )  # fmt: skip


def _figure(
    width: float, height: float, *, above: float, below: float, note: str, theme: Theme = THEMES["light"]
) -> tuple[Figure, float]:
    """A figure for axes of `height`, with room above for the title and below for the axis and the note, in inches; and
    where the axes begin. Without pyplot, so that nothing outside the figure changes and no display is needed."""
    from matplotlib.figure import Figure

    lines = len(_wrapped(note, width))
    below += 0.14 * lines + (0.12 if lines else 0)
    return Figure((width, above + height + below), facecolor=theme.paper), below


def _wrapped(note: str, width: float) -> list[str]:
    return textwrap.wrap(note, int(16 * (width - 0.2)))


def _width(labels: Sequence[str]) -> float:
    """Inches that the longest label takes at 9 points."""
    from matplotlib.textpath import TextPath

    return max(TextPath((0, 0), label, size=9).get_extents().width for label in labels) / 72 * 1.02


def _shaded(axes: Axes, shades: Any, column: float, row: float, value: float | None, bold: bool) -> None:
    from matplotlib.patches import Rectangle

    if value is None:
        axes.text(column + 0.5, row + 0.5, "–", va="center", ha="center", color=FAINT, fontsize=9)
        return
    shade = shades(min(1.0, max(0.0, value)))
    axes.add_patch(Rectangle((column, row), 1, 1, facecolor=shade, edgecolor=PAPER, linewidth=1.2, clip_on=False))
    light = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2]
    axes.text(
        *(column + 0.5, row + 0.5, f"{100 * value:.0f}"),
        **{"va": "center", "ha": "center", "fontsize": 9, "weight": "bold" if bold else "normal"},
        color=INK if light > 0.55 else PAPER,
    )


def _shades() -> Any:
    """White to dark blue: light and dark survive every kind of colour vision, and print."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("retention", ["#F7FAFC", "#C5DCEB", "#7FB2D3", "#3B82B4", "#0B4F83"])


def _whisker(axes: Axes, value: float, row: float, ends: Sequence[float], colour: str, filled: bool) -> None:
    axes.plot(ends, [row] * len(ends), color=colour, linewidth=1.8, solid_capstyle="round", zorder=2)
    face = colour if filled else PAPER
    axes.plot([value], [row], "o", color=colour, markersize=6.5, markeredgewidth=1.5, markerfacecolor=face, zorder=3)


def _plain(axes: Axes, grid: str, theme: Theme = THEMES["light"]) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.faint)
    axes.tick_params(length=0, labelsize=9, colors=theme.ink)
    axes.xaxis.label.set(fontsize=9, color=theme.ink)
    axes.grid(axis=grid, color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)


def _title(figure: Figure, title: str, note: str, theme: Theme = THEMES["light"]) -> None:
    width, height = figure.get_size_inches()
    figure.text(
        0.12 / width, 1 - 0.12 / height, title, ha="left", va="top", fontsize=11, weight="bold", color=theme.ink
    )
    text = "\n".join(_wrapped(note, width))
    figure.text(0.12 / width, 0.1 / height, text, ha="left", va="bottom", fontsize=8, color=theme.note)


def _saved(figure: Figure, path: Path) -> Path:
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": ""}
    with rc_context({"svg.hashsalt": path.stem}):  # the same numbers make the same bytes
        figure.savefig(path, dpi=DPI, metadata=metadata)
    return path
