# SPDX-License-Identifier: Apache-2.0
"""Two metrics have one fingerprint where nothing tells them apart, in other processes too, and none where something may."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluate
import pytest

from optimum_calibprune.capabilities import identity
from optimum_calibprune.capabilities.identity import fingerprint_of


METRIC = Path(__file__).parents[2] / "metrics" / "capability_retention"


def defined(code: str) -> Callable[..., Any]:
    """The `metric` of some code, as of a user's script."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "<script>", "exec", dont_inherit=True), scope)
    return scope["metric"]


BASE = """
import re, numpy
NUMBER, SHARE, NAMES = re.compile("[0-9]+"), 0.5, {"a": [1, (2, 3)], "b": {4}}
def half(text):
    return text[:len(text) // 2] if text in {"first", "second", "third"} else text
def metric(predictions, references, *, weight=1.0):
    import math
    found = [NUMBER.findall(half(p)) for p in predictions]
    return weight * SHARE * float(numpy.mean([p == r for p, r in zip(found, references)])) * math.cos(0.0)
"""
CLOSURE = """
def made(threshold):
    def metric(predictions, references):
        return float(len(predictions[0]) > threshold)
    return metric
metric = made(3)
"""
CHANGES = {
    "a constant": ("math.cos(0.0)", "math.cos(1.0)"),
    "a name": ("math.cos(0.0)", "math.sin(0.0)"),
    "a default": ("weight=1.0", "weight=0.9"),
    "a variable of the module": ("SHARE, NAMES = re.compile(\"[0-9]+\"), 0.5", "SHARE, NAMES = re.compile(\"[0-9]+\"), 0.4"),
    "a pattern": ("[0-9]+", "[0-8]+"),
    "a function that it calls": ("// 2]", "// 3]"),
    "a set in that": ("\"third\"", "\"fourth\""),
    "a comprehension": ("p == r", "p != r"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_function_refers_to_tells_it_from_another_one(change: str) -> None:
    before, after = CHANGES[change]
    assert BASE.count(before) == 1
    found = {fingerprint_of(defined(code)) for code in (BASE, BASE.replace(before, after))}
    assert len(found) == 2
    assert None not in found


def test_a_function_is_itself_wherever_it_stands_and_after_it_was_called() -> None:
    metric = defined(BASE)
    first = fingerprint_of(metric)
    assert metric(["12"], [["12"]]) == 0.5
    assert {fingerprint_of(metric), fingerprint_of(defined("resume = True\n\n" + BASE))} == {first}
    lines = f"import runpy\n{BASE}\nprint(runpy.run_path({identity.__file__!r})['fingerprint_of'](metric))"
    for seed in "12":  # of the order in sets
        script = subprocess.run(
            [sys.executable, "-c", lines], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
        )
        assert script.stdout.strip() == first, script.stderr


def test_what_a_closure_holds_tells_functions_apart() -> None:
    found = [fingerprint_of(defined(code)) for code in (CLOSURE, CLOSURE.replace("made(3)", "made(4)"), CLOSURE)]
    assert found[0] == found[2] != found[1]
    assert fingerprint_of(max) not in (fingerprint_of(min), None)


def test_a_function_that_calls_itself_has_a_fingerprint() -> None:
    code = "def metric(p, r):\n    return metric(p[1:], r) if p[1:] else 1.0"
    assert fingerprint_of(defined(code)) not in (fingerprint_of(defined(code.replace("1.0", "0.5"))), None)


class Metric:
    def __call__(self, predictions: list[str], references: list[str]) -> float:
        return 1.0


@pytest.mark.parametrize(
    "metric",
    [
        Metric(),
        Metric().__call__,
        functools.partial(max, 3),
        defined("class Other: pass\nother = Other()\ndef metric(p, r):\n    return other.score(p, r)"),
        defined("import tests\ndef metric(p, r):\n    return tests.score(p, r)"),
        defined("def metric(p, r):\n    import tests\n    return tests.score(p, r)"),
        defined("def metric(p, r):\n    from not_loaded_yet import score\n    return score(p, r)"),
    ],
    ids=["object", "method", "partial", "an object inside", "a module", "a module inside", "a module not loaded"],
)
def test_what_may_be_anything_has_no_fingerprint(metric: Any) -> None:
    assert fingerprint_of(metric) is None


def test_a_metric_of_evaluate_is_that_of_its_files(tmp_path: Path) -> None:
    text = (METRIC / "capability_retention.py").read_text(encoding="utf-8")
    folders = [tmp_path / place / "capability_retention" for place in ("first", "second", "third")]
    for folder, change in zip(folders, ("", "", "# another version\nVERSION = 2\n"), strict=True):
        folder.mkdir(parents=True)
        (folder / "capability_retention.py").write_text(text + change, encoding="utf-8")
    found = [fingerprint_of(evaluate.load(str(folder))) for folder in folders]
    assert None not in found
    assert found[0] == found[1] != found[2]
    assert fingerprint_of(evaluate.combine([evaluate.load(str(METRIC))])) is None
