# SPDX-License-Identifier: Apache-2.0
"""What must hold before a release, asked of the built files: `release_check.py ROOT DIST`; each problem is one line."""

from __future__ import annotations

import json
import re
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path


REQUIRED = ("Name", "Version", "Summary", "License-Expression", "License-File", "Requires-Python")
SPDX = "# SPDX-License-Identifier: Apache-2.0\n"


def problems(root: Path, dist: Path) -> list[str]:
    """Everything that keeps the files in `dist`, built from the checkout `root`, from being released."""
    wheels, sdists = sorted(dist.glob("*.whl")), sorted(dist.glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        return [f"{dist} must hold one wheel and one sdist; it holds {len(wheels)} and {len(sdists)}"]
    wheel = zipfile.ZipFile(wheels[0])
    with tarfile.open(sdists[0]) as archive:
        members = {name.partition("/")[2]: archive.extractfile(name) for name in archive.getnames()}
        sdist = {name: file.read() for name, file in members.items() if file is not None}
    found = message_from_bytes(wheel.read(next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))))
    return [
        *_metadata(found),
        *_version(root, found["Version"], wheels[0].name, sdists[0].name),
        *_readme(root, str(found.get_payload())),
        *_licences(root, wheel, sdist),
    ]


def _metadata(found: object) -> list[str]:
    missing = [name for name in REQUIRED if not found[name]]  # type: ignore[index]
    if found["Description-Content-Type"] != "text/markdown":  # type: ignore[index]
        missing.append("Description-Content-Type: text/markdown")
    return [f"the wheel's metadata lacks {name}" for name in missing]


def _version(root: Path, version: str, wheel: str, sdist: str) -> list[str]:
    """One version everywhere, and the changelog begins with it: with what a development version leads to, as unreleased."""
    declared = re.search(r'__version__ = "(.+)"', (root / "optimum_calibprune" / "__init__.py").read_text("utf-8"))
    newest = re.search(r"^## (.+)", (root / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    said = {
        "__init__.py": declared[1] if declared else "none",
        "the wheel's name": wheel.split("-")[1],
        "the sdist's name": sdist.removesuffix(".tar.gz").split("-")[1],
    }
    wrong = [f"{where} says version {other}, the wheel {version}" for where, other in said.items() if other != version]
    final, _, development = version.partition(".dev")
    heading = f"{final} (unreleased)" if development else final
    if newest is None or newest[1].partition(", ")[0] != heading:  # a date may follow a comma
        wrong.append(
            f"CHANGELOG.md begins with {newest[1] if newest else 'nothing'!r}; for {version} it begins with {heading!r}"
        )
    return wrong


def _readme(root: Path, description: str) -> list[str]:
    """The description is the README, and what the README links to is there."""
    text = (root / "README.md").read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    wrong = [f"README.md links to {link}, which is not there" for link in links if not (root / link).exists()]
    if text.count("```") % 2:
        wrong.append("README.md has a block of code without an end")
    if text.split() != description.split():
        wrong.append("the wheel's description is not README.md")
    return wrong


def _licences(root: Path, wheel: zipfile.ZipFile, sdist: dict[str, bytes]) -> list[str]:
    """The licence is in both files, each source file names it, and each bundled text has its own."""
    licence = (root / "LICENSE").read_bytes()
    inside = [name for name in wheel.namelist() if name.endswith("/licenses/LICENSE")]
    wrong = [] if inside and wheel.read(inside[0]) == licence else ["the wheel has no LICENSE"]
    wrong += [] if sdist.get("LICENSE") == licence else ["the sdist has no LICENSE"]
    wrong += [
        f"{name} names no licence"
        for name, text in sdist.items()
        if name.endswith(".py") and not text.decode().startswith(SPDX)
    ]
    manifest = json.loads(sdist.get("optimum_calibprune/pocket/texts/manifest.json", b"{}"))
    wrong += [
        f"the bundled text {name} has no licence" for name, entry in manifest.items() if not entry.get("licence")
    ]
    return wrong if manifest else [*wrong, "the sdist has no manifest of the bundled texts"]


if __name__ == "__main__":
    found_here = problems(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.write("".join(f"{line}\n" for line in found_here) or "ready to be released\n")
    sys.exit(bool(found_here))
