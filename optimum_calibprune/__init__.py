# SPDX-License-Identifier: Apache-2.0
"""Choose calibration text so that no capability is sacrificed, prune with it, measure what was kept, publish the result."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .choices import calibration_sources as calibration_sources
    from .comparing import compare_runs as compare_runs
    from .planning import Machine as Machine
    from .pruner import CalibPruner as CalibPruner
    from .publishing.push import push_folder as push_folder
    from .records import CalibPruneConfig as CalibPruneConfig
    from .records import CalibrationSet as CalibrationSet
    from .records import CalibrationSource as CalibrationSource
    from .records import Plan as Plan
    from .records import RunRecord as RunRecord
    from .records import SparsityPattern as SparsityPattern
    from .shape import ModelShape as ModelShape

__version__ = "0.1.0.dev0"

_HOMES = {
    "calibration_sources": "choices",
    "compare_runs": "comparing",
    "Machine": "planning",
    "ModelShape": "shape",
    "CalibPruner": "pruner",
    "push_folder": "publishing.push",
    "CalibPruneConfig": "records",
    "CalibrationSet": "records",
    "CalibrationSource": "records",
    "Plan": "records",
    "RunRecord": "records",
    "SparsityPattern": "records",
}

__all__ = [
    "CalibPruneConfig",
    "CalibPruner",
    "CalibrationSet",
    "CalibrationSource",
    "Machine",
    "ModelShape",
    "Plan",
    "RunRecord",
    "SparsityPattern",
    "calibration_sources",
    "compare_runs",
    "push_folder",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
