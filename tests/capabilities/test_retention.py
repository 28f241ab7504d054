# SPDX-License-Identifier: Apache-2.0
"""Retention: ratio of means, paired intervals, undefined at chance, totals over what was measured."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from optimum_calibprune.capabilities.retention import capability_report, draws_report
from optimum_calibprune.records import CapabilityReport, Scores, TaskScore


BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "coverage.py"))


def scores(*tasks: tuple[str, str, float, object]) -> Scores:
    return Scores(
        tuple(TaskScore(name, room, "x", chance, tuple(map(float, items))) for name, room, chance, items in tasks)
    )


def bits(share: float, count: int = 400, seed: int = 0) -> list[float]:
    return (np.random.default_rng(seed).permutation(count) < share * count).astype(float).tolist()


def test_retention_is_the_ratio_of_means_over_the_tasks_of_a_capability() -> None:
    dense = scores(("a", "math", 0, [1, 1, 1, 1]), ("b", "math", 0, [1, 0, 1, 0]))
    sparse = scores(("a", "math", 0, [1, 0, 0, 0]), ("b", "math", 0, [0, 0, 1, 0]))
    kept = capability_report(dense, sparse).capabilities[0]
    assert (kept.dense, kept.sparse, kept.items) == (0.75, 0.25, 8)
    assert kept.retention == pytest.approx(1 / 3)


def test_the_total_is_the_mean_over_capabilities_and_the_worst_is_named() -> None:
    dense = scores(("a", "math", 0, bits(0.8)), ("b", "code", 0, bits(1.0)))
    sparse = scores(("a", "math", 0, bits(0.4)), ("b", "code", 0, bits(0.9)))
    report = capability_report(dense, sparse)
    assert report.total == pytest.approx((0.5 + 0.9) / 2)
    assert report.worst == "math"
    assert report.measured == ("code", "math")
    low, high = report.total_interval
    assert low < report.total < high


def test_a_dense_score_at_chance_leaves_retention_undefined_and_out_of_the_total() -> None:
    dense = scores(("a", "general", 0.25, bits(0.27)), ("b", "code", 0, bits(0.5)), ("c", "math", 0, bits(0.0)))
    report = capability_report(dense, dense)
    general, code, math = report.capabilities
    assert general.retention is None
    assert general.interval is None
    assert math.retention is None
    assert code.retention == 1.0
    assert report.total == 1.0
    assert report.measured == ("code",)


def test_the_chance_level_is_subtracted_beside() -> None:
    report = capability_report(scores(("a", "general", 0.25, bits(0.75))), scores(("a", "general", 0.25, bits(0.5))))
    assert report.capabilities[0].above_chance == pytest.approx(0.5)
    assert report.capabilities[0].retention == pytest.approx(2 / 3)


def test_items_are_paired() -> None:
    """Where the sparse model fails on the dense one's failures, the ratio varies less than with unrelated failures."""
    dense = bits(0.5, seed=1)
    same = [value if i % 10 else 0.0 for i, value in enumerate(dense)]
    other = np.random.default_rng(2).permutation(same).tolist()

    def width(sparse: list[float]) -> float:
        low, high = (
            capability_report(scores(("a", "code", 0, dense)), scores(("a", "code", 0, sparse)))
            .capabilities[0]
            .interval
        )
        return high - low

    assert width(same) < 0.6 * width(other)


@pytest.mark.parametrize("setting", ["50 items", "100 items, hardly anything lost", "as HumanEval of a small model"])
def test_the_interval_covers_the_truth_in_93_to_97_of_100_trials(setting: str) -> None:
    found = BENCHMARK["coverage"](BENCHMARK["RETENTION"][setting], trials=1000)
    assert found["intervals"] > 980
    assert 0.93 <= found["covered"] <= 0.97


def test_the_interval_of_a_difference_covers_the_truth_in_93_to_97_of_100_trials() -> None:
    found = BENCHMARK["difference_coverage"](*BENCHMARK["DIFFERENCES"]["100 items"], trials=1000)
    assert found["intervals"] == 1000
    assert 0.93 <= found["covered"] <= 0.97


def test_two_levels_are_wider_than_one_where_draws_differ() -> None:
    dense = scores(("a", "code", 0, bits(1.0)))
    draws = [scores(("a", "code", 0, bits(share, seed=i))) for i, share in enumerate((0.3, 0.5, 0.7))]
    several, one = draws_report(dense, draws).capabilities[0], draws_report(dense, draws[1:2]).capabilities[0]
    assert several.retention == pytest.approx(0.5)
    assert several.interval[1] - several.interval[0] > 2 * (one.interval[1] - one.interval[0])


def test_the_same_scores_give_the_same_report() -> None:
    dense, sparse = scores(("a", "code", 0, bits(0.9))), scores(("a", "code", 0, bits(0.6)))
    assert capability_report(dense, sparse) == capability_report(dense, sparse)


def test_scores_of_different_items_are_refused() -> None:
    with pytest.raises(ValueError, match="'a' was not measured on the same items"):
        capability_report(scores(("a", "code", 0, [1, 1])), scores(("a", "code", 0, [1])))
    with pytest.raises(ValueError, match="'a' was not measured"):
        capability_report(scores(("a", "code", 0, [1, 1])), scores(("b", "code", 0, [1, 1])))


def test_a_dense_score_so_low_that_a_resample_may_be_zero_leaves_retention_undefined() -> None:
    dense, sparse = scores(("a", "math", 0, bits(0.01))), scores(("a", "math", 0, bits(0.0025)))
    report = capability_report(dense, sparse)
    assert report.capabilities[0].retention is None
    assert CapabilityReport.from_json(report.to_json()) == report


def test_a_capability_that_only_the_dense_model_was_measured_on_is_not_measured() -> None:
    dense = scores(("a", "math", 0, bits(0.5)), ("b", "code", 0, bits(0.5)))
    sparse = Scores(scores(("a", "math", 0, bits(0.4))).tasks, {"code": "no memory"})
    report = capability_report(dense, sparse)
    assert report.measured == ("math",)
    assert report.not_measured == {"code": "no memory"}


def test_what_was_not_measured_is_handed_on() -> None:
    empty = Scores((), {"code": "no sandbox"})
    report = capability_report(empty, empty)
    assert report.total is None
    assert report.worst is None
    assert report.not_measured == {"code": "no sandbox"}
