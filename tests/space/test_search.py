# SPDX-License-Identifier: Apache-2.0
"""Models of the Hub by a part of their name: who is found, who is not, and a Hub that does not answer."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import HubServer, Reply, Request
from tests.publishing.pushing import Client, process


sys.path.insert(0, str(Path(__file__).parents[2] / "space"))

import search


SMALL, LARGE = {"model.safetensors": bytes(1000)}, {"model.safetensors": bytes(1002)}


class Hub(HubServer):
    """One that can be slow, and can list what no Hub lists."""

    seconds = 0.0
    listed: bytes | None = None

    def answer(self, request: Request) -> tuple[Reply, str]:
        time.sleep(self.seconds)
        return (Reply(self.listed), "") if self.listed is not None else super().answer(request)


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Client]]:
    """A Hub, and a process that is logged in there."""
    with Hub() as hub, process(hub.environment(tmp_path_factory.mktemp("home"))) as there:
        yield hub, there


@pytest.fixture
def hub(everywhere: tuple[Hub, Client]) -> Hub:
    hub = everywhere[0]
    hub.seconds, hub.listed = 0.0, None
    hub.repos.clear()
    hub.requests.clear()
    return hub


@pytest.fixture
def there(everywhere: tuple[Hub, Client]) -> Client:
    return everywhere[1]


def card(**said: object) -> dict[str, bytes]:
    text = json.dumps({"pipeline_tag": "text-generation", "library_name": "transformers"} | said)
    return {"README.md": f"---\n{text}\n---\n".encode()}


def _names(typed: object, small: bool = True, seconds: float = 60.0) -> list[str]:
    search.WEIGHT_BYTES, search.SECONDS = 1000, seconds
    return asyncio.run(search.names(typed, small))


def _at_once(count: int) -> list[list[str]]:
    async def everybody() -> list[list[str]]:
        return await asyncio.gather(*(search.names("owner", False) for _ in range(count)))

    return asyncio.run(everybody())


def test_what_can_be_pruned_is_found_as_nobody(hub: Hub, there: Client) -> None:
    hub.add_repo("owner/Tiny-base", card() | SMALL)
    hub.add_repo("owner/tiny", card() | SMALL)
    hub.add_repo("owner/tiny-large", card() | LARGE)
    hub.add_repo("owner/tiny-gated", card() | SMALL, gated=True)
    hub.add_repo("owner/tiny-private", card() | SMALL, private=True)
    hub.add_repo("owner/tiny-image", card(pipeline_tag="text-to-image") | SMALL)
    hub.add_repo("owner/tiny-pickle", card() | {"pytorch_model.bin": b"0"})
    hub.add_repo("owner/tiny-code", card(tags=["custom_code"]) | SMALL)
    hub.add_repo("owner/tiny-quantized", card(tags=["4-bit"]) | SMALL)
    hub.add_repo("owner/other", card() | SMALL)
    assert there(_names, "tin") == ["owner/Tiny-base", "owner/tiny"]
    assert there(_names, " owner/TINY ") == ["owner/tiny", "owner/Tiny-base"], "the one that is meant comes first"
    assert there(_names, "tin", small=False) == [
        "owner/Tiny-base",
        "owner/tiny",
        "owner/tiny-large",
        "owner/tiny-gated",
    ]
    assert {token for *_, token in hub.requests} == {None}
    assert "num_parameters=max%3A1B" in hub.requests[0][1]
    assert all("sort=downloads" in target for _, target, _ in hub.requests)


def test_only_the_first_few_are_shown(hub: Hub, there: Client) -> None:
    for i in range(2 * search.SHOWN):
        hub.add_repo(f"owner/tiny-{i}", card() | SMALL)
    assert there(_names, "owner") == [f"owner/tiny-{i}" for i in range(search.SHOWN)]
    assert [len(found) for found in there(_at_once, 20)] == [search.SHOWN] * 20


@pytest.mark.parametrize(
    "typed", ["", "ti", "x" * 2**20, "<b>", "owner name", "tin\x00", "tiny\nb", "tín", None, 7, ["tin"]]
)
def test_what_is_part_of_no_name_is_not_searched_for(hub: Hub, there: Client, typed: object) -> None:
    hub.add_repo("owner/tiny", card() | SMALL)
    assert there(_names, typed) == []
    assert hub.requests == []


@pytest.mark.parametrize(
    "listed",
    [
        b"<html>",
        b"{}",
        b"null",
        b"[1]",
        b'[{"id": "owner/tiny"}]',
        b'[{"id": "owner/tiny", "tags": [], "safetensors": null}]',
        b'[{"id": "<img src=x onerror=alert(1)>", "tags": [], "safetensors": {"parameters": {"F32": 1}}}]',
        b'[{"id": "owner/tiny", "tags": [], "safetensors": {"parameters": {"F32": "many"}}}]',
    ],
)
def test_a_list_of_another_kind_is_none(hub: Hub, there: Client, listed: bytes) -> None:
    hub.listed = listed
    assert there(_names, "tiny") == []


def test_a_hub_that_is_away_or_slow_is_no_error(hub: Hub, there: Client) -> None:
    hub.add_repo("owner/tiny", card() | SMALL)
    for status in (401, 404, 429, 500):
        hub.fail_next("GET", "/api/models", status)
        assert there(_names, "tiny") == []
    for how in ("cut", "lost"):
        hub.break_next("GET", "/api/models", how)
        assert there(_names, "tiny") == []
    assert there(_names, "tiny") == ["owner/tiny"]
    hub.seconds = 2.0
    assert there(_names, "tiny", seconds=0.2) == []
    assert asyncio.run(search.names("tiny", True)) == [], "offline, as this process is"


@pytest.mark.parametrize(
    ("kind", "bits"), [("F64", 64), ("F32", 32), ("BF16", 16), ("F8_E4M3", 8), ("F4", 4), ("I64", 64), ("BOOL", 8)]
)
def test_types_have_the_size_that_their_names_say(kind: str, bits: int) -> None:
    assert search._bits(kind) == bits
