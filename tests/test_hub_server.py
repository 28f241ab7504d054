# SPDX-License-Identifier: Apache-2.0
"""The loopback Hub against the real clients, each in a process of its own because they read HF_ENDPOINT at import."""

import hashlib
import http.client
import io
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.hub_server import STRANGER_TOKEN, TOKEN, HubServer


Client = Callable[..., Any]
WEIGHTS = bytes(range(256)) * 16
MODEL = {"README.md": b"# Tiny\n", "config.json": b"{}", "model.safetensors": WEIGHTS, "a/b/notes.txt": b"deep"}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def client(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """Calls functions of this module in a process that has the Hub's environment."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])  # the process imports this module by name
    environment = mock.patch.dict(os.environ, hub.environment(tmp_path / "home"), clear=True)
    with environment, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield lambda function, *arguments, **options: pool.submit(function, *arguments, **options).result()


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def push(folder: Path, repo_id: str, **options: Any) -> tuple[str, str | None]:
    from huggingface_hub import HfApi

    HfApi().create_repo(repo_id, exist_ok=True)
    pushed = HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Push", **options)
    return pushed.oid, pushed.pr_revision


def pull(repo_id: str, revision: str | None = None) -> dict[str, bytes]:
    from huggingface_hub import HfApi

    api = HfApi()
    snapshot = Path(api.snapshot_download(repo_id, revision=revision))
    names = api.list_repo_files(repo_id, revision=revision)
    assert Path(api.hf_hub_download(repo_id, "config.json", revision=revision)).parent == snapshot
    assert [file.rfilename for file in api.model_info(repo_id, revision=revision).siblings] == names
    return {name: (snapshot / name).read_bytes() for name in names}


def create_branch(repo_id: str, branch: str) -> None:
    from huggingface_hub import HfApi

    HfApi().create_branch(repo_id, branch=branch)


def test_push_and_pull_a_folder(hub: HubServer, client: Client, tmp_path: Path) -> None:
    sha, _ = client(push, written(tmp_path / "model", MODEL), "me/tiny")
    assert hub.files("me/tiny") == client(pull, "me/tiny") == MODEL
    assert [commit.title for commit in hub.commits("me/tiny")] == ["initial commit", "Push"]
    assert hub.commits("me/tiny")[-1].sha == sha
    (upload,) = (request for request in hub.requests if request[0] == "PUT")
    assert upload[1].endswith(hashlib.sha256(WEIGHTS).hexdigest())
    assert ("POST", "/api/models/me/tiny/commit/main", f"Bearer {TOKEN}") in hub.requests


def test_an_unchanged_folder_makes_no_commit(hub: HubServer, client: Client, tmp_path: Path) -> None:
    hub.add_repo("me/tiny", MODEL)
    sha, _ = client(push, written(tmp_path / "model", MODEL), "me/tiny")
    assert [commit.sha for commit in hub.commits("me/tiny")] == [sha]
    client(push, written(tmp_path / "model", {"config.json": b"{}\n"}), "me/tiny")
    assert len(hub.commits("me/tiny")) == 2
    assert hub.files("me/tiny") == MODEL | {"config.json": b"{}\n"}


def test_branches_and_pull_requests_leave_main_alone(hub: HubServer, client: Client, tmp_path: Path) -> None:
    hub.add_repo("me/tiny", MODEL)
    client(create_branch, "me/tiny", "sparse/50")
    client(push, written(tmp_path / "branch", {"x.txt": b"x"}), "me/tiny", revision="sparse/50")
    sha, pull_request = client(push, written(tmp_path / "pull", {"y.txt": b"y"}), "me/tiny", create_pr=True)
    assert pull_request == "refs/pr/1"
    assert hub.commits("me/tiny", pull_request)[-1].sha == sha
    assert hub.files("me/tiny") == MODEL
    assert client(pull, "me/tiny", "sparse/50") == hub.files("me/tiny", "sparse/50") == MODEL | {"x.txt": b"x"}
    assert client(pull, "me/tiny", pull_request) == client(pull, "me/tiny", sha) == MODEL | {"y.txt": b"y"}


def commit_in_parts(repo_id: str) -> list[str]:
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api, base = HfApi(), HfApi().model_info(repo_id).sha
    copied = CommitOperationCopy("model.safetensors", "copy.safetensors")
    deleted = [CommitOperationDelete("a/"), CommitOperationDelete("README.md")]
    api.create_commit(repo_id, [copied, *deleted], commit_message="Good", parent_commit=base)
    raised = []
    for name, parent in ("gone.txt", None), ("config.json", base):
        operations = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete(name)]
        with pytest.raises(HfHubHTTPError) as error:
            api.create_commit(repo_id, operations, commit_message="Bad", parent_commit=parent)
        raised.append((error.type.__name__, error.value.response.status_code))
    return raised


def test_a_commit_is_applied_wholly_or_not_at_all(hub: HubServer, client: Client) -> None:
    hub.add_repo("me/tiny", MODEL)
    assert client(commit_in_parts, "me/tiny") == [("RemoteEntryNotFoundError", 404), ("HfHubHTTPError", 412)]
    assert hub.files("me/tiny") == {"config.json": b"{}", "model.safetensors": WEIGHTS, "copy.safetensors": WEIGHTS}


def refusals(attempts: dict[str, tuple[str, list, dict]]) -> dict[str, tuple[str, int]]:
    """Which exception and status each call of a method of HfApi ends in."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    raised = {}
    for name, (method, arguments, options) in attempts.items():
        with pytest.raises(HfHubHTTPError) as error:
            getattr(HfApi(), method)(*arguments, **options)
        raised[name] = (error.type.__name__, error.value.response.status_code)
    return raised


def test_refusals_are_those_of_the_hub(hub: HubServer, client: Client) -> None:
    hub.add_repo("me/open", MODEL)
    hub.add_repo("me/private", MODEL, private=True)
    hub.add_repo("me/gated", MODEL, gated=True)
    anonymous, stranger, wrong = ({"token": token} for token in (False, STRANGER_TOKEN, "hf_wrong"))
    missing = ("RepositoryNotFoundError", 404)
    cases = {
        "no repository": ("model_info", ["me/absent"], {}, missing),
        "other type": ("dataset_info", ["me/open"], {}, missing),
        "no revision": ("model_info", ["me/open"], {"revision": "v9"}, ("RevisionNotFoundError", 404)),
        "no file": ("hf_hub_download", ["me/open", "absent"], {}, ("RemoteEntryNotFoundError", 404)),
        "private, anonymous": ("model_info", ["me/private"], anonymous, ("RepositoryNotFoundError", 401)),
        "private, stranger": ("hf_hub_download", ["me/private", "config.json"], stranger, missing),
        "gated, anonymous": ("hf_hub_download", ["me/gated", "config.json"], anonymous, ("GatedRepoError", 403)),
        "gated, stranger": ("snapshot_download", ["me/gated"], stranger, ("GatedRepoError", 403)),
        "create, anonymous": ("create_repo", ["me/new"], anonymous, ("HfHubHTTPError", 401)),
        "create, wrong token": ("create_repo", ["me/new"], wrong, ("HfHubHTTPError", 401)),
        "create, again": ("create_repo", ["me/open"], {}, ("HfHubHTTPError", 409)),
        "write, stranger": ("create_branch", ["me/open"], stranger | {"branch": "x"}, ("HfHubHTTPError", 403)),
    }
    attempts = {name: (method, arguments, options) for name, (method, arguments, options, _) in cases.items()}
    assert client(refusals, attempts) == {name: expected for name, (*_, expected) in cases.items()}
    assert client(pull, "me/private") == client(pull, "me/gated") == MODEL
    assert "me/new" not in {repo_id for _, repo_id in hub.repos}


def test_injected_failures_pass(hub: HubServer, client: Client, tmp_path: Path) -> None:
    folder = written(tmp_path / "model", MODEL)
    hub.add_repo("me/tiny", {})
    hub.fail_next("PUT", "/storage/", 503)  # the client tries again after a second
    hub.fail_next("POST", "/commit/", 429, headers={"Retry-After": "7"})
    upload = ("upload_folder", [], {"repo_id": "me/tiny", "folder_path": folder})
    assert client(refusals, {"upload": upload}) == {"upload": ("HfHubHTTPError", 429)}
    assert hub.files("me/tiny") == {}
    client(push, folder, "me/tiny")
    assert hub.files("me/tiny") == MODEL
    assert [method for method, *_ in hub.requests].count("PUT") == 2


def test_http_on_one_connection(hub: HubServer) -> None:
    hub.add_repo("me/tiny", MODEL)
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=10)

    def ask(method: str, path: str, body: bytes | list[bytes] = b"", **headers: str) -> tuple[int, bytes, Any]:
        connection.request(method, path, body, headers, encode_chunked=isinstance(body, list))
        response = connection.getresponse()
        return response.status, response.read(), response.headers

    weights = "/me/tiny/resolve/main/model.safetensors"
    assert ask("GET", weights)[:2] == (200, WEIGHTS)
    status, body, headers = ask("HEAD", weights)
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(WEIGHTS)))
    assert headers["X-Repo-Commit"] == hub.commits("me/tiny")[0].sha
    assert headers["ETag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
    for byte_range, part in ("0-9", WEIGHTS[:10]), ("4000-", WEIGHTS[4000:]), ("-7", WEIGHTS[-7:]):
        assert ask("GET", weights, Range=f"bytes={byte_range}")[:2] == (206, part)
    assert ask("GET", weights, Range="bytes=9999-")[0] == 416
    folders = {"": ["README.md", "a", "config.json", "model.safetensors"], "/a": ["a/b"], "/a/b": ["a/b/notes.txt"]}
    for folder, paths in folders.items():
        listed = json.loads(ask("GET", f"/api/models/me/tiny/tree/main{folder}")[1])
        assert [entry["path"] for entry in listed] == paths
    storage = "/me/tiny.git/info/lfs/storage/" + hashlib.sha256(b"hello").hexdigest()
    assert ask("PUT", storage, [b"hel", b"lo"], **{"Transfer-Encoding": "chunked"})[0] == 200
    assert ask("PUT", storage, b"other")[0] == 400
    assert ask("GET", "/api/agent-harnesses")[0] == 404
    assert json.loads(ask("GET", "/api/whoami-v2", Authorization=f"Bearer {TOKEN}")[1])["name"] == "me"
    hub.__exit__()
    with pytest.raises(OSError):
        ask("GET", weights)


def test_the_environment_reaches_this_hub_only(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", "elsewhere")
    environment = hub.environment(tmp_path)
    assert {"HF_HUB_OFFLINE", "HF_HUB_CACHE"}.isdisjoint(environment)
    assert (environment["HF_ENDPOINT"], environment["HF_HOME"]) == (hub.url, str(tmp_path))
    assert environment["PATH"] == os.environ["PATH"]


def push_and_load_model(repo_id: str) -> bool:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    model.push_to_hub(repo_id)
    loaded = AutoModelForCausalLM.from_pretrained(repo_id).state_dict()
    return all(loaded[name].equal(weight) for name, weight in model.state_dict().items())


def test_transformers_loads_what_it_pushed(hub: HubServer, client: Client) -> None:
    assert client(push_and_load_model, "me/llama")
    assert {"config.json", "model.safetensors"} <= set(hub.files("me/llama"))


def stream(attempts: list[tuple[str, dict[str, Any]]]) -> list[list[int]]:
    from datasets import load_dataset

    return [
        [row["n"] for row in load_dataset(repo_id, split="train", streaming=True, **options)]
        for repo_id, options in attempts
    ]


def load_absent_dataset() -> str:
    from datasets import load_dataset

    with pytest.raises(FileNotFoundError) as error:
        load_dataset("me/absent", split="train", streaming=True)
    return error.type.__name__


def parquet(values: list[int]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"n": values}), sink)
    return sink.getvalue()


def test_datasets_streams_lines_parquet_and_configurations(hub: HubServer, client: Client) -> None:
    lines = {"train.jsonl": b'{"n": 1}\n{"n": 2}\n', "extra/more.jsonl": b'{"n": 3}\n'}
    card = b"---\nconfigs:\n- config_name: odd\n  data_files: odd.jsonl\n- config_name: even\n  data_files: e/*\n---\n"
    hub.add_repo("me/lines", lines, repo_type="dataset")
    hub.add_repo("me/table", {"data/train-00000-of-00001.parquet": parquet([4, 5])}, repo_type="dataset")
    numbers = {"odd.jsonl": b'{"n": 1}\n', "e/0.jsonl": b'{"n": 2}\n', "e/1.jsonl": b'{"n": 4}\n'}
    hub.add_repo("me/configured", {"README.md": card} | numbers, repo_type="dataset", private=True)
    sha = hub.commits("me/configured", repo_type="dataset")[0].sha
    cases = [
        (("me/lines", {}), [1, 2]),
        (("me/lines", {"data_files": "extra/*.jsonl"}), [3]),
        (("me/table", {}), [4, 5]),
        (("me/configured", {"name": "odd"}), [1]),
        (("me/configured", {"name": "even", "revision": sha}), [2, 4]),
    ]
    assert client(stream, [attempt for attempt, _ in cases]) == [expected for _, expected in cases]
    assert client(load_absent_dataset) == "DatasetNotFoundError"
