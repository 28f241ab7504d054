# SPDX-License-Identifier: Apache-2.0
"""The job script, as far as it goes without the service: its first lines, what it refuses, and a push over real HTTP."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.hub_server import HubServer


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "prune_job.py"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def job(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_first_lines_name_this_package_and_its_python() -> None:
    """PEP 723: lines between `# /// script` and `# ///`, each with `# ` before it, are TOML."""
    block = re.search(r"(?m)^# /// script$\s(?P<toml>(^#(| .*)$\s)+)^# ///$", SCRIPT.read_text(encoding="utf-8"))
    assert block is not None
    metadata = tomllib.loads("".join(line[2:] or "\n" for line in block["toml"].splitlines(keepends=True)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata["requires-python"] == project["requires-python"]
    ours, *_ = [Requirement(line) for line in metadata["dependencies"]]
    assert ours.name == project["name"]
    assert ours.extras <= set(project["optional-dependencies"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("pocket",), "--push-to-hub ID is missing"), (("pocket", "--push-to-hub", "me/x", "--output", "y"), "--output")],
)
def test_what_would_be_lost_is_refused(arguments: tuple[str, ...], message: str) -> None:
    done = job(*arguments)
    assert done.returncode == 2
    assert message in done.stdout


def test_a_job_prunes_and_pushes(hub: HubServer, tmp_path: Path) -> None:
    options = ("--samples", "8", "--length", "64", "--mix", "uniform", "--capabilities", "none")
    done = job("pocket", *options, "--push-to-hub", "me/pocket-50", environment=hub.environment(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"model.safetensors", "README.md", "calibprune.json"} <= set(hub.files("me/pocket-50"))
    assert "hf_fake" not in done.stdout + done.stderr
