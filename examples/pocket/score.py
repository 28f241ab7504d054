# SPDX-License-Identifier: Apache-2.0
"""Score a trained model on probe files: how many items of each capability it gets right.

    python examples/pocket/score.py MODEL [--probes DIR] [--device cuda]

MODEL is a folder of train.py, or `pocket`. Without --probes it answers the 400 items a capability that come with the package.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path


os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_calibprune import pocket
from optimum_calibprune.capabilities.score import measure
from optimum_calibprune.capabilities.tasks import Task, pocket_tasks
from optimum_calibprune.records import CAPABILITIES, Scores


def probe_tasks(folder: Path | None) -> list[Task]:
    """The pocket's four tasks, on the files of a folder where one is given; `ValueError` where a file is not there."""
    tasks = pocket_tasks(CAPABILITIES)
    if folder is None:
        return tasks
    found = [replace(task, path=folder / f"{task.capability}.jsonl") for task in tasks]
    if missing := [task.path for task in found if not task.path.is_file()]:
        raise ValueError(f"{missing[0]} is not there; write the four files with examples/pocket/probes.py.")
    return found


def score(model: str, probes: Path | None, device: str) -> Scores:
    """The scores of a model folder, or of the bundled pocket."""
    folder = pocket.MODEL if model == pocket.NAME else Path(model)
    tasks = probe_tasks(probes)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{model} holds no model (no config.json); give a folder of examples/pocket/train.py, or 'pocket'."
        )
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval().to(device)
    return measure(loaded, AutoTokenizer.from_pretrained(folder), tasks)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a trained model, or 'pocket'")
    parser.add_argument("--probes", type=Path, help="folder of probes.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args(given)
    try:
        scores = score(chosen.model, chosen.probes, chosen.device)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    for task in scores.tasks:
        print(f"{task.capability:12} {task.value:.3f} of {len(task.item_scores)} items")
    for capability, reason in scores.not_measured.items():
        print(f"{capability:12} not measured: {reason}")


if __name__ == "__main__":
    main()
