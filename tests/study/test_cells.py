# SPDX-License-Identifier: Apache-2.0
"""What a study runs: which mixes a text stands for, and names of cells that do not collide."""

from __future__ import annotations

import pytest

from optimum_calibprune.records import CalibrationSource, TaskScore
from optimum_calibprune.study.cells import Cell, CellResult, TaskItems, grid
from optimum_calibprune.values import MIXES
from tests.study import made_study


A, B = CalibrationSource("a", "code", path="a.txt"), CalibrationSource("b", "math", path="b.txt")
PROBES = CalibrationSource("p", "math", path="p.txt", upper_bound=True)


def named(
    mixes: list[str], sources: tuple[CalibrationSource, ...] = (A, B, PROBES)
) -> list[tuple[str, tuple[str, ...]]]:
    return [(str(cell.mix), cell.sources) for cell in grid(mixes, sources, ["50%"], [0])]


def test_all_is_each_source_alone_and_one_mix_of_each_other_kind() -> None:
    found = dict(named(["all"]))
    assert set(found) == {"single:a", "single:b", *MIXES} - {"single", "weighted"}
    assert found["single:b"] == ("b",)
    assert found["uniform"] == found["cola"] == ("a", "b")
    assert found["self-cal"] == found["sgs"] == found["igsp"] == ()
    assert named([]) == named(["all"])


def test_texts_from_the_generator_of_the_probes_are_used_only_where_they_are_named() -> None:
    assert named(["single", "uniform"]) == [("single:a", ("a",)), ("single:b", ("b",)), ("uniform", ("a", "b"))]
    assert named(["single:p", "uniform@p"]) == [("single:p", ("p",)), ("uniform", ("p",))]
    assert named(["uniform"], (PROBES,)) == [("uniform", ("p",))]


def test_a_mix_is_given_the_sources_behind_the_at_sign_and_each_once() -> None:
    assert named(["igsp@all", "igsp@self,b", "sgs:prefix=8@a"]) == [
        ("igsp", ("a", "b")),
        ("igsp", ("b", "self")),
        ("sgs:prefix=8", ("a",)),
    ]
    assert named(["weighted:b=2,a=1"]) == [("weighted:b=2,a=1", ("a", "b"))]
    assert named(["uniform", "uniform@all", "uniform@b,a"]) == [("uniform", ("a", "b"))]


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("unifrom", "Unknown mix 'unifrom'. Did you mean 'uniform'?"),
        ("single:c", "Unknown source of the mix 'c'"),
        ("uniform@a,c", "Unknown source of the mix 'c'"),
        ("uniform@self", "Unknown source of the mix 'self'"),
        ("uniform@", "names no source after '@'"),
        ("single:a@b", "names its sources already"),
        ("self-cal@a", "the model alone writes this mix"),
    ],
)
def test_what_no_mix_can_be_is_refused_with_a_sentence(mix: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named([mix])


def test_seeds_and_sparsities_are_checked_and_all_mixes_of_one_seed_come_first() -> None:
    cells = grid(["single"], (A, B), ["2:4", 0.6], [4, 7])
    assert [(str(c.mix), str(c.pattern), c.seed) for c in cells][:5] == [
        ("single:a", "2:4", 4),
        ("single:b", "2:4", 4),
        ("single:a", "60%", 4),
        ("single:b", "60%", 4),
        ("single:a", "2:4", 7),
    ]
    for patterns, seeds, message in (
        ([], [0], "at least one sparsity"),
        (["50%"], [], "at least one seed"),
        (["50%"], [-1], "must not be negative"),
        (["150%"], [0], "between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            grid(["single"], (A, B), patterns, seeds)
    with pytest.raises(ValueError, match="at least one source"):
        grid(["uniform"], (), ["50%"], [0])


def test_every_cell_has_a_file_name_of_its_own() -> None:
    mixes = [
        "single",
        "uniform",
        "uniform@a",
        "igsp",
        "igsp:temperature=0.8",
        "igsp:temperature=8",
        "sgs:prefix=4,keep=1",
    ]
    cells = grid(mixes, (A, B), ["50%", "5%", "2:4"], range(3))
    keys = {cell.key for cell in cells}
    assert len(keys) == len(cells)
    assert all(set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.") for key in keys)
    slash = CalibrationSource("x/../" + "y" * 200, "code", path="x.txt")
    assert len(grid(["single"], (slash,), ["50%"], [0])[0].key) < 120


def test_the_key_does_not_depend_on_the_order_of_sources() -> None:
    first, second = (grid(["uniform"], order, ["50%"], [0])[0] for order in ((A, B), (B, A)))
    assert first.key == second.key
    assert first == second == Cell.from_json(first.to_json())


def test_scores_of_zero_and_one_are_kept_as_characters_and_others_as_numbers() -> None:
    binary = TaskScore("t", "code", "pass@1", 0.0, (1.0, 0.0, 1.0))
    partial = TaskScore("t", "code", "f1", 0.0, (1.0, 0.5))
    assert TaskItems.of(binary).items == "101"
    assert TaskItems.of(partial).values == (1.0, 0.5)
    assert [TaskItems.of(score).score() for score in (binary, partial)] == [binary, partial]


def test_a_result_survives_its_file() -> None:
    result = made_study.result("igsp:temperature=0.8", seed=3)
    assert CellResult.from_json(result.to_json()) == result
