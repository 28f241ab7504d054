# SPDX-License-Identifier: Apache-2.0
"""Tests never reach a network: the Hub is off, or a server on the loopback interface."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="calibprune-tests-")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers of pytest-xdist share the cores
os.environ.pop("HF_TOKEN", None)
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels run on the CPU, before anything imports triton

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `from tests.hub_server import ...`
