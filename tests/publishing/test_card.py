# SPDX-License-Identifier: Apache-2.0
"""The card is a pure function of the RunRecord: the whole text is compared with a golden file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from optimum_calibprune.publishing.card import render, retention_table, starved_experts
from optimum_calibprune.records import (
    CalibrationSource,
    CapabilityReport,
    CapabilityRetention,
    RunRecord,
    Sparsity,
    Untouched,
)
from tests.publishing.run_record import example


GOLDEN = Path(__file__).parent / "golden_card.md"


@pytest.fixture
def run() -> RunRecord:
    return example()


def test_the_record_survives_json(run: RunRecord) -> None:
    assert RunRecord.from_json(run.to_json()) == run


def test_the_whole_card_is_as_it_was_approved(run: RunRecord) -> None:
    """After a change that is meant, write `render(example(), "me/tiny-60")` to golden_card.md and read the difference."""
    assert render(run, "me/tiny-60") == GOLDEN.read_text(encoding="utf-8")


def test_sparsity_by_module_is_named_by_its_share_and_listed(run: RunRecord) -> None:
    asked = Sparsity.parse("*.gate_proj=dense,*.mlp.*=60.2%,*=50%")
    left = Untouched("model.layers.0.mlp.gate_proj.weight", (16, 8), "left dense, as asked by '*.gate_proj'")
    prune = replace(run.prune, pattern=asked, untouched=(*run.prune.untouched, left))
    by_module = replace(run, config=replace(run.config, sparsity=asked), prune=prune)
    text = render(by_module)
    assert RunRecord.from_json(by_module.to_json()) == by_module
    assert "# someone/tiny at 40.1%\n" in text, "154 of 384 weights, those left dense among them"
    assert f"pruned to 40.1% sparsity (`{asked}`) with SparseGPT" in text
    folded = text.partition("<details>")[2].partition("</details>")[0]
    assert f"\n\nThe first pattern that fits a module's name says its sparsity: `{asked}`.\n\n| module " in folded
    assert "- model.layers.0.mlp.gate_proj.weight: left dense, as asked by '*.gate_proj'\n" in folded


def test_owl_is_named_with_what_it_asked_of_the_modules(run: RunRecord) -> None:
    up, down = run.prune.layers
    prune = replace(run.prune, layers=(replace(up, zeros_asked=64), replace(down, zeros_asked=90)))
    text = render(replace(run, config=replace(run.config, allocation="owl"), prune=prune))
    assert (
        "weights are zero (61.33 %). Blocks with more outliers lose less (OWL, arXiv:2310.05175): of a matrix 50.0 % to "
        "70.3 % were asked, in total as many as without it.\n\nHessians that" in text
    )


def test_the_metadata_is_valid_and_claims_nothing_of_the_base(run: RunRecord) -> None:
    data = ModelCard(render(run)).data
    assert data.base_model == "someone/tiny"
    assert data.license == "mit"
    assert data.datasets == ["allenai/c4"]
    assert {"calibprune", "sparse"} <= set(data.tags)
    assert {r.dataset_name: r.metric_value for r in data.eval_results} == {
        "general (400 items)": 0.6,
        "code (2 items)": 0.1,
    }


def test_a_section_without_data_does_not_appear(run: RunRecord) -> None:
    bare = replace(run, capabilities=None, perplexity=None)
    text = render(bare)
    assert "What was kept" not in text
    assert "## Perplexity" not in text
    assert "None" not in text
    assert "\n\n\n\n" not in text


def test_a_local_base_model_is_no_hub_link(run: RunRecord) -> None:
    text = render(replace(run, base=replace(run.base, name="my-model", revision=None)))
    assert "base_model" not in text
    assert "https://huggingface.co/my-model" not in text


def test_text_that_the_model_wrote_says_so_and_how(run: RunRecord) -> None:
    pool = {"sampling": "t_initial 0.7, t_final 0.7", "documents": "12", "seed": "3", "windows": "8"}
    written = CalibrationSource("notes", "code", written="proposals", pool=pool)
    text = render(replace(run, sources=(run.sources[0], written)))
    row = next(line for line in text.splitlines() if line.startswith("| notes "))
    assert "| written by the model: t_initial 0.7, t_final 0.7, documents 12, seed 3 |" in row
    assert "| the model's own text |" in row


def test_undefined_retention_says_so(run: RunRecord) -> None:
    at_chance = CapabilityRetention("math", 4, 0.25, 0.25, 0.25, None, None, None)
    report = CapabilityReport((at_chance,), None, None, None, {"code": "nobody asked"})
    text = render(replace(run, capabilities=report))
    assert "undefined: dense is at chance" in text
    assert "Not measured:\n\n- code: nobody asked" in text
    assert ["math", "25.0 %", "25.0 %", "undefined: dense is at chance", ""] in retention_table(
        replace(run, capabilities=report)
    )


def test_every_python_line_compiles(run: RunRecord) -> None:
    text = render(run, "me/tiny-60")
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert '"me/tiny-60"' in code


def of_experts(run: RunRecord, count: int, starved: int) -> RunRecord:
    """A run whose layers are those of `count` experts, the first `starved` of which saw too few tokens."""
    up, down = run.prune.layers
    layers = [
        replace(
            layer,
            module=layer.module.replace("mlp.", f"mlp.experts.{expert}."),
            relative_error=expert / 1000,
            routed=expert,
            starved=expert < starved,
            rescue="",
        )
        for expert in range(count)
        for layer in (up, down)
    ]
    return replace(run, prune=replace(run.prune, layers=tuple(layers)))


def test_the_experts_of_a_layer_share_a_row(run: RunRecord) -> None:
    text = render(of_experts(run, 256, 0))
    rows = [line for line in text.splitlines() if "experts" in line]
    assert rows == [
        "| model.layers.0.mlp.experts.*.up_proj, 256 experts | 16 x 8 | 20480 | 19712 | 0.1275 (at most 0.2550) |",
        "| model.layers.0.mlp.experts.*.down_proj, 256 experts | 8 x 16 | 19712 | 19712 | 0.1275 (at most 0.2550) |",
    ]


def test_starved_experts_are_counted_and_the_first_of_them_named(run: RunRecord) -> None:
    assert starved_experts(run) == ""
    assert starved_experts(of_experts(run, 4, 2)) == (
        "2 of 4 experts were sent too few tokens for one of their matrices, which was pruned for all tokens of its layer: "
        "model.layers.0.mlp.experts.0, model.layers.0.mlp.experts.1."
    )
    text = render(of_experts(run, 1500, 1200))
    assert "1,200 of 1,500 experts were sent too few tokens" in text
    assert "model.layers.0.mlp.experts.9, and 1,190 more." in text
