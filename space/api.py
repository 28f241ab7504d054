# SPDX-License-Identifier: Apache-2.0
"""The endpoints for scripts, under the same limits as the page."""

from __future__ import annotations

from collections.abc import Callable

import gradio as gr

from events import EVERY, TURN, key_of
from limits import CAPABILITIES, Job, checked
from push import upload
from runs import EXPECTED, Run, plan_of, sentence
from visitors import Visitors


def endpoints(visitors: Visitors) -> None:
    """Makes them; before the page's own events, which would take their names."""

    def plan(job: Job, key: str) -> str:
        """What a run would do, with its memory and time, as Markdown. Nothing is pruned."""
        return plan_of(job, visitors.root)

    def prune(job: Job, key: str) -> str:
        """Prunes a model and measures what was kept; the answer is the record of the run as JSON. One run at a time."""
        run = visitors.prune(key, job)
        _finish(run)
        assert run.record is not None
        return run.record.to_json()  # a client would take what a dict calls a path for a file

    def stop(request: gr.Request) -> bool:
        """Stops the run of this session; whether there was one."""
        return visitors.stop(key_of(request))

    def push(repo: str, token: str, private: bool = False, create_pr: bool = False, request: gr.Request = None) -> str:  # type: ignore[assignment]
        """Uploads the result of this session to a repo of the token's owner; the answer is the address of the commit."""
        try:
            return upload(visitors.result(key_of(request)), repo, token, private, create_pr)
        except EXPECTED as error:
            raise gr.Error(sentence(error), print_exception=False) from None

    gr.api(_with_a_job(plan), api_name="plan", **TURN)
    gr.api(_with_a_job(prune), api_name="prune", **TURN)
    gr.api(stop, api_name="stop", queue=False)
    gr.api(push, api_name="push")


def _with_a_job(answer: Callable[[Job, str], str]) -> Callable[..., str]:
    """An endpoint that takes the values of a job, and answers for that and for the session that asks."""

    def endpoint(
        model: str = "pocket",
        mix: str = "uniform",
        sources: list[str] | None = None,
        sparsity: str = "50%",
        samples: int = 16,
        capabilities: list[str] | None = None,
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> str:
        try:
            return answer(
                checked(model, mix, sources, sparsity, samples, capabilities or CAPABILITIES), key_of(request)
            )
        except EXPECTED as error:
            raise gr.Error(sentence(error), print_exception=False) from None

    endpoint.__doc__ = answer.__doc__
    return endpoint


def _finish(run: Run) -> None:
    """Waits for the end of a run; `ValueError` where it had no success."""
    while run.wait(EVERY):
        pass
    if run.error:
        raise ValueError(run.error)
