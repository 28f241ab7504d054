# SPDX-License-Identifier: Apache-2.0
"""Locates the bundled pocket model, its calibration texts and its probes; installed as a wheel, too."""

from __future__ import annotations

import json
from pathlib import Path

from ..records import CAPABILITIES, CalibrationSource


NAME = "pocket"
SAMPLES, LENGTH = 64, 256
LICENCE = "apache-2.0"

_FOLDER = Path(__file__).parent
MODEL = _FOLDER / "model"


def probes() -> dict[str, Path]:
    """The probe file of each capability."""
    return {capability: _FOLDER / "probes" / f"{capability}.jsonl" for capability in CAPABILITIES}


def sources() -> dict[str, CalibrationSource]:
    """The bundled texts. Those written by the generator of the probes are marked as an upper bound."""
    manifest = json.loads((_FOLDER / "texts" / "manifest.json").read_text(encoding="utf-8"))
    return {
        name: CalibrationSource(
            name,
            entry["capability"],
            path=str(_FOLDER / "texts" / f"{name}.jsonl"),
            licence=entry["licence"],
            upper_bound=name.startswith("pocket_"),
        )
        for name, entry in manifest.items()
    }


def default_sources() -> list[str]:
    """The real-text sources, which make the headline numbers."""
    return [name for name, source in sources().items() if not source.upper_bound]
