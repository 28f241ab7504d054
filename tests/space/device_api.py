# SPDX-License-Identifier: Apache-2.0
"""Who lends GPUs on ZeroGPU, as `spaces` asks it, on the loopback interface: it says yes, and keeps what it was asked."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import parse_qs, urlsplit


class DeviceApi:
    """`asked` are the requests in their order, each a path and its parameters. With `used_up` the quota is."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.used_up = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def of(self, path: str) -> list[dict[str, str]]:
        return [given for asked, given in list(self.asked) if asked == path]

    def answer(self, path: str, given: dict[str, str]) -> tuple[int, dict]:
        self.asked.append((path, given))
        if path != "/schedule":
            return 200, {}
        if self.used_up:
            return 429, {"left": 3, "wait": 3600}
        number = len(self.of("/schedule"))
        return 200, {"idle": False, "nvidiaIndex": 0, "nvidiaUUID": "GPU-0", "allowToken": f"allowed-{number}"}


def _handler(api: DeviceApi) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            path = urlsplit(self.path)
            status, found = api.answer(path.path, {name: values[0] for name, values in parse_qs(path.query).items()})
            body = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Says nothing."""

    return Handler
