# SPDX-License-Identifier: Apache-2.0
"""Starts the Space of a folder with this Python, asks it for a plan, and ends it: `space_starts.py FOLDER`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from gradio_client import Client


PORT = "7869"
WITHIN = 180  # seconds


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        changed = {"TMPDIR": temporary, "GRADIO_SERVER_PORT": PORT, "HF_HUB_OFFLINE": "1"}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | changed
        process = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment)
        try:
            plan = _client(process).predict(samples=4, capabilities=["general"], api_name="/plan")
        finally:
            process.terminate()
            process.wait(60)
    assert "42 linear layers" in plan, plan
    sys.stdout.write(f"{folder} starts, and plans: {plan}\n")


def _client(process: subprocess.Popen) -> Client:
    until = time.monotonic() + WITHIN
    while time.monotonic() < until and process.poll() is None:
        try:
            return Client(f"http://127.0.0.1:{PORT}", verbose=False)
        except (httpx.HTTPError, OSError, ValueError):
            time.sleep(0.5)
    sys.exit("The Space did not start.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
