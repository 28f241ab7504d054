# SPDX-License-Identifier: Apache-2.0
"""The table of calibration sources on the Hub; all are plain files, none needs a script."""

from __future__ import annotations

from ..records import CalibrationSource


# A licence stands here where it is known from elsewhere than memory; where none does, a run takes the one that the data set's
# card states. Revisions are resolved by a run.
SOURCES: dict[str, CalibrationSource] = {
    source.name: source
    for source in (
        CalibrationSource("c4", "general", "allenai/c4", "en", licence="odc-by"),
        CalibrationSource("fineweb_edu", "general", "HuggingFaceFW/fineweb-edu", "sample-10BT", licence="odc-by"),
        CalibrationSource("dclm", "general", "mlfoundations/dclm-baseline-1.0-parquet"),
        CalibrationSource(
            "wikitext2", "general", "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", text="{page}"
        ),
        CalibrationSource(
            "ultrachat", "general", "HuggingFaceH4/ultrachat_200k", split="train_sft", text="chat:messages"
        ),
        CalibrationSource(
            "dolly", "general", "databricks/databricks-dolly-15k", text="instruction", licence="cc-by-sa-3.0"
        ),
        CalibrationSource("arc", "general", "allenai/ai2_arc", "ARC-Easy", text="arc"),
        CalibrationSource("winogrande", "commonsense", "allenai/winogrande", "winogrande_xl", text="winogrande"),
        CalibrationSource("hellaswag", "commonsense", "Rowan/hellaswag", text="hellaswag"),
        CalibrationSource("piqa", "commonsense", "baber/piqa", text="piqa", licence="afl-3.0"),
        CalibrationSource("commonsense_qa", "commonsense", "tau/commonsense_qa", text="arc", licence="mit"),
        CalibrationSource("evol_codealpaca", "code", "theblackcat102/evol-codealpaca-v1", text="instruction"),
        CalibrationSource("code_alpaca", "code", "sahil2801/CodeAlpaca-20k", text="instruction"),
        CalibrationSource("mbpp", "code", "google-research-datasets/mbpp", "full", text="mbpp", licence="cc-by-4.0"),
        CalibrationSource("python", "code", "codeparrot/codeparrot-clean", text="permissive_code"),
        CalibrationSource("gsm8k", "math", "openai/gsm8k", "main", text="gsm8k", licence="mit"),
        CalibrationSource("metamath", "math", "meta-math/MetaMathQA", text="{query}\n\n{response}"),
        CalibrationSource(
            "hendrycks_math",
            "math",
            "EleutherAI/hendrycks_math",
            "algebra+counting_and_probability+geometry+intermediate_algebra+number_theory+prealgebra+precalculus",
            text="{problem}\n\n{solution}",
        ),
        CalibrationSource("open_web_math", "math", "open-web-math/open-web-math", licence="odc-by"),
    )
}
