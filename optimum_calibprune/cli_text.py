# SPDX-License-Identifier: Apache-2.0
"""Records as a person reads them in a terminal: a plan, and rows of the tables of sources and profiles."""

from __future__ import annotations

from .records import CalibrationSource, Plan, SourceProfile


PROFILE_HEADER = (
    *("source", "capability", "share", "perplexity", "entropy", "duplicates", "collisions"),
    *("types", "bits", "zip"),
)
PROFILE_LEGEND = (
    "entropy: under the model, nats a token; duplicates, collisions: of 4-grams; types: type-token ratio;\n"
    "bits: unigram entropy, bits a token; zip: compression ratio of the text."
)


def plan_text(plan: Plan) -> str:
    """The plan as a person reads it before a run."""
    reasons: dict[str, int] = {}
    for entry in plan.untouched:
        reasons[entry.reason] = reasons.get(entry.reason, 0) + 1
    dense = "; ".join(f"{count} x {reason}" for reason, count in reasons.items()) or "none"
    experts = f", with those of {plan.experts:,} experts," if plan.experts else ""
    owl = ["  allocation     owl: blocks with more outliers lose less, the total is the same"]
    forward = "one forward" if plan.replays == 0 else f"{plan.replays} replays a block"
    return "\n".join(
        [
            f"Prune {plan.model} to {plan.pattern} with {plan.method}, calibrated on {plan.samples} x {plan.length} tokens",
            *(owl if plan.allocation == "owl" else []),
            f"  mix            {plan.mix} of {', '.join(plan.sources)}",
            *(
                [f"  written        {plan.written:,} tokens by the model itself, kept for the next run"]
                if plan.written
                else []
            ),
            f"  pruned         {plan.modules:,} linear layers{experts} in {plan.blocks} blocks, {plan.weights:,} weights",
            f"  left dense     {dense}",
            f"  arithmetic     micro-batches of {plan.micro_batch}, {forward}, on {plan.device}",
            *(["  weights        on disk, read block by block"] if plan.streamed else []),
            *(f"  memory         {size / 2**20:,.0f} MiB {place}" for place, size in plan.memory.items()),
            f"  measured       {', '.join(plan.capabilities) or 'no capability'}",
            f"  pruning takes  about {plan.seconds:,.0f} s",
        ]
    )


def source_row(source: CalibrationSource) -> list[str]:
    if source.path is not None:
        bound = ", upper bound: made by the generator of the probes" if source.upper_bound else ""
        return [source.name, source.capability, f"bundled with pocket{bound}", source.licence or ""]
    where = " ".join(filter(None, (source.repo, source.subset, source.split)))
    return [source.name, source.capability, where, source.licence or "see the data set's card"]


def profile_row(profile: SourceProfile, share: float) -> list[str]:
    return [
        profile.name,
        profile.capability,
        f"{100 * share:.1f} %",
        f"{profile.perplexity:.2f}",
        f"{profile.model_entropy:.2f}",
        f"{100 * profile.duplicate_rate:.1f} %",
        f"{profile.collision_probability:.2e}",
        f"{profile.type_token_ratio:.3f}",
        f"{profile.unigram_entropy:.2f}",
        f"{profile.compression_ratio:.2f}",
    ]
