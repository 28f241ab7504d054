# SPDX-License-Identifier: Apache-2.0
"""The setting of the paper: Llama-3.1-8B, SparseGPT at 60 %, 128 x 2048 tokens, real sources against text the model writes.

    python examples/reproduce_llama31_8b.py --output llama-study [--dry-run]

Needs a CUDA GPU that holds the model in bfloat16 (16 GB of weights), the Hub, and access to the gated model (`hf auth login`).
What is finished is kept: the same command goes on after an interruption. Calibration: each source of the table alone (C4 is one
of them), their uniform mix, Self-Cal, SGS and IGSP. The paper reports retention by capability; a study measures capabilities of
the pocket model only, so what is reported here is perplexity on WikiText-2, dense and sparse.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from optimum_calibprune.calibration.table import SOURCES
from optimum_calibprune.study.cells import Cell, grid


MODEL, SPARSITY, SAMPLES, LENGTH = "meta-llama/Llama-3.1-8B", "60%", 128, 2048
MIXES = ("single", "uniform", "self-cal", "sgs", "igsp")
ONLY_PERPLEXITY = "A study does not measure this model's capabilities: it reports perplexity on WikiText-2."


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, metavar="DIR", help="folder, new or of this study")
    parser.add_argument("--model", default=MODEL, help=f"default {MODEL}")
    parser.add_argument("--mixes", nargs="+", default=MIXES, help=f"default {' '.join(MIXES)}")
    parser.add_argument("--sparsity", nargs="+", default=[SPARSITY], help=f"default {SPARSITY.replace('%', '%%')}")
    parser.add_argument("--seeds", type=int, default=1, help="draws of each calibration set (default 1)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"default {SAMPLES}")
    parser.add_argument("--length", type=int, default=LENGTH, help=f"tokens in a sample (default {LENGTH})")
    parser.add_argument("--device", default="cuda", help="default cuda")
    parser.add_argument("--dry-run", action="store_true", help="list the cells and stop")
    return parser.parse_args(arguments)


def cells(given: argparse.Namespace) -> list[Cell]:
    """What will run: every mix at every sparsity with every seed."""
    return grid(given.mixes, list(SOURCES.values()), given.sparsity, range(given.seeds))


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    try:
        planned = cells(given)
    except ValueError as error:
        sys.exit(f"Error: {error}")
    print(f"{len(planned)} cells on {given.model}, {given.samples} x {given.length} tokens. {ONLY_PERPLEXITY}")
    if given.dry_run:
        print("\n".join(f"  {cell}" for cell in planned))
        return
    from optimum_calibprune.study.report import write_report
    from optimum_calibprune.study.runner import Study

    study = Study.open(
        given.model,
        given.output,
        mixes=given.mixes,
        sparsity=given.sparsity,
        seeds=range(given.seeds),
        samples=given.samples,
        length=given.length,
        device=given.device,
        dtype="bfloat16",
    )
    study.run(on_cell=lambda done, total, result: print(f"{done}/{total} {result.cell} {result.failed}", flush=True))
    write_report(study.folder, study.settings)
    print(f"The report is {study.folder.path / 'report.md'}.")
    if study.failed():
        sys.exit(f"{len(study.failed())} cells failed; the same command tries them again.")


if __name__ == "__main__":
    main()
