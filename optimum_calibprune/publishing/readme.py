# SPDX-License-Identifier: Apache-2.0
"""A card goes into a README that may exist already: what the user wrote there stays, what was drawn before is replaced."""

from __future__ import annotations

import re
from typing import Any


BEGIN = "<!-- optimum-calibprune draws what follows, and draws it again; write above or below it -->"
END = "<!-- optimum-calibprune ends here -->"
FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
OURS = ("tags", "calibprune")  # metadata that no one else writes, or that is merged


def updated(existing: str | None, card: str) -> str:
    """`existing` with its drawn part and the metadata that `card` states replaced by those of `card`.

    Metadata that `card` does not state, further tags, and all text outside the drawn part stay as they are; a README without a
    drawn part gets it at its end.

    Raises `ValueError` where the metadata of `existing` is no YAML.
    """
    if existing is None or not existing.strip():
        return card
    body, drawn = _body(existing), _body(card)
    start, end = body.find(BEGIN), body.rfind(END)
    if start >= 0 and end > start:
        text = body[:start] + drawn.strip() + body[end + len(END) :]
    else:
        text = f"{body.rstrip()}\n\n{drawn.strip()}\n"
    return _front(_merged(_metadata(existing), _metadata(card))) + "\n" + text.lstrip("\n")


def has_own_text(text: str) -> bool:
    """Whether there is anything outside the drawn part."""
    body = _body(text)
    start, end = body.find(BEGIN), body.rfind(END)
    return bool((body[:start] + body[end + len(END) :]).strip()) if 0 <= start < end else bool(body.strip())


def _body(text: str) -> str:
    return FRONT.sub("", text, count=1)


def _front(metadata: dict[str, Any]) -> str:
    from huggingface_hub.utils import yaml_dump

    return f"---\n{yaml_dump(metadata, sort_keys=False, line_break=chr(10)).strip()}\n---\n"


def _metadata(text: str) -> dict[str, Any]:
    import yaml

    found = FRONT.match(text)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        raise ValueError(f"The metadata of the README that is there is no YAML; mend it first: {error}") from error
    return data if isinstance(data, dict) else {}


def _merged(kept: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Ours first, so that a card that is drawn again without a change has the same bytes."""
    tags = kept.get("tags") or []
    tags = [tag for tag in (tags if isinstance(tags, list) else [tags]) if tag not in new.get("tags", [])]
    theirs = {key: kept[key] for key in kept if key not in new and key not in OURS}
    return {**new, **theirs, "tags": [*new.get("tags", []), *tags]}
