# SPDX-License-Identifier: Apache-2.0
"""All else that is done on the Hub, while it fails in every way that the push of a model is tested with, at every endpoint:
cards that are drawn again, collections, calibration sets, and weights that go chunk by chunk with Xet."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from optimum_calibprune import RunRecord, pocket
from optimum_calibprune.publishing.failures import WAITS
from tests.hub_server import TOKEN, HubServer
from tests.publishing import pushing
from tests.publishing.pushing import Client, Outcome, contents, inject, saved_run


ALWAYS = 1000


@dataclass(frozen=True)
class Job:
    """Something that is done on the Hub: `begin` puts there what it finds, `run` does it, `done` says whether it is done.

    `requests` are those that it makes, each with what of its path tells it from the others; `failed` and `remedy` are how its
    errors begin and end, with the names of the repo and the folder left open.
    """

    requests: dict[str, tuple[str, str]]
    begin: Callable[[HubServer, Client, Path, str], None]
    run: Callable[[Client, Path, str], Outcome]
    done: Callable[[HubServer, Path, str], bool]
    failed: str
    remedy: str


def begin_card(hub: HubServer, client: Client, folder: Path, repo_id: str) -> None:
    drawn = {path: (folder / path).read_bytes() for path in contents(folder)}
    hub.add_repo(repo_id, drawn | {"README.md": f"# Mine {repo_id}\n".encode()})


def card_is_drawn(hub: HubServer, folder: Path, repo_id: str) -> bool:
    card = hub.files(repo_id)["README.md"].decode()
    return f'from_pretrained("{repo_id}")' in card and f"# Mine {repo_id}" in card and len(hub.commits(repo_id)) == 2


def begin_collection(hub: HubServer, client: Client, folder: Path, repo_id: str) -> None:
    for name in (f"{repo_id}-other", repo_id):
        hub.add_repo(name, {})
    assert client(pushing.collect, f"{repo_id}-other", base_of(repo_id)).error == ""


def base_of(repo_id: str) -> str:
    return f"someone/base-of-{repo_id.rpartition('/')[2]}"


def is_collected(hub: HubServer, folder: Path, repo_id: str) -> bool:
    title = f"{base_of(repo_id).rpartition('/')[2]} pruned"
    (found,) = [collection["items"] for collection in hub.collections.values() if collection["title"] == title]
    return [item["id"] for item in found] == [f"{repo_id}-other", repo_id]


def begin_set(hub: HubServer, client: Client, folder: Path, repo_id: str) -> None:
    hub.add_repo(repo_id, {"README.md": b"# Mine\n"}, repo_type="dataset")


def set_is_there(hub: HubServer, folder: Path, repo_id: str) -> bool:
    files = hub.files(repo_id, repo_type="dataset")
    written = {"README.md", "data/code.jsonl", "data/general.jsonl"}
    return (
        set(files) == written
        and b"# Mine" in files["README.md"]
        and len(hub.commits(repo_id, repo_type="dataset")) == 2
    )


def begin_chunks(hub: HubServer, client: Client, folder: Path, repo_id: str) -> None:
    hub.add_repo(repo_id, {})
    (folder / "model.safetensors").write_bytes(
        random.Random(repo_id).randbytes(20_000)
    )  # which no other case has sent


def chunks_are_there(hub: HubServer, folder: Path, repo_id: str) -> bool:
    sent = (folder / "model.safetensors").read_bytes()
    return hub.files(repo_id)["model.safetensors"] == sent and len(hub.commits(repo_id)) == 2


CARD = {"card head": ("HEAD", "/README.md"), "card": ("GET", "/README.md"), "validate": ("POST", "/api/validate-yaml")}
COMMIT = {"preupload": ("POST", "/preupload/"), "commit": ("POST", "/commit/")}
JOBS = {
    "redraw": Job(
        {
            "info": ("GET", "/api/models/"),
            "record head": ("HEAD", "/calibprune.json"),
            "record": ("GET", "/calibprune.json"),
            **CARD,
            **COMMIT,
        },
        begin_card,
        lambda client, folder, repo_id: client(pushing.redraw, repo_id),
        card_is_drawn,
        "The card of {repo_id} was not drawn again: ",
        "Repeat it with: optimum-cli calibprune card {repo_id}",
    ),
    "collect": Job(
        {
            "info": ("GET", "/api/models/"),
            "create": ("POST", "/api/collections"),
            "look": ("GET", "/api/collections/"),
            "add": ("POST", "/items"),
        },
        begin_collection,
        lambda client, folder, repo_id: client(pushing.collect, repo_id, base_of(repo_id)),
        is_collected,
        "{repo_id} was not added to a collection: ",
        "The model itself is on the Hub.",
    ),
    "set": Job(
        {"create": ("POST", "/api/repos/create"), "info": ("GET", "/api/datasets/"), **CARD, **COMMIT},
        begin_set,
        lambda client, folder, repo_id: client(pushing.push_calibration, folder, repo_id),
        set_is_there,
        "{repo_id} was not pushed: ",
        "--repo-type dataset --commit-message 'Upload a calibration set chosen with optimum-calibprune'",
    ),
    "chunks": Job(
        {"token": ("GET", "/xet-write-token/"), "chunks": ("POST", "/v1/xorbs/"), "files": ("POST", "/shards")},
        begin_chunks,
        lambda client, folder, repo_id: client(pushing.push, folder, repo_id),
        chunks_are_there,
        "{repo_id} was not pushed: ",
        "{folder} is complete; finish with: optimum-cli calibprune push {folder} {repo_id}",
    ),
}
CASES = [(job, request) for job, made in JOBS.items() for request in made.requests]


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """With Xet, whose own client hardly pauses here, and with a place for what a failed push of a set leaves."""
    home = tmp_path_factory.mktemp("home")
    settings = {"HF_XET_CLIENT_RETRY_BASE_DELAY": "1ms", "TMPDIR": str(home)}
    with pushing.process(hub.environment(home, xet=True) | settings) as call:
        yield call


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose calibration set may be published."""
    folder = saved_run(tmp_path_factory.mktemp("saved") / "run")
    run = RunRecord.from_json((folder / "calibprune.json").read_text())
    run = replace(run, sources=tuple(replace(source, licence="mit") for source in run.sources))
    (folder / "calibprune.json").write_text(run.to_json())
    for path in pocket.MODEL.glob("tokenizer*"):
        shutil.copy(path, folder)
    save_file({"input_ids": np.arange(64).reshape(2, 32)}, folder / "calibration.safetensors")
    return folder


def run_and_check(
    job: Job, hub: HubServer, client: Client, folder: Path, repo_id: str, told_so: bool = False
) -> Outcome:
    """Does it once, with what must hold whatever happens, also where the Hub says wrongly that it is done (`told_so`)."""
    before = contents(folder)
    outcome = job.run(client, folder, repo_id)
    assert contents(folder) == before
    assert TOKEN not in outcome.error + outcome.output + outcome.value
    names = {"repo_id": repo_id, "folder": folder}
    if outcome.error:
        assert outcome.error.startswith("PushError: " + job.failed.format(**names))
        assert outcome.error.endswith(job.remedy.format(**names))
        assert "\n" not in outcome.error
    else:
        assert told_so or job.done(hub, folder, repo_id)
    return outcome


def was_asked(hub: HubServer, before: int, request: tuple[str, str]) -> bool:
    return any(method == request[0] and request[1] in target for method, target, _ in hub.requests[before:])


@pytest.mark.parametrize(("name", "request_name"), CASES)
@pytest.mark.parametrize("fault", ["500", "429", "503", "cut", "lost", "slow"])
def test_what_fails_once_is_done_in_the_end(
    name: str, request_name: str, fault: str, hub: HubServer, client: Client, folder: Path, repo_id: str
) -> None:
    job = JOBS[name]
    job.begin(hub, client, folder, repo_id)
    before = len(hub.requests)
    inject(hub, job.requests[request_name], fault)
    assert run_and_check(job, hub, client, folder, repo_id).error == ""
    assert was_asked(hub, before, job.requests[request_name])


@pytest.mark.parametrize(("name", "request_name"), CASES)
@pytest.mark.parametrize("fault", ["401", "403", "404", "409", "500", "lost"])
def test_what_fails_always_ends_in_one_sentence_and_a_repeat_finishes(
    name: str, request_name: str, fault: str, hub: HubServer, client: Client, folder: Path, repo_id: str
) -> None:
    job = JOBS[name]
    job.begin(hub, client, folder, repo_id)
    before = len(hub.requests)
    inject(hub, job.requests[request_name], fault, ALWAYS)
    told_so = (request_name, fault) == ("add", "409")  # that the model is in the collection already
    outcome = run_and_check(job, hub, client, folder, repo_id, told_so)
    assert was_asked(hub, before, job.requests[request_name])
    assert not outcome.error or (sum(outcome.pauses) >= sum(WAITS)) == (fault in ("500", "lost"))
    hub.forget_faults()
    assert run_and_check(job, hub, client, folder, repo_id).error == ""
