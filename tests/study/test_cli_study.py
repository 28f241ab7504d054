# SPDX-License-Identifier: Apache-2.0
"""The command line of a study: a table on standard output, progress beside it, and an exit code that tells of failures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from optimum_calibprune import pocket


def study(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("optimum-cli")), "calibprune", "study", "pocket", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)


def test_a_table_and_a_failed_cell(tmp_path: Path) -> None:
    (tmp_path / "probes").mkdir()
    lines = pocket.probes()["general"].read_text(encoding="utf-8").splitlines()[:10]
    (tmp_path / "probes" / "general.jsonl").write_text("\n".join(lines))
    (tmp_path / "short.jsonl").write_text('{"text": "One day Tom was hungry."}\n')
    words = [
        "--mixes",
        "single",
        "--sources",
        "gsm8k",
        "short.jsonl",
        "--seeds",
        "1",
        "--samples",
        "4",
        "--length",
        "32",
    ]
    words += ["--capabilities", "general", "--probes", "probes", "--output", "out"]
    done = study(tmp_path, *words)
    assert done.returncode == 1, done.stderr
    header, _, row = done.stdout.strip().splitlines()
    assert header.split()[:4] == ["calibration", "sparsity", "draws", "general"]
    assert row.split()[:3] == ["gsm8k", "50%", "1"]
    assert "1 of 2 cells failed" in done.stderr
    assert "Source 'short' is too short" in done.stderr
    assert "Traceback" not in done.stderr
    good = study(tmp_path, *words, "--mixes", "single:gsm8k", "--json")
    assert good.returncode == 0, good.stderr
    assert [row["mix"] for row in json.loads(good.stdout)["cells"]] == ["single:gsm8k"]


def test_bad_arguments_end_with_a_sentence(tmp_path: Path) -> None:
    done = study(tmp_path, "--mixes", "unifrom", "--output", "out")
    assert done.returncode == 2
    assert "Did you mean 'uniform'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
