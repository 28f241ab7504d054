# SPDX-License-Identifier: Apache-2.0
"""Two saved runs side by side."""

from __future__ import annotations

from pathlib import Path

from .capabilities.comparison import compare
from .publishing.hub import load_scores
from .records import RunComparison


def compare_runs(first: str | Path, second: str | Path, *, token: str | None = None) -> RunComparison:
    """What two runs kept, by capability and task: folders that `CalibPruner.save_pretrained` wrote, or repos on the Hub,
    `"ID"` or `"ID@REVISION"`.

    Args:
        token: for private repos, as everywhere in huggingface_hub.

    Raises:
        FileNotFoundError: for a run without scores.
        PermissionError: for a repo that is gated.
        ValueError: for runs that were not measured on the same items, and files that hold no scores.
    """
    names = (str(first), str(second))
    return compare(load_scores(first, token=token), load_scores(second, token=token), names=names)
