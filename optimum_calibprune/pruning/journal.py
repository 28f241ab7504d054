# SPDX-License-Identifier: Apache-2.0
"""What a run has finished, kept in a folder after every block, so that a run that was killed can go on."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..records import LayerReport
from .activations import Activations
from .checkpoint import Checkpoint, committed, write_shard
from .ranks import ALONE, Ranks


MANIFEST = "manifest.json"
SCHEMA = 1
State = Callable[[], Mapping[str, Tensor]]  # the tensors of a part of the model, for the process that writes them


class Journal:
    """A folder with the weights of the blocks that are finished, each in a shard of the checkpoint that is being made, with
    their reports, and with the hidden states that enter the next block. Each file is written whole; the manifest, last,
    says how far the run has come, and how many seconds it has taken; `earlier` are those of the runs before this one.

    Args:
        folder: new or empty, or with `resume` that of a run which stopped.
        identity: all that decides the result; a run goes on only where nothing of it has changed.
        blocks: how many there are.
        ranks: the processes that prune together. The first one writes; each keeps its own hidden states.

    Raises:
        `FileExistsError` where the folder holds something and `resume` was not asked for; `FileNotFoundError` where there is
        nothing to resume; `ValueError` that says what differs where the run in the folder is another one.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: Mapping[str, Any],
        blocks: int,
        *,
        resume: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder, self.blocks, self.ranks = Path(folder), blocks, ranks
        self.done, self.outside, self.earlier = 0, False, 0.0
        self._started = time.perf_counter()
        self._identity = json.loads(json.dumps({**identity, "processes": ranks.size}))
        self._layouts: list[dict[str, Any]] = []
        if resume:
            self._take_up()
        elif ranks.first:
            self._begin()
        ranks.wait()

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if set(self.folder.iterdir()) - set(self._unfinished()):
            unfinished = (self.folder / MANIFEST).is_file()
            what = "an unfinished run; go on with it by --resume (resume=True)" if unfinished else "other files"
            raise FileExistsError(f"{self.folder} holds {what}, or remove the folder, or name another one.")
        self._tidy()
        self._commit()

    def _unfinished(self) -> list[Path]:
        """Files that were being written when a run was killed."""
        return [path for name in ("*.json", "model-*", "hidden-states-*") for path in self.folder.glob(f".{name}.new")]

    def _tidy(self) -> None:
        for left in self._unfinished():
            left.unlink()

    def _take_up(self) -> None:
        manifest = self.folder / MANIFEST
        if not manifest.is_file():
            raise FileNotFoundError(f"There is no run to resume in {self.folder}: it has no {MANIFEST}.")
        found = json.loads(manifest.read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA:
            raise ValueError(f"{self.folder} was written by another version of this library; start the run again.")
        then = found["identity"]
        differing = differences({key: then.get(key) for key in self._identity}, self._identity)
        if differing:
            raise self._another(differing)
        self._identity = then
        self.done, self.outside, self._layouts = found["done"], found["outside"], found["layouts"]
        self.earlier = found["seconds"]
        if self.ranks.first:
            self._tidy()
            for left in self.folder.glob(
                "hidden-states-*.bin"
            ):  # of blocks before, by a kill between commit and removal
                if not left.name.startswith(f"hidden-states-{self.done:05d}."):
                    left.unlink()

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
            if self.ranks.first:
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

    def commit_outside(self, state: State) -> None:
        """Keeps what is no block, which is not changed."""
        self.outside = True
        if self.ranks.first:
            write_shard(self.shard(-1), state())
            self._commit()

    def commit(self, block: int, state: State, hidden: Activations, reports: Sequence[LayerReport]) -> None:
        """Keeps a finished block, its reports, and what it hands on to the next one."""
        assert block == self.done, "blocks are finished in their order"
        self.done = block + 1
        if self.done < self.blocks:
            hidden.save(self.hidden_states(self.done))
        layouts = self.ranks.everywhere(hidden.layout)
        if self.ranks.first:
            self._layouts = layouts
            write_shard(self.shard(block), state())
            self.keep(f"reports-{block:05d}", json.dumps([report.to_dict() for report in reports]))
            self._commit()
        self.ranks.wait()
        self.hidden_states(block).unlink(missing_ok=True)

    def reports(self, block: int) -> tuple[LayerReport, ...]:
        """Of a finished block."""
        text = self.kept(f"reports-{block:05d}")
        assert text is not None
        return tuple(LayerReport.from_dict(report) for report in json.loads(text))

    def take_up(self, empty: Activations) -> Activations:
        """What enters the next block; to be called where a block is finished and another is not."""
        layout = self._layouts[self.ranks.rank]
        return empty.load(self.hidden_states(self.done), layout["shapes"], layout["dtype"])

    def hidden_states(self, block: int) -> Path:
        """The file of this rank's hidden states that enter a block."""
        return self.folder / f"hidden-states-{block:05d}.{self.ranks.rank}.bin"

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

    def _commit(self) -> None:
        found = {
            "schema": SCHEMA,
            "identity": self._identity,
            "done": self.done,
            "outside": self.outside,
            "layouts": self._layouts,
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
