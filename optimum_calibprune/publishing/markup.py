# SPDX-License-Identifier: Apache-2.0
"""Text from elsewhere becomes Markdown that shows it and does nothing else.

Names of models, sources, files and modules, and the messages of other programs, are chosen by others: each goes through one of
these functions before it stands in a card.
"""

from __future__ import annotations

import json
import re
import unicodedata


REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)
LINKED = re.compile(r"://|www\.|(?<!\w)@|@[\w-]+\.\w")  # what a renderer turns into a link or a mention by itself
MEANT = re.compile(r"[\\`*\[\]|~#<>&$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
HUB = "https://huggingface.co/"


def one_line(value: object) -> str:
    """Without line breaks, control characters, and the invisible ones that change the direction of reading."""
    return _visible(" ".join(str(value).split()))


def _visible(text: str) -> str:
    return "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf", "Co", "Cs"))


def code(value: object) -> str:
    """As inline code: nothing in it is markup. Backslashes before a bar are held off it: two of them would end a cell."""
    text = one_line(value).replace("`", "'")
    text = re.sub(r"\\+(?=\|)", lambda found: found[0] + " ", text).replace("|", "\\|")
    return f"`{text}`" if text else ""


def prose(value: object) -> str:
    """As running text, with everything escaped that Markdown or HTML give a meaning; as code where it holds an address."""
    text = one_line(value)
    if LINKED.search(text):
        return code(text)
    entities = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "\\": "&#92;"}  # the last since two of it may begin a formula
    return MEANT.sub(lambda found: entities.get(found[0], "\\" + found[0]), text)


def fenced(value: str, language: str = "") -> str:
    """As a block of code whose fence is longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", value)), default=0)
    fence = "`" * max(3, longest + 1)
    kept = "\n".join(_visible(line) for line in value.splitlines())
    return f"{fence}{language}\n{kept}\n{fence}"


def literal(value: str) -> str:
    """As a string in Python code."""
    return json.dumps(one_line(value))


def is_repo_id(value: str | None) -> bool:
    """Whether it has the form of a repository's name, so that it may become part of an address."""
    return value is not None and REPO_ID.fullmatch(value) is not None and ".." not in value


def link(repo: str, kind: str = "", revision: str | None = None) -> str:
    """A repository as a link to the Hub, at its commit where that is known; as code where it cannot be one."""
    if not is_repo_id(repo):
        return code(repo)
    at = f"/tree/{revision}" if revision and re.fullmatch(r"[0-9a-f]{7,64}", revision) else ""
    return f"[{prose(repo)}]({HUB}{kind}{repo}{at})"
