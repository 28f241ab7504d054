# SPDX-License-Identifier: Apache-2.0
"""Quotas are exact, draws follow seed and name, and IGSP's selection equals the greedy that its definition describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from optimum_calibprune.calibration.mix import (
    OVERSAMPLE,
    calibration_set,
    draw,
    even_split,
    quotas,
    windows_wanted,
)
from optimum_calibprune.calibration.sources import OpenSource, Pool, build_pool
from optimum_calibprune.records import CalibrationSource, MixRule


SOURCES = [
    CalibrationSource("web", "general"),
    CalibrationSource("wiki", "general"),
    CalibrationSource("chat", "general"),
    CalibrationSource("python", "code"),
    CalibrationSource("algebra", "math"),
    CalibrationSource("gsm", "math"),
]
NAMES = sorted(source.name for source in SOURCES)


def quota(rule: str, samples: int, sources: Sequence[CalibrationSource] = SOURCES) -> dict[str, int]:
    return quotas(MixRule.parse(rule), sources, samples)


# ----------------------------------------------------------------------------------------------- quotas


def test_single_takes_all_of_one_source() -> None:
    assert quota("single:wiki", 7) == {"wiki": 7}


@pytest.mark.parametrize("rule", ["uniform", "igsp:code=1,math=1"])
def test_uniform_divides_by_capability_then_by_source(rule: str) -> None:
    assert quota(rule, 18) == {"python": 6, "chat": 2, "web": 2, "wiki": 2, "algebra": 3, "gsm": 3}


@pytest.mark.parametrize("rule", ["uniform", "igsp:code=1,math=1"])
def test_remainders_go_to_the_first_names(rule: str) -> None:
    # 20 = 7 code + 7 general + 6 math; general 7 = 3 chat + 2 web + 2 wiki
    assert quota(rule, 20) == {"python": 7, "chat": 3, "web": 2, "wiki": 2, "algebra": 3, "gsm": 3}
    # 5 = 2 code + 2 general + 1 math
    assert quota(rule, 5) == {"python": 2, "chat": 1, "web": 1, "algebra": 1}


def test_igsp_gives_fragile_capabilities_more_samples() -> None:
    # general 1 : code 2 : math 2 of 15 = 3 : 6 : 6
    assert quota("igsp", 15) == {"python": 6, "chat": 1, "web": 1, "wiki": 1, "algebra": 3, "gsm": 3}
    assert quota("igsp:math=0,code=1", 6) == {"python": 3, "chat": 1, "web": 1, "wiki": 1}
    with pytest.raises(ValueError, match="a weight above 0 for one of code, general, math"):
        quota("igsp:general=0,code=0,math=0", 6)


def test_fewer_samples_than_sources_leave_the_last_names_out() -> None:
    assert quota("uniform", 1) == {"python": 1}
    assert quota("uniform", 2) == {"python": 1, "chat": 1}
    assert quota("weighted:web=1,chat=1,wiki=1", 2) == {"chat": 1, "web": 1}


def test_weights_are_normalised() -> None:
    assert quota("weighted:web=3,python=1", 8) == {"web": 6, "python": 2}
    assert quota("weighted:web=0.75,python=0.25", 8) == quota("weighted:web=300,python=100", 8)


def test_weighted_remainders_go_to_the_largest_then_to_the_first_name() -> None:
    assert quota("weighted:web=5,python=3,gsm=2", 9) == {"web": 4, "python": 3, "gsm": 2}  # 4.5, 2.7, 1.8
    assert quota("weighted:web=1,python=1,gsm=1", 4) == {"gsm": 2, "python": 1, "web": 1}
    assert quota("weighted:web=1,python=1,gsm=1", 5) == {"gsm": 2, "python": 2, "web": 1}
    assert quota("weighted:web=1000,python=1", 10) == {"web": 10}


def test_quotas_sum_up_for_any_rule() -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        chosen = generator.choice(len(SOURCES), size=generator.integers(1, 7), replace=False)
        sources = [SOURCES[i] for i in chosen]
        samples = int(generator.integers(1, 60))
        weights = ",".join(f"{s.name}={generator.uniform(0.1, 9):.3f}" for s in sources)
        for rule in ("uniform", "igsp", f"weighted:{weights}"):
            found = quota(rule, samples, sources)
            assert sum(found.values()) == samples
            assert min(found.values()) > 0
        groups = {s.capability: 0 for s in sources}
        for name, count in quota("uniform", samples, sources).items():
            groups[next(s.capability for s in sources if s.name == name)] += count
        assert max(groups.values()) - min(groups.values()) <= 1


def test_even_split_is_exact() -> None:
    assert even_split(7, ["c", "a", "b"]) == {"a": 3, "b": 2, "c": 2}
    assert even_split(0, ["b", "a"]) == {"a": 0, "b": 0}


@pytest.mark.parametrize("rule", ["single:wikki", "weighted:web=1,wikki=2"])
def test_a_rule_that_names_no_source_is_refused(rule: str) -> None:
    with pytest.raises(ValueError, match=r"Unknown source of the mix 'wikki'\. Did you mean 'wiki'\? Allowed: web,"):
        quota(rule, 8)


def test_igsp_draws_four_candidates_for_each_sample() -> None:
    assert OVERSAMPLE == 4
    for rule, factor in (
        ("uniform", 1),
        ("igsp", 4),
        ("igsp:oversample=7", 7),
        ("single:web", 1),
        ("weighted:web=1,gsm=2", 1),
    ):
        wanted = windows_wanted(MixRule.parse(rule), SOURCES, 18)
        assert wanted == {name: factor * count for name, count in quota(rule, 18).items()}


# ------------------------------------------------------------------------------------------------ draws


def pools(windows: int = 40) -> list[Pool]:
    return [
        Pool(source, np.arange(windows * 8).reshape(windows, 8) + 1000 * i) for i, source in enumerate(SOURCES[:4])
    ]


def test_no_window_is_drawn_twice() -> None:
    for seed in range(20):
        drawn = draw(pools(), {"web": 40, "python": 13}, seed)
        assert len({(row.origin, row.index) for row in drawn.rows}) == len(drawn.rows) == 53
        assert len(np.unique(drawn.input_ids, axis=0)) == 53


def test_each_row_says_where_its_window_comes_from() -> None:
    drawn = draw(pools(), {"web": 3, "wiki": 5, "python": 4}, 0)
    ids = {pool.source.name: pool.input_ids for pool in pools()}
    capability = {source.name: source.capability for source in SOURCES}
    for window, row in zip(drawn.input_ids, drawn.rows, strict=True):
        assert np.array_equal(window, ids[row.origin][row.index])
        assert (row.group, row.weight) == (capability[row.origin], 1.0)


def drawn_indices(seed: int, counts: Mapping[str, int], given: Sequence[Pool] | None = None) -> dict[str, set[int]]:
    drawn = draw(given or pools(), counts, seed)
    return {name: {row.index for row in drawn.rows if row.origin == name} for name in counts}


def test_a_draw_depends_on_seed_and_name_alone() -> None:
    one = drawn_indices(3, {"web": 10, "python": 10})
    assert one == drawn_indices(3, {"web": 10, "python": 10})
    assert one["web"] == drawn_indices(3, {"web": 10, "wiki": 2}, pools()[::-1])["web"], "not on other sources"
    assert one["web"] != one["python"], "each name has its own draw"
    assert one["web"] != drawn_indices(4, {"web": 10})["web"]
    assert one["web"] < drawn_indices(3, {"web": 20})["web"], "a larger draw extends a smaller one"


def test_every_window_can_be_drawn() -> None:
    seen = set().union(*(drawn_indices(seed, {"web": 10})["web"] for seed in range(40)))
    assert seen == set(range(40))


def test_the_pool_does_not_depend_on_the_draw() -> None:
    class Tokenizer:
        eos_token_id = 0
        pad_token_id = None

    rows = [[i] * 8 for i in range(1, 60)]
    opened = OpenSource(CalibrationSource("web", "general"), rows)
    first, second = (build_pool(opened, Tokenizer(), 8, 10) for _ in range(2))  # type: ignore[arg-type]
    assert np.array_equal(first.input_ids, second.input_ids)
    assert not np.array_equal(draw([first], {"web": 10}, 0).input_ids, draw([second], {"web": 10}, 1).input_ids)


# -------------------------------------------------------------------------------------- calibration set


def test_other_mixes_take_all_that_was_drawn() -> None:
    rule = MixRule.parse("weighted:web=2,python=1")
    counts = {"web": 6, "python": 3}
    candidates = draw(pools(), counts, 0)
    chosen, mix = calibration_set(rule, candidates, counts)
    assert np.array_equal(chosen.input_ids, candidates.input_ids)
    assert chosen.rows == candidates.rows
    assert (mix.quotas, mix.trace, mix.objective, mix.parts) == (counts, (), None, {})
    assert mix.shares == {"python": pytest.approx(1 / 3), "web": pytest.approx(2 / 3)}
    assert mix.note == "quotas are rounded by largest remainders, ties to the first names in alphabetical order"


def test_the_note_tells_of_remainders_where_there_can_be_some() -> None:
    def note(rule: str, counts: dict[str, int]) -> str:
        return calibration_set(MixRule.parse(rule), draw(pools(), counts, 0), counts)[1].note

    assert note("single:web", {"web": 3}) == ""
    assert note("uniform", {"web": 4, "python": 3}) == (
        "remainders, where there are any, go to the first names in alphabetical order"
    )


def test_igsp_keeps_the_quota_of_each_capability() -> None:
    counts = {"web": 2, "wiki": 1, "python": 3}
    candidates = draw(pools(), {name: 4 * count for name, count in counts.items()}, 0)
    nll = np.random.default_rng(0).normal(2, 1, 24)
    chosen, mix = calibration_set(MixRule("igsp"), candidates, counts, nll)
    assert mix.quotas == {"general": 3, "code": 3}
    assert [row.group for row in chosen.rows].count("general") == 3
    assert sum(mix.shares.values()) == pytest.approx(1)
    assert mix.objective == mix.trace[-1]
    assert mix.objective == pytest.approx(mix.parts["aggregation"] + mix.parts["lambda"] * mix.parts["level"])
    places = {(row.origin, row.index): ids for row, ids in zip(candidates.rows, candidates.input_ids, strict=True)}
    assert all(
        np.array_equal(places[row.origin, row.index], ids)
        for row, ids in zip(chosen.rows, chosen.input_ids, strict=True)
    )


def test_igsp_balances_perplexity_where_that_is_asked_for() -> None:
    counts = {"web": 3, "python": 3}
    candidates = draw(pools(), {name: 4 * count for name, count in counts.items()}, 0)
    nll = np.random.default_rng(0).normal(2, 1, 24)
    _, mix = calibration_set(MixRule.parse("igsp:level=0,imbalance=0.1"), candidates, counts, nll)
    assert mix.objective == pytest.approx(mix.parts["aggregation"] + 0.1 * mix.parts["imbalance"])
    with pytest.raises(ValueError, match="also give level=0"):
        quota("igsp:imbalance=0.1", 6)


def test_igsp_is_content_with_fewer_candidates_but_not_with_fewer_than_the_quota() -> None:
    """A source that is smaller than four times its quota still takes part."""
    generator = np.random.default_rng(0)
    pools = [
        Pool(CalibrationSource(name, room), generator.integers(0, 50, (size, 16)))
        for name, room, size in (("small", "code", 5), ("large", "math", 40))
    ]
    rule = MixRule.parse("igsp:code=1,math=1")
    sources = [pool.source for pool in pools]
    counts, wanted = quotas(rule, sources, 8), windows_wanted(rule, sources, 8)
    candidates = draw(pools, wanted, seed=0)
    assert len(candidates.rows) == 5 + 16
    chosen, mix = calibration_set(rule, candidates, counts, generator.random(len(candidates.rows)))
    assert [row.group for row in chosen.rows].count("code") == 4
    assert mix.quotas == {"code": 4, "math": 4}
