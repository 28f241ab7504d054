# SPDX-License-Identifier: Apache-2.0
"""What a pruned model kept of each capability, as a metric of `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate

from optimum_calibprune.capabilities.retention import capability_report
from optimum_calibprune.records import CAPABILITIES, Scores, TaskScore


_DESCRIPTION = """\
Retention of a capability is the mean score of the pruned (sparse) model divided by that of the dense one, over the tasks of
the capability, with a 95 % bootstrap interval over the items, paired between the two models. The total is the mean over the
capabilities whose dense score is above chance.
"""

_CITATION = ""  # there is no paper of it

_KWARGS_DESCRIPTION = """
Args:
    predictions: the score of each item for the pruned model, 0 to 1.
    references: the score of the same items, in the same order, for the dense model.
    tasks: the name of each item's task. Default: all items are of one task.
    capabilities: task -> "general" (the default), "commonsense", "code" or "math".
    chance: task -> the score of guessing (the default is 0).
Returns:
    total: the mean retention over the capabilities in `measured`; None where there is none.
    total_interval: its 95 % interval.
    worst: the capability that kept least.
    measured: the capabilities whose retention is defined: that of the dense model is above chance.
    capabilities: capability -> items, chance, dense, sparse, retention, interval, above_chance (retention with the chance
        level subtracted from both scores first).
Examples:
    >>> metric = evaluate.load("metrics/capability_retention")
    >>> found = metric.compute(predictions=[1, 0, 1, 0, 1, 0], references=[1, 1, 1, 1, 1, 1])
    >>> found["total"]
    0.5
    >>> dense = [1, 1, 1, 0] * 25 + [1, 1] * 50
    >>> sparse = [1, 1, 0, 0] * 25 + [1, 0] * 50
    >>> found = metric.compute(
    ...     predictions=sparse,
    ...     references=dense,
    ...     tasks=["arc_easy"] * 100 + ["gsm8k"] * 100,
    ...     capabilities={"arc_easy": "general", "gsm8k": "math"},
    ...     chance={"arc_easy": 0.25},
    ... )
    >>> {name: round(entry["retention"], 3) for name, entry in found["capabilities"].items()}
    {'general': 0.667, 'math': 0.5}
    >>> round(found["total"], 3), found["worst"]
    (0.583, 'math')
    >>> round(found["capabilities"]["general"]["above_chance"], 3)
    0.5
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class CapabilityRetention(evaluate.Metric):
    """See `optimum_calibprune.capabilities.retention`, which computes it."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(
        self,
        predictions: Sequence[float],
        references: Sequence[float],
        tasks: Sequence[str] | None = None,
        capabilities: Mapping[str, str] | None = None,
        chance: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        names = ["task"] * len(predictions) if tasks is None else list(tasks)
        if len(names) != len(predictions):
            raise ValueError(f"{len(predictions)} items but {len(names)} names of tasks; give one for each item.")
        outside = [value for value in (*predictions, *references) if not 0 <= value <= 1]
        if outside:
            raise ValueError(f"Scores are 0 to 1; {outside[0]:g} was given.")
        for given in (capabilities or {}, chance or {}):
            for name in given:
                if name not in names:
                    raise ValueError(
                        f"There is no item of task {name!r}; the tasks are {', '.join(dict.fromkeys(names))}."
                    )
        for name, capability in (capabilities or {}).items():
            if capability not in CAPABILITIES:
                raise ValueError(f"{capability!r}, given for {name!r}, is none of {', '.join(CAPABILITIES)}.")
        dense, sparse = (
            Scores(
                tuple(
                    TaskScore(
                        task=name,
                        capability=(capabilities or {}).get(name, CAPABILITIES[0]),
                        metric="score",
                        chance=(chance or {}).get(name, 0.0),
                        item_scores=tuple(value for value, own in zip(values, names, strict=True) if own == name),
                    )
                    for name in dict.fromkeys(names)
                )
            )
            for values in (references, predictions)
        )
        report = capability_report(dense, sparse)
        return {
            "total": report.total,
            "total_interval": report.total_interval,
            "worst": report.worst,
            "measured": list(report.measured),
            "capabilities": {
                entry.capability: {name: value for name, value in entry.to_dict().items() if name != "capability"}
                for entry in report.capabilities
            },
        }
