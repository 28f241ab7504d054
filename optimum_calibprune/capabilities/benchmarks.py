# SPDX-License-Identifier: Apache-2.0
"""The field's benchmarks: which of lm-eval's tasks stand for a capability, and how each is reported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..records import CAPABILITIES, unknown


DRAW = 0  # seed of the items of a task that is limited: the same ones for every model


@dataclass(frozen=True)
class Benchmark:
    """A task of lm-eval, computed as its own YAML file says.

    `config` is that file (a pattern where one task is many), below lm-eval's tasks or a user's own; `metric` is the key of its
    result, `"acc"` or `"exact_match,strict-match"` (with the filter, where there are several), or `"pass@1"`, which our own
    sandbox measures. `shots` None leaves their number to the file. `chance` is that of most items; what is reported is the
    mean over the items. `limit` is the number of items, drawn by a fixed seed; None means all of them. `data` is a folder
    with local files: see `task_data.py`.
    """

    name: str
    capability: str
    config: str
    metric: str = ""
    repo: str = ""
    shots: int | None = None
    chance: float = 0.0
    limit: int | None = None
    data: Path | None = None

    @property
    def runs_code(self) -> bool:
        return self.metric == "pass@1"


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("mmlu", "general", "mmlu/default/mmlu_*.yaml", "acc", "cais/mmlu", 5, 0.25),
        Benchmark("arc_easy", "general", "arc/arc_easy.yaml", "acc", "allenai/ai2_arc", 0, 0.25),
        Benchmark("arc_challenge", "general", "arc/arc_challenge.yaml", "acc_norm", "allenai/ai2_arc", 0, 0.25),
        Benchmark("boolq", "general", "super_glue/boolq/default.yaml", "acc", "aps/super_glue", 0, 0.5),
        Benchmark("sciq", "general", "sciq/sciq.yaml", "acc", "allenai/sciq", 0, 0.25),
        Benchmark("hellaswag", "commonsense", "hellaswag/hellaswag.yaml", "acc_norm", "Rowan/hellaswag", 0, 0.25),
        Benchmark("winogrande", "commonsense", "winogrande/default.yaml", "acc", "allenai/winogrande", 0, 0.5),
        Benchmark("piqa", "commonsense", "piqa/piqa.yaml", "acc", "baber/piqa", 0, 0.5),
        Benchmark("commonsense_qa", "commonsense", "commonsense_qa/default.yaml", "acc", "tau/commonsense_qa", 0, 0.2),
        Benchmark("humaneval", "code", "humaneval/humaneval.yaml", "pass@1", "openai/openai_humaneval", 0),
        Benchmark("mbpp", "code", "mbpp/mbpp.yaml", "pass@1", "google-research-datasets/mbpp", 3),
        Benchmark("gsm8k", "math", "gsm8k/gsm8k.yaml", "exact_match,strict-match", "openai/gsm8k", 5),
        Benchmark(
            "minerva_math500", "math", "minerva_math/minerva_math500.yaml", "exact_match", "HuggingFaceH4/MATH-500", 4
        ),
    )
}
SUITES = {"quick": 200, "full": None}  # items of each benchmark


def find(name: str, others: tuple[str, ...] = ()) -> Benchmark:
    """A benchmark by its name, or a user's own: `FILE.yaml`, or `FILE.yaml:CAPABILITY` where it is not general."""
    path, _, capability = name.rpartition(":") if ".yaml:" in name or ".yml:" in name else (name, "", "general")
    if Path(path).suffix in (".yaml", ".yml"):
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no file {path!r}, of which a task of lm-eval was expected.")
        if capability not in CAPABILITIES:
            raise unknown(f"capability of the task {path!r}", capability, CAPABILITIES)
        return Benchmark(Path(path).stem, capability, str(Path(path).resolve()))
    if name not in BENCHMARKS:
        raise unknown("task", name, (*BENCHMARKS, *others, "FILE.yaml:CAPABILITY"))
    return BENCHMARKS[name]
