# SPDX-License-Identifier: Apache-2.0
"""The study behind docs/study.md: 15 real sources, every kind of mix, and a curve over sparsities, on the pocket model.

    python benchmarks/study.py --data DIR --output DIR [--workers 2]

`--data` is a folder of NAME.jsonl files (`{"text": ...}` a line), one for each name below. Everything that was finished is
kept: the same command goes on after an interruption. The probes are written first, 2000 items of each capability.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from optimum_calibprune.records import CalibrationSource
from optimum_calibprune.study.cells import CellResult
from optimum_calibprune.study.report import write_report
from optimum_calibprune.study.runner import Study


ITEMS, PROBE_SEED = 2000, 2024
SOURCES = {
    "general": ("c4", "openwebtext", "wikitext2", "textbooks", "dolly", "arc"),
    "commonsense": ("piqa", "winogrande", "commonsense_qa"),
    "code": ("thealgorithms", "codegen_instruct", "mbpp"),
    "math": ("gsm8k", "algebra_textbook", "mathematics"),
}
GENERATED = ("pocket_general", "pocket_commonsense", "pocket_code", "pocket_math")
# Options in a mix's text are those that its own search found best (docs/log.md); a bare name is its default.
TUNED_SELF_CAL, TUNED_SGS = "self-cal:t_initial=0.65,t_final=0.65", "sgs:prefix=1"
TABLE = (
    *("single", "uniform", "igsp", "self-cal", TUNED_SELF_CAL, "sgs", TUNED_SGS),
    *("igsp@all", "cola", "balanced", "mixcal", f"uniform@{','.join(GENERATED)}"),
)
CURVE = ("uniform", "igsp", "single:c4")
EQUAL = "code=1,math=1"  # IGSP with as many samples for each capability
ABLATIONS = (f"igsp:{EQUAL}", f"igsp:oversample=1,{EQUAL}", f"igsp:level=0,imbalance=0.1,{EQUAL}", "balanced:worst=1")
SPARSITY, OTHERS = "50%", ("30%", "40%", "60%", "70%")


def source(data: Path, name: str, capability: str) -> CalibrationSource:
    return CalibrationSource(name, capability, path=str(data / f"{name}.jsonl"))


def write_probes(folder: Path) -> Path:
    script = Path(__file__).parents[1] / "examples" / "pocket" / "probes.py"
    arguments = ["--items", str(ITEMS), "--seed", str(PROBE_SEED), "--output", str(folder)]
    subprocess.run([sys.executable, str(script), *arguments], check=True)
    return folder


def say(done: int, total: int, result: CellResult) -> None:
    print(f"{done}/{total} {result.cell} {result.failed}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of NAME.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="folder for the probes and the study")
    parser.add_argument("--seeds", type=int, default=5, help="draws of each calibration set at 50 %%")
    parser.add_argument(
        "--curve-seeds", type=int, default=3, help="draws of each calibration set at the other sparsities"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    given = parser.parse_args()
    real = [source(given.data, name, capability) for capability, names in SOURCES.items() for name in names]
    probes = write_probes(given.output / "probes")

    def run(mixes: tuple[str, ...], sparsity: tuple[str, ...], seeds: int) -> dict:
        study = Study.open(
            "pocket",
            given.output / "study",
            sources=[*real, *GENERATED],
            mixes=mixes,
            sparsity=sparsity,
            seeds=range(seeds),
            probes=probes,
        )
        study.run(workers=given.workers, on_cell=say)
        return write_report(study.folder, study.settings)

    table = run(TABLE, (SPARSITY,), given.seeds)
    singles = [row for row in table["mixes"] if row["mix"].startswith("single:") and row["pattern"] == SPARSITY]
    best = max(singles, key=lambda row: row["total"])["mix"]
    run((*CURVE, best), OTHERS, given.curve_seeds)
    run(ABLATIONS, (SPARSITY,), given.seeds)


if __name__ == "__main__":
    main()
