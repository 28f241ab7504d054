# SPDX-License-Identifier: Apache-2.0
"""Records: validated when made, frozen, and the same after a round trip through JSON."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from optimum_calibprune.records import (
    CalibPruneConfig,
    CalibrationRow,
    CalibrationSet,
    CalibrationSource,
    CapabilityReport,
    CapabilityRetention,
    MixRule,
    RunRecord,
    Scores,
    Sparsity,
    SparsityPattern,
    TaskScore,
)
from tests.publishing.run_record import example


@pytest.mark.parametrize(
    ("given", "fraction", "shown"),
    [
        ("60%", 0.6, "60%"),
        (0.6, 0.6, "60%"),
        ("0.6", 0.6, "60%"),
        ("33.3%", 0.333, "33.3%"),
        ("2:4", 0.5, "2:4"),
        ("4:8", 0.5, "4:8"),
        ("1:4", 0.75, "1:4"),
        (SparsityPattern(0.5), 0.5, "50%"),
        (1 / 3, 1 / 3, "0.3333333333333333"),
    ],
)
def test_a_pattern_is_parsed_and_shown(given: str | float, fraction: float, shown: str) -> None:
    pattern = SparsityPattern.parse(given)
    assert pattern.fraction == pytest.approx(fraction, abs=1e-15)
    assert str(pattern) == shown
    assert SparsityPattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize(
    "given", ["0%", "100%", 0, 1, 1.5, -0.1, "4:4", "5:4", "0:4", "1:256", "a", "", "2:4:8", "nan", None]
)
def test_a_bad_pattern_is_refused_in_one_sentence(given: str | float | None) -> None:
    with pytest.raises(ValueError, match=r"Sparsity must|n:m pattern needs|Unknown sparsity"):
        SparsityPattern.parse(given)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (0.6, "60%"),
        ("2:4", "2:4"),
        (SparsityPattern(0.5), "50%"),
        ("*=50%", "50%"),
        ({"*": 0.5}, "50%"),
        ({"*.mlp.*": 0.7, "*": "50%"}, "*.mlp.*=70%,*=50%"),
        (" *.mlp.*=0.7, *=50%", "*.mlp.*=70%,*=50%"),
        ({"*.o_proj": 0, "*.k_proj": "0%", "*.[01].*": "2:4", "*": 1 / 3}, None),
        ("*.o_proj=dense,*=33.3%", "*.o_proj=dense,*=33.3%"),
    ],
)
def test_a_sparsity_is_parsed_shown_and_kept_in_json(given: object, shown: str | None) -> None:
    sparsity = Sparsity.parse(given)
    assert str(sparsity) == shown or shown is None
    assert Sparsity.parse(str(sparsity)) == sparsity
    config = CalibPruneConfig("pocket", sparsity=given)
    assert json.loads(config.to_json())["sparsity"] == str(sparsity)
    assert CalibPruneConfig.from_json(config.to_json()) == config


def test_the_first_pattern_that_fits_a_name_counts() -> None:
    sparsity = Sparsity.parse({"*.layers.0.*": "dense", "*.mlp.*": 0.7, "*.layers.1?.*": "2:4", "*": 0.5})
    found = [sparsity.of(f"model.layers.{name}") for name in ("0.mlp.up_proj", "10.mlp.up_proj", "10.q", "1.q")]
    assert [str(pattern) for pattern in found] == ["None", "70%", "2:4", "50%"]
    assert Sparsity.parse("60%").of("anything") == SparsityPattern(0.6)
    with pytest.raises(
        ValueError, match=r"\*\.MLP\.\*=70% says nothing about layers\.0\.mlp\.up; end it with '\*=50%'"
    ):
        Sparsity.parse("*.MLP.*=70%").of("layers.0.mlp.up")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("*.mpl.*=70%,*=50%", r"'\*\.mpl\.\*' of the sparsity .* fits no module .* like 'layers\.0\.attn\.q'"),
        ("*=50%,*.mlp.*=70%", r"'\*\.mlp\.\*' of the sparsity .* decides about no module: the first .* before them"),
        ("*.mlp.*=70%", r"says nothing about layers\.0\.attn\.q"),
    ],
)
def test_a_sparsity_is_checked_against_the_modules(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sparsity.parse(given).check(["layers.0.attn.q", "layers.0.mlp.up"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "names at least one"),
        ("*=dense", "leaves every module dense"),
        ({"a": 0, "b": "dense"}, "leaves every module dense"),
        ("a=50%,a=60%", "names each pattern once"),
        ("=50%", "'' is no pattern for names"),
        ("a=b=50%", "'a=b' is no pattern for names"),
        ("a b=50%", "'a b' is no pattern for names"),
        ("a=50%,", "Unknown sparsity ''"),
        ("a=x", "Unknown sparsity 'x'"),
        ({"a": 1.2}, "between 0 and 1"),
        ("dense", "Unknown sparsity 'dense'"),
        (0, "between 0 and 1"),
    ],
)
def test_a_bad_sparsity_is_refused_in_one_sentence(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sparsity.parse(given)


@pytest.mark.parametrize(
    "given", ["single:c4", "uniform", "weighted:a=2,b=0.12345678", "igsp", "sgs:prefix=2,keep=0.5"]
)
def test_a_mix_is_shown_as_it_was_given(given: str) -> None:
    assert str(MixRule.parse(given)) == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("unifrom", "Did you mean 'uniform'"),
        ("singel:gsm8k", "Did you mean 'single'"),
        ("single", "names its source"),
        ("single:", "names its source"),
        ("weighted:", "names its sources"),
        ("weighted:a=x", "each value is a number"),
        ("weighted:a=-1", "must be positive"),
        ("weighted:a=1,a=2", "each source once"),
        ("uniform:a=1", "neither source names nor options"),
        ("self-cal:temperature=1", "Did you mean|Unknown option"),
        ("self-cal:t_final=-1", "must not be negative"),
        ("sgs:prefix=4,prefix=5", "each option once"),
    ],
)
def test_a_bad_mix_is_refused(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixRule.parse(given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "sparsegtp"}, "Did you mean 'sparsegpt'"),
        ({"sequential": "x"}, "Unknown sequential"),
        ({"allocation": "own"}, "Did you mean 'owl'"),
        ({"allocation": "owl", "sparsity": "2:4"}, "moves zeros from block to block, which n:m does not allow; 2:4"),
        (
            {"allocation": "owl", "sparsity": {"*.mlp.*": "2:4", "*": 0.5}},
            r"does not allow; \*\.mlp\.\*=2:4,\*=50% was",
        ),
        ({"capabilities": "genral"}, "Did you mean 'general'"),
        ({"capabilities": ("auto", "math")}, "Unknown capability 'auto'"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"length": 4}, "length must be at least 8"),
        ({"micro_batch": 0}, "micro_batch must be"),
        ({"damping": 0.0}, "damping"),
        ({"seed": -1}, "seed"),
        ({"model": ""}, "No model"),
    ],
)
def test_a_bad_config_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibPruneConfig(**{"model": "pocket", **change})


def test_a_config_survives_its_file(tmp_path: pytest.TempPathFactory) -> None:
    config = CalibPruneConfig(
        "pocket", sparsity="2:4", mix="weighted:gsm8k=2,piqa=1", sources=["gsm8k", "piqa"], capabilities="code,math"
    )
    config.save_pretrained(tmp_path)
    assert CalibPruneConfig.from_pretrained(tmp_path) == config
    assert config.capabilities == ("code", "math")


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CalibPruneConfig("pocket").seed = 1


def test_nested_records_survive_json() -> None:
    scores = Scores((TaskScore("t", "code", "pass@1", 0.0, (1.0, 0.0)),), {"math": "no data"})
    report = CapabilityReport(
        (CapabilityRetention("code", 2, 0.0, 1.0, 0.5, 0.5, (0.0, 1.0), 0.5),), 0.5, (0.0, 1.0), "code", {"math": "x"}
    )
    assert Scores.from_json(scores.to_json()) == scores
    assert CapabilityReport.from_json(report.to_json()) == report


def test_json_of_another_schema_or_with_unknown_fields_is_refused() -> None:
    data = json.loads(CalibPruneConfig("pocket").to_json())
    with pytest.raises(ValueError, match="schema version 99"):
        CalibPruneConfig.from_json(json.dumps({**data, "schema_version": 99}))
    with pytest.raises(ValueError, match=r"Unknown field of CalibPruneConfig 'sead'\. Did you mean 'seed'"):
        CalibPruneConfig.from_json(json.dumps({**data, "sead": 1}))


def _set(ids: np.ndarray, **row: object) -> CalibrationSet:
    return CalibrationSet(ids, tuple(CalibrationRow("s", i, "math", **row) for i in range(len(ids))))


def test_a_calibration_set_survives_json_and_keeps_its_fingerprint() -> None:
    made = _set(np.arange(12).reshape(3, 4))
    again = CalibrationSet.from_json(made.to_json())
    assert np.array_equal(again.input_ids, made.input_ids)
    assert again.rows == made.rows
    assert again.fingerprint == made.fingerprint


def test_the_fingerprint_depends_on_ids_order_shape_and_weights() -> None:
    ids = np.arange(12).reshape(3, 4)
    prints = {_set(x).fingerprint for x in (ids, ids[::-1], ids.reshape(2, 6), ids + 1)}
    assert len(prints | {_set(ids, weight=2.0).fingerprint}) == 5
    assert _set(ids).fingerprint == _set(ids.astype(np.int32)).fingerprint


def test_a_calibration_set_is_checked_and_read_only() -> None:
    with pytest.raises(ValueError, match="rows"):
        CalibrationSet(np.zeros((2, 4)), ())
    with pytest.raises(ValueError, match="samples, length"):
        CalibrationSet(np.zeros(4), ())
    with pytest.raises(ValueError, match="read-only"):
        _set(np.zeros((1, 4))).input_ids[0, 0] = 1


def test_a_source_names_a_known_capability_and_one_place() -> None:
    with pytest.raises(ValueError, match="Did you mean 'math'"):
        CalibrationSource("x", "maths")
    with pytest.raises(ValueError, match="both a repo and a path"):
        CalibrationSource("x", "math", repo="a/b", path="c")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("plan", "length"), "<b>", "Plan.length must be of type int, and is of type str"),
        (("prune", "micro_batch"), 1.5, "PruneReport.micro_batch must be of type int, and is of type float"),
        (("peak_memory",), True, "RunRecord.peak_memory must be of type int, and is of type bool"),
        (("seconds", "prune"), "1", "RunRecord.seconds must be of type float, and is of type str"),
        (("fingerprint",), 5, "RunRecord.fingerprint must be of type str, and is of type int"),
        (("overlaps", 0, "short"), "<b>", "TaskOverlap.short must be of type int, and is of type str"),
        (("capabilities", "capabilities", 0, "items"), None, "CapabilityRetention.items must be of type int"),
        (("capabilities", "total"), "<b>", "CapabilityReport.total must be of type float, and is of type str"),
        (("base", "language"), "en", "BaseModel.language must be of type list, and is of type str"),
        (("versions",), [], "RunRecord.versions must be of type dict, and is of type list"),
        (("plan",), [], "RunRecord.plan must be of type dict, and is of type list"),
        (("config", "allow_code_execution"), 1, "CalibPruneConfig.allow_code_execution must be of type bool"),
    ],
)
def test_a_record_with_a_value_of_another_type_is_refused(
    path: tuple[str | int, ...], value: object, said: str
) -> None:
    data = json.loads(example().to_json())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(TypeError, match=said):
        RunRecord.from_json(json.dumps(data))


def test_a_whole_number_may_stand_for_a_float() -> None:
    data = json.loads(example().to_json())
    data["seconds"]["prune"] = 2
    assert RunRecord.from_json(json.dumps(data)).seconds == {"prune": 2}
