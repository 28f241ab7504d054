# SPDX-License-Identifier: Apache-2.0
"""Writes the folder that is uploaded as a Space: `space_bundle.py WHEEL TARGET`.

A Space installs its requirements before its files are there, so a wheel beside them cannot be one of these. The wheel's
package is unpacked next to app.py instead, and its place in the requirements is taken by those that the wheel states. The
wheel lies there as a whole, too, for jobs that the Space starts.
"""

from __future__ import annotations

import shutil
import sys
import zipfile
from email.parser import Parser
from pathlib import Path


SPACE = Path(__file__).parents[1] / "space"
PACKAGE = "optimum_calibprune/"
EXTRA = "plots"


def bundle(wheel: Path, target: Path) -> Path:
    """The Space's own files, the package, and the requirements of both; `target` is replaced."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(SPACE, target, ignore=shutil.ignore_patterns("__pycache__"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target, [name for name in archive.namelist() if name.startswith(PACKAGE)])
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        required = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist", [])
    shutil.copy(wheel, target)
    lines = (target / "requirements.txt").read_text().splitlines()
    further = [line for line in lines if not line.startswith("optimum-calibprune")]
    (target / "requirements.txt").write_text(
        "".join(f"{line}\n" for line in [*filter(None, map(_wanted, required)), *further])
    )
    return target


def _wanted(requirement: str) -> str | None:
    """A requirement without its extra; None for those of extras that the Space does not use."""
    text, _, marker = requirement.partition(";")
    extra = f"extra == '{EXTRA}'"
    if "extra ==" in marker and extra not in marker.replace('"', "'"):
        return None
    return text.strip()


if __name__ == "__main__":
    sys.stdout.write(f"{bundle(Path(sys.argv[1]), Path(sys.argv[2]))}\n")
