# SPDX-License-Identifier: Apache-2.0
"""Pushing as the one who has logged in, and as nobody else."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.hub_server import TOKEN, HubServer
from tests.publishing.pushing import process, saved_run
from tests.publishing.run_record import example


pytest.importorskip("gradio", reason="the Space needs gradio")
SPACE = str(Path(__file__).parents[2] / "space")


def _push(folder: Path, token: str | None) -> str:
    """What the page says to one who pushes a result and has logged in with this token, or not at all."""
    sys.path.insert(0, SPACE)
    import gradio as gr

    from app import build_demo
    from limits import Job
    from runs import PruneRun
    from visitors import Visitor, Visitors

    visitors = Visitors(folder / "visitors", folder / "files")
    saved_run(folder / "run" / "model")
    run = PruneRun(Job(), folder / "run", folder / "files" / "shelf", keep=lambda record: None)
    run.record = example()
    visitors._visitors["one"] = Visitor(pruned=run)
    demo = build_demo(visitors, login=True)
    handler = next(entry.fn for entry in demo.fns.values() if entry.name == "push_logged_in")
    oauth = gr.OAuthToken(token=token, scope="", expires_at=0) if token is not None else None
    return handler("me/pushed", "", False, False, SimpleNamespace(session_hash="one"), oauth)


@pytest.mark.parametrize("token", [TOKEN, None])
def test_a_visitor_who_logged_in_pushes_with_their_token(tmp_path: Path, token: str | None) -> None:
    with HubServer() as hub, process(hub.environment(tmp_path)) as there:  # where the server itself is logged in
        said = there(_push, tmp_path / "space", token)
        assert ("Pushed" in said) == (token is not None)
        assert ("Log in, or give a token" in said) == (token is None)
        assert (("model", "me/pushed") in hub.repos) == (token is not None)
