# SPDX-License-Identifier: Apache-2.0
"""The Space on ZeroGPU: who lends GPUs is on the loopback interface, workers are forked; there is only no CUDA in them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from optimum_calibprune import RunRecord, pocket
from tests.space.device_api import DeviceApi
from tests.space.server import Server, serve


gradio_client = pytest.importorskip("gradio_client", reason="the Space needs gradio")
sys.path.insert(0, str(Path(__file__).parents[2] / "space"))

import zero  # noqa: E402
from limits import SECONDS, Job  # noqa: E402


QUICK = {"samples": 4, "capabilities": ["general"]}


@pytest.fixture(scope="module")
def lender() -> Iterator[DeviceApi]:
    with DeviceApi() as lender:
        yield lender


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, lender: DeviceApi) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("space")
    group = folder / "cgroup"
    group.write_text("0::/a/pod\n")
    lent = {"SPACES_ZERO_GPU": "true", "SPACES_ZERO_DEVICE_API_URL": lender.url}
    variables = lent | {"ZEROGPU_PROC_SELF_CGROUP_PATH": str(group), "CUDA_VISIBLE_DEVICES": ""}
    with serve(folder, Path(__file__).parent / "zero_app.py", variables) as server:
        yield server


@pytest.fixture
def client(server: Server, lender: DeviceApi) -> Iterator[gradio_client.Client]:
    lender.asked.clear()
    client = gradio_client.Client(server.url, verbose=False)
    yield client
    client.close()
    server.wait_for_no_visitors()


def wait_for(condition: Callable[[], object], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    assert condition()


def test_a_plan_asks_for_no_gpu(client: gradio_client.Client, lender: DeviceApi) -> None:
    assert "42 linear layers" in client.predict(api_name="/plan")
    assert lender.asked == []


def test_models_are_pruned_and_answer_in_workers(
    client: gradio_client.Client, lender: DeviceApi, server: Server, tmp_path: Path
) -> None:
    record = RunRecord.from_json(client.predict(samples=4, capabilities=["code"], api_name="/prune"))
    assert record.capabilities.capabilities[0].dense > 0, "programs run in a sandbox within the worker"
    assert record.prune.zeros / record.prune.weights == pytest.approx(0.5, abs=0.01)
    [asked] = lender.of("/schedule")
    wanted = zero.seconds_of(Job(samples=4, capabilities=("code",)), tmp_path)
    assert zero.LOADS < wanted < SECONDS
    assert float(asked["durationSeconds"]) == wanted
    [allowed] = lender.of("/allow")
    assert int(allowed["pid"]) != server.process.pid
    assert lender.of("/release") == [{"allowToken": "allowed-1", "fail": "false"}]
    dense, sparse = client.submit(
        "Question: What is the capital of Canada?\nAnswer:", 8, api_name="/generate"
    ).result()
    assert dense.startswith(" Ottawa")
    assert sparse
    assert lender.of("/schedule")[1]["durationSeconds"] == "60"
    assert len(lender.of("/release")) == 2


def test_each_mix_of_a_comparison_has_its_own_turn(client: gradio_client.Client, lender: DeviceApi) -> None:
    mixes = ["uniform", "single:gsm8k"]
    found = json.loads(client.predict(mixes=mixes, **QUICK, api_name="/compare"))
    assert [record["config"]["mix"] for record in found] == mixes
    assert len({record["capabilities"]["capabilities"][0]["dense"] for record in found}) == 1
    assert len(lender.of("/schedule")) == len(lender.of("/release")) == 2


def test_a_model_of_the_hub_is_fetched_once_and_before_a_gpu_is_asked_for(
    client: gradio_client.Client, lender: DeviceApi, server: Server
) -> None:
    server.hub.add_repo(
        "owner/tiny", {path.name: path.read_bytes() for path in pocket.MODEL.iterdir() if path.is_file()}
    )
    server.hub.requests.clear()
    asked_after = []
    answer = lender.answer
    lender.answer = lambda path, given: asked_after.append(len(weights(server))) or answer(path, given)
    found = json.loads(client.predict(["igsp", "self-cal"], "owner/tiny", samples=4, api_name="/compare"))
    lender.answer = answer
    assert [record["base"]["name"] for record in found] == ["owner/tiny"] * 2
    assert asked_after[0] == 1
    assert len(weights(server)) == 1


def weights(server: Server) -> list[str]:
    """Downloads of the weights so far."""
    return [path for method, path, _ in server.hub.requests if method == "GET" and path.endswith("model.safetensors")]


def test_a_run_that_is_stopped_gives_its_gpu_back(client: gradio_client.Client, lender: DeviceApi) -> None:
    going_on = client.submit(api_name="/prune")
    wait_for(lambda: lender.of("/allow"))
    client.predict(api_name="/stop")
    with pytest.raises(gradio_client.exceptions.AppError, match="was stopped"):
        going_on.result(60)
    assert len(lender.of("/release")) == 1


def test_what_zero_gpu_refuses_or_ends_is_said(client: gradio_client.Client, lender: DeviceApi) -> None:
    lender.used_up = True
    with pytest.raises(gradio_client.exceptions.AppError, match="GPU limit"):
        client.predict(**QUICK, api_name="/prune")
    lender.used_up = False
    going_on = client.submit(api_name="/prune")
    wait_for(lambda: lender.of("/allow"))
    os.kill(int(lender.of("/allow")[-1]["pid"]), signal.SIGKILL)  # as when its seconds are over
    with pytest.raises(gradio_client.exceptions.AppError, match="GPU task aborted"):
        going_on.result(60)
    assert RunRecord.from_json(client.predict(**QUICK, api_name="/prune")).prune.zeros
