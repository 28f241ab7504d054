# SPDX-License-Identifier: Apache-2.0
"""Two runs side by side: McNemar against scipy, differences against closed forms, unpaired items refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from optimum_calibprune import compare_runs
from optimum_calibprune.capabilities.comparison import compare, mcnemar_p_value
from optimum_calibprune.records import RunComparison, Scores, TaskScore
from tests.hub_server import HubServer


CLI = str(Path(sys.executable).parent / "optimum-cli")
Run = dict[str, Scores]
NAMES = ("a", "b")


def bits(share: float, count: int = 200) -> tuple[float, ...]:
    return tuple(float(i < share * count) for i in range(count))


def task(items: tuple[float, ...], name: str = "t", capability: str = "code", fingerprint: str = "f") -> TaskScore:
    return TaskScore(name, capability, "pass@1", 0.0, items, fingerprint)


def run(dense: float, sparse: float, name: str = "t", capability: str = "code", fingerprint: str = "f") -> Run:
    return {
        state: Scores((task(bits(share), name, capability, fingerprint),))
        for state, share in (("dense", dense), ("sparse", sparse))
    }


def changed(scores: Run, **fields: object) -> Run:
    return {state: Scores(tuple(replace(t, **fields) for t in found.tasks)) for state, found in scores.items()}


def joined(*runs: Run) -> Run:
    return {state: Scores(tuple(t for one in runs for t in one[state].tasks)) for state in ("dense", "sparse")}


def save(folder: Path, scores: Run) -> Path:
    (folder / "scores").mkdir(parents=True)
    for state, found in scores.items():
        (folder / "scores" / f"{state}.json").write_text(found.to_json())
    return folder


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 5), (3, 9), (12, 12), (40, 17), (1, 0), (700, 611), (3500, 3600)])
def test_mcnemar_is_the_exact_binomial_test(b: int, c: int) -> None:
    expected = scipy.stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar_p_value(b, c) == pytest.approx(expected)
    assert mcnemar_p_value(c, b) == mcnemar_p_value(b, c)


def test_mcnemar_rejects_about_as_often_as_it_may() -> None:
    generator = np.random.default_rng(0)
    values = [mcnemar_p_value(k, 60 - k) for k in generator.binomial(60, 0.5, 2000)]
    assert 0.02 < np.mean(np.array(values) <= 0.05) <= 0.05


def test_items_on_which_one_alone_is_right_are_counted() -> None:
    dense = bits(1.0, 6)
    first = {"dense": Scores((task(dense),)), "sparse": Scores((task((1, 1, 1, 0, 0, 1)),))}
    second = {"dense": Scores((task(dense),)), "sparse": Scores((task((1, 0, 0, 1, 0, 0)),))}
    (found,) = compare(first, second, names=NAMES).tasks
    assert (found.items, found.only_first, found.only_second) == (6, 3, 1)
    assert found.p_value == pytest.approx(2 * 5 / 16)
    assert (found.first, found.second) == (4 / 6, 2 / 6)


def test_scores_between_0_and_1_have_no_p_value() -> None:
    partial = {state: Scores((task((0.5, 1.0, 1.0, 0.75)),)) for state in ("dense", "sparse")}
    assert compare(partial, partial, names=NAMES).tasks[0].p_value is None


def test_a_run_does_not_differ_from_itself() -> None:
    same = joined(run(0.9, 0.5), run(0.8, 0.4, "m", "math"))
    found = compare(same, same, names=NAMES)
    assert [entry.difference for entry in found.capabilities] == [0.0, 0.0]
    for entry in found.capabilities:  # 200 items without a difference do not show that there is none
        low, high = entry.interval
        assert -0.02 < low < 0 < high < 0.02
    assert found.totals[0] == found.totals[1] == pytest.approx((0.5 / 0.9 + 0.5) / 2)
    assert [entry.p_value for entry in found.tasks] == [1.0, 1.0]


def test_the_difference_is_paired_over_the_items() -> None:
    """All items on which the two differ are won by the first: the difference has the deviation sqrt(.2 * .8 / 200)."""
    (found,) = compare(run(1.0, 0.8), run(1.0, 0.6), names=NAMES).capabilities
    assert found.difference == pytest.approx(0.2)
    low, high = found.interval
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.2 * 0.8 / 200), rel=0.08)


def test_totals_over_different_capabilities_are_not_set_side_by_side() -> None:
    both = joined(run(0.9, 0.5), run(0.8, 0.4, "m", "math"))
    at_chance = joined(run(0.9, 0.5), run(0.0, 0.0, "m", "math"))
    found = compare(both, at_chance, names=NAMES)
    assert found.totals is None
    assert [(entry.difference, entry.interval) for entry in found.capabilities][1] == (None, None)


def test_tasks_that_one_run_alone_has_are_named_and_left_out() -> None:
    found = compare(joined(run(0.9, 0.5), run(0.8, 0.4, "m", "math")), run(0.9, 0.6), names=NAMES)
    assert [entry.task for entry in found.tasks] == ["t"]
    assert found.unpaired == ("m",)
    assert found.totals == pytest.approx((0.5 / 0.9, 0.6 / 0.9))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (run(0.9, 0.5, fingerprint="g"), "a and b were not measured on the same items of 't'"),
        (run(0.9, 0.5, name="u"), "a and b have no task in common: t and u"),
        (
            {state: Scores((task(bits(0.5, 100)),)) for state in ("dense", "sparse")},
            "a and b were not measured on the same items of 't'",
        ),
        (run(0.8, 0.5, fingerprint=""), "a and b were not measured on the same items of 't'"),
        (changed(run(0.9, 0.5), metric="acc"), "of 't' in the same way"),
        (changed(run(0.9, 0.5, fingerprint=""), metric="acc"), "of 't' in the same way"),
        (changed(run(0.9, 0.5), shots=5), "of 't' in the same way"),
    ],
    ids=[
        "other questions",
        "other tasks",
        "other counts",
        "no fingerprint and other dense answers",
        "another metric",
        "another metric and no fingerprint",
        "other shots",
    ],
)
def test_what_is_not_paired_is_refused(second: Run, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(run(0.9, 0.5), second, names=NAMES)


def test_old_scores_are_paired_by_the_answers_of_the_dense_model() -> None:
    assert compare(run(0.9, 0.5, fingerprint=""), run(0.9, 0.6), names=NAMES).tasks[0].only_second == 20
    old = json.loads(run(0.9, 0.5)["dense"].to_json())
    del old["tasks"][0]["fingerprint"]
    assert Scores.from_json(json.dumps(old)).tasks[0].fingerprint == ""


def test_a_saved_run_without_scores_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a", run(0.9, 0.5))
    (tmp_path / "b").mkdir()
    with pytest.raises(FileNotFoundError, match=r"b has no scores/dense\.json: name the folder"):
        compare_runs(tmp_path / "a", tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="someone/gone is no folder here, and the Hub cannot be reached"):
        compare_runs(tmp_path / "a", "someone/gone")


def cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [CLI, "calibprune", "compare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def test_the_command_prints_what_python_returns(tmp_path: Path) -> None:
    save(tmp_path / "one", joined(run(0.9, 0.5), run(0.8, 0.4, "m", "math")))
    save(tmp_path / "two", replaced := joined(run(0.9, 0.72), run(0.8, 0.4, "m", "math")))
    done = cli("one", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["A:", "one"] in lines
    code = next(line for line in lines if line[:1] == ["code"])
    assert code[:6] == ["code", "55.6", "%", "80.0", "%", "-24.4"]
    assert next(line for line in lines if line[:1] == ["t"]) == [
        "t",
        "200",
        "50.0",
        "%",
        "72.0",
        "%",
        "0",
        "44",
        "1.1e-13",
    ]
    found = RunComparison.from_json(cli("one", "two", "--json", cwd=tmp_path).stdout)
    assert replace(found, first="", second="") == replace(
        compare_runs(tmp_path / "one", tmp_path / "two"), first="", second=""
    )
    save(tmp_path / "other", {state: Scores((task(bits(0.5, 10)),)) for state in replaced})
    refused = cli("one", "other", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.strip().endswith("measure both again with the same suite and limit.")
    assert "Traceback" not in refused.stderr


PULL = """
from optimum_calibprune import compare_runs
print(compare_runs({folder!r}, "me/run").tasks[0].only_second)
try:
    compare_runs({folder!r}, "me/other")
except FileNotFoundError as error:
    print(error)
"""


def test_a_run_on_the_hub_is_compared_by_its_name(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one", run(0.9, 0.5)), save(tmp_path / "two", run(0.9, 0.6))
    push = "from huggingface_hub import HfApi\nHfApi().create_repo('me/run')\n"
    push += f"HfApi().upload_folder(folder_path={str(two)!r}, repo_id='me/run')\n"
    with HubServer() as server:
        environment = server.environment(tmp_path / "home")
        done = subprocess.run(
            [sys.executable, "-c", push + PULL.format(folder=str(one))],
            **{"capture_output": True, "text": True, "env": environment, "timeout": 120},
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "20"
    assert "me/other has no scores/dense.json" in done.stdout
