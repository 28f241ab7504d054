# SPDX-License-Identifier: Apache-2.0
"""A trained model from outside, stories260K: what pruning with one half of its text costs on the other half."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_calibprune.calibration.measure import mean_nll
from optimum_calibprune.pruning import schedule
from optimum_calibprune.records import CalibrationRow, CalibrationSet, LayerReport, SparsityPattern


FOLDER = Path(__file__).resolve().parents[2] / "../shared/models/stories260K"
LENGTH = 256
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


@cache
def dense_perplexity() -> float:
    return perplexity(load())


@dataclass(frozen=True)
class Run:
    """`rise` is what perplexity rises by over the dense model's; `zeros` is counted in the pruned model itself."""

    rise: float
    reports: tuple[LayerReport, ...]
    zeros: dict[str, float]


@cache
def run(asked: str, method: str) -> Run:
    """stories260K, calibrated on the first half."""
    ids = halves()[0]
    rows = tuple(CalibrationRow("stories", i, "general") for i in range(len(ids)))
    settings = schedule.Settings(SparsityPattern.parse(asked), method, micro_batch=16)
    model = load()
    walk = schedule.prune_blocks(model, CalibrationSet(ids, rows), settings)
    reports = tuple(report for block in walk for report in block)
    linears = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    zeros = {name: float((weight == 0).double().mean()) for name, weight in linears.items()}
    return Run(perplexity(model) - dense_perplexity(), reports, zeros)


def test_the_dense_model_reads_its_stories_as_well_as_it_should() -> None:
    assert 5.4 < dense_perplexity() < 6.0


@pytest.mark.parametrize(("asked", "share"), [("50%", 0.42), ("2:4", 1 / 3)])
def test_sparsegpt_costs_a_fraction_of_what_magnitude_costs(asked: str, share: float) -> None:
    """Measured: 0.39 at 50 % (perplexity 24.4 against 53.8, dense 5.6), 0.29 at 2:4."""
    assert 0 < run(asked, "sparsegpt").rise <= share * run(asked, "magnitude").rise


@pytest.mark.xfail(
    strict=True, reason="the rise is 0.39 of magnitude's; docs/log.md says what would bring it below a third"
)
def test_sparsegpt_costs_at_most_a_third_of_what_magnitude_costs() -> None:
    assert run("50%", "sparsegpt").rise <= run("50%", "magnitude").rise / 3


@pytest.mark.parametrize("asked", ["50%", "2:4"])
def test_wanda_lies_between_sparsegpt_and_magnitude(asked: str) -> None:
    assert run(asked, "sparsegpt").rise < run(asked, "wanda").rise < run(asked, "magnitude").rise


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("asked", ["50%", "2:4"])
def test_half_of_every_linear_layer_is_zero_and_the_head_is_dense(asked: str, method: str) -> None:
    done = run(asked, method)
    pruned = {report.module for report in done.reports}
    assert len(pruned) == 5 * 7
    assert all(share == (0.5 if name in pruned else 0.0) for name, share in done.zeros.items())
    assert set(done.zeros) - pruned == {"lm_head"}
    for report in done.reports:
        assert report.zeros_found == report.zeros_asked == report.shape[0] * report.shape[1] // 2
        assert (report.rescue, report.why) == ("", "")
