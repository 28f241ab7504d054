# SPDX-License-Identifier: Apache-2.0
"""What the events of all views share: who asks, when their turn comes, and what a view says while it waits and works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

import figures
from runs import Run
from visitors import Visitors
from watch import STOPPED


EVERY = 0.4  # seconds between two looks at a run
TURN = {"concurrency_id": "run", "concurrency_limit": 1}
PRIVATE = {"api_visibility": "private"}
QUIET = {"show_progress": "hidden", **PRIVATE}
FULL = "This did not work: the queue may be full. Try again later."
Update = dict[Any, Any]  # component -> its new value


def key_of(request: gr.Request) -> str:
    """What tells a visitor from all others."""
    if not request.session_hash:
        raise gr.Error(
            "This needs a session, so that nobody gets your result: call it with gradio_client.", print_exception=False
        )
    return request.session_hash


@dataclass(frozen=True)
class Desk:
    """What each view has: its kind of run, buttons that start something, one that stops it, and a line that says how it
    goes."""

    kind: type[Run]
    starts: tuple[gr.Button, ...]
    stop: gr.Button
    said: gr.HTML

    def busy(self, stoppable: bool) -> Update:
        started = {button: gr.update(interactive=False) for button in self.starts}
        return started | {self.stop: gr.update(visible=stoppable), self.said: figures.waiting()}

    def ready(self, text: str, kind: str = "error") -> Update:
        started = {button: gr.update(interactive=True) for button in self.starts}
        return started | {self.stop: gr.update(visible=False), self.said: figures.message(text, kind)}

    def ended(self, error: str) -> Update:
        """After a run that had no success, which may be as its visitor wished."""
        return self.ready(error, "note" if error == STOPPED else "error")

    def on_click(
        self,
        button: gr.Button,
        work: Callable[..., Any],
        inputs: list[Any],
        outputs: list[Any],
        *,
        visitors: Visitors,
        first: Update,
        stoppable: bool = True,
    ) -> None:
        """A click says `first` at once, and does `work` when its turn comes: it answers with updates of this desk and of
        `outputs`."""
        everything = [*self.starts, self.stop, self.said, *outputs]

        def wait(request: gr.Request) -> Update:
            if stoppable:
                visitors.expect(key_of(request), self.kind)
            return self.busy(stoppable) | first

        clicked = button.click(wait, None, everything, queue=False, **QUIET)
        worked = clicked.then(work, inputs, everything, **TURN, **QUIET)
        worked.failure(lambda: self.ready(FULL), None, everything, **QUIET)

    def on_stop(self, visitors: Visitors) -> None:
        def halt(request: gr.Request) -> Update:
            visitors.decline(key_of(request), self.kind)
            return self.ready(STOPPED, "note")

        self.stop.click(halt, None, [*self.starts, self.stop, self.said], queue=False, **QUIET)
