# SPDX-License-Identifier: Apache-2.0
"""The table of calibration sources on the Hub; all are plain files, none needs a script."""

from __future__ import annotations

from ..records import CalibrationSource


# Licences and revisions are not repeated here: the data set's own card states the one, a run resolves the other.
SOURCES: dict[str, CalibrationSource] = {
    source.name: source
    for source in (
        CalibrationSource("c4", "general", "allenai/c4", "en"),
        CalibrationSource(
            "wikitext2", "general", "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", text="{page}"
        ),
        CalibrationSource(
            "ultrachat", "general", "HuggingFaceH4/ultrachat_200k", split="train_sft", text="chat:messages"
        ),
        CalibrationSource("arc", "general", "allenai/ai2_arc", "ARC-Easy", text="arc"),
        CalibrationSource("winogrande", "commonsense", "allenai/winogrande", "winogrande_xl", text="winogrande"),
        CalibrationSource("hellaswag", "commonsense", "Rowan/hellaswag", text="hellaswag"),
        CalibrationSource("piqa", "commonsense", "baber/piqa", text="piqa"),
        CalibrationSource(
            "evol_codealpaca", "code", "theblackcat102/evol-codealpaca-v1", text="{instruction}\n\n{output}"
        ),
        CalibrationSource("mbpp", "code", "google-research-datasets/mbpp", "full", text="mbpp"),
        CalibrationSource("gsm8k", "math", "openai/gsm8k", "main", text="gsm8k"),
        CalibrationSource(
            "hendrycks_math", "math", "EleutherAI/hendrycks_math", "algebra", text="{problem}\n\n{solution}"
        ),
    )
}
