# SPDX-License-Identifier: Apache-2.0
"""The endpoints for scripts, under the same limits as the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gradio as gr

import jobs
from estimate import estimates, shape_of
from events import EVERY, TURN, key_of
from hardware import flavors
from limits import (
    CAPABILITIES,
    PROCESSES,
    Job,
    checked,
    checked_big,
    checked_mixes,
    checked_question,
    checked_token,
    whole,
)
from push import upload
from runs import Run, plan_of
from visitors import Visitors
from watch import sentence


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

    def compare(
        mixes: list[str],
        model: str = "pocket",
        sparsity: str = "50%",
        samples: int = 16,
        capabilities: list[str] | None = None,
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> str:
        """Prunes a model with two to four mixes in turn; the answer is the list of their records as JSON."""
        with _refusals():
            jobs = checked_mixes(model, mixes, sparsity, samples, capabilities or CAPABILITIES)
            run = visitors.compare(key_of(request), jobs)
            _finish(run)
        return f"[{','.join(record.to_json() for record in run.records)}]"

    def generate(
        prompt: str,
        new_tokens: int = 64,
        temperature: float = 0.0,
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> Iterator[tuple[str, str]]:
        """The answers of the dense and of the pruned model of this session, growing until they are finished."""
        with _refusals():
            run = visitors.answer(key_of(request), checked_question(prompt, new_tokens, temperature))
            for _ in run.looks(EVERY):
                yield run.texts["dense"], run.texts["sparse"]
            _finish(run)
        yield run.texts["dense"], run.texts["sparse"]

    generate.__annotations__["return"] = tuple[str, str]  # what each step is, as gradio reads it

    def stop(request: gr.Request) -> bool:
        """Stops the run of this session; whether there was one."""
        return visitors.stop(key_of(request))

    def push(repo: str, token: str, private: bool = False, create_pr: bool = False, request: gr.Request = None) -> str:  # type: ignore[assignment]
        """Uploads the result of this session to a repo of the token's owner; the answer is the address of the commit."""
        with _refusals():
            return upload(visitors.result(key_of(request)), repo, token, private, create_pr)

    def command(
        model: str,
        mix: str = "uniform",
        sources: list[str] | None = None,
        sparsity: str = "50%",
        samples: int = 128,
        measure: bool = True,
        gpus: int = 1,
    ) -> str:
        """What to type on a machine of your own, for a model that is too large for this page."""
        with _refusals():
            job = checked_big(model, mix, sources, sparsity, samples, measure)
            return job.command(whole("The number of GPUs", gpus, PROCESSES))

    def estimate(
        model: str,
        mix: str = "uniform",
        sources: list[str] | None = None,
        sparsity: str = "50%",
        samples: int = 128,
        measure: bool = True,
        token: str = "",
    ) -> str:
        """What a run may take on each hardware of Hugging Face Jobs, as JSON: bytes on the GPU, hours and dollars at best and at
        worst. Only the model's config is fetched, with your token if you give one."""
        with _refusals():
            job = checked_big(model, mix, sources, sparsity, samples, measure)
            shape = shape_of(job, checked_token(token) if token else None, visitors.root)
            return json.dumps([entry.told for entry in estimates(shape, flavors())])

    def launch(
        model: str,
        repo: str,
        token: str,
        flavor: str,
        hours: int = 4,
        mix: str = "uniform",
        sources: list[str] | None = None,
        sparsity: str = "50%",
        samples: int = 128,
        measure: bool = True,
        private: bool = False,
    ) -> str:
        """Starts the run as a Hugging Face Job on the account of the token's owner, who pays for it; the answer is its address."""
        with _refusals():
            job = checked_big(model, mix, sources, sparsity, samples, measure, repo, private)
            return jobs.launch(job, flavor, hours, token).url

    gr.api(_with_a_job(plan), api_name="plan", **TURN)
    gr.api(_with_a_job(prune), api_name="prune", **TURN)
    gr.api(compare, api_name="compare", **TURN)
    gr.api(generate, api_name="generate", **TURN)
    gr.api(stop, api_name="stop", queue=False)
    gr.api(push, api_name="push")
    gr.api(command, api_name="command")
    gr.api(estimate, api_name="estimate", concurrency_id="estimate", concurrency_limit=1)
    gr.api(launch, api_name="launch")


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
        with _refusals():
            job = checked(model, mix, sources, sparsity, samples, capabilities or CAPABILITIES)
            return answer(job, key_of(request))

    endpoint.__doc__ = answer.__doc__
    return endpoint


@contextmanager
def _refusals() -> Iterator[None]:
    """What was refused is said in one sentence."""
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        raise gr.Error(sentence(error), print_exception=False) from None


def _finish(run: Run) -> None:
    """Waits for the end of a run; `ValueError` where it had no success."""
    while run.wait(EVERY):
        pass
    if run.error:
        raise ValueError(run.error)
