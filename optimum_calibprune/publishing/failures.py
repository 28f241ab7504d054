# SPDX-License-Identifier: Apache-2.0
"""Talks to the Hub persistently: tries again where that can help, and says in one sentence, without secrets, what failed."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, TypeVar

from .markup import one_line


if TYPE_CHECKING:
    from huggingface_hub import HfApi


Result = TypeVar("Result")

# Seconds before each further attempt. Within one attempt the client repeats single requests by itself, where it does that.
WAITS = (1.0, 4.0, 16.0)
MOST_PATIENT = 300.0  # seconds of a Retry-After header that are waited for
TOLD_STATUS = re.compile(r"HTTP status \w+ error \((\d{3}) ")
PASSING = (408, 412, 429, 500, 502, 503, 504)  # 412: another commit came in between
WHY = {
    401: "the Hub does not accept the token; run `hf auth login`, or pass a token that may write",
    403: "the token may not write there; pass one that may, or push to a repo of your own",
    404: "the Hub does not know it, or the token may not see it",
    409: "the Hub says that it conflicts with what is there",
    412: "others were committing at the same time",
    413: "the Hub says that it is too large",
    429: "the Hub asks for fewer requests; try again later",
    507: "the Hub has no room for it",
}


class PushError(OSError):
    """What was pushed is not on the Hub, or not complete there; its text ends with the command that finishes it."""


def persistently(attempt: Callable[[HfApi], Result], failed: str, token: str | None, remedy: str) -> Result:
    """The result of `attempt`, made again where the failure may pass, after a pause or what the Hub asks for.

    Raises `PushError` with `failed`, the reason and `remedy`, on one line and without any token.
    """
    from huggingface_hub import HfApi

    token = token.strip() if isinstance(token, str) else token
    if isinstance(token, str) and not re.fullmatch("[!-~]+", token):  # errors and logs would quote it as a bad header
        raise PushError(f"{failed}: the token holds characters that no token has. {remedy}")
    api = HfApi(token=token)
    for pause in (*WAITS, None):
        try:
            return attempt(api)
        except (OSError, ValueError, RuntimeError, KeyError, _http_error()) as error:
            asked = _retry_after(error)
            if pause is None or not _may_pass(error) or (asked or 0.0) > MOST_PATIENT:
                text = f"{failed}: {one_line(reason(error))} {remedy}"
                safe = without_secrets(" ".join(text.split()), token)
                raise PushError(safe) from None  # the cause may quote the request, and with it the token
            time.sleep(max(pause, asked or 0.0))
    raise AssertionError("the last pause is None")


def reason(error: BaseException) -> str:
    """One sentence on why the Hub could not be had."""
    import huggingface_hub

    if huggingface_hub.is_offline_mode():
        return "HF_HUB_OFFLINE is set; unset it."
    cause = _cause(error)
    status = _status(cause)
    if status is None or (isinstance(error, ValueError) and status == 400):  # then the client has said what is wrong
        cause = error if status is not None else cause
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        said = " ".join(lines)[:400] or type(cause).__name__
        if isinstance(cause, KeyError):
            said = f"the answer of the Hub has no {said}"
        return (f"the connection broke ({said})" if _is_transport(cause) else said).rstrip(".") + "."
    said = (getattr(cause, "server_message", None) or "")[:400]
    text = WHY.get(status, f"the Hub answers {status}" + (" each time; try again later" if status >= 500 else ""))
    return f"{text} ({said})." if said else f"{text} ({status})."


def without_secrets(text: str, token: str | None) -> str:
    """`text` with every token in it replaced: the given one, the one that is logged in, and what looks like one."""
    from huggingface_hub import get_token

    for secret in (token, get_token()):
        if isinstance(secret, str) and secret.strip():
            text = text.replace(secret, "hf_***").replace(secret.strip(), "hf_***")
    return re.sub(r"hf_[A-Za-z0-9]{16,}", "hf_***", text)


# ------------------------------------------------------------------------------------------ what went wrong


def _http_error() -> type[Exception]:
    from huggingface_hub.utils import httpx

    return httpx.HTTPError


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def _cause(error: BaseException) -> BaseException:
    """The first that says something: an answer of the Hub, or a broken connection, under what the client wrapped it in."""
    return next((e for e in _causes(error) if _status(e) is not None or _is_transport(e)), error)


def _status(error: BaseException) -> int | None:
    """Of the answer that an error tells of; the client of the chunk store tells of it in words."""
    told = TOLD_STATUS.search(str(error)) if isinstance(error, OSError | RuntimeError) else None
    return getattr(getattr(error, "response", None), "status_code", int(told[1]) if told else None)


def _is_transport(error: BaseException) -> bool:
    """Whether there was no answer, or none that could be read."""
    kinds = (ConnectionError, TimeoutError, json.JSONDecodeError, _http_error())
    return _status(error) is None and isinstance(error, kinds)


def answer_lost(error: BaseException, part: str) -> bool:
    """Whether the answer to a request broke off whose address has this part, so that the Hub may have done what was asked."""
    cause = _cause(error)
    try:
        return _is_transport(cause) and part in str(cause.request.url)  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):  # an error that names no request
        return False


def _may_pass(error: BaseException) -> bool:
    import huggingface_hub

    cause = _cause(error)
    status = _status(cause)
    return not huggingface_hub.is_offline_mode() and (_is_transport(cause) if status is None else status in PASSING)


def _retry_after(error: BaseException) -> float | None:
    """Seconds that the answer asks to wait, which it says as a number or as a date."""
    response = getattr(_cause(error), "response", None)
    asked = (response.headers.get("Retry-After") or "").strip() if response is not None else ""
    if asked.isdecimal():
        return float(asked)
    try:
        date = parsedate_to_datetime(asked)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
