# SPDX-License-Identifier: Apache-2.0
"""Hub sources against a Hub on the loopback interface, from processes that have its address in their environment."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest

from optimum_calibprune.calibration.sources import SHUFFLE_BUFFER, SOURCES
from tests import hub_server
from tests.hub_server import STRANGER_TOKEN, HubServer


Client = Callable[..., Any]
LENGTH = 16
ROWS = [{"text": f"Sentence {i} of many tells of a ship, {i * 7} birds and the sea."} for i in range(300)]
LINES = [json.dumps(row).encode() + b"\n" for row in ROWS]
BIG_ROW = json.dumps({"text": "The sea is wide and the ship is small. " * 12}).encode() + b"\n"
BIG = BIG_ROW * (96 * 2**20 // len(BIG_ROW))  # 96 MiB
DATASET = {"repo_type": "dataset"}


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, row_group_size=1000)
    return sink.getvalue()


def fill(hub: HubServer) -> None:
    card = b"---\nconfigs:\n- config_name: en\n  data_files: en/*.jsonl\n---\n"
    hub.add_repo(
        "allenai/c4",
        {"README.md": card, "en/a.jsonl": b"".join(LINES[:150]), "en/b.jsonl": b"".join(LINES[150:])},
        **DATASET,
    )
    hub.add_repo("me/lines", {"train.jsonl": b"".join(LINES), "test.jsonl": b'{"text": "x"}\n'}, **DATASET)
    hub.add_repo("me/table", {"data/train-00000-of-00001.parquet": parquet(ROWS)}, **DATASET)
    hub.add_repo("me/private", {"train.jsonl": b"".join(LINES)}, private=True, **DATASET)
    hub.add_repo("me/gated", {"train.jsonl": b"".join(LINES)}, gated=True, **DATASET)
    hub.add_repo("me/script", {"script.py": b"x = 1"}, **DATASET)
    hub.add_repo("me/empty", {"README.md": b"nothing"}, **DATASET)
    hub.add_repo("me/malformed", {"train.jsonl": b"".join(LINES) + b'{"text": bad}\n'}, **DATASET)
    hub.add_repo("me/column", {"train.jsonl": b'{"prose": "x"}\n'}, **DATASET)
    subjects = (
        b"---\nconfigs:\n- {config_name: a, data_files: a.jsonl}\n- {config_name: b, data_files: b.jsonl}\n---\n"
    )
    hub.add_repo(
        "me/subjects",
        {"README.md": subjects, "a.jsonl": b"".join(LINES[:3]), "b.jsonl": b"".join(LINES[150:152])},
        **DATASET,
    )
    hub.add_repo("me/big", {"train.jsonl": BIG}, **DATASET)


@contextmanager
def process(environment: dict[str, str]) -> Iterator[Client]:
    """Calls functions of this module in a process that has this environment."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
    changed = mock.patch.dict(os.environ, environment | {"PYTHONPATH": path}, clear=True)
    with changed, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield lambda function, *arguments, **options: pool.submit(function, *arguments, **options).result()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        fill(server)
        yield server


@pytest.fixture(scope="module")
def client(hub: HubServer, home: Path) -> Iterator[Client]:
    with process(hub.environment(home)) as call:
        yield call


def read(given: str | dict[str, str], wanted: int = 4, token: str | None = None) -> dict[str, Any] | str:
    """What a source gives: the pool and how it was made, or the name and text of the error."""
    from transformers import AutoTokenizer

    from optimum_calibprune import pocket
    from optimum_calibprune.calibration.sources import build_pool, open_sources
    from optimum_calibprune.records import CalibrationSource

    tokenizer = AutoTokenizer.from_pretrained(pocket.MODEL)
    (opened,) = open_sources([given if isinstance(given, str) else CalibrationSource("a", "code", **given)])
    try:
        pool = build_pool(opened, tokenizer, LENGTH, wanted, token=token)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    text = tokenizer.decode(pool.input_ids.reshape(-1).tolist())
    return {
        "windows": pool.input_ids.tolist(),
        "documents": text.split(tokenizer.eos_token)[:-1],
        "revision": pool.source.revision,
        "pool": pool.source.pool,
    }


def in_order(**given: Any) -> list[str] | str:
    """The texts of a source, as they stand there."""
    from optimum_calibprune.calibration.sources import OpenSource, rows
    from optimum_calibprune.records import CalibrationSource

    try:
        _, found = rows(OpenSource(CalibrationSource("a", "math", **given)), shuffle=False)
        return [row["text"] for row in found]
    except ValueError as error:
        return str(error)


def test_of_several_subsets_one_row_each_is_read_in_turn(client: Client) -> None:
    texts = [ROWS[i]["text"] for i in (0, 150, 1, 151, 2)]
    assert client(in_order, repo="me/subjects", subset="a+b") == texts
    assert client(in_order, repo="me/subjects", subset="b") == texts[1::2]
    assert "BuilderConfig 'c' not found" in client(in_order, repo="me/subjects", subset="a+c")


@pytest.mark.parametrize("given", ["c4", {"repo": "me/lines"}, {"repo": "me/table"}])
def test_a_source_is_streamed_from_all_over_it(
    given: str | dict[str, str], hub: HubServer, client: Client, home: Path
) -> None:
    found = client(read, given, wanted=10)
    repo = str(SOURCES[given].repo) if isinstance(given, str) else given["repo"]
    assert found["revision"] == hub.commits(repo, **DATASET)[0].sha
    assert found["pool"]["shuffle_buffer"] == str(SHUFFLE_BUFFER)
    assert {"documents", "windows", "shuffle_seed", "datasets"} < found["pool"].keys()
    texts = [row["text"] for row in ROWS]
    places = [texts.index(document) for document in found["documents"]]
    assert min(places) < 75 <= 225 < max(places)
    assert places != sorted(places)
    assert not list((home / "hub").glob("**/*.parquet")) + list((home / "hub").glob("**/*.jsonl")), "nothing is kept"


def test_the_same_revision_gives_the_same_pool(hub: HubServer, client: Client) -> None:
    sha = hub.commits("me/lines", **DATASET)[0].sha
    found = client(read, {"repo": "me/lines"})
    assert client(read, {"repo": "me/lines", "revision": sha}) == found
    assert found["revision"] == sha


def test_a_private_or_gated_source_is_read_with_a_token(client: Client) -> None:
    expected = client(read, {"repo": "me/lines"})["windows"]
    for repo in "me/private", "me/gated":
        assert client(read, {"repo": repo}, token=hub_server.TOKEN)["windows"] == expected


REFUSED = {
    "private": ({"repo": "me/private"}, "ValueError: 'a': me/private is not on the Hub, or it is private and needs"),
    "gated": ({"repo": "me/gated"}, "ValueError: 'a': me/gated is gated. Accept its terms on the Hub, then log in"),
    "missing": (
        {"repo": "me/none"},
        "ValueError: 'a': me/none is not on the Hub, or it is private and needs a token.",
    ),
    "no id": ({"repo": "a/b/c"}, "ValueError: 'a': a/b/c cannot be read: Repo id must be in the form"),
    "revision": ({"repo": "me/lines", "revision": "v9"}, "ValueError: 'a': me/lines has no revision 'v9'."),
    "subset": (
        {"repo": "me/lines", "subset": "de"},
        "ValueError: 'a': me/lines cannot be read: BuilderConfig 'de' not",
    ),
    "split": ({"repo": "me/lines", "split": "val"}, "ValueError: 'a': me/lines cannot be read: Bad split: val."),
    "script": ({"repo": "me/script"}, "ValueError: 'a': me/script cannot be read: Dataset scripts are no longer"),
    "empty": (
        {"repo": "me/empty"},
        "ValueError: 'a': me/empty cannot be read: The directory at hf://datasets/me/empty",
    ),
    "malformed": ({"repo": "me/malformed"}, "ValueError: 'a': me/malformed cannot be read: JSON parse error"),
    "column": ({"repo": "me/column"}, "ValueError: A row of source 'a' does not fit '{text}': 'text' is missing. Its"),
    "short": ({"repo": "me/lines", "split": "test"}, "ValueError: Source 'a' is too short: 4 samples of 16 tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_told_in_one_sentence(case: str, client: Client) -> None:
    given, said = REFUSED[case]
    found = client(read, given, token=STRANGER_TOKEN if case in ("private", "gated") else None)
    assert isinstance(found, str)
    assert found.startswith(said)
    assert "\n" not in found


def test_a_refusal_of_the_hub_itself_is_a_connection_error(hub: HubServer, client: Client) -> None:
    hub.fail_next("GET", "/api/datasets/me/lines", 403)
    found = client(read, {"repo": "me/lines"})
    assert found.startswith("ConnectionError: 'a' needs the Hub data set me/lines, which cannot be reached: 403")
    assert "\n" not in found


def test_a_large_source_is_read_in_part(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def serve_in_pieces(handler: hub_server.Handler) -> None:
        """As the server answers, but counting what the client takes before it hangs up."""
        whole, handler.wfile = handler.wfile, io.BytesIO()
        hub_server.Handler.serve(handler)
        answer, handler.wfile = handler.wfile.getbuffer(), whole
        for start in range(0, len(answer), 2**16):
            taken.append(handler.wfile.write(answer[start : start + 2**16]))
            handler.wfile.flush()

    monkeypatch.setattr(hub_server.Handler, "do_GET", serve_in_pieces)
    found = client(read, {"repo": "me/big"}, wanted=50)
    assert len(found["windows"]) == 200
    assert SHUFFLE_BUFFER * len(BIG_ROW) < sum(taken) < len(BIG) // 2


def load_into_cache(repo: str) -> int:
    import datasets

    return len(datasets.load_dataset(repo, split="train"))


def test_offline_only_what_is_in_the_cache_is_read(hub: HubServer, client: Client, home: Path) -> None:
    assert client(load_into_cache, "me/lines") == 300
    before = len(hub.requests)
    with process(hub.environment(home) | {"HF_HUB_OFFLINE": "1"}) as offline:
        assert offline(read, {"repo": "me/table"}) == (
            "ConnectionError: 'a' needs the Hub data set me/table, which cannot be reached: HF_HUB_OFFLINE is set and "
            "it is not in the local cache. Local files work without the Hub: NAME=PATH:CAPABILITY."
        )
        found = offline(read, {"repo": "me/lines"}, wanted=10)
    assert len(hub.requests) == before
    assert len(found["windows"]) == 40
    assert "shuffle_buffer" not in found["pool"], "the whole of it is shuffled"


def test_a_hub_that_cannot_be_reached_is_a_connection_error(client: Client) -> None:
    found = client(read_elsewhere, "http://127.0.0.1:9")  # where nothing listens
    assert found.startswith("ConnectionError: 'a' needs the Hub data set me/lines, which cannot be reached: [Errno")
    assert found.endswith("Connection refused. Local files work without the Hub: NAME=PATH:CAPABILITY.")


def read_elsewhere(endpoint: str) -> dict[str, Any] | str:
    from huggingface_hub import constants

    with mock.patch.object(constants, "ENDPOINT", endpoint):
        return read({"repo": "me/lines"})
