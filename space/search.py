# SPDX-License-Identifier: Apache-2.0
"""Names of models on the Hub that hold what a visitor types, asked for as nobody in particular."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import build_hf_headers, get_async_session, httpx

from limits import MODEL_NAME, NAME_CHARACTERS, WEIGHT_BYTES


SECONDS = 3.0  # from a key to the names, after which there are none
AT_ONCE = asyncio.Semaphore(4)  # searches of all visitors
LISTED, SHOWN = 40, 10  # models that the Hub is asked for, and names of these
PART = re.compile(rf"[\w./-]{{3,{NAME_CHARACTERS}}}", re.ASCII)  # of a name
SMALL = {"num_parameters": "max:1B", "gated": "false"}  # more fit into WEIGHT_BYTES in no type that is pruned
CANNOT = {"custom_code", "4-bit", "8-bit"}  # tags of models that bring their own code, or are quantized
BITS = re.compile(r"\d+")  # in the name of a type, such as BF16


async def names(typed: object, small: bool) -> list[str]:
    """Of public models that can be pruned, those with most downloads first; with `small`, of what fits into this page.

    None for what is part of no name, and where the Hub does not answer in time.
    """
    part = typed.strip() if isinstance(typed, str) else ""
    if not PART.fullmatch(part):
        return []
    try:
        async with asyncio.timeout(SECONDS), AT_ONCE:
            listed = await _listed(part, small)
        found = [entry["id"] for entry in listed if _fits(entry, small)][:SHOWN]
    except (OSError, httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError):  # no Hub, or no list
        return []
    return sorted(found, key=lambda name: name.lower() != part.lower())  # the one that is meant first


async def _listed(part: str, small: bool) -> list[dict[str, Any]]:
    """What the Hub lists. `HfApi.list_models` would wait without end for an answer, and ask again where there is none."""
    asked = {"search": part, "pipeline_tag": "text-generation", "filter": ["transformers", "safetensors"]}
    asked |= {"sort": "downloads", "limit": LISTED, "expand": ["safetensors", "tags"]} | (SMALL if small else {})
    async with get_async_session() as client:
        answer = await client.get(
            f"{HfApi().endpoint}/api/models", params=asked, headers=build_hf_headers(token=False)
        )
    return answer.raise_for_status().json()


def _fits(entry: dict[str, Any], small: bool) -> bool:
    if not MODEL_NAME.fullmatch(entry["id"]) or CANNOT & {*entry["tags"]}:
        return False
    weights = (entry.get("safetensors") or {}).get("parameters", {})
    return not small or 0 < sum(count * _bits(kind) // 8 for kind, count in weights.items()) <= WEIGHT_BYTES


def _bits(kind: str) -> int:
    found = BITS.search(kind)
    return int(found[0]) if found else 8  # BOOL
