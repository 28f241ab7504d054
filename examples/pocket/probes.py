# SPDX-License-Identifier: Apache-2.0
"""Write fresh probes of the four capabilities, any number of items, as the package reads them.

    python examples/pocket/probes.py --items 2000 --seed 7 --output DIR

Writes DIR/{general,commonsense,code,math}.jsonl. The same seed gives the same bytes, and more items begin with the same ones.
"""

from __future__ import annotations

import argparse
import json
import logging
from itertools import islice
from pathlib import Path
from random import Random

import tasks


logger = logging.getLogger("probes")


def probes(capability: str, items: int, seed: int) -> list[tasks.Item]:
    """The first `items` items of a seed: distinct as long as their kind has distinct ones left."""
    return list(islice(tasks.distinct(capability, Random(f"probes {capability} {seed}")), items))


def write(path: Path, capability: str, items: list[tasks.Item]) -> None:
    rows = ({"id": f"{capability}-{i}", "prompt": item.prompt, **item.probe} for i, item in enumerate(items))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(given: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=400, help="items of each capability")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other items")
    parser.add_argument("--output", type=Path, required=True, help="folder for the four files")
    chosen = parser.parse_args(given)
    if chosen.items < 1:
        parser.error(f"--items {chosen.items}: there must be at least one item.")
    chosen.output.mkdir(parents=True, exist_ok=True)
    for capability, kinds in tasks.KINDS.items():
        items = probes(capability, chosen.items, chosen.seed)
        path = chosen.output / f"{capability}.jsonl"
        write(path, capability, items)
        different, possible = len({item.key for item in items}), sum(kind.distinct for kind in kinds)
        logger.info("%s: %d items, %d of them distinct (%d are possible)", path, len(items), different, possible)


if __name__ == "__main__":
    main()
