# SPDX-License-Identifier: Apache-2.0
"""Hugging Face Jobs: a run on hardware that its visitor rents, with their own token."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, JobInfo
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

from hardware import flavors
from limits import HOURS, POCKET, BigJob, checked_token, whole
from optimum_calibprune import __version__


IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"
PACKAGE, TORCH = "optimum-calibprune[triton]", "torch>=2.10"  # as the head of examples/prune_job.py has it
HERE = Path(__file__).parent
OVER = ("COMPLETED", "CANCELED", "ERROR", "DELETED")  # stages
OUTPUT = "/tmp/sparse"  # goes with the job; the result is pushed
REFUSED = {
    401: "The Hub does not accept the token.",
    402: "The Hub asks for payment: Jobs need credit, or a subscription. See https://huggingface.co/pricing.",
    403: "The token may not start jobs there: it needs the right to write, or the scope 'jobs'.",
    404: "There is no such job of yours.",
    429: "The Hub has had too many requests; try again later.",
}


def package() -> str:
    """What to install elsewhere: the wheel that lies in this Space, if one does, as before a release; else the release that
    runs here."""
    wheel, space = next(HERE.glob("*.whl"), None), os.environ.get("SPACE_ID")
    if wheel and space:
        return f"{PACKAGE} @ {ENDPOINT}/spaces/{space}/resolve/main/{wheel.name}"
    return f"{PACKAGE}=={__version__}"


def launch(job: BigJob, flavor: str, hours: object, token: object) -> JobInfo:
    """Starts the run as a job of the token's owner, which ends after so many hours at the latest.

    The client's `run_uv_job` would upload each file of this server that an argument is the name of; so the command is given as
    it is. Raises `ValueError`, which never shows the token.
    """
    owner, ends = checked_token(token), whole("The number of hours", hours, HOURS)
    if not job.repo:
        raise ValueError(
            "Name a repo to push to: the disk of a job is gone when it ends, and the pruned model with it."
        )
    if job.model == POCKET:
        raise ValueError("The bundled 'pocket' needs no hardware for rent: prune it on this page.")
    allowed = [entry.name for entry in flavors()]
    if flavor not in allowed:
        raise ValueError(f"Unknown hardware {str(flavor)[:60]!r}; allowed: {', '.join(allowed)}.")
    command = ["uv", "run", "--no-project", "--with", package(), "--with", TORCH, *job.words(OUTPUT)]
    with _explained():
        api = HfApi(token=owner)
        api.create_repo(
            job.repo, private=job.private or None, exist_ok=True
        )  # else the job would find out last of all
        return api.run_job(
            image=IMAGE, command=command, flavor=flavor, secrets={"HF_TOKEN": owner}, timeout=f"{ends}h"
        )


def state(job_id: str, token: object) -> JobInfo:
    """How a job of the token's owner is going. Raises as `launch` does."""
    owner = checked_token(token)
    with _explained():
        return HfApi(token=owner).inspect_job(job_id=job_id)


def cancel(job_id: str, token: object) -> None:
    """Ends a job of the token's owner. Raises as `launch` does."""
    owner = checked_token(token)
    with _explained():
        HfApi(token=owner).cancel_job(job_id=job_id)


@contextmanager
def _explained() -> Iterator[None]:
    """Turns what the client raises into one sentence, in which no token stands."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise ValueError(REFUSED.get(status, f"The Hub refused, with status {status}.")) from None
    except (httpx.HTTPError, OSError):
        raise ValueError("The Hub cannot be reached; try again later.") from None
