# SPDX-License-Identifier: Apache-2.0
"""The Space as a process of its own, whose Hub is the one on the loopback interface."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psutil

from tests.hub_server import HubServer


SPACE = Path(__file__).parents[2] / "space"
STARTS_WITHIN = 120  # seconds


@dataclass(frozen=True)
class Server:
    """A running Space: its address, its Hub, the folder below which everything temporary is, its process."""

    url: str
    hub: HubServer
    temporary: Path
    process: psutil.Process

    @property
    def visitors(self) -> list[Path]:
        """The private folders that there are, those of archives among them."""
        kinds = ("visitors", "files")
        found = [path for kind in kinds for path in (self.temporary / "calibprune-space" / kind).glob("*")]
        return [
            path for path in found if path.name != "vibe_edit_history"
        ]  # which gradio makes, and which stays empty

    def wait_for_no_visitors(self, seconds: float = 90.0) -> None:
        until = time.monotonic() + seconds
        while self.visitors and time.monotonic() < until:
            time.sleep(0.2)
        assert self.visitors == []


@contextmanager
def serve(
    folder: Path,
    script: Path = SPACE / "app.py",
    variables: Mapping[str, str] = MappingProxyType({}),
    hub: HubServer | None = None,
) -> Iterator[Server]:
    """Starts the Space with caches and temporary folders below `folder`; nobody is logged in."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary = folder / "tmp"
    temporary.mkdir()
    left_behind = temporary / "calibprune-space" / "visitors" / "of-a-server-that-was-killed"
    left_behind.mkdir(parents=True)
    url = f"http://127.0.0.1:{port}"
    with hub or HubServer() as hub, (folder / "log.txt").open("w") as log:
        environment = hub.environment(folder / "home") | {"TMPDIR": str(temporary), "GRADIO_SERVER_PORT": str(port)}
        del environment["HF_TOKEN"]
        command = [sys.executable, str(script)]
        process = subprocess.Popen(command, env=environment | variables, stdout=log, stderr=log, cwd=folder)
        try:
            _wait(url, process, folder / "log.txt")
            assert not left_behind.exists()
            yield Server(url, hub, temporary, psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(60)
        assert not (temporary / "calibprune-space").exists(), "it takes its folders along"


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"the Space did not start: {log.read_text()}")
