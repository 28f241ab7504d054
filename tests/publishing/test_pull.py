# SPDX-License-Identifier: Apache-2.0
"""Models from the Hub: pinned, gated, offline, cut off, as pickles; and those that were pruned here know it."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from optimum_calibprune import CalibPruner, RunRecord, pocket
from optimum_calibprune.records import Scores, TaskScore
from tests.hub_server import STRANGER_TOKEN, TOKEN, HubServer
from tests.publishing import pushing
from tests.publishing.pushing import Client


BASE = {path.name: path.read_bytes() for path in pocket.MODEL.iterdir() if path.is_file()}
BASE["README.md"] = b"---\nlicense: apache-2.0\nlanguage: en\nmodel-index:\n- name: base\n---\n# Base\n"


CLI = str(Path(sys.executable).parent / "optimum-cli")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a pruned pocket model."""
    pruner = CalibPruner.from_pretrained("pocket", samples=8, length=64, capabilities="none", mix="uniform")
    pruner.prune()
    folder = tmp_path_factory.mktemp("runs") / "run"
    pruner.save_pretrained(folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_repo("big/base", BASE)
        server.add_repo("big/gated", BASE, gated=True)
        server.add_repo("big/private", BASE, private=True)
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def process(hub: HubServer, home: Path) -> Iterator[Client]:
    with pushing.process(hub.environment(home)) as call:
        yield call


@pytest.fixture
def client(hub: HubServer, process: Client) -> Iterator[Client]:
    yield process
    hub.forget_faults()


def load(name: str, **options: Any) -> dict[str, Any] | str:
    """What a pruner knows of a model, or the name and text of the error."""
    from optimum_calibprune import CalibPruner

    texts = {"x:math": ["one two three four five six " * 200]}
    settings = {"samples": 4, "length": 64, "capabilities": "none", "sources": texts}
    try:
        pruner = CalibPruner.from_pretrained(name, **settings | options)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    made_by = pruner.made_by
    return {
        "base": pruner.base.to_dict(),
        "zeros": int((pruner.model.model.layers[0].mlp.up_proj.weight == 0).sum()),
        "sum": float(sum(p.double().abs().sum() for p in pruner.model.parameters())),
        "is_pocket": pruner.is_pocket,
        "made_by": made_by.to_json() if made_by is not None else None,
        "refused": list(pruner._measuring.chosen.refused),
    }


def test_every_file_is_of_the_commit_that_was_asked_for(hub: HubServer, client: Client) -> None:
    config = json.loads(BASE["config.json"])
    first = hub.add_repo("me/moving", BASE).at("main").sha
    changed = BASE | {
        "config.json": json.dumps(config | {"rope_theta": 5.0}).encode(),
        "README.md": b"---\nlicense: mit\n---\n",
    }
    hub.repos["model", "me/moving"].branch("main").append(type(hub.commits("me/moving")[0])("second", changed))
    pinned, newest = client(load, "me/moving", revision=first), client(load, "me/moving")
    assert pinned["base"]["revision"] == first
    assert (pinned["base"]["licence"], pinned["base"]["language"]) == ("apache-2.0", ["en"])
    assert newest["base"]["revision"] == hub.commits("me/moving")[-1].sha
    assert newest["base"]["licence"] == "mit"
    asked = [target for _, target, _ in hub.requests if target.endswith("/model.safetensors")]
    assert not [target for target in asked if "/main/" in target], "the branch may move in between"
    assert "has no revision 'v9'" in client(load, "me/moving", revision="v9") or "v9" in client(
        load, "me/moving", revision="v9"
    )


def test_gated_and_private_models_need_a_token_that_may(hub: HubServer, client: Client, tmp_path: Path) -> None:
    assert client(load, "big/gated", token=TOKEN)["base"]["name"] == "big/gated"
    assert client(load, "big/private", token=TOKEN)["base"]["name"] == "big/private"
    refused = client(load, "big/gated", token=STRANGER_TOKEN, cache_dir=tmp_path)
    assert "big/gated is gated. Accept its terms on the Hub" in refused
    hidden = client(load, "big/private", token=STRANGER_TOKEN, cache_dir=tmp_path)
    assert hidden.startswith("OSError: The model 'big/private' cannot be loaded")
    for said in (refused, hidden):
        assert "\n" not in said
        assert STRANGER_TOKEN not in said


def test_offline_the_cache_serves_and_a_part_of_it_is_recognised(hub: HubServer, client: Client, home: Path) -> None:
    online = client(load, "big/base")
    before = len(hub.requests)
    with pushing.process(hub.environment(home) | {"HF_HUB_OFFLINE": "1"}) as offline:
        assert offline(load, "big/base") == online
        assert offline(load, "big/base", local_files_only=True) == online
        assert "big/none is neither a local folder nor in the local cache" in offline(load, "big/none")
        (snapshot,) = (home / "hub" / "models--big--base" / "snapshots").iterdir()
        (snapshot / "model.safetensors").unlink()
        cut = offline(load, "big/base")
    assert cut.startswith(
        "OSError: The local cache holds only a part of big/base, as after a download that was cut off."
    )
    assert cut.endswith("unset HF_HUB_OFFLINE, or run `hf download big/base`.")
    assert len(hub.requests) == before
    assert client(load, "big/base") == online


@pytest.mark.parametrize("how", ["lost", "slow"])
def test_a_download_that_breaks_goes_on(how: str, hub: HubServer, client: Client, tmp_path: Path) -> None:
    hub.break_next("GET", "/model.safetensors", how)
    expected = client(load, "big/base", cache_dir=tmp_path)["sum"]
    assert expected == client(load, "big/base")["sum"]


def test_a_download_that_always_breaks_is_one_sentence_and_a_repeat_finishes(
    hub: HubServer, client: Client, tmp_path: Path
) -> None:
    hub.break_next("GET", "/model.safetensors", "lost", times=1000)
    assert client(load, "big/base", cache_dir=tmp_path) == (
        "OSError: The download of big/base broke off 3 times. Do the same again, which fetches only what is missing."
    )
    hub.forget_faults()
    assert client(load, "big/base")["sum"] > 0


def upload(folder: Path, repo_id: str) -> None:
    from huggingface_hub import HfApi

    HfApi().create_repo(repo_id)
    HfApi().upload_folder(repo_id=repo_id, folder_path=folder)


def test_chunks_that_break_off_are_asked_for_again_or_it_is_one_sentence(hub: HubServer, tmp_path: Path) -> None:
    environment = hub.environment(tmp_path / "home", xet=True) | {"HF_XET_CLIENT_RETRY_BASE_DELAY": "1ms"}
    with pushing.process(environment) as client:
        client(upload, pocket.MODEL, "me/chunks")
        for part in ("/xet-read-token/", "/v2/reconstructions/", "/xet/blocks/"):
            for how in ("cut", "lost"):
                hub.break_next("GET", part, how)
            found = client(load, "me/chunks", cache_dir=tmp_path / part[1:5])
            assert found["base"]["name"] == "me/chunks", part
        for part in ("/v2/reconstructions/", "/xet/blocks/"):
            hub.fail_next("GET", part, 500, times=1000)
            assert client(load, "me/chunks", cache_dir=tmp_path / "none") == (
                "OSError: The download of me/chunks broke off 3 times. Do the same again, which fetches only what is missing. "
                "If it is the chunk store that fails, HF_HUB_DISABLE_XET=1 goes around it."
            )
            with pushing.process(environment | {"HF_HUB_DISABLE_XET": "1"}) as around:
                assert around(load, "me/chunks", cache_dir=tmp_path / part[1:3]) == found
            hub.forget_faults()


def test_pickles_are_refused_unless_they_are_asked_for(
    hub: HubServer, client: Client, home: Path, tmp_path: Path
) -> None:
    weights = io.BytesIO()
    torch.save(load_file(pocket.MODEL / "model.safetensors"), weights)
    files = {name: content for name, content in BASE.items() if name != "model.safetensors"}
    hub.add_repo("me/pickle", files | {"pytorch_model.bin": weights.getvalue()})
    before = len(hub.requests)
    refused = client(load, "me/pickle")
    assert refused.startswith(
        "OSError: me/pickle has no weights in safetensors. If it has pickles (.bin) and you trust who"
    )
    assert not [target for _, target, _ in hub.requests[before:] if target.endswith(".bin") or "discussions" in target]
    assert client(load, "me/pickle", allow_pickle=True)["sum"] == client(load, "big/base")["sum"]
    with pushing.process(hub.environment(home) | {"HF_HUB_OFFLINE": "1"}) as offline:
        assert offline(load, "me/pickle") == refused
    command = [CLI, "calibprune", "mix", "me/pickle", "--mix", "self-cal", "--samples", "2", "--length", "16"]
    for options, code in (((), 2), (("--allow-pickle",), 0)):
        done = subprocess.run(
            [*command, *options], capture_output=True, text=True, env=hub.environment(home), timeout=300
        )
        assert done.returncode == code, done.stderr
    local = shutil.copytree(pocket.MODEL, tmp_path / "local")
    (local / "model.safetensors").unlink()
    (local / "pytorch_model.bin").write_bytes(weights.getvalue())
    assert "has no weights in safetensors" in client(load, str(local))
    assert client(load, str(local), allow_pickle=True)["sum"] > 0


def test_a_pruned_repo_knows_what_it_is(hub: HubServer, client: Client, home: Path, pruned: dict[str, bytes]) -> None:
    hub.add_repo("me/pocket-50", pruned, private=True)
    found = client(load, "me/pocket-50", capabilities="math")
    assert RunRecord.from_json(found["made_by"]) == RunRecord.from_json(pruned["calibprune.json"].decode())
    assert found["is_pocket"], "so that its capabilities can be measured"
    assert found["zeros"] > 0
    with pushing.process(hub.environment(home) | {"HF_HUB_OFFLINE": "1"}) as offline:
        assert offline(load, "me/pocket-50", capabilities="math") == found
    assert client(load, "big/base")["made_by"] is None
    assert not client(load, "big/base")["is_pocket"]


def test_a_repo_that_calls_itself_pruned_from_the_pocket_runs_no_code(
    hub: HubServer, client: Client, pruned: dict[str, bytes]
) -> None:
    hub.add_repo("stranger/pocket", pruned)
    found = client(load, "stranger/pocket", capabilities="auto")
    assert (found["is_pocket"], found["refused"]) == (True, ["pocket_code"])
    assert "runs only with allow_code_execution" in client(load, "stranger/pocket", capabilities="code")
    assert client(load, "stranger/pocket", capabilities="auto", allow_code_execution=True)["refused"] == []


def test_a_record_is_kept_and_found_in_the_cache_that_was_named(
    hub: HubServer, client: Client, home: Path, pruned: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add_repo("me/elsewhere", pruned)
    found = client(load, "me/elsewhere", capabilities="math", cache_dir=tmp_path / "cache")
    assert RunRecord.from_json(found["made_by"]) == RunRecord.from_json(pruned["calibprune.json"].decode())
    assert found["is_pocket"]
    assert list((tmp_path / "cache" / "models--me--elsewhere").rglob("calibprune.json"))
    assert not (home / "hub" / "models--me--elsewhere").exists()


@pytest.mark.parametrize(
    "record", [b"[]", b"{", b'{"schema_version": 1, "base": []}', b'{"schema_version": 99}', b"\xff"]
)
def test_a_record_that_cannot_be_read_does_no_harm(hub: HubServer, client: Client, record: bytes) -> None:
    hub.add_repo("me/broken", BASE | {"calibprune.json": record})
    found = client(load, "me/broken")
    assert found["made_by"] is None
    assert not found["is_pocket"]


@pytest.mark.parametrize(
    "metadata",
    ["a: [", "- a", "license: {a: 1}\nlanguage: 5", "license: [mit]\nlanguage: {a: b}", "\tx", "license: !!python/x"],
)
def test_a_base_card_that_is_odd_states_nothing(hub: HubServer, client: Client, metadata: str) -> None:
    hub.add_repo("me/odd", BASE | {"README.md": f"---\n{metadata}\n---\n# Odd\n".encode()})
    base = client(load, "me/odd")["base"]
    assert (base["licence"], base["language"]) == (None, [])


def kept(run: str, **options: Any) -> dict[str, float] | str:
    """The score of each state of a run's one task, or the name and text of the error."""
    from optimum_calibprune.publishing.hub import load_scores

    try:
        return {state: scores.tasks[0].value for state, scores in load_scores(run, **options).items()}
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def of_run(value: float) -> dict[str, bytes]:
    text = Scores((TaskScore("t", "code", "pass@1", 0.0, (value,)),)).to_json().encode()
    return {"scores/dense.json": text, "scores/sparse.json": text}


def test_scores_are_of_one_commit(hub: HubServer, client: Client) -> None:
    first = hub.add_repo("me/scores", of_run(0.25)).at("main").sha
    assert client(kept, "me/scores") == {"dense": 0.25, "sparse": 0.25}
    commit = type(hub.commits("me/scores")[0])
    hub.repos["model", "me/scores"].branch("main").append(commit("second", of_run(0.5)))
    before = len(hub.requests)
    assert client(kept, "me/scores") == {"dense": 0.5, "sparse": 0.5}
    asked = [target for _, target, _ in hub.requests[before:] if target.endswith("/sparse.json")]
    assert asked
    assert not [target for target in asked if "/main/" in target], "the branch may move in between"
    assert client(kept, f"me/scores@{first}") == {"dense": 0.25, "sparse": 0.25}
    assert client(kept, "me/scores@v9") == "FileNotFoundError: me/scores has no revision 'v9'."


def test_scores_that_are_gated_are_not_missing(hub: HubServer, client: Client) -> None:
    hub.add_repo("big/gated-scores", of_run(0.25), gated=True)
    assert client(kept, "big/gated-scores", token=STRANGER_TOKEN) == (
        "PermissionError: big/gated-scores is gated. Accept its terms on the Hub, then run `hf auth login` or pass a token."
    )
    assert client(kept, "big/gated-scores", token=TOKEN) == {"dense": 0.25, "sparse": 0.25}
    assert "me/no-scores has no scores/dense.json: name the folder" in client(kept, "me/no-scores")
