# SPDX-License-Identifier: Apache-2.0
"""The Space through its API: what a script of a visitor can do, and what it cannot."""

from __future__ import annotations

import json
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import wait
from itertools import pairwise
from pathlib import Path

import pytest

from optimum_calibprune import RunRecord, pocket
from tests.hub_server import STRANGER_TOKEN, TOKEN
from tests.space import large
from tests.space.server import Server, serve


pytest.importorskip("gradio", reason="the Space needs gradio")
gradio_client = pytest.importorskip("gradio_client", reason="the Space needs gradio")

QUICK = {"samples": 4, "capabilities": ["general"]}
MIB = 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("space")) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[gradio_client.Client]:
    client = connect(server)
    yield client
    client.close()


def connect(server: Server) -> gradio_client.Client:
    return gradio_client.Client(server.url, verbose=False)


def test_endpoints_have_names_and_docstrings(server: Server) -> None:
    with urllib.request.urlopen(f"{server.url}/gradio_api/info") as answer:
        endpoints = json.load(answer)["named_endpoints"]
    mine = {"/plan", "/prune", "/stop", "/push"}
    assert set(endpoints) == mine | {"/compare", "/generate", "/command", "/estimate", "/launch"}
    assert all(endpoint["description"] for endpoint in endpoints.values())


def test_a_script_plans_prunes_and_pushes_under_its_own_name(server: Server, client: gradio_client.Client) -> None:
    plan = client.predict(**QUICK, api_name="/plan")
    assert "42 linear layers" in plan
    assert "MiB" in plan
    record = RunRecord.from_json(client.predict(**QUICK, sparsity="60%", api_name="/prune"))
    assert record.capabilities.total > 0
    assert str(record.config.sparsity) == "60%"
    url = client.predict("me/pocket-60", TOKEN, True, api_name="/push")
    assert url.startswith(server.hub.url)
    assert {"model.safetensors", "calibprune.json", "README.md"} <= set(server.hub.files("me/pocket-60"))
    assert server.hub.repos["model", "me/pocket-60"].private
    client.predict("me/pocket-60", TOKEN, True, True, api_name="/push")
    for repo, token, said in [
        ("me/other", "", "Log in, or give a token"),
        ("me/other", STRANGER_TOKEN, "the token may not write there"),
        ("me/other", "hf_none", "does not accept the token"),
        ("me/other", "hf_a\nHost: b", "holds characters that no token has"),
        ("../me", TOKEN, "is no name of a repo"),
        ("x" * MIB, TOKEN, "is no name of a repo"),
    ]:
        text = failure(client, repo, token, api_name="/push")
        assert said in text
        assert "/tmp" not in text
        assert token not in text or not token
    assert ("model", "me/other") not in server.hub.repos


def test_a_model_of_the_hub_is_pruned_and_nothing_of_it_is_run(server: Server, client: gradio_client.Client) -> None:
    files = {path.name: path.read_bytes() for path in pocket.MODEL.iterdir() if path.is_file()}
    server.hub.add_repo("owner/tiny", files | {"evil.py": b"raise SystemExit"})
    record = RunRecord.from_json(client.predict("owner/tiny", "igsp", samples=4, api_name="/prune"))
    dense, sparse = client.predict("Question: What is the capital of Canada?\nAnswer:", 8, api_name="/generate")
    assert "Ottawa" in dense
    assert sparse != ""
    assert record.base.name == "owner/tiny"
    assert len(record.prune.layers) == 42
    assert "runs only with allow_code_execution" in record.capabilities.not_measured["code"]


def test_a_script_compares_mixes_and_asks_both_models(server: Server, client: gradio_client.Client) -> None:
    found = json.loads(client.predict(["uniform", "single:gsm8k"], **QUICK, api_name="/compare"))
    assert [record["config"]["mix"] for record in found] == ["uniform", "single:gsm8k"]
    assert "a comparison takes 2 to 4" in failure(client, ["igsp"], api_name="/compare")
    prompt = "Question: What is the capital of Canada?\nAnswer:"
    assert "no result yet in this session" in failure(client, prompt, api_name="/generate")
    client.predict(**QUICK, sparsity="70%", api_name="/prune")
    job = client.submit(prompt, 32, api_name="/generate")
    steps = list(job)
    assert steps[-1][0].startswith(" Ottawa")
    assert steps[-1][0] != steps[-1][1]
    assert all(later[0].startswith(earlier[0]) for earlier, later in pairwise(steps))
    bad = "<script>alert(1)</script>"
    assert client.predict(bad, 4, api_name="/generate")[0] != ""
    for changed, said in (({"prompt": "x" * MIB}, "up to 2,000"), ({"prompt": "a", "new_tokens": 10**9}, "1 to 256")):
        assert said in failure(client, **changed, api_name="/generate")


def test_a_script_prunes_a_large_model_elsewhere(server: Server, client: gradio_client.Client) -> None:
    server.hub.add_repo("owner/large", {"config.json": large.config().encode()})
    server.hub.requests.clear()
    assert client.predict("owner/large", gpus=4, api_name="/command").startswith("torchrun --nproc-per-node 4 ")
    found = json.loads(client.predict("owner/large", sparsity="2:4", api_name="/estimate"))
    assert {entry["flavor"] for entry in found} == {"l4x1", "a100-large", "h200"}
    assert [entry["dollars"] for entry in found] == sorted(entry["dollars"] for entry in found)
    assert all(0 < entry["gpu_bytes"] < 141e9 for entry in found)
    asked = {path.rpartition("/")[2] for _, path, _ in server.hub.requests if "owner/large" in path}
    assert asked == {"large", "config.json"}, "whether it is there, and its config"
    url = client.predict("owner/large", "me/large-50", TOKEN, "a100-large", 2, api_name="/launch")
    [(job_id, job)] = server.hub.jobs.items()
    assert url.endswith(job_id)
    assert job["secrets"] == {"HF_TOKEN": TOKEN}
    assert shlex.join(job["command"]).endswith("--push-to-hub me/large-50 --output /tmp/sparse")
    for given, endpoint, said in [
        (("../../etc",), "/command", "is no name of a model"),
        (("owner/large; id",), "/estimate", "is no name of a model"),
        (("owner/absent",), "/estimate", "owner/absent"),
        (("x" * MIB,), "/estimate", "is no name of a model"),
        (("owner/large", "me/$(id)", TOKEN, "h200"), "/launch", "is no name of a repo"),
        (("owner/large", "me/x", "", "h200"), "/launch", "Log in, or give a token"),
        (("owner/large", "me/x", STRANGER_TOKEN, "h200"), "/launch", "may not start jobs"),
        (("owner/large", "me/x", TOKEN, "h200", 10**9), "/launch", "1 to 24"),
    ]:
        text = failure(client, *given, api_name=endpoint)
        assert said in text
        assert str(server.temporary) not in text
    assert len(server.hub.jobs) == 1


def test_a_server_ends_in_the_middle_of_a_run_and_leaves_nothing(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        running = connect(server).submit(mix="igsp", api_name="/prune")
        until = time.monotonic() + 60
        while not server.visitors and time.monotonic() < until:
            time.sleep(0.1)
        assert server.visitors
        server.process.terminate()
        server.process.wait(20)
        assert running.exception(20) is not None


def test_a_stranger_sees_nothing_of_another(server: Server, client: gradio_client.Client) -> None:
    server.wait_for_no_visitors()
    client.predict(**QUICK, api_name="/prune")
    other = connect(server)
    assert "no result yet in this session" in failure(other, "me/stolen", TOKEN, api_name="/push")
    assert "no result yet in this session" in failure(other, "Who was here?", api_name="/generate")
    assert other.predict(api_name="/stop") is False
    [folder] = [path for path in server.visitors if path.parent.name == "visitors"]
    for path in (folder / "model" / "model.safetensors", folder, Path("/etc/passwd"), f"{folder}/../../files"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server.url}/gradio_api/file={path}")
        assert refused.value.code in (403, 404)
    other.close()
    client.close()
    server.wait_for_no_visitors()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "../../etc/passwd"}, "is no name of a model"),
        ({"model": "<img src=x onerror=alert(1)>"}, "is no name of a model"),
        ({"model": "x" * MIB}, "is no name of a model"),
        ({"model": "owner/none"}, "does not show a public model 'owner/none'"),
        ({"samples": 10**9}, "this page allows 4 to 64"),
        ({"sources": ["x=/etc/passwd:general"]}, "Unknown source"),
    ],
)
def test_errors_are_one_sentence(server: Server, client: gradio_client.Client, changed: dict, said: str) -> None:
    text = failure(client, **changed, api_name="/prune")
    assert said in text
    assert len(text) < 500
    assert "Traceback" not in text
    assert str(server.temporary) not in text


def test_a_call_without_a_session_is_refused(server: Server) -> None:
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/gradio_api/run/stop", b'{"data": []}', kind)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert "needs a session" in refused.value.read().decode()


def test_files_cannot_be_left_on_the_server(server: Server, tmp_path: Path) -> None:
    boundary = "x" * 20
    body = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n{"y" * MIB}\r\n--{boundary}--\r\n'
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    request = urllib.request.Request(f"{server.url}/gradio_api/upload", body.encode(), kind)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 413


def test_ten_jobs_finish_in_order_and_leave_nothing(server: Server) -> None:
    clients = [connect(server) for _ in range(10)]
    clients[0].predict(**QUICK, api_name="/prune")  # what stays loaded is loaded
    before = server.process.memory_info().rss
    ended: list[int] = []
    jobs = []
    for i, client in enumerate(clients):
        job = client.submit(**QUICK, sparsity=("30%", "70%")[i % 2], api_name="/prune")
        job.add_done_callback(lambda _, i=i: ended.append(i))
        jobs.append(job)
        time.sleep(0.3)  # so that they arrive in this order
    wait(jobs)
    assert [str(RunRecord.from_json(job.result()).config.sparsity) for job in jobs] == ["30%", "70%"] * 5
    assert ended == list(range(10))
    for client in clients:
        client.close()
    server.wait_for_no_visitors()
    assert server.process.memory_info().rss - before < 100 * MIB  # the weights alone of ten models are 116 MiB


def failure(client: gradio_client.Client, *values: object, **options: object) -> str:
    with pytest.raises(gradio_client.exceptions.AppError) as failed:
        client.predict(*values, **options)
    return str(failed.value)
