# SPDX-License-Identifier: Apache-2.0
"""What a run has finished, kept in a folder after every block, so that a run that was killed can go on."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..records import LayerReport
from .activations import Activations
from .checkpoint import Checkpoint, committed, write_shard


MANIFEST = "manifest.json"
SCHEMA = 1


class Journal:
    """A folder with the weights of the blocks that are finished, each in a shard of the checkpoint that is being made, with
    their reports, and with the hidden states that enter the next block. Each file is written whole; the manifest, last,
    says how far the run has come, and how many seconds it has taken; `earlier` are those of the runs before this one.

    Args:
        folder: new or empty, or with `resume` that of a run which stopped.
        identity: all that decides the result; a run goes on only where nothing of it has changed.
        blocks: how many there are.

    Raises:
        `FileExistsError` where the folder holds something and `resume` was not asked for; `FileNotFoundError` where there is
        nothing to resume; `ValueError` that says what differs where the run in the folder is another one.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], blocks: int, *, resume: bool = False) -> None:
        self.folder, self.blocks = Path(folder), blocks
        self.done, self.outside, self.earlier = 0, False, 0.0
        self._started = time.perf_counter()
        self._identity = json.loads(json.dumps(identity))
        self._layout: dict[str, Any] = {}
        manifest = self.folder / MANIFEST
        for left in self.folder.glob(".*.new"):  # by a run that was killed while it wrote
            left.unlink()
        if resume:
            if not manifest.is_file():
                raise FileNotFoundError(f"There is no run to resume in {self.folder}: it has no {MANIFEST}.")
            self._take_up(json.loads(manifest.read_text(encoding="utf-8")))
            return
        if self.folder.exists() and any(self.folder.iterdir()):
            what = (
                "an unfinished run; go on with it by --resume (resume=True)" if manifest.is_file() else "other files"
            )
            raise FileExistsError(f"{self.folder} holds {what}, or remove the folder, or name another one.")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._commit()

    def _take_up(self, found: dict[str, Any]) -> None:
        if found["schema"] != SCHEMA:
            raise ValueError(f"{self.folder} was written by another version of this library; start the run again.")
        then = found["identity"]
        differing = differences({key: then.get(key) for key in self._identity}, self._identity)
        if differing:
            raise self._another(differing)
        self._identity = then
        self.done, self.outside, self._layout = found["done"], found["outside"], found["layout"]
        self.earlier = found["seconds"]

    def _another(self, differing: list[str]) -> ValueError:
        return ValueError(
            f"The run in {self.folder} cannot be resumed with what was given: {'; '.join(differing)}. Give what it was "
            "started with, or start anew in another folder."
        )

    def expect(self, name: str, value: Any) -> None:
        """Adds to the identity what is known only now; raises `ValueError` where the run in the folder had another one."""
        if name in self._identity and self._identity[name] != value:
            raise self._another([f"{name} was {_short(self._identity[name])} and is {_short(value)}"])
        if name not in self._identity:
            self._identity[name] = value
            self._commit()

    # ---------------------------------------------------------------------------------------- stages

    def keep(self, name: str, text: str) -> None:
        """Keeps the result of a stage before the walk, as JSON."""
        path = self.folder / f"{name}.json"
        with committed(path, len(text)) as new:
            new.write_text(text, encoding="utf-8")

    def kept(self, name: str) -> str | None:
        path = self.folder / f"{name}.json"
        return path.read_text(encoding="utf-8") if path.is_file() else None

    # ---------------------------------------------------------------------------------------- blocks

    def shard(self, part: int) -> Path:
        """The file of a block, or of what is outside them, which comes first."""
        return self.folder / f"model-{part + 2:05d}-of-{self.blocks + 1:05d}.safetensors"

    def checkpoint(self, block: int) -> Checkpoint:
        return Checkpoint.of_files([self.shard(block)])

    def commit_outside(self, state: Mapping[str, Tensor]) -> None:
        """Keeps what is no block, which is not changed."""
        write_shard(self.shard(-1), state)
        self.outside = True
        self._commit()

    def commit(
        self, block: int, state: Mapping[str, Tensor], hidden: Activations, reports: Sequence[LayerReport]
    ) -> None:
        """Keeps a finished block, its reports, and what it hands on to the next one."""
        assert block == self.done, "blocks are finished in their order"
        write_shard(self.shard(block), state)
        self.keep(f"reports-{block:05d}", json.dumps([report.to_dict() for report in reports]))
        if block + 1 < self.blocks:
            hidden.save(self._hidden(block + 1))
            self._layout = hidden.layout
        self.done = block + 1
        self._commit()
        self._hidden(block).unlink(missing_ok=True)

    def reports(self, block: int) -> tuple[LayerReport, ...]:
        """Of a finished block."""
        text = self.kept(f"reports-{block:05d}")
        assert text is not None
        return tuple(LayerReport.from_dict(report) for report in json.loads(text))

    def hidden(self, empty: Activations) -> Activations:
        """What enters the next block; to be called where a block is finished and another is not."""
        return empty.load(self._hidden(self.done), self._layout["shapes"], self._layout["dtype"])

    def save(self, folder: Path, model: PreTrainedModel) -> None:
        """Writes the checkpoint, all of whose blocks are finished, to `folder`; on the same disk it takes no room."""
        model.save_pretrained(folder, state_dict={})  # all files but the weights
        (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
        weight_map, size = {}, 0
        for part in range(-1, self.blocks):
            shard = self.shard(part)
            _link(shard, folder / shard.name)
            weight_map |= dict.fromkeys(Checkpoint.of_files([shard]).files, shard.name)
            size += shard.stat().st_size
        index = {
            "metadata": {"total_parameters": model.num_parameters(), "total_size": size},
            "weight_map": weight_map,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")

    def remove(self) -> None:
        """Removes the folder, when all that is in it has been saved elsewhere."""
        shutil.rmtree(self.folder)

    def _hidden(self, block: int) -> Path:
        return self.folder / f"hidden-states-{block:05d}.bin"

    def _commit(self) -> None:
        found = {
            "schema": SCHEMA,
            "identity": self._identity,
            "done": self.done,
            "outside": self.outside,
            "layout": self._layout,
            "seconds": self.earlier + time.perf_counter() - self._started,
        }
        text = json.dumps(found, indent=1) + "\n"
        with committed(self.folder / MANIFEST, len(text)) as new:
            new.write_text(text, encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def differences(then: Mapping[str, Any], now: Mapping[str, Any], under: str = "") -> list[str]:
    """What differs between two nested mappings, one sentence each."""
    found = []
    for key in dict.fromkeys((*then, *now)):
        a, b = then.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{under}{key}.")
        elif a != b:
            found.append(f"{under}{key} was {_short(a)} and is {_short(b)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:38]}...{text[-38:]}"
