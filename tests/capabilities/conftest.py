# SPDX-License-Identifier: Apache-2.0
"""Both ways of isolation, each where this machine has it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from optimum_calibprune.capabilities import sandbox
from optimum_calibprune.capabilities.sandbox import Isolation


# What a machine may lack; any other reason not to run programs is a defect of the sandbox.
LACKS = "not permitted|denied|not implemented|not found|No such file|only root|has no attribute|no Landlock|can be refused on|prctl: Invalid"


def skip_unless_possible(level: Isolation) -> None:
    if not level.available:
        assert re.search(LACKS, level.reason), level.reason
        pytest.skip(f"not possible here: {level.reason}")


@pytest.fixture(scope="session")
def open_python() -> Iterator[str]:
    """This Python with its standard library, where every user of the machine can read it."""
    with tempfile.TemporaryDirectory() as folder:
        name = f"python{sys.version_info.major}.{sys.version_info.minor}"
        left_out = shutil.ignore_patterns("site-packages", "dist-packages", "test", "tests", "config-*", "ensurepip")
        shutil.copytree(sysconfig.get_path("stdlib"), Path(folder, "lib", name), ignore=left_out)
        Path(folder, "bin").mkdir()
        shutil.copy(os.path.realpath(sys.executable), Path(folder, "bin", name))
        os.chmod(folder, 0o755)
        yield str(Path(folder, "bin", name))


@pytest.fixture(scope="module", params=[True, False], ids=["namespaces", "spare user"])
def probed(request: pytest.FixtureRequest, open_python: str) -> Isolation:
    with pytest.MonkeyPatch.context() as patch:
        if not request.param:
            patch.setattr(sys, "executable", open_python)
        level = sandbox._probe(namespaces=request.param)
    skip_unless_possible(level)
    return level


@pytest.fixture
def level(probed: Isolation, open_python: str, monkeypatch: pytest.MonkeyPatch) -> Isolation:
    monkeypatch.setattr(sandbox, "isolation", lambda: probed)
    if not probed.namespaces:
        monkeypatch.setattr(sys, "executable", open_python)
    return probed


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen]:
    """A process of the user who runs the tests."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()
