# SPDX-License-Identifier: Apache-2.0
"""Draws what `solver.py` and `end_to_end.py` measured: seconds of ours and of the peers, and the floor.

    python benchmarks/speed_figure.py

Reads `benchmarks/results/{solver,end_to_end}-*.json`, writes `docs/speed-DEVICE.svg`. Needs matplotlib.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt


HERE = Path(__file__).parent
COLOURS = {"ours": "#0072b2", "published": "#e69f00", "llm-compressor": "#999999"}


def rows_of(device: str) -> dict[str, dict[str, Any]]:
    """What was timed -> seconds by solver, and the floor."""
    rows = {}
    solver = HERE / "results" / f"solver-{device}.json"
    if solver.exists():
        for name, found in json.loads(solver.read_text())["layers"].items():
            seconds = {which: stages["solve"] for which, stages in found["seconds"].items()}
            rows[name] = seconds | {"floor": found["floor of our solve"]["seconds"]}
    for path in sorted((HERE / "results").glob(f"end_to_end-*-{device}.json")):
        found = json.loads(path.read_text())
        rows[path.stem.removeprefix("end_to_end-").removesuffix(f"-{device}")] = found["seconds"] | {
            "floor": found["floor in seconds"]["all"]
        }
    return rows


def draw(device: str) -> None:
    rows = rows_of(device)
    if not rows:
        return
    figure, axes = plt.subplots(figsize=(8, 0.7 * len(rows) + 1.2), layout="constrained")
    for place, seconds in enumerate(rows.values()):
        for offset, (which, colour) in enumerate(COLOURS.items()):
            if which in seconds:
                y = place + (offset - 1) * 0.26
                axes.barh(y, seconds[which], height=0.24, color=colour, label=which if place == 0 else None)
                axes.annotate(f" {seconds[which]:.2f}", (seconds[which], y), va="center", fontsize=8)
        axes.plot([seconds["floor"]] * 2, [place - 0.4, place + 0.4], color="#d55e00", linewidth=2)
    axes.plot([], [], color="#d55e00", linewidth=2, label="our floor: the products alone")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(f"seconds, {device}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(HERE.parent / "docs" / f"speed-{device}.svg", metadata={"Date": None})


if __name__ == "__main__":
    for each in ("cpu", "cuda"):
        draw(each)
