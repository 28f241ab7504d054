# SPDX-License-Identifier: Apache-2.0
"""Runs leave nothing behind in the server's memory: counted by the allocator, since the size of a process says too little."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("gradio", reason="the Space needs gradio")

RUNS = """
import ctypes, gc, sys, tempfile
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import app, limits
from visitors import Visitors

class Info(ctypes.Structure):  # of glibc's malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

if not hasattr(ctypes.CDLL(None), "mallinfo2"):
    sys.exit("no mallinfo2")
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info

def used():
    gc.collect()
    info = mallinfo2()
    return info.uordblks + info.hblkhd

with tempfile.TemporaryDirectory() as folder:
    visitors = Visitors(Path(folder, "visitors"), Path(folder, "files"))
    for i in range(6):
        run = visitors.prune(f"visitor {i}", limits.checked("pocket", "uniform", None, "50%", 4, ["general"]))
        while run.wait(0.1):
            pass
        assert not run.error, run.error
        visitors.leave(f"visitor {i}")
        del run
        print(used())
"""


def test_a_run_leaves_no_memory_in_use(tmp_path: Path) -> None:
    """What each run had tokenised once stayed in threads that go on: 4.6 MB a run."""
    space = Path(__file__).parents[2] / "space"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path), "HF_HOME": str(tmp_path / "home")}
    environment.pop("TOKENIZERS_PARALLELISM", None)
    command = [sys.executable, "-c", RUNS, str(space)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    if "no mallinfo2" in done.stderr:
        pytest.skip("the C library counts nothing")
    assert done.returncode == 0, done.stderr
    used = [int(line) for line in done.stdout.split()]
    assert len(used) == 6
    assert used[-1] - used[2] < 4 * 2**20, used  # three runs, after those that fill what is kept once
