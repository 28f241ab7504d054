# SPDX-License-Identifier: Apache-2.0
"""Pushing with the real client over real HTTP, while the Hub fails in every way at every endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from optimum_calibprune.publishing.failures import WAITS, without_secrets
from optimum_calibprune.publishing.readme import BEGIN, END
from tests.hub_server import STRANGER_TOKEN, TOKEN, HubServer
from tests.publishing import pushing
from tests.publishing.pushing import Client, contents, inject, saved_run


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with pushing.process(hub.environment(tmp_path_factory.mktemp("home"))) as call:
        yield call


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run(tmp_path_factory.mktemp("saved") / "run")


def check_complete(hub: HubServer, folder: Path, repo_id: str, revision: str = "main") -> None:
    """All files of the folder are there, with the repo's name in the card."""
    files = hub.files(repo_id, revision)
    for path in contents(folder):
        if path != "README.md":
            assert files[path] == (folder / path).read_bytes(), path
    assert f'from_pretrained("{repo_id}")'.encode() in files["README.md"]


def test_a_push_is_one_commit_and_without_a_change_none(
    hub: HubServer, client: Client, folder: Path, repo_id: str
) -> None:
    before = contents(folder)
    first = client(pushing.push, folder, repo_id, commit_message="first")
    assert first.error == ""
    assert [commit.title for commit in hub.commits(repo_id)] == ["initial commit", "first"]
    check_complete(hub, folder, repo_id)
    again = client(pushing.push, folder, repo_id, commit_message="second")
    assert again.value == first.value, "the address of the commit that is there"
    assert len(hub.commits(repo_id)) == 2
    (folder / "config.json").write_text('{"a": 1}')
    client(pushing.push, folder, repo_id, commit_message="third")
    assert [commit.title for commit in hub.commits(repo_id)] == ["initial commit", "first", "third"]
    assert contents(folder) == before | {"config.json": contents(folder)["config.json"]}
    assert TOKEN not in first.output + again.output
    assert first.pauses == []


def test_a_bare_name_a_branch_a_pull_request_and_a_private_repo(
    hub: HubServer, client: Client, folder: Path, repo_id: str
) -> None:
    bare = repo_id.split("/")[1]
    assert client(pushing.push, folder, bare, private=True).error == ""
    assert hub.repos["model", repo_id].private
    assert len(hub.commits(repo_id)) == 2
    (folder / "config.json").write_text('{"a": 1}')
    assert client(pushing.push, folder, repo_id, revision="half/way").error == ""
    assert hub.files(repo_id, "half/way")["config.json"] == b'{"a": 1}'
    opened = client(pushing.push, folder, repo_id, create_pr=True)
    assert opened.error == ""
    assert hub.files(repo_id, "refs/pr/1")["config.json"] == b'{"a": 1}'
    assert hub.files(repo_id)["config.json"] == b"{}"


def test_arguments_that_do_not_fit_are_refused_before_anything_is_sent(
    hub: HubServer, client: Client, folder: Path, repo_id: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    before = len(hub.requests)
    both = client(pushing.push, folder, repo_id, create_pr=True, revision="v1")
    assert both.error.startswith("ValueError: A pull request goes to the main branch; revision 'v1' was given")
    assert client(pushing.redraw, repo_id, create_pr=True, revision="v1").error == both.error
    assert "holds no calibprune.json" in client(pushing.push, tmp_path / "empty", repo_id).error
    assert "There is no folder" in client(pushing.push, tmp_path / "none", repo_id).error
    assert len(hub.requests) == before
    bad = client(pushing.push, folder, "a/b/c")
    assert bad.error.startswith("PushError: a/b/c was not pushed: Repo id must be in the form")


def test_a_public_repo_does_not_take_what_was_to_be_private(
    hub: HubServer, client: Client, folder: Path, repo_id: str
) -> None:
    hub.add_repo(repo_id, {})
    refused = client(pushing.push, folder, repo_id, private=True)
    assert f"{repo_id} exists and is public; push to another name, or make it private" in refused.error
    assert hub.files(repo_id) == {}


def test_hidden_files_stay_here(hub: HubServer, client: Client, folder: Path, repo_id: str) -> None:
    (folder / ".env").write_text(TOKEN)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")
    assert client(pushing.push, folder, repo_id).error == ""
    assert not any(path.startswith(".") for path in hub.files(repo_id))


def test_what_users_wrote_in_the_card_stays(hub: HubServer, client: Client, folder: Path, repo_id: str) -> None:
    assert client(pushing.push, folder, repo_id).error == ""
    (commits,) = [hub.commits(repo_id)]
    card = commits[-1].files["README.md"].decode()
    edited = card.replace("- sparsegpt\n", "- sparsegpt\n- mine\nthumbnail: a.png\n").replace(
        BEGIN, f"Mine, above.\n\n{BEGIN}"
    )
    hub.add_repo(repo_id, {"README.md": edited.replace("75.0\u00a0%", "99.9\u00a0%").encode() + b"\nMine, below.\n"})
    assert client(pushing.push, folder, repo_id).error == ""
    now = hub.files(repo_id)["README.md"].decode()
    front, _, body = now.partition("\n---\n")
    assert "- mine\n" in front
    assert "thumbnail: a.png" in front
    assert body.startswith(f"\nMine, above.\n\n{BEGIN}")
    assert now.endswith(f"{END}\n\nMine, below.\n")
    assert "99.9\u00a0%" not in now, "what was drawn is drawn again"
    assert "75.0\u00a0%" in now
    assert client(pushing.push, folder, repo_id).error == ""
    assert len(hub.commits(repo_id)) == 2, "once more changes nothing"


def test_a_card_is_drawn_again_in_a_folder_and_in_a_repo(
    hub: HubServer, client: Client, folder: Path, repo_id: str, tmp_path: Path
) -> None:
    readme = folder / "README.md"
    drawn = readme.read_text()
    readme.write_text(drawn.replace("75.0\u00a0%", "99.9\u00a0%") + "\nMine.\n")
    assert client(pushing.redraw, str(folder)).value == f"Drew {readme}."
    assert readme.read_text() == drawn + "\nMine.\n"
    assert client(pushing.push, folder, repo_id).error == ""
    assert client(pushing.redraw, repo_id).value == f"The card of {repo_id} is up to date."
    files = hub.files(repo_id)
    hub.add_repo(repo_id, files | {"README.md": files["README.md"].replace(b"75.0", b"99.9")})
    assert "/discussions/1" in client(pushing.redraw, repo_id, create_pr=True).value
    assert hub.files(repo_id, "refs/pr/1") == files
    assert "/commit/" in client(pushing.redraw, repo_id).value
    assert hub.files(repo_id) == files
    assert [commit.title for commit in hub.commits(repo_id)] == ["initial commit", "Draw the card again"]
    (tmp_path / "empty").mkdir()
    assert "holds no calibprune.json" in client(pushing.redraw, str(tmp_path / "empty")).error
    assert "was not drawn again: the Hub does not know it" in client(pushing.redraw, "me/none").error
    record = folder / "calibprune.json"
    good = record.read_text()
    for text in ("[]", "{", good.replace('"sparsegpt"', '"other"'), good.replace('"short": 12', '"short": "<b>"')):
        assert text != good
        record.write_text(text)
        assert client(pushing.redraw, str(folder)).error.startswith("ValueError: ")
        assert readme.read_text() == drawn + "\nMine.\n"
        assert client(pushing.push, folder, repo_id).error.startswith("PushError: ")


def test_all_sparsities_of_a_base_are_collected(hub: HubServer, client: Client, tmp_path: Path) -> None:
    for share in ("50", "60"):
        folder = saved_run(tmp_path / share, f"{share}%")
        assert client(pushing.push, folder, f"me/tiny-{share}").error == ""
        hub.fail_next("POST", "/api/collections", 503)
        for _ in range(2):  # once more adds nothing
            found = client(pushing.collect, f"me/tiny-{share}", "someone/tiny")
            assert found.error == ""
    (collection,) = hub.collections.values()
    assert collection["title"] == "tiny pruned"
    assert [item["id"] for item in collection["items"]] == ["me/tiny-50", "me/tiny-60"]


# ----------------------------------------------------------------------------------------------- faults

ENDPOINTS = {  # each request of a push, with what of its path tells it from the others
    "create": ("POST", "/api/repos/create"),
    "branch": ("POST", "/branch/"),
    "info": ("GET", "/revision/"),
    "card head": ("HEAD", "/README.md"),
    "card": ("GET", "/README.md"),
    "validate": ("POST", "/api/validate-yaml"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/info/lfs/objects/batch"),
    "upload": ("PUT", "/info/lfs/storage/"),
    "verify": ("POST", "/info/lfs/verify"),
    "commit": ("POST", "/commit/"),
}
ALWAYS = 1000


@pytest.fixture
def begun(hub: HubServer, client: Client, folder: Path, repo_id: str) -> str:
    """A repo that holds a card of the user and nothing else, so that a push to a new branch asks every endpoint."""
    hub.add_repo(repo_id, {"README.md": f"# Mine {repo_id}\n".encode()})
    return repo_id


def push_and_check(hub: HubServer, client: Client, folder: Path, repo_id: str) -> pushing.Outcome:
    """One push with what must hold of it, whatever happens."""
    before = contents(folder)
    done = client(pushing.push, folder, repo_id, revision="new")
    assert contents(folder) == before
    assert TOKEN not in done.error + done.output + done.value
    if done.error:
        kind, _, said = done.error.partition(": ")
        assert kind == "PushError"
        assert said.startswith(f"{repo_id} was not pushed: ")
        assert "\n" not in said
        finish = f"optimum-cli calibprune push {folder} {repo_id} --revision new"
        assert said.endswith(f"{folder} is complete; finish with: {finish}")
    return done


def check_repeat_finishes(hub: HubServer, client: Client, folder: Path, repo_id: str) -> None:
    hub.forget_faults()
    assert push_and_check(hub, client, folder, repo_id).error == ""
    check_complete(hub, folder, repo_id, "new")
    assert hub.files(repo_id, "new")["README.md"].startswith(b"---\n")
    assert f"# Mine {repo_id}".encode() in hub.files(repo_id, "new")["README.md"]
    assert len(hub.commits(repo_id, "new")) == 2, "the initial one and the push"


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("fault", ["500", "cut", "lost", "slow"])
def test_what_fails_once_is_tried_again(
    endpoint: str, fault: str, hub: HubServer, client: Client, folder: Path, begun: str
) -> None:
    inject(hub, ENDPOINTS[endpoint], fault)
    done = push_and_check(hub, client, folder, begun)
    assert done.error == ""
    assert endpoint == "card head" or (done.pauses == []) == (fault == "slow"), (
        "for that the client asks again at once"
    )
    check_complete(hub, folder, begun, "new")
    check_repeat_finishes(hub, client, folder, begun)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("status", [429, 503])
def test_the_hub_says_how_long_to_wait(
    endpoint: str, status: int, hub: HubServer, client: Client, folder: Path, begun: str
) -> None:
    hub.fail_next(*ENDPOINTS[endpoint], status, headers={"Retry-After": "60"})
    done = push_and_check(hub, client, folder, begun)
    assert done.error == ""
    assert endpoint == "card head" or 60 <= sum(done.pauses) <= 62
    check_repeat_finishes(hub, client, folder, begun)


def test_the_hub_says_until_when_to_wait(hub: HubServer, client: Client, folder: Path, begun: str) -> None:
    for seconds, least in ((60, 55), (-60, 1)):
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)
        hub.fail_next(*ENDPOINTS["commit"], 503, headers={"Retry-After": date})
        done = push_and_check(hub, client, folder, begun)
        assert done.error == ""
        assert least <= sum(done.pauses) <= max(seconds, least)
        (folder / "config.json").write_text('{"a": 1}')  # so that there is something to commit again
    hub.fail_next(*ENDPOINTS["create"], 503, headers={"Retry-After": "soon"})
    assert client(pushing.push, folder, begun).pauses == [WAITS[0]]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("fault", ["500", "lost"])
def test_what_fails_always_ends_in_one_sentence(
    endpoint: str, fault: str, hub: HubServer, client: Client, folder: Path, begun: str
) -> None:
    inject(hub, ENDPOINTS[endpoint], fault, ALWAYS)
    done = push_and_check(hub, client, folder, begun)
    if endpoint == "verify" or (endpoint, fault) in (("commit", "lost"), ("upload", "lost")):
        assert done.error == "", "it is there, and the next attempt finds that nothing is left to do"
    else:
        assert ("the Hub answers 500 each time" if fault == "500" else "the connection broke") in done.error
        assert sum(done.pauses) >= sum(WAITS)
    check_repeat_finishes(hub, client, folder, begun)


def test_a_pull_request_that_may_be_open_is_not_opened_again(
    hub: HubServer, client: Client, folder: Path, begun: str
) -> None:
    hub.break_next("POST", "/commit/", "lost", times=ALWAYS)
    done = client(pushing.push, folder, begun, create_pr=True)
    assert "the pull request may be open already; look before a repeat." in done.error
    assert TOKEN not in done.error + done.output
    hub.add_repo(begun, {"calibprune.json": (folder / "calibprune.json").read_bytes()})
    drawn = client(pushing.redraw, begun, create_pr=True)
    assert drawn.error == (
        f"PushError: The card of {begun} was not drawn again: the connection broke, and the pull request may be open already; "
        f"look before a repeat. Repeat it with: optimum-cli calibprune card {begun} --create-pr"
    )
    assert not drawn.pauses
    hub.forget_faults()
    hub.fail_next("POST", "/preupload/", 500, times=6)  # before it was asked for
    assert client(pushing.push, folder, begun, create_pr=True).error == ""


REFUSED = {
    401: "the Hub does not accept the token; run `hf auth login`",
    403: "the token may not write there",
    404: "the Hub does not know it, or the token may not see it",
    409: "the Hub says that it conflicts with what is there",
}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("status", REFUSED)
def test_a_refusal_is_one_sentence_at_once(
    endpoint: str, status: int, hub: HubServer, client: Client, folder: Path, begun: str
) -> None:
    hub.fail_next(*ENDPOINTS[endpoint], status, times=ALWAYS)
    done = push_and_check(hub, client, folder, begun)
    if (endpoint, status) == ("branch", 409):
        assert "was not pushed: the Hub does not know it" in done.error, (
            "it said that the branch exists, which does not"
        )
    elif endpoint == "create" and status in (401, 403, 409):
        assert done.error or hub.commits(begun, "new"), "the repo is there already"
    else:
        assert done.error
        assert REFUSED[status] in done.error
    assert done.pauses == []
    check_repeat_finishes(hub, client, folder, begun)


def test_a_hub_without_room_is_one_sentence(hub: HubServer, client: Client, folder: Path, begun: str) -> None:
    for status, said in ((507, "the Hub has no room for it"), (413, "the Hub says that it is too large")):
        hub.fail_next(*ENDPOINTS["upload"], status)
        assert said in push_and_check(hub, client, folder, begun).error
    check_repeat_finishes(hub, client, folder, begun)


def test_metadata_that_the_hub_refuses_is_said_before_anything_is_uploaded(
    hub: HubServer, client: Client, folder: Path, begun: str
) -> None:
    hub.add_repo(begun, {"README.md": b"---\nlicense: [\n---\n# Mine\n"})
    broken = client(pushing.push, folder, begun)
    assert "The metadata of the README that is there is no YAML; mend it first" in broken.error
    hub.add_repo(begun, {})
    hub.fail_next("POST", "/api/validate-yaml", 400)
    refused = client(pushing.push, folder, begun)
    assert "was not pushed: Invalid metadata in README.md." in refused.error
    assert hub.files(begun) == {}
    assert "PUT" not in [method for method, target, _ in hub.requests if begun in target]


def test_a_token_never_shows(hub: HubServer, client: Client, folder: Path, repo_id: str) -> None:
    secret = "hf_" + "x" * 34
    for token in (secret, f"{secret}\n", f"{secret}\nX: y", f"{secret} x", f"{secret}\u00e9", STRANGER_TOKEN):
        done = client(pushing.push, folder, repo_id, token=token)
        assert done.error.startswith("PushError: ")
        assert token.strip() not in done.error + done.output
        assert secret not in done.error + done.output
    assert without_secrets(f"Bearer {secret} and {secret}s", None) == "Bearer hf_*** and hf_***"
    assert without_secrets("hf_hub_download", None) == "hf_hub_download"


def test_what_the_hub_says_moves_no_cursor(hub: HubServer, client: Client, folder: Path, repo_id: str) -> None:
    message = f"\x1b[2J\x1b]0;owned\x07 \u202enwod edispu {TOKEN[:3]}\u200b{TOKEN[3:]} {'long ' * 500}"
    hub.fail_next("GET", "/api/models/", 403, message=message)
    done = client(pushing.push, folder, repo_id)
    assert "the token may not write there" in done.error
    assert done.error.isprintable()
    assert TOKEN not in done.error
    assert len(done.error) < 1000


def test_a_full_disk_here_is_one_sentence(hub: HubServer, client: Client, folder: Path, begun: str) -> None:
    before = contents(folder)
    done = client(pushing.push_without_disk, folder, begun)
    assert "File too large" in done.error
    assert contents(folder) == before
    assert "README.md" not in hub.files(begun) or len(hub.commits(begun)) == 1
    assert client(pushing.push, folder, begun).error == ""
    check_complete(hub, folder, begun)


def test_another_commit_in_between_is_built_upon(hub: HubServer, client: Client, folder: Path, begun: str) -> None:
    hub.fail_next("POST", "/commit/", 412)
    assert client(pushing.push, folder, begun).error == ""
    check_complete(hub, folder, begun)


def test_offline_and_unreachable_hubs_are_named(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    elsewhere = hub.environment(tmp_path / "home") | {"HF_ENDPOINT": "http://127.0.0.1:9"}  # where nothing listens
    with pushing.process(elsewhere) as client:
        lost = client(pushing.push, folder, "me/x")
    assert "me/x was not pushed: the connection broke ([Errno 111] Connection refused)." in lost.error
    assert lost.pauses == list(WAITS)
    with pushing.process(hub.environment(tmp_path / "home") | {"HF_HUB_OFFLINE": "1"}) as client:
        offline = client(pushing.push, folder, "me/x")
    assert "me/x was not pushed: HF_HUB_OFFLINE is set; unset it." in offline.error
    assert offline.pauses == []
