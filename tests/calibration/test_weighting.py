# SPDX-License-Identifier: Apache-2.0
"""The mixes that weigh Hessians, and COLA: quotas, options, weights; and each through CalibPruner on the pocket."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from optimum_calibprune import CalibPruner, RunRecord
from optimum_calibprune.calibration.mix import calibration_set, draw, quotas, windows_wanted
from optimum_calibprune.calibration.sources import Pool
from optimum_calibprune.calibration.weighting import mixcal_weights
from optimum_calibprune.records import CalibrationRow, CalibrationSet, CalibrationSource, Mix, MixRule


SOURCES = [
    CalibrationSource("web", "general"),
    CalibrationSource("wiki", "general"),
    CalibrationSource("chat", "general"),
    CalibrationSource("python", "code"),
    CalibrationSource("algebra", "math"),
    CalibrationSource("gsm", "math"),
]
POOLS = [Pool(source, np.arange(40 * 8).reshape(40, 8) + 1000 * i) for i, source in enumerate(SOURCES)]
CAPABILITY = {source.name: source.capability for source in SOURCES}


def chosen_by(rule: str, samples: int = 18, activations: np.ndarray | None = None) -> tuple[CalibrationSet, Mix]:
    parsed = MixRule.parse(rule)
    counts = quotas(parsed, SOURCES, samples)
    candidates = draw(POOLS, windows_wanted(parsed, SOURCES, samples), 0)
    return calibration_set(parsed, candidates, counts, activations=activations)


def rows_of(groups: str) -> tuple[CalibrationRow, ...]:
    names = {"g": "general", "c": "code", "m": "math", "s": "commonsense"}
    return tuple(CalibrationRow("s", i, names[letter]) for i, letter in enumerate(groups))


def weight_by_group(rows: tuple[CalibrationRow, ...]) -> dict[str, float]:
    """The sum of the weights of each group, as shares of all."""
    total = Counter[str]()
    for row in rows:
        total[row.group] += row.weight
    return {group: value / sum(total.values()) for group, value in total.items()}


# ------------------------------------------------------------------------------------------------ MixCal


@pytest.mark.parametrize("groups", ["gcms", "gggggcm", "gcccccccccmms"])
@pytest.mark.parametrize("general", [0.1, 0.5, 0.8])
def test_general_text_has_its_share_and_the_others_divide_the_rest(groups: str, general: float) -> None:
    rows = mixcal_weights(rows_of(groups), general)
    shares = weight_by_group(rows)
    others = len(shares) - 1
    assert shares == pytest.approx({g: general if g == "general" else (1 - general) / others for g in shares})
    assert sum(row.weight for row in rows) == pytest.approx(len(rows))
    for group in shares:
        assert len({row.weight for row in rows if row.group == group}) == 1
    assert [(r.origin, r.index, r.group) for r in rows] == [(r.origin, r.index, r.group) for r in rows_of(groups)]


def test_the_hessian_of_mixcal_by_hand() -> None:
    """a H_general + (1 - a) (H_code + H_math) / 2, each a mean over its own tokens."""
    import torch

    from optimum_calibprune.pruning.hessian import Hessian

    rows = mixcal_weights(rows_of("ggggcmm"), 0.3)
    X = torch.randn(7, 9, 5, generator=torch.Generator().manual_seed(0))
    H = Hessian(5)
    H.add(X, torch.tensor([row.weight for row in rows]))
    general, code, math = (2 / (9 * len(x)) * torch.einsum("stc,std->cd", x, x) for x in (X[:4], X[4:5], X[5:]))
    torch.testing.assert_close(H.matrix, 0.3 * general + 0.35 * code + 0.35 * math, rtol=1e-5, atol=1e-6)


def test_equal_shares_of_equal_counts_are_the_uniform_mix() -> None:
    assert [row.weight for row in mixcal_weights(rows_of("gcms"), 0.25)] == [1.0] * 4


@pytest.mark.parametrize("groups", ["ggg", "cccm", "mc", "c"])
def test_where_there_is_nothing_to_set_against_all_count_the_same(groups: str) -> None:
    shares = weight_by_group(mixcal_weights(rows_of(groups), 0.9))
    assert shares == pytest.approx(dict.fromkeys(shares, 1 / len(shares)))


def test_mixcal_takes_as_many_samples_of_every_source() -> None:
    chosen, mix = chosen_by("mixcal", 20)
    assert mix.quotas == {"algebra": 4, "chat": 4, "gsm": 3, "python": 3, "web": 3, "wiki": 3}
    assert Counter(row.origin for row in chosen.rows) == mix.quotas
    assert weight_by_group(chosen.rows) == pytest.approx({"general": 0.5, "code": 0.25, "math": 0.25})
    assert chosen.normalise == mix.normalise == "none"
    assert weight_by_group(chosen_by("mixcal:general=0.2")[0].rows)["general"] == pytest.approx(0.2)


# ------------------------------------------------------------------------------------- balanced and COLA


@pytest.mark.parametrize(
    ("rule", "normalise"), [("balanced", "trace"), ("balanced:worst=0", "trace"), ("balanced:worst=1", "minimax")]
)
def test_balanced_is_the_uniform_draw_with_another_hessian(rule: str, normalise: str) -> None:
    uniform, chosen = chosen_by("uniform")[0], chosen_by(rule)[0]
    assert np.array_equal(chosen.input_ids, uniform.input_ids)
    assert chosen.rows == uniform.rows
    assert (chosen.normalise, chosen_by(rule)[1].normalise) == (normalise, normalise)
    assert chosen.fingerprint != uniform.fingerprint


def test_cola_takes_one_sample_of_each_cluster_of_four_times_as_many_candidates() -> None:
    wanted = windows_wanted(MixRule("cola"), SOURCES, 12)
    assert wanted == {name: 4 * count for name, count in quotas(MixRule("uniform"), SOURCES, 12).items()}
    assert sum(wanted.values()) == 48
    origins = sorted(wanted, key=lambda name: (CAPABILITY[name], name))
    # The candidates of code are all alike; those of the others are not.
    generator = np.random.default_rng(0)
    alike = np.repeat([CAPABILITY[name] == "code" for name in origins], [wanted[name] for name in origins])
    activations = generator.normal(0, 5, (48, 6)) * ~alike[:, None]
    chosen, mix = chosen_by("cola", 12, activations)
    assert len(chosen.rows) == 12
    assert len({(row.origin, row.index) for row in chosen.rows}) == 12
    assert mix.quotas == Counter(row.origin for row in chosen.rows)
    assert mix.quotas["python"] == 1
    assert mix.shares["python"] == pytest.approx(1 / 12)
    assert (mix.note, mix.normalise) == ("one sample of each cluster of activations", "none")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("balanced:worst=2", r"balanced:worst is 0 .* or 1 .*; 2 was given"),
        ("balanced:worst=0.5", "0.5 was given"),
        ("mixcal:general=0", r"mixcal:general is a share between 0 and 1, both excluded; 0 was given"),
        ("mixcal:general=1", "1 was given"),
        ("cola:layers=1.5", r"cola:layers is a whole number, 0 for all layers; 1.5 was given"),
        ("cola:layer=2", r"Unknown option of the mix 'cola' 'layer'\. Did you mean 'layers'"),
    ],
)
def test_options_out_of_range_are_refused_before_a_model_is_loaded(rule: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibPruner.from_pretrained("pocket", mix=rule, capabilities="none")


# --------------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize("rule", ["cola:layers=2", "balanced", "balanced:worst=1", "mixcal"])
def test_the_run_folder_suffices_to_make_the_same_hessians(rule: str, tmp_path: Path) -> None:
    pruner = CalibPruner.from_pretrained("pocket", mix=rule, samples=12, length=64, capabilities="none")
    record = pruner.prune()
    pruner.save_pretrained(tmp_path / "run")
    saved = RunRecord.from_json((tmp_path / "run" / "calibprune.json").read_text())
    assert saved == record
    ids = load_file(tmp_path / "run" / "calibration.safetensors")["input_ids"]
    again = CalibrationSet(ids, saved.rows, saved.mix.normalise)
    assert again.fingerprint == saved.fingerprint == pruner.calibration.fingerprint
    assert record.prune.zeros == record.prune.weights // 2
    assert sum(record.mix.quotas.values()) == 12
    assert [layer.tokens for layer in record.prune.layers] == pytest.approx([12 * 64] * 42)
    if rule.startswith("cola"):
        assert sum(profile.samples for profile in record.profiles) == 48
