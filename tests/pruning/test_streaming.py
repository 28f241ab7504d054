# SPDX-License-Identifier: Apache-2.0
"""A model that is read from disk block by block: the same bytes as in memory, in every family, under the same keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_calibprune.pruning import blocks
from optimum_calibprune.pruning.checkpoint import Checkpoint
from optimum_calibprune.pruning.homes import Streamed, without_weights
from optimum_calibprune.pruning.journal import Journal
from optimum_calibprune.pruning.schedule import Settings, prune_blocks
from optimum_calibprune.records import SparsityPattern
from tests.pruning.test_families import FAMILIES, MICRO_BATCH, calibration, logits, make


CPU = torch.device("cpu")
SETTINGS = Settings(SparsityPattern(0.5), micro_batch=MICRO_BATCH)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def opened(folder: Path, dtype: torch.dtype) -> Streamed:
    model = without_weights(AutoConfig.from_pretrained(folder), dtype)
    return Streamed(model, Checkpoint.of_files(sorted(folder.glob("*.safetensors"))), CPU)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_streamed_model_becomes_the_same_as_one_in_memory(name: str, tmp_path: Path) -> None:
    make(name).save_pretrained(tmp_path / "dense")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    home = opened(tmp_path / "dense", expected.dtype)
    assert torch.equal(logits(home.model), logits(expected))
    blocks.check_model(home.model, SETTINGS.sparsity, streamed=True)
    reports = [r for part in prune_blocks(expected, calibration(), SETTINGS) for r in part]
    expected.save_pretrained(tmp_path / "sparse")
    journal = Journal(tmp_path / "work", {}, len(home.blocks))
    walk = prune_blocks(home.model, calibration(), SETTINGS, home=home, journal=journal)
    streamed = [r for part in walk for r in part]
    assert [(r.module, r.zeros_found, r.relative_error) for r in streamed] == [
        (r.module, r.zeros_found, r.relative_error) for r in reports
    ]
    one, other = tensors_in(tmp_path / "sparse"), tensors_in(tmp_path / "work")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert all(parameter.is_meta for block in home.blocks for parameter in block.parameters())
    assert torch.equal(logits(home.model), logits(expected))
