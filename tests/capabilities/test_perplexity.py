# SPDX-License-Identifier: Apache-2.0
"""Perplexity on a text, against a plain computation; a text that cannot be had is a reason, not a crash."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from optimum_calibprune import CalibPruneConfig, CalibPruner, pocket
from optimum_calibprune.capabilities import perplexity
from optimum_calibprune.choices import choose_perplexity_text
from optimum_calibprune.records import CalibrationSource


def test_it_is_that_of_plain_windows(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket.MODEL)
    model = AutoModelForCausalLM.from_pretrained(pocket.MODEL, dtype="float32")
    lines = Path(str(pocket.sources()["piqa"].path)).read_text().splitlines()[:60]
    paragraphs = [json.loads(line)["text"] for line in lines]
    (tmp_path / "text.txt").write_text("\n\n".join(paragraphs))
    source = CalibrationSource("text", "general", path=str(tmp_path / "text.txt"))
    found = perplexity.read(source, tokenizer, 128)
    ids = tokenizer("\n\n".join(paragraphs), return_tensors="pt")["input_ids"][0]
    windows = ids[: len(ids) // 128 * 128].view(-1, 128)
    assert torch.equal(torch.from_numpy(found.windows), windows)
    with torch.no_grad():
        losses = [float(model(input_ids=w[None], labels=w[None]).loss) for w in windows]
    assert perplexity.perplexity(model, found.windows) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found.report.tokens == windows.numel()


def test_wikitext_that_cannot_be_had_is_a_reason() -> None:
    found = perplexity.read(perplexity.WIKITEXT2, AutoTokenizer.from_pretrained(pocket.MODEL), 128)
    assert found.windows is None
    assert found.report.dense is None
    assert "HF_HUB_OFFLINE" in found.report.reason


def test_a_local_wikitext_is_the_text_of_the_protocol(tmp_path: Path) -> None:
    """The rows of the Hub's set, of which many are empty, joined by blank lines, in windows of 2048 tokens."""
    lines = ["", " = Title = \n", "", *[f" Sentence number {i} , as it stands there . \n" for i in range(500)], ""]
    (tmp_path / "wikitext2_test.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (tmp_path / "piqa.jsonl").write_text('{"goal": "Sit", "sol1": "a", "sol2": "b", "label": 1}\n')
    tokenizer = AutoTokenizer.from_pretrained(pocket.MODEL)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=2048, max_position_embeddings=4096))
    config = CalibPruneConfig("mine", samples=8, length=64, mix="single:gsm8k", task_data=tmp_path, tasks="piqa")
    pruner = CalibPruner(model, tokenizer, config, sources=[pocket.sources()["gsm8k"]])
    found = pruner._measuring.text()
    ids = tokenizer("\n\n".join(lines), return_tensors="pt")["input_ids"][0]
    assert len(ids) > 2 * 2048
    assert found.windows.shape[1] == 2048
    assert found.windows.flatten().tolist() == ids[: found.windows.size].tolist()
    assert found.report.text == "WikiText-2, wikitext2_test.jsonl"
    assert pruner._measuring.named_text is None, "the recorded command names the folder alone"
    (tmp_path / "wikitext2_test.jsonl").unlink()
    assert choose_perplexity_text(config, None) == perplexity.WIKITEXT2


@pytest.mark.parametrize(
    ("text", "message"), [('{"text": "short"}', "fewer than one window"), ('{"x": 1}', "does not fit")]
)
def test_a_file_that_the_user_named_must_do(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "f.jsonl").write_text(text + "\n")
    source = CalibrationSource("f", "general", path=str(tmp_path / "f.jsonl"))
    with pytest.raises(ValueError, match=message):
        perplexity.read(source, AutoTokenizer.from_pretrained(pocket.MODEL), 128)
