# SPDX-License-Identifier: Apache-2.0
"""The paper's setting: what it would run is listed without a GPU, and what cannot run is refused before anything is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from optimum_calibprune.calibration.table import SOURCES


SCRIPT = Path(__file__).parents[2] / "examples" / "reproduce_llama31_8b.py"


def reproduce(*options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--output", "study", *options],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
    )


def test_a_dry_run_lists_the_papers_setting_and_writes_nothing(tmp_path: Path) -> None:
    done = reproduce("--dry-run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    first, *cells = done.stdout.splitlines()
    mixes = [f"single:{name}" for name in SOURCES] + ["uniform", "self-cal", "sgs", "igsp"]
    assert first.startswith(f"{len(mixes)} cells on meta-llama/Llama-3.1-8B, 128 x 2048 tokens.")
    assert cells == [f"  {mix} at 60%, seed 0" for mix in mixes]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mixes", "igps"], "Error: Unknown mix 'igps'. Did you mean 'igsp'"),
        (["--sparsity", "160%"], "Error: Sparsity must lie between 0 and 1"),
        (["--seeds", "0"], "Error: A study needs at least one seed."),
    ],
)
def test_what_cannot_run_is_refused_before_a_model_is_looked_for(
    options: list[str], message: str, tmp_path: Path
) -> None:
    done = reproduce(*options, folder=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
