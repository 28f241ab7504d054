# SPDX-License-Identifier: Apache-2.0
"""`calibprune sources --check` against a Hub on the loopback interface that holds each source in small."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from optimum_calibprune.calibration.table import SOURCES
from tests.calibration.test_readers import READ
from tests.hub_server import HubServer


CLI = str(Path(sys.executable).parent / "optimum-cli")


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        for name, source in SOURCES.items():
            row = json.dumps(READ[name][0]).encode()
            files = [{"split": source.split, "path": "data.jsonl"}]
            subsets = (source.subset or "default").split("+")
            configs = [{"config_name": subset, "data_files": files} for subset in subsets]
            card = {"license": ["mit"], "configs": configs}
            readme = f"---\n{yaml.safe_dump(card)}---\n".encode()
            server.add_repo(str(source.repo), {"README.md": readme, "data.jsonl": row + b"\n"}, repo_type="dataset")
        yield server


def check(hub: HubServer, home: Path) -> subprocess.CompletedProcess[str]:
    command = [CLI, "calibprune", "sources", "--check"]
    return subprocess.run(command, capture_output=True, text=True, env=hub.environment(home), timeout=300)


def test_every_source_is_read_at_its_revision_with_its_licence(hub: HubServer, tmp_path: Path) -> None:
    done = check(hub, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()[2:]}
    for name, source in SOURCES.items():
        sha = hub.commits(str(source.repo), repo_type="dataset")[0].sha
        assert rows[name] == [name, sha[:12], source.licence or "mit"]


def test_what_cannot_be_used_is_named(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("baber/piqa", {"piqa.py": b"x = 1"}, repo_type="dataset")
    hub.add_repo("openai/gsm8k", {"train.jsonl": b'{"prose": "x"}\n'}, repo_type="dataset")
    del hub.repos["dataset", "tau/commonsense_qa"]
    card = b"---\nconfigs:\n- config_name: default\n  data_files: data.jsonl\n---\n"
    empty = json.dumps(READ["python"][0] | {"license": "gpl-3.0"}).encode()
    hub.add_repo("codeparrot/codeparrot-clean", {"README.md": card, "data.jsonl": empty}, repo_type="dataset")
    done = check(hub, tmp_path)
    assert done.returncode == 1
    assert "4 of 19 sources cannot be used: piqa, commonsense_qa, python, gsm8k." in done.stderr
    problems = {line.split()[0]: line for line in done.stdout.splitlines()[2:]}
    assert "Dataset scripts are no longer supported" in problems["piqa"]
    assert "is not on the Hub" in problems["commonsense_qa"]
    assert "BuilderConfig 'main' not found" in problems["gsm8k"]
    assert "its first 100 rows hold no text" in problems["python"]
