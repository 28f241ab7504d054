# SPDX-License-Identifier: Apache-2.0
"""A trained model from outside, stories260K: what pruning with one half of its text costs on the other half."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_calibprune.calibration.measure import mean_nll
from optimum_calibprune.pruning import schedule
from optimum_calibprune.records import CalibrationRow, CalibrationSet, LayerReport, SparsityPattern


FOLDER = Path(__file__).resolve().parents[2] / "../shared/models/stories260K"
LENGTH, SAMPLES = 256, 64
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"needs the model stories260K in {FOLDER}")


@cache
def halves() -> tuple[np.ndarray, np.ndarray]:
    """Windows `[windows, LENGTH]` of the first and of the second half of the stories, as the model was trained: each
    story begins with the beginning-of-sequence token, and so does each window."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = (FOLDER / "tinystories_sample.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    middle = len(stories) // 2
    begin = tokenizer.bos_token_id

    def windows(part: list[str]) -> np.ndarray:
        ids = [i for story in part for i in (begin, *tokenizer(story, add_special_tokens=False)["input_ids"])]
        body = np.array(ids[: len(ids) // (LENGTH - 1) * (LENGTH - 1)]).reshape(-1, LENGTH - 1)
        return np.concatenate([np.full((len(body), 1), begin), body], axis=1)

    return windows(stories[:middle]), windows(stories[middle:])


def load() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


def perplexity(model: PreTrainedModel) -> float:
    """On the second half, over tokens 2..length of each window."""
    return float(np.exp(mean_nll(model, halves()[1]).mean()))


def prune(asked: str, method: str, sequential: str = "module") -> tuple[PreTrainedModel, list[LayerReport]]:
    """stories260K, calibrated on the first half."""
    ids = halves()[0][:SAMPLES]
    rows = tuple(CalibrationRow("stories", i, "general") for i in range(len(ids)))
    settings = schedule.Settings(SparsityPattern.parse(asked), method, sequential=sequential, micro_batch=8)
    model = load()
    walk = schedule.prune_blocks(model, CalibrationSet(ids, rows), settings)
    return model, [report for block in walk for report in block]


@cache
def dense_perplexity() -> float:
    return perplexity(load())


@cache
def rise(asked: str, method: str, sequential: str = "module") -> float:
    """How much perplexity rises over that of the dense model."""
    return perplexity(prune(asked, method, sequential)[0]) - dense_perplexity()


def test_the_dense_model_reads_its_stories_as_well_as_it_should() -> None:
    assert 5.4 < dense_perplexity() < 6.0


@pytest.mark.parametrize("sequential", ["module", "block"])
def test_at_half_sparsegpt_costs_a_third_of_magnitude_at_most(sequential: str) -> None:
    assert 0 < rise("50%", "sparsegpt", sequential) <= rise("50%", "magnitude") / 3


@pytest.mark.parametrize("asked", ["50%", "2:4"])
def test_sparsegpt_costs_less_than_wanda_and_wanda_less_than_magnitude(asked: str) -> None:
    assert rise(asked, "sparsegpt") < rise(asked, "wanda") < rise(asked, "magnitude")


@pytest.mark.parametrize("asked", ["50%", "2:4"])
def test_half_of_the_weights_of_every_linear_layer_is_zero(asked: str) -> None:
    model, reports = prune(asked, "sparsegpt")
    assert len(reports) == 5 * 7
    for report in reports:
        weight = model.get_submodule(report.module).weight
        assert int((weight == 0).sum()) == report.zeros_found == report.zeros_asked == weight.numel() // 2
        assert (report.rescue, report.damping) == ("", 0.01)
        assert 0 < report.relative_error < 0.2
