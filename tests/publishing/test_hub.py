# SPDX-License-Identifier: Apache-2.0
"""Push and pull over real HTTP with the real client, against a Hub on the loopback interface."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_calibprune import CalibPruner, RunRecord, pocket
from tests.hub_server import STRANGER_TOKEN, HubServer
from tests.publishing import pushing


CLI = str(Path(sys.executable).parent / "optimum-cli")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pruner = CalibPruner.from_pretrained("pocket", samples=8, length=64, capabilities="none")
    pruner.prune()
    target = tmp_path_factory.mktemp("runs") / "run"
    pruner.save_pretrained(target)
    return target


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def python(code: str, hub: HubServer, home: Path) -> subprocess.CompletedProcess[str]:
    """Runs code where the Hub is the loopback server; its address is read when the client is imported."""
    temporary = home.parent / "temporary"
    temporary.mkdir(exist_ok=True)
    environment = hub.environment(home) | {"TMPDIR": str(temporary)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)


PRUNE_AND_PUSH = """
from optimum_calibprune import CalibPruner
pruner = CalibPruner.from_pretrained("pocket", samples=8, length=64, capabilities="none")
pruner.prune()
print(pruner.push_to_hub("me/pocket-50", private=True, commit_message="first", push_calibration=True).commit_url)
"""
PULL = """
import torch
from transformers import AutoModelForCausalLM
from optimum_calibprune import CalibPruner
a = AutoModelForCausalLM.from_pretrained("me/pocket-50")
b = AutoModelForCausalLM.from_pretrained({folder!r})
ids = torch.arange(64)[None]
assert torch.equal(a(input_ids=ids).logits, b(input_ids=ids).logits)
again = CalibPruner.from_pretrained("me/pocket-50", samples=4, length=64, capabilities="none",
                                    sources={{"x:math": ["one two three four five six " * 200]}})
assert again.base.revision and again.base.name == "me/pocket-50" and again.base.licence == "apache-2.0", again.base
record = again.prune()
assert "base_model: me/pocket-50" in __import__("optimum_calibprune.publishing.card").publishing.card.render(record)
"""


def test_push_in_one_commit_then_pull_with_equal_logits(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    pushed = python(PRUNE_AND_PUSH, hub, tmp_path / "a")
    assert pushed.returncode == 0, pushed.stderr
    assert hub.repos["model", "me/pocket-50"].private
    commits = [c for c in hub.commits("me/pocket-50") if c.title == "first"]
    assert len(commits) == 1
    files = hub.files("me/pocket-50")
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert not list((tmp_path / "temporary").iterdir()), "what was pushed is not kept"
    rows = hub.files("me/pocket-50-calibration", repo_type="dataset")
    assert b"written by the model" in rows["README.md"]
    assert {"data/code.jsonl", "data/math.jsonl"} < set(rows)
    assert hub.repos["dataset", "me/pocket-50-calibration"].private
    expected = {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "calibprune.json",
        "calibration.safetensors",
    }
    assert expected <= set(files)
    assert b'from_pretrained("me/pocket-50")' in files["README.md"]
    RunRecord.from_json(files["calibprune.json"].decode())
    assert "hf_fake" not in pushed.stdout + pushed.stderr
    assert not any(b"hf_fake" in content for content in files.values())
    pulled = python(PULL.format(folder=str(folder)), hub, tmp_path / "b")
    assert pulled.returncode == 0, pulled.stderr


BARE_NAME = """
from optimum_calibprune import CalibPruner
pruner = CalibPruner.from_pretrained("pocket", samples=8, length=64, capabilities="none")
pruner.prune()
pruner.save_pretrained({target!r}, push_to_hub=True, commit_message="second")
"""


def test_a_bare_name_belongs_to_the_owner_of_the_token(hub: HubServer, tmp_path: Path) -> None:
    done = python(BARE_NAME.format(target=str(tmp_path / "tiny")), hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert b'from_pretrained("me/tiny")' in hub.files("me/tiny")["README.md"]
    assert [c.title for c in hub.commits("me/tiny")][-1] == "second"


def pulled(name: str, **options: Any) -> tuple[torch.Tensor, str] | str:
    """The logits of a saved model and the record that it was made by, or the error."""
    texts = {"x:math": ["one two three four five six " * 200]}
    settings = {"samples": 4, "length": 64, "capabilities": "none", "sources": texts}
    try:
        pruner = CalibPruner.from_pretrained(name, **settings | options)
    except OSError as error:
        return str(error)
    with torch.no_grad():
        logits = pruner.model(input_ids=torch.arange(64)[None]).logits
    return logits, pruner.made_by.to_json() if pruner.made_by is not None else ""


@pytest.mark.parametrize("xet", [False, True], ids=["files", "chunks"])
def test_there_and_back(xet: bool, hub: HubServer, folder: Path, tmp_path: Path) -> None:
    """Main branch, another branch and a pull request, with weights that go file by file, or chunk by chunk with Xet."""
    changed = shutil.copytree(folder, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    record = (folder / "calibprune.json").read_bytes()
    with pushing.process(hub.environment(tmp_path / "home", xet=xet)) as client:
        first = client(pushing.push, folder, "me/run", private=True)
        assert (first.error, client(pushing.push, folder, "me/run").value) == ("", first.value)
        assert len(hub.commits("me/run")) == 2, "once more changes nothing"
        assert hub.repos["model", "me/run"].private
        assert client(pushing.push, changed, "me/run", revision="half").error == ""
        assert client(pushing.push, changed, "me/run", create_pr=True).error == ""
        for revision, pushed in (("main", folder), ("half", changed), ("refs/pr/1", changed)):
            files = hub.files("me/run", revision)
            assert files["model.safetensors"] == (pushed / "model.safetensors").read_bytes()
            assert files["calibprune.json"] == record
            logits, made_by = client(pulled, "me/run", revision=revision)
            assert torch.equal(logits, client(pulled, str(pushed))[0])
            assert RunRecord.from_json(made_by) == RunRecord.from_json(record.decode())
        assert "cannot be loaded" in client(pulled, "me/run", token=STRANGER_TOKEN, cache_dir=tmp_path / "stranger")
        asked = [f"{method} {target}" for method, target, _ in hub.requests]
        by_files = [line for line in asked if re.match("GET /me/run/resolve/.*/model.safetensors|.*/info/lfs/", line)]
        by_chunks = [
            line for line in asked if re.match("GET /xet/(v2/reconstructions|blocks)/|POST /xet/.*/xorbs/", line)
        ]
        assert (bool(by_files), bool(by_chunks)) == (not xet, xet)
        hub.add_repo("big/base", {path.name: path.read_bytes() for path in pocket.MODEL.iterdir() if path.is_file()})
        assert torch.equal(client(pulled, "big/base")[0], client(pulled, str(pocket.MODEL))[0]), (
            "no chunks of it there"
        )


def test_a_failed_push_keeps_the_result_and_names_the_command_that_finishes(hub: HubServer, tmp_path: Path) -> None:
    hub.fail_next("POST", "/api/repos/create", 403)
    options = ["--samples", "8", "--length", "64", "--capabilities", "none", "--push-to-hub", "me/run"]
    done = subprocess.run(
        [CLI, "calibprune", "prune", "pocket", *options, "--output", "out"],
        capture_output=True,
        text=True,
        env=hub.environment(tmp_path / "home"),
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("finish with: optimum-cli calibprune push out me/run")
    assert "hf_fake" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def cli(hub: HubServer, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [CLI, "calibprune", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=hub.environment(home), timeout=300)


def test_push_and_card_on_the_command_line(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    options = ["--private", "--message", "mine", "--calibration", "--collection"]
    done = cli(hub, tmp_path, "push", str(folder), "run", *options)
    assert done.returncode == 0, done.stderr
    model, calibration, collection = done.stdout.splitlines()
    assert model == f"Pushed: {hub.url}/me/run/commit/{hub.commits('me/run')[-1].sha}"
    assert calibration.startswith(f"Pushed: {hub.url}/datasets/me/run-calibration/commit/")
    assert collection.startswith(f"Collected: {hub.url}/collections/me/pocket-pruned-")
    assert [commit.title for commit in hub.commits("me/run")] == ["initial commit", "mine"]
    assert hub.repos["model", "me/run"].private
    branch = cli(hub, tmp_path, "push", str(folder), "me/run", "--revision", "half")
    request = cli(hub, tmp_path, "push", str(folder), "me/other", "--create-pr")
    assert (branch.returncode, request.returncode) == (0, 0), branch.stderr + request.stderr
    assert hub.files("me/run", "half") == hub.files("me/run")
    assert "/discussions/1" in request.stdout
    files = hub.files("me/run")
    hub.add_repo("me/run", files | {"README.md": b"# Mine\n"})
    drawn = cli(hub, tmp_path, "card", "me/run")
    assert drawn.stdout.startswith("Pushed: ")
    assert hub.files("me/run")["README.md"].endswith(files["README.md"].partition(b"\n---\n")[2].lstrip())
    assert cli(hub, tmp_path, "card", "me/run").stdout == "The card of me/run is up to date.\n"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    bad = cli(hub, tmp_path, "push", str(tmp_path / "none"), "me/run")
    assert bad.returncode == 1
    assert bad.stderr.startswith(f"Error: {tmp_path / 'none'} holds no calibprune.json; name a folder")
    unknown = shutil.copytree(folder, tmp_path / "unknown")
    record = unknown / "calibprune.json"
    record.write_text(record.read_text().replace('"written": "proposals"', '"written": ""'))
    before = len(hub.requests)
    refused = cli(hub, tmp_path, "push", str(unknown), "me/run", "--calibration")
    assert refused.returncode == 1
    assert "The calibration set cannot be published" in refused.stderr
    assert len(hub.requests) == before, "nothing is uploaded before that is known"


@pytest.mark.parametrize(
    ("method", "path", "said"),
    [
        ("POST", "/preupload/", "was not pushed"),
        ("GET", "/api/datasets/", "me/run-calibration was not pushed"),
        ("POST", "/api/collections", "was not added to a collection"),
    ],
)
def test_the_command_that_finishes_a_push_is_the_whole_one(
    method: str, path: str, said: str, hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    hub.fail_next(method, path, 403)
    options = ["--private", "--create-pr", "--message", "my words", "--calibration", "--collection"]
    done = cli(hub, tmp_path, "push", str(folder), "me/run", *options)
    assert done.returncode == 1
    assert said in done.stderr
    finish = shlex.split(done.stderr.rpartition("finish with: ")[2])
    assert finish[:5] == ["optimum-cli", "calibprune", "push", str(folder), "me/run"]
    assert finish[5:] == options


GATED = """
from optimum_calibprune import CalibPruner
try:
    CalibPruner.from_pretrained("big/gated", token=False)
except OSError as error:
    print(error)
try:
    CalibPruner.from_pretrained("big/missing")
except OSError as error:
    print(error)
"""


def test_gated_and_missing_models_are_told_apart(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("big/gated", {"config.json": b"{}"}, gated=True)
    done = python(GATED, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    gated, missing = done.stdout.strip().splitlines()
    assert "big/gated is gated. Accept its terms" in gated
    assert "'big/missing' cannot be loaded" in missing
