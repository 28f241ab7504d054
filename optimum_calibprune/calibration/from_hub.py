# SPDX-License-Identifier: Apache-2.0
"""Rows of a Hub data set, streamed at a resolved revision; every failure of the Hub becomes one sentence."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..records import CAPABILITIES, CalibrationSource
from ..values import ANY
from .readers import document


if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo

ROWS_CHECKED = 100
EVERY_ROW = "all_exhausted_without_replacement"  # one row of each subset in turn, until all have ended


def load_from_hub(source: CalibrationSource, token: str | None) -> tuple[CalibrationSource, Any]:
    """Streams what is on the Hub at a resolved revision; offline, what an earlier `load_dataset` left in the cache.

    The source comes back with that revision, and with the licence of the data set's card where it had none.
    """
    import datasets
    import huggingface_hub

    repo, revision, licence = str(source.repo), source.revision, source.licence
    online = not huggingface_hub.is_offline_mode()
    with hub_errors(source):
        if online:
            info = huggingface_hub.HfApi(token=token).dataset_info(repo, revision=revision)
            revision, licence = info.sha, licence or _licence(info)
        parts = [
            datasets.load_dataset(repo, subset, split=source.split, revision=revision, token=token, streaming=online)
            for subset in (source.subset.split("+") if source.subset else [None])
        ]
        found = datasets.interleave_datasets(parts, stopping_strategy=EVERY_ROW) if len(parts) > 1 else parts[0]
    return replace(source, revision=revision, licence=licence), found


def published_sources(name: str, token: str | None = None) -> list[CalibrationSource]:
    """The sources of a published calibration set, `"ID"` or `"ID@REVISION"`: one for each capability that it holds.

    Raises `ValueError` for a data set that is none, `ConnectionError` where the Hub cannot be had.
    """
    import huggingface_hub

    repo, _, revision = name.partition("@")
    short = repo.rpartition("/")[2]
    asked = CalibrationSource(short, CAPABILITIES[0], repo, revision=revision or None)
    with hub_errors(asked):
        info = huggingface_hub.HfApi(token=token).dataset_info(repo, revision=revision or None)
    configs = [config.get("config_name") for config in (info.card_data or {}).get("configs") or []]
    found = [
        CalibrationSource(
            f"{short}-{config}",
            CAPABILITIES[0] if config == ANY else config,
            repo,
            config,
            revision=info.sha,
            licence=_licence(info),
        )
        for config in configs
        if config in (*CAPABILITIES, ANY)
    ]
    if not found:
        raise ValueError(
            f"{repo} is no published calibration set: none of its configurations is named like a capability. Name its text "
            "with CalibrationSource(name, capability, repo=...)."
        )
    return found


def _licence(info: DatasetInfo) -> str | None:
    """What the data set's card states, where it states one licence."""
    stated = (info.card_data or {}).get("license")
    stated = stated[0] if isinstance(stated, list) and len(stated) == 1 else stated
    return stated if isinstance(stated, str) and stated not in ("unknown", "other") else None


@dataclass(frozen=True)
class Checked:
    """What the Hub says of a source; `problem` is empty where it can be used."""

    source: CalibrationSource
    problem: str = ""


def check(source: CalibrationSource, token: str | None = None) -> Checked:
    """Whether a source of the Hub is there, needs no script, has its subset and split, and a row that becomes a text."""
    try:
        source, found = load_from_hub(source, token)
        with hub_errors(source):
            texts = [document(source, row, None) for row in itertools.islice(found, ROWS_CHECKED)]
    except (ValueError, ConnectionError) as error:
        return Checked(source, str(error))
    return Checked(source, "" if any(texts) else f"its first {ROWS_CHECKED} rows hold no text")


@contextlib.contextmanager
def hub_errors(source: CalibrationSource) -> Iterator[None]:
    """Failures of the Hub, and of `datasets` on what it serves, become one sentence that names the source."""
    import huggingface_hub
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import httpx

    name, repo = source.name, source.repo
    try:
        yield
    except (GatedRepoError, DatasetNotFoundError) as error:  # the latter only after the repo itself was found
        raise ValueError(
            f"{name!r}: {repo} is gated. Accept its terms on the Hub, then log in or pass a token."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{name!r}: {repo} is not on the Hub, or it is private and needs a token.") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{name!r}: {repo} has no revision {source.revision!r}.") from error
    except (LocalEntryNotFoundError, ConnectionError, TimeoutError, httpx.HTTPError) as error:
        offline = huggingface_hub.is_offline_mode()
        why = "HF_HUB_OFFLINE is set and it is not in the local cache." if offline else sentence(error)
        raise ConnectionError(
            f"{name!r} needs the Hub data set {repo}, which cannot be reached: {why} "
            "Local files work without the Hub: NAME=PATH:CAPABILITY."
        ) from error
    except (DatasetsError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name!r}: {repo} cannot be read: {sentence(error)}") from error


def sentence(error: BaseException) -> str:
    """What an error of a library says, on one line and with a full stop."""
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".") + "."
