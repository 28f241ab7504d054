# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["optimum-calibprune[triton]", "torch>=2.10"]
# ///
"""Prune a model on rented hardware, and push the result: for those who have no GPU that holds it.

    hf jobs uv run --flavor a100-large --timeout 4h --secrets HF_TOKEN examples/prune_job.py \\
        meta-llama/Llama-3.1-8B --sparsity 60% --push-to-hub me/Llama-3.1-8B-calibprune-60

`hf jobs` sends this one file; uv installs what its first lines name. What stands behind the model's name is given to
`optimum-cli calibprune prune` as it is, so the same line without `hf jobs uv run ...` runs here. The job's disk is gone when
it ends: `--push-to-hub` is required, and the run is written to a temporary folder before it is pushed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    if not arguments or "--help" in arguments:
        print(__doc__)
        return 0 if arguments else 2
    if "--push-to-hub" not in arguments:
        print("Error: --push-to-hub ID is missing. The job's disk is gone when it ends, and the pruned model with it.")
        return 2
    if "--output" in arguments:
        print(
            "Error: --output makes no sense in a job, whose disk is gone when it ends; the result goes to --push-to-hub."
        )
        return 2
    with tempfile.TemporaryDirectory() as folder:
        command = [optimum_cli(), "calibprune", "prune", *arguments, "--output", str(Path(folder) / "sparse")]
        return subprocess.run(command).returncode


def optimum_cli() -> str:
    """The command of this very environment; uv does not put it on the path."""
    return shutil.which("optimum-cli", path=sysconfig.get_path("scripts")) or "optimum-cli"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
