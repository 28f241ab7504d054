# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of the solver run where there is nothing but torch, transformers, safetensors and what these need (and
psutil, which tells the free memory of a CPU)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
BARE = """
import sys
for name in ("datasets", "optimum", "lm_eval", "evaluate", "accelerate", "greenlet", "jinja2", "matplotlib"):
    sys.modules[name] = None  # as if it were not installed
sys.path[:0] = [{benchmarks!r}, {root!r}]
import torch
import end_to_end, solver
from optimum_calibprune.pruning import forward
assert forward.Forward is forward.ThreadForward

shape = dict(hidden_size=32, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
job = end_to_end.Job(shape | dict(num_hidden_layers=2, vocab_size=64), 3, 16, "0.6", torch.device("cpu"), 2)
seconds, extra, reports = end_to_end.run_ours(job)
theirs = end_to_end.run_published(job, 2)[2]
for name, error in theirs.items():
    ours = next(report.relative_error for report in reports if report.module == name)
    assert abs(ours / error - 1) < 0.1, (name, ours, error)
assert set(end_to_end.stages(job)) >= {{"forward", "Hessian", "factor", "select", "sweep"}}
found = solver.compare(40, 256, "2:4", torch.device("cpu"), 1, solver.Path("/none"))
assert found["checks"]["zeros"]["ours"] == found["checks"]["zeros wanted"] == 40 * 128
assert solver.count_launches("0.6", torch.device("cpu"), solver.Path("/none"))["published"]["launches"] > 1000
"""


def test_the_benchmarks_need_nothing_of_ours_but_the_pruning_rooms(tmp_path: Path) -> None:
    code = BARE.format(benchmarks=str(ROOT / "benchmarks"), root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
