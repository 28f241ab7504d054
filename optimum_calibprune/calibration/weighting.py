# SPDX-License-Identifier: Apache-2.0
"""Weights of the calibration rows in a layer's Hessian, for mixes that weigh capabilities beyond their number of samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ..records import CalibrationRow


GENERAL = "general"


def mixcal_weights(rows: Sequence[CalibrationRow], general: float) -> tuple[CalibrationRow, ...]:
    """The rows with weights such that H = a H_general + (1 - a) mean_c H_c, with a = `general`, H_c the mean over the tokens
    of capability c, and c over all capabilities but the general one; the weights' mean is 1.

    MixCal (Williams et al. 2025, arXiv 2502.18424) adds the Hessian of the special domain and that of general text with a
    parameter between them. What can be read of it without the full text says no more: the mean over several special
    domains is ours, and so is the default of one half. Text mixed in one pool is the case of weights by tokens; with
    as many samples of each capability, `general` = 1 / capabilities is the uniform mix. Where the general capability, or
    every other, is missing, the capabilities that are there count the same.
    """
    counts = Counter(row.group for row in rows)
    special = len(counts) - (GENERAL in counts)
    if special in (0, len(counts)):
        share = dict.fromkeys(counts, 1 / len(counts))
    else:
        share = {group: general if group == GENERAL else (1 - general) / special for group in counts}
    return tuple(replace(row, weight=share[row.group] * len(rows) / counts[row.group]) for row in rows)
