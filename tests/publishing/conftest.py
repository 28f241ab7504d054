# SPDX-License-Identifier: Apache-2.0
"""What tests of pushing take, each of a module that has a run `saved` and a `hub`."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import HubServer


NUMBERS = itertools.count()


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture
def repo_id(hub: HubServer) -> Iterator[str]:
    """Of a repo that is not there yet."""
    yield f"me/run-{next(NUMBERS)}"
    hub.forget_faults()
