# SPDX-License-Identifier: Apache-2.0
"""What strangers may ask for, and what the Space may use."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

import optimum_calibprune
from tests.hub_server import HubServer
from tests.publishing.pushing import process
from tests.space import large


SPACE = Path(__file__).parents[2] / "space"
sys.path.insert(0, str(SPACE))

import limits  # noqa: E402
from limits import Job, checked, checked_mixes, checked_question, checked_repo  # noqa: E402


FORM = {"model": "pocket", "mix": "uniform", "sources": [], "sparsity": "50%", "samples": 16, "capabilities": ["math"]}
HOSTILE = [
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    "a/../b",
    "a/b/c",
    "owner/name; rm -rf /",
    "owner/$(id)",
    "owner/`id`",
    "<script>alert(1)</script>",
    "owner/<b>",
    "owner/na me",
    "owner/name\nother",
    "owner/name\x00",
    "hub:owner/name",
    "file:///etc/passwd",
    "-owner/name",
    "owner/--name",
    "оwner/name",  # its first letter is Cyrillic
    "owner/" + "x" * 200,
    "x" * 2**20,
    "",
    None,
    7,
    ["pocket"],
]


def ask(**changed: Any) -> Job:
    return checked(**(FORM | changed))


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: repr(name)[:30])
def test_hostile_names_are_refused_in_one_short_sentence(name: Any) -> None:
    for refuse in (lambda: ask(model=name), lambda: checked_repo(name)):
        with pytest.raises(ValueError, match="is no name of a") as refused:
            refuse()
        assert len(str(refused.value)) < 200
        assert "\n" not in str(refused.value)


def test_a_folder_of_the_server_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert ask(model="owner/name").model == "owner/name"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'owner/name' is no name of a model"):
        ask(model="owner/name")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"mix": "single:/etc/passwd"}, "Unknown mix"),
        ({"sources": ["x=/etc/passwd:general"]}, "Unknown source"),
        ({"sources": ["hub:owner/name"]}, "Unknown source"),
        ({"sources": "c4"}, "Give a list for source"),
        ({"sparsity": "99%"}, "Unknown sparsity '99%'; allowed: 30%"),
        ({"samples": 10**9}, "this page allows 4 to 64"),
        ({"samples": 4.5}, "a whole number"),
        ({"samples": "16"}, "a whole number"),
        ({"samples": True}, "a whole number"),
        ({"samples": float("inf")}, "a whole number"),
        ({"samples": 10**400}, "this page allows 4 to 64"),
        ({"mix": "single:gsm8k", "sources": ["piqa"]}, "names its source"),
        ({"capabilities": []}, "No capability was chosen"),
        ({"capabilities": ["<b>"]}, "Unknown capability"),
        ({"model": "owner/name", "capabilities": ["code"]}, "would have to run what they write"),
    ],
)
def test_each_value_is_checked(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ask(**changed)


def test_a_comparison_is_jobs_that_differ_in_their_mix() -> None:
    jobs = checked_mixes("pocket", ["uniform", "single:gsm8k", "uniform"], "60%", 8, ["math"])
    assert jobs == tuple(ask(mix=mix, sparsity="60%", samples=8) for mix in ("uniform", "single:gsm8k"))
    for mixes in (
        None,
        "uniform",
        [],
        ["igsp"],
        ["igsp", "igsp"],
        ["igsp", "cola", "uniform", "balanced", "self-cal"],
    ):
        with pytest.raises(ValueError, match="a comparison takes 2 to 4"):
            checked_mixes("pocket", mixes, "60%", 8, ["math"])
    with pytest.raises(ValueError, match="Unknown mix"):
        checked_mixes("pocket", ["uniform", "single:/etc/passwd"], "60%", 8, ["math"])


@pytest.mark.parametrize(
    ("question", "said"),
    [
        (("", 8, 0), "There is no prompt"),
        ((" \n", 8, 0), "There is no prompt"),
        ((["a"], 8, 0), "There is no prompt"),
        (("x" * 2**20, 8, 0), "has 1,048,576 characters; this page takes up to 2,000"),
        (("\ud800", 8, 0), "half a character"),
        (("a", 0, 0), "this page allows 1 to 256"),
        (("a", 10**400, 0), "this page allows 1 to 256"),
        (("a", 8.5, 0), "a whole number"),
        (("a", 8, -1), "this page allows 0 to 2"),
        (("a", 8, float("nan")), "this page allows 0 to 2"),
        (("a", 8, "hot"), "is a number"),
    ],
)
def test_a_question_is_checked(question: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        checked_question(*question)
    assert len(str(refused.value)) < 200


def test_more_sources_than_allowed_are_refused() -> None:
    table = list(optimum_calibprune.calibration_sources("owner/name"))
    assert len(ask(model="owner/name", sources=table[: limits.SOURCES]).sources) == limits.SOURCES
    with pytest.raises(ValueError, match="this page allows 8 at once"):
        ask(model="owner/name", sources=table[: limits.SOURCES + 1])


def test_a_model_of_a_visitor_brings_no_code_and_has_none_run() -> None:
    options = ask(model="owner/name", capabilities=list(limits.CAPABILITIES)).options
    assert [options[name] for name in ("trust_remote_code", "allow_pickle", "allow_code_execution")] == [False] * 3
    assert options["suite"] == "quick", "also where the model says that it was pruned from the pocket"
    assert options["limit"] == limits.ITEMS


def _size(model: str, allowed: int) -> str:
    limits.WEIGHT_BYTES = allowed
    try:
        limits.check_size(model)
    except ValueError as error:
        return str(error)
    return "fits"


def test_size_is_asked_before_anything_is_loaded(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 99}
    config = LlamaConfig(**small, num_hidden_layers=2).to_json_string().encode()
    deep = LlamaConfig(**small, num_hidden_layers=3000).to_json_string().encode()
    weights = {"a.safetensors": b"0" * 60_000, "sub/b.safetensors": b"0" * 60_000, "c.bin": b"0" * 9_000_000}
    with HubServer() as hub:
        hub.add_repo("owner/name", weights | {"config.json": config})
        hub.add_repo("owner/secret", {"a.safetensors": b"0", "config.json": config}, private=True)
        hub.add_repo("owner/wide", {"a.safetensors": b"0", "config.json": large.config().encode()})
        hub.add_repo("owner/deep", {"a.safetensors": b"0", "config.json": deep})
        with process(hub.environment(tmp_path)) as there:
            assert there(_size, "owner/name", 120_000) == "fits"
            assert "owner/name has 0.0 GiB of weights; this page prunes up to" in there(_size, "owner/name", 119_999)
            assert "owner/wide has 15.0 GiB of weights" in there(_size, "owner/wide", 2**30), "whatever its files have"
            assert "owner/deep has 3,000 blocks" in there(_size, "owner/deep", 2**30)
            for hidden in ("owner/secret", "owner/none"):  # the token of the server opens no door for visitors
                assert there(_size, hidden, 2**30).startswith(f"The Hub does not show a public model {hidden!r}")


@pytest.mark.parametrize("path", sorted(SPACE.glob("*.py")), ids=lambda path: path.name)
def test_the_space_uses_public_names_and_holds_no_algorithm(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    roots = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "optimum_calibprune":
            assert {alias.name for alias in node.names} <= {*optimum_calibprune.__all__, "__version__"}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
    assert not roots & {"optimum_calibprune", "torch", "transformers", "numpy", "datasets", "lm_eval"}
