# SPDX-License-Identifier: Apache-2.0
"""The scripts of examples/pocket import each other by name, as they do when one of them is run."""

from __future__ import annotations

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[2] / "examples" / "pocket"))
