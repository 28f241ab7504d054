# SPDX-License-Identifier: Apache-2.0
"""What a model has written is found again under the same fingerprint only, and a damaged file is not believed."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.normalizers import Lowercase
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from optimum_calibprune import pocket
from optimum_calibprune.calibration import store


IDS = np.arange(12).reshape(3, 4)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path))


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=32))


def test_what_was_saved_is_loaded_with_its_notes() -> None:
    assert store.load("a" * 64) is None
    store.save("a" * 64, IDS, {"documents": "7"})
    found = store.load("a" * 64)
    assert found is not None
    assert np.array_equal(found[0], IDS)
    assert found[0].dtype == np.int64
    assert found[1] == {"documents": "7"}
    assert [path.name for path in store.place("a" * 64).parent.iterdir()] == ["a" * 64 + ".safetensors"]


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "text"])
def test_a_damaged_file_is_named_and_not_used(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    store.save("b" * 64, IDS, {})
    path = store.place("b" * 64)
    content = path.read_bytes()
    damaged = {"cut": content[:-5], "empty": b"", "flipped": content[:-1] + b"\x07", "text": b"no such thing" * 9}
    path.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING):
        assert store.load("b" * 64) is None
    assert "is damaged" in caplog.text
    store.save("b" * 64, IDS, {})
    assert store.load("b" * 64) is not None


def test_a_cache_that_cannot_be_written_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store, "place", lambda key: tmp_path / "gone" / key)
    with caplog.at_level(logging.WARNING):
        store.save("c" * 64, IDS, {})
    assert "could not be kept" in caplog.text


def test_the_fingerprint_follows_weights_tokenizer_and_settings() -> None:
    model, tokenizer = tiny(), AutoTokenizer.from_pretrained(pocket.MODEL)
    first = store.fingerprint(model, tokenizer, seed=0)
    assert store.fingerprint(tiny(), tokenizer, seed=0) == first
    assert store.fingerprint(model, tokenizer, seed=1) != first
    assert store.fingerprint(model.to(torch.bfloat16), tokenizer, seed=0) != first
    changed = tiny()
    with torch.no_grad():
        changed.model.norm.weight[3] += 1e-6
    assert store.fingerprint(changed, tokenizer, seed=0) != first
    tokenizer("a text", truncation=True, max_length=1)
    assert store.fingerprint(tiny(), tokenizer, seed=0) == first, "that was for one call"
    before = tokenizer.get_vocab()
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    lowercase = store.fingerprint(tiny(), tokenizer, seed=0)
    assert (tokenizer.get_vocab(), lowercase != first) == (before, True)
    tokenizer.add_tokens(["another"])
    assert store.fingerprint(tiny(), tokenizer, seed=0) != lowercase
    assert store.fingerprint(tiny(), tokenizer, seed=0) != first
