# SPDX-License-Identifier: Apache-2.0
"""Plans for machines that are not here: those of a loaded model where they can be compared, and from the config alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from optimum_calibprune import CalibPruneConfig, CalibPruner, Machine, ModelShape
from optimum_calibprune.planning import COLUMN_SECONDS, make_plan
from optimum_calibprune.pruning.blocks import find_groups
from optimum_calibprune.pruning.homes import InMemory
from tests.hub_server import HubServer
from tests.pruning.test_families import FAMILIES
from tests.publishing.pushing import process


LARGE = Machine("cpu", free=2**42, free_host=2**42, products=1e12, exact_products=1e11, sweep=1e9)
CARD = Machine("cuda", free=2**34, free_host=2**36, products=1e14, exact_products=5e13, sweep=3e10)
ROOMY = replace(CARD, free=2**40, free_host=2**40)
HIDDEN, MLP, KEYS, BLOCKS, VOCABULARY = 8192, 28_672, 1024, 8, 128_256
IN_A_BLOCK = 2 * HIDDEN**2 + 2 * HIDDEN * KEYS + 3 * HIDDEN * MLP
SHAPE = {"hidden_size": HIDDEN, "intermediate_size": MLP, "num_attention_heads": 64, "num_key_value_heads": 8}
PLAIN = {"mix": "uniform", "capabilities": "none"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With the config of eight blocks of Llama-3.1-70B's shape, and nothing else."""
    folder = tmp_path_factory.mktemp("shape")
    further = {"vocab_size": VOCABULARY, "max_position_embeddings": 131_072, "dtype": "bfloat16"}
    LlamaConfig(**SHAPE, **further, num_hidden_layers=BLOCKS).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def large_llama(folder: str) -> ModelShape:
    return ModelShape.from_pretrained(folder, **PLAIN)


@pytest.mark.parametrize("options", [{"mix": "igsp"}, {"mix": "balanced", "sparsity": "2:4", "sequential": "block"}])
def test_it_is_the_plan_of_the_loaded_model(options: dict[str, str]) -> None:
    here = CalibPruner.from_pretrained("pocket", **options).plan()
    assert replace(ModelShape.from_pretrained("pocket", **options).plan(LARGE), seconds=here.seconds) == here


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_tells_what_a_model_of_any_family_has(family: str, tmp_path: Path) -> None:
    shape = FAMILIES[family].config()
    shape.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(shape)
    config = CalibPruneConfig(str(tmp_path), mix="uniform", capabilities="none", samples=8, length=16, micro_batch=2)
    home, groups = InMemory(model), find_groups(model, config.sparsity)
    plan = ModelShape.from_pretrained(str(tmp_path), samples=8, length=16, micro_batch=2, **PLAIN).plan(LARGE)
    assert plan == make_plan(home, config, groups, plan.sources, 0, (), machine=LARGE)
    assert plan.modules > 0


def test_a_large_model_is_streamed_and_needs_what_its_largest_matrix_does(large_llama: ModelShape) -> None:
    plan = large_llama.plan(CARD)
    assert plan.streamed
    assert plan.blocks == BLOCKS
    assert plan.weights == BLOCKS * IN_A_BLOCK
    assert plan.memory["blocks on cuda"] == pytest.approx(
        2 * 2 * IN_A_BLOCK, rel=1e-4
    )  # two at once, with their norms
    assert plan.memory["Hessians and factor on cuda"] == 8 * MLP**2
    assert plan.memory["weights being solved on cuda"] == 7 * 2 * HIDDEN * MLP
    assert plan.memory["hidden states in pinned host memory"] == 2 * 128 * 2048 * HIDDEN
    assert "model on cuda" not in plan.memory
    assert sum(size for place, size in plan.memory.items() if place.endswith("cuda")) < CARD.free


def test_where_it_fits_it_is_in_memory(large_llama: ModelShape) -> None:
    plan = large_llama.plan(ROOMY)
    parameters = BLOCKS * (IN_A_BLOCK + 2 * HIDDEN) + HIDDEN + 2 * VOCABULARY * HIDDEN
    assert not plan.streamed
    assert plan.memory["model on cuda"] == 2 * parameters
    assert plan.replays == 0
    assert large_llama.plan(replace(ROOMY, free_host=2**30)).streamed, "the host loads it first"


def test_seconds_are_work_by_rates(large_llama: ModelShape) -> None:
    plan = large_llama.plan(ROOMY)
    tokens = 128 * 2048
    inputs = ((HIDDEN, HIDDEN + 2 * KEYS), (HIDDEN, HIDDEN), (HIDDEN, 2 * MLP), (MLP, HIDDEN))
    products = sum(2 * tokens * columns * rows for columns, rows in inputs)
    exact = sum(tokens * c**2 + 2 / 3 * c**3 + 3 * rows * c**2 for c, rows in inputs)
    swept = sum(columns * rows for columns, rows in inputs)
    steps = COLUMN_SECONDS * sum(columns for columns, _ in inputs)
    block = products / ROOMY.products + exact / ROOMY.exact_products + swept / ROOMY.sweep + steps
    assert plan.seconds == pytest.approx(BLOCKS * block)


def test_a_streamed_model_writes_no_text(folder: str) -> None:
    shape = ModelShape.from_pretrained(folder, mix="igsp")
    with pytest.raises(ValueError, match=r"16\.7 GiB of weights .* cannot write its own calibration text"):
        shape.plan(CARD)
    assert shape.plan(ROOMY).written > 0


def test_what_cannot_be_pruned_is_refused(folder: str) -> None:
    with pytest.raises(ValueError, match="does not divide"):
        ModelShape.from_pretrained(folder, sparsity="2:3", **PLAIN)
    with pytest.raises(ValueError, match="exceeds the model's context"):
        ModelShape.from_pretrained(folder, length=2**20, **PLAIN).plan(CARD)
    with pytest.raises(OSError, match="neither a local folder nor in the local cache"):
        ModelShape.from_pretrained("owner/none", **PLAIN)


def _plan(name: str, cache: Path) -> str:
    try:
        shape = ModelShape.from_pretrained(name, token=False, cache_dir=cache, **PLAIN)
        return str(shape.plan(LARGE).modules)
    except (ValueError, OSError) as error:
        return str(error)


def test_only_the_config_is_fetched_and_no_code_is_run(tmp_path: Path) -> None:
    folder = tmp_path / "config"
    small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    LlamaConfig(**small, vocab_size=99).save_pretrained(folder)
    config = (folder / "config.json").read_bytes()
    evil = b'{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}'
    code = f"open({str(tmp_path / 'was-run')!r}, 'w')\nclass Config: pass".encode()
    with HubServer() as hub, process(hub.environment(tmp_path / "home")) as there:
        hub.add_repo("owner/plain", {"config.json": config, "model.safetensors": b"never read"})
        hub.add_repo("owner/evil", {"config.json": evil, "evil.py": code})
        hub.add_repo("owner/secret", {"config.json": config}, private=True)
        assert there(_plan, "owner/plain", tmp_path / "cache") == "14"
        fetched = {target.rpartition("/")[2] for _, target, _ in hub.requests if "/resolve/" in target}
        assert fetched == {"config.json"}
        assert "trust_remote_code" in there(_plan, "owner/evil", tmp_path / "cache")
        assert not (tmp_path / "was-run").exists()
        assert "cannot be loaded" in there(_plan, "owner/secret", tmp_path / "cache")
        assert {token for _, _, token in hub.requests} == {None}, "the token of this machine stays here"
