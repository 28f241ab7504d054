# SPDX-License-Identifier: Apache-2.0
"""A saved run without a real model, and a process whose Hub is the loopback server."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

from optimum_calibprune.publishing.card import PICTURES, render
from tests.hub_server import HubServer
from tests.publishing.run_record import example


Client = Callable[..., Any]
WEIGHTS = bytes(range(256)) * 16


def saved_run(folder: Path, sparsity: str = "60%") -> Path:
    """What a run leaves, in small: weights that are no real model's, record, figure and card."""
    run = example()
    run = replace(run, config=replace(run.config, sparsity=sparsity))
    (folder / PICTURES[0]).parent.mkdir(parents=True)
    for name in PICTURES:
        (folder / name).write_bytes(b"\x89PNG")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "calibprune.json").write_text(run.to_json())
    (folder / "README.md").write_text(render(run, pictures=PICTURES))
    return folder


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextmanager
def process(environment: dict[str, str]) -> Iterator[Client]:
    """Calls functions in a process that has this environment."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    changed = mock.patch.dict(os.environ, environment | {"PYTHONPATH": path}, clear=True)
    with changed, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield lambda function, *arguments, **options: pool.submit(function, *arguments, **options).result()


@dataclass(frozen=True)
class Outcome:
    """How a call ended: what it returned, or the name and text of its error; the pauses that it made; all that it said."""

    value: str
    error: str
    pauses: list[float]
    output: str


def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Outcome:
    """Calls `function` with everything logged, and with pauses that are noted instead of made."""
    output, pauses, value, error = io.StringIO(), [], "", ""
    handler = logging.StreamHandler(output)
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    logging.getLogger("huggingface_hub").setLevel(logging.DEBUG)
    logging.getLogger("huggingface_hub").addHandler(handler)
    with (
        redirect_stdout(output),
        redirect_stderr(output),
        warnings.catch_warnings(),
        mock.patch.object(time, "sleep", pauses.append),
    ):
        warnings.simplefilter("always")
        try:
            value = str(function(*arguments, **options))
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
            logging.exception("failed")
    return Outcome(value, error, pauses, output.getvalue())


def inject(hub: HubServer, request: tuple[str, str], fault: str, times: int = 1) -> None:
    """A fault by its name: a status, with a time to wait where the Hub gives one, or how an answer breaks."""
    if fault.isdigit():
        wait = {"Retry-After": "60"} if fault in ("429", "503") else None
        hub.fail_next(*request, int(fault), headers=wait, times=times)
    else:
        hub.break_next(*request, fault, times=times)


def push(folder: Path, repo_id: str, **options: Any) -> Outcome:
    from optimum_calibprune.publishing.push import push_folder

    return call(push_folder, folder, repo_id, **options)


def push_calibration(folder: Path, repo_id: str, **options: Any) -> Outcome:
    from optimum_calibprune.publishing import push

    return call(push.push_calibration, folder, repo_id, **options)


def redraw(name: str, **options: Any) -> Outcome:
    from optimum_calibprune.publishing import push

    return call(push.redraw, name, **options)


def collect(repo_id: str, base: str) -> Outcome:
    from optimum_calibprune.publishing import push

    return call(push.collect, repo_id, base)


def push_without_disk(folder: Path, repo_id: str) -> Outcome:
    """As a full disk would have it: no file of this process can grow."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        return push(folder, repo_id)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
