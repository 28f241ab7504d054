# SPDX-License-Identifier: Apache-2.0
"""A RunRecord made by hand, with something in every field."""

from __future__ import annotations

from optimum_calibprune.records import (
    BaseModel,
    CalibPruneConfig,
    CalibrationRow,
    CalibrationSource,
    CapabilityReport,
    CapabilityRetention,
    LayerReport,
    Mix,
    MixRule,
    PerplexityReport,
    Plan,
    PruneReport,
    RunRecord,
    SampleProfile,
    SourceProfile,
    Sparsity,
    TaskOverlap,
    TaskRetention,
    Untouched,
)


def example() -> RunRecord:
    pattern, rule = Sparsity.parse("60%"), MixRule.parse("uniform")
    untouched = (Untouched("model.embed_tokens.weight", (32, 8), "embeddings, which are never pruned"),)
    layers = (
        LayerReport(
            "model.layers.0.mlp.up_proj", (16, 8), 77, 80, "3 in dead inputs", 0.0625, 0.01, "", 64.0, 0.5, "torch"
        ),
        LayerReport(
            "model.layers.0.mlp.down_proj", (8, 16), 77, 77, "", 0.125, 0.1, "float64, damping 10%", 64.0, 0.5, "torch"
        ),
    )
    return RunRecord(
        created="2026-11-24T00:00:00+00:00",
        command="optimum-cli calibprune prune someone/tiny --sparsity 60% --output DIR",
        config=CalibPruneConfig("someone/tiny", sparsity="60%", mix=rule, samples=2, length=32, micro_batch=1),
        base=BaseModel("someone/tiny", "0123456789abcdef", "mit", ("en",), "LlamaForCausalLM", 1000),
        plan=Plan(
            model="someone/tiny",
            pattern=pattern,
            method="sparsegpt",
            mix=rule,
            sources=("c4", "notes"),
            samples=2,
            length=32,
            blocks=1,
            modules=2,
            weights=256,
            untouched=untouched,
            capabilities=("general", "code"),
            micro_batch=1,
            resident=2,
            replays=0,
            device="cpu",
            memory={"model on cpu": 2000},
            seconds=1.0,
        ),
        sources=(
            CalibrationSource("c4", "general", "allenai/c4", "en", revision="fedcba9876543210", pool={"windows": "8"}),
            CalibrationSource("notes", "code", path="notes.jsonl", licence="MIT", upper_bound=True),
        ),
        profiles=(
            SourceProfile("c4", "general", 1, 20.0, 0.125, 0.001, 0.5, 4.0, 1.5, 3.0),
            SourceProfile("notes", "code", 1, 5.0, 0.5, 0.002, 0.25, 3.0, 2.5, 1.5),
        ),
        mix=Mix(
            rule, {"c4": 1, "notes": 1}, {"c4": 0.5, "notes": 0.5}, "remainders, where there are any, go first to c4"
        ),
        samples=(
            SampleProfile(20.0, 0.125, 0.001, 32, 0.5, 4.0, 1.5, 3.0),
            SampleProfile(5.0, 0.5, 0.002, 32, 0.25, 3.0, 2.5, 1.5),
        ),
        rows=(CalibrationRow("c4", 3, "general"), CalibrationRow("notes", 0, "code")),
        fingerprint="ab" * 32,
        prune=PruneReport(pattern, "sparsegpt", layers, untouched, 1, 2, 0),
        capabilities=CapabilityReport(
            (
                CapabilityRetention("general", 400, 0.25, 0.8, 0.6, 0.75, (0.7, 0.8), 0.636),
                CapabilityRetention("code", 2, 0.0, 0.5, 0.1, 0.2, (0.0, 0.5), 0.2),
            ),
            0.475,
            (0.4, 0.55),
            "code",
            {"math": "no suite"},
        ),
        perplexity=PerplexityReport("WikiText-2", 32, 6400, 6.25, 9.5),
        versions={"optimum-calibprune": "0.1.0", "torch": "2.13.0"},
        hardware={"cores": "2"},
        seconds={"prune": 1.25},
        peak_memory=2**30,
        overlaps=(TaskOverlap("some_code", 400, 3, 12, {"c4": 3, "notes": 40}),),
        tasks=(
            TaskRetention(
                *("easy_facts", "general", "accuracy", 300, 0.9, 0.7, 5, "some/facts, test", 0.25, "some/facts"),
                *(0.7778, (0.72, 0.83)),
            ),
            TaskRetention("hard_facts", "general", "acc", 100, 0.3, 0.3, 0, "some/facts, test", 0.25, "some/facts"),
            TaskRetention("functions", "code", "pass@1", 2, 0.5, 0.1, 3, "functions.jsonl", 0.0, "", 0.2, (0.0, 0.5)),
        ),
    )
