# SPDX-License-Identifier: Apache-2.0
"""Models that are too large for the page: their command line, what they may take elsewhere, and jobs on rented hardware."""

from __future__ import annotations

import ast
import json
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from optimum_calibprune import ModelShape, __version__
from optimum_calibprune.cli import PruneCommand
from tests.hub_server import OWNER, STRANGER_TOKEN, TOKEN, HubServer
from tests.publishing.pushing import process
from tests.space import large


SPACE = Path(__file__).parents[2] / "space"
sys.path.insert(0, str(SPACE))

import estimate  # noqa: E402
import hardware  # noqa: E402
import jobs  # noqa: E402
from hardware import GB, Flavor  # noqa: E402
from limits import BigJob, checked_big, checked_token  # noqa: E402


FORM = {"model": "owner/large", "mix": "uniform", "sources": [], "sparsity": "2:4", "samples": 128, "measure": True}
JOB = BigJob("owner/large", repo=f"{OWNER}/large-50")
RENTED = (  # much as the Hub has listed them
    Flavor("l4x1", "L4", 24 * GB, 30 * GB, 400 * GB, 0.8),
    Flavor("a100-large", "A100", 80 * GB, 142 * GB, 1000 * GB, 2.5),
    Flavor("h200", "H200", 141 * GB, 256 * GB, 3000 * GB, 5.0),
)
HOSTILE = ["; rm -rf ~", "$(id)", "`id`", "--output=/", "a'b", "a\nid", "owner/x;id", "owner/$HOME"]


# ------------------------------------------------------------------------------------------- the command


def test_the_command_is_one_that_the_command_line_takes() -> None:
    parser = ArgumentParser()
    PruneCommand.parse_args(parser)
    asked = FORM | {"sources": ["c4", "gsm8k"], "measure": False, "repo": "me/x", "private": True}
    words = shlex.split(checked_big(**asked).command(processes=8))
    assert words[:4] == ["torchrun", "--nproc-per-node", "8", "--no-python"]
    assert words[4:7] == ["optimum-cli", "calibprune", "prune"]
    parsed = parser.parse_args(words[7:])
    assert (parsed.model, parsed.sparsity, parsed.mix, parsed.samples) == ("owner/large", "2:4", "uniform", 128)
    assert (parsed.sources, parsed.capabilities, parsed.output) == (["c4", "gsm8k"], "none", "large-2of4")
    assert (parsed.push_to_hub, parsed.private) == ("me/x", True)
    plain = parser.parse_args(shlex.split(checked_big(**FORM).command())[3:])
    assert (plain.sources, plain.capabilities, plain.push_to_hub, plain.private) == (None, None, None, None)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused_and_would_do_nothing(name: str) -> None:
    with pytest.raises(ValueError, match="is no name of a model"):
        checked_big(**FORM | {"model": name})
    with pytest.raises(ValueError, match="is no name of a repo"):
        checked_big(**FORM | {"repo": name})
    with pytest.raises(ValueError, match="Unknown source"):
        checked_big(**FORM | {"sources": [name]})
    words = shlex.split(BigJob(name, repo=name, sources=(name,)).command())
    assert words.count(name) == 3, "even so a shell takes it for one word"


@pytest.mark.parametrize("samples", [8, 10**9, 10**400, 4.5, float("inf"), float("nan"), "128", True, None])
def test_samples_have_limits(samples: object) -> None:
    with pytest.raises(ValueError, match=r"16 to 1024|a whole number"):
        checked_big(**FORM | {"samples": samples})


# ------------------------------------------------------------------------------------------ the estimate


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelShape]:
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_text(large.config(), encoding="utf-8")
    return lambda mix: ModelShape.from_pretrained(str(folder), mix=mix)


def test_a_larger_gpu_holds_what_a_smaller_one_reads_block_by_block(shape: Callable[[str], ModelShape]) -> None:
    found = {entry.flavor.name: entry for entry in estimate.estimates(shape("uniform"), RENTED)}
    assert not found["h200"].plan.streamed
    assert found["l4x1"].plan.streamed
    assert found["h200"].gpu_bytes > 2 * 8e9 > found["l4x1"].gpu_bytes
    for entry in found.values():
        assert 0 < entry.hours[0] < entry.hours[1] < 24
        assert entry.gpu_bytes < entry.flavor.memory
        assert entry.dollars == tuple(entry.flavor.dollars_per_hour * hours for hours in entry.hours)


def test_what_no_gpu_can_do_is_said(shape: Callable[[str], ModelShape]) -> None:
    large = shape("igsp")
    assert "l4x1" not in [entry.flavor.name for entry in estimate.estimates(large, RENTED)]
    with pytest.raises(ValueError, match="cannot write its own calibration text"):
        estimate.estimates(large, RENTED[:1])
    tiny = replace(RENTED[0], memory=2**30)
    with pytest.raises(ValueError, match="None of the 1 GPUs"):
        estimate.estimates(shape("uniform"), [tiny])
    with pytest.raises(ValueError, match="None of the 1 GPUs"):
        estimate.estimates(shape("uniform"), [replace(RENTED[-1], disk=2**30)])


def test_the_cheapest_comes_first(shape: Callable[[str], ModelShape]) -> None:
    priced = [replace(flavor, dollars_per_hour=cost) for flavor, cost in zip(RENTED, (9, 1, 3), strict=True)]
    dollars = [entry.dollars for entry in estimate.estimates(shape("uniform"), priced)]
    assert dollars == sorted(dollars)


# -------------------------------------------------------------------------------------- the Hub and jobs


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def there(hub: HubServer, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Calls functions in a process whose Hub this is, and where this machine is logged in."""
    with process(hub.environment(tmp_path)) as there:
        yield there


def _flavors() -> list[tuple]:
    return [(entry.name, entry.gpu, entry.memory, entry.dollars_per_hour) for entry in hardware.flavors()]


def _refused(function: Callable[..., Any], *values: Any) -> str:
    try:
        return f"done: {function(*values)}"
    except ValueError as error:
        return str(error)


def _launched(job: BigJob, flavor: str, hours: object, token: object) -> str:
    return jobs.launch(job, flavor, hours, token).url


def _state(job_id: str, token: str) -> str:
    return str(jobs.state(job_id, token).status.stage)


def test_hardware_is_what_the_hub_lists_with_its_prices(hub: HubServer, there: Callable[..., Any]) -> None:
    found = {name: (gpu, memory, dollars) for name, gpu, memory, dollars in there(_flavors)}
    assert set(found) == {"l4x1", "a100-large", "h200"}, "one GPU each, of those with bf16"
    assert found["a100-large"] == ("A100", 80 * 10**9, pytest.approx(2.5, abs=0.001))
    assert {token for _, _, token in hub.requests} == {None}
    hub.fail_next("GET", "/api/jobs/hardware", 404)
    assert "cannot be had" in there(_refused, _flavors)


def test_a_job_is_started_looked_after_and_cancelled(hub: HubServer, there: Callable[..., Any]) -> None:
    url = there(_launched, JOB, "a100-large", 3, TOKEN)
    [(job_id, job)] = hub.jobs.items()
    assert url == f"{hub.url}/jobs/{OWNER}/{job_id}"
    assert ("model", JOB.repo) in hub.repos, "which the job may push to, or would have failed at once"
    assert job["flavor"] == "a100-large"
    assert job["timeoutSeconds"] == 3 * 3600
    assert job["secrets"] == {"HF_TOKEN": TOKEN}
    assert job["environment"] == {}
    assert TOKEN not in json.dumps(job["command"])
    assert job["command"][-len(JOB.words("/tmp/sparse")) :] == JOB.words("/tmp/sparse")
    assert there(_state, job_id, TOKEN) == "SCHEDULING"
    there(jobs.cancel, job_id, TOKEN)
    assert there(_state, job_id, TOKEN) == "CANCELED"
    assert {token for method, _, token in hub.requests if method == "POST"} == {f"Bearer {TOKEN}"}


def test_jobs_install_what_the_example_installs() -> None:
    head = (SPACE.parent / "examples" / "prune_job.py").read_text(encoding="utf-8")
    line = next(line for line in head.splitlines() if line.startswith("# dependencies = "))
    assert ast.literal_eval(line.removeprefix("# dependencies = ")) == [jobs.PACKAGE, jobs.TORCH]


def test_before_a_release_jobs_install_the_wheel_of_the_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "HERE", tmp_path)
    monkeypatch.setenv("SPACE_ID", "owner/calibprune")
    assert jobs.package() == f"optimum-calibprune[triton]=={__version__}"
    (tmp_path / "optimum_calibprune-1.0-py3-none-any.whl").touch()
    found = Requirement(jobs.package())
    assert (found.name, found.extras) == ("optimum-calibprune", {"triton"})
    assert found.url.endswith("/spaces/owner/calibprune/resolve/main/optimum_calibprune-1.0-py3-none-any.whl")
    monkeypatch.delenv("SPACE_ID")
    assert jobs.package() == f"optimum-calibprune[triton]=={__version__}"


@pytest.mark.parametrize(
    ("job", "flavor", "hours", "token", "said"),
    [
        (JOB, "h200", 4, "", "Log in, or give a token of yours"),
        (JOB, "h200", 4, None, "Log in, or give a token of yours"),
        (JOB, "h200", 4, "hf_secret\nHost: b", "holds characters that no token has"),
        (JOB, "h200", 4, "hf_sécret", "holds characters that no token has"),
        (JOB, "h200", 4, "hf_secret", "does not accept the token"),
        (JOB, "h200", 4, STRANGER_TOKEN, "may not start jobs"),
        (JOB, "h200", 99, TOKEN, "1 to 24"),
        (JOB, "x" * 2**20, 4, TOKEN, "Unknown hardware"),
        (BigJob("owner/large"), "h200", 4, TOKEN, "Name a repo to push to"),
        (replace(JOB, model="pocket"), "h200", 4, TOKEN, "prune it on this page"),
    ],
)
def test_what_is_refused_is_one_sentence_without_the_token(
    hub: HubServer, there: Callable[..., Any], job: BigJob, flavor: str, hours: object, token: Any, said: str
) -> None:
    text = there(_refused, jobs.launch, job, flavor, hours, token)
    assert said in text
    assert "secret" not in text
    assert len(text) < 300
    assert hub.jobs == {}


def test_payment_and_a_hub_that_is_away_are_said(hub: HubServer, there: Callable[..., Any]) -> None:
    hub.fail_next("POST", "/api/jobs", 402)
    assert "asks for payment" in there(_refused, jobs.launch, JOB, "h200", 4, TOKEN)
    hub.break_next("POST", "/api/jobs", "cut")
    assert "cannot be reached" in there(_refused, jobs.launch, JOB, "h200", 4, TOKEN)
    assert there(_refused, jobs.state, "0" * 24, TOKEN) == "There is no such job of yours."


def test_a_token_is_taken_without_what_is_around_it() -> None:
    assert checked_token(f" {TOKEN}\n") == TOKEN
