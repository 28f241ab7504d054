# SPDX-License-Identifier: Apache-2.0
"""The hidden states of the calibration set between two blocks: on the device, in pinned host memory, or in a file."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoint import as_bytes, committed, not_written


PLACES = ("device", "pinned host memory", "file")


class Activations:
    """One tensor `[samples, length, width]` for each micro-batch, given and taken on `device` wherever it is kept.

    In a `"file"`, what is assigned enters the next generation, which `save` makes the one that is read.
    """

    def __init__(self, place: str, device: torch.device, path: Path | None = None) -> None:
        assert place != "file" or path is not None, "which file?"
        self.place, self.device = place, device
        self._shapes: list[tuple[int, ...]] = []
        self._dtype = torch.float32
        self._held: list[Tensor] = []
        self._read_from = path
        self._next: Path | None = None

    def fill(self, tensors: Iterable[Tensor]) -> Activations:
        """Keeps the hidden states of all micro-batches, in their order."""
        for tensor in tensors:
            self._shapes.append(tuple(tensor.shape))
            self._dtype = tensor.dtype
            if self.place != "file":
                self._held.append(self._kept(tensor))
                continue
            assert self._read_from is not None
            if len(self._shapes) == 1:
                self._read_from.unlink(missing_ok=True)
            self._write(self._read_from, len(self._shapes) - 1, tensor)
        return self

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, i: int) -> Tensor:
        if self.place != "file":
            return self._held[i].to(self.device, non_blocking=True)
        assert self._read_from is not None
        return self._from_file(self._read_from, i).to(self.device)

    def __setitem__(self, i: int, tensor: Tensor) -> None:
        assert tuple(tensor.shape) == self._shapes[i], "a block keeps the shape of the hidden states"
        if self.place != "file":
            self._held[i] = self._kept(tensor)
            return
        self._write(self._generation(), i, tensor)

    def turn(self) -> None:
        """What was assigned is read from now on; for where nobody calls `save`."""
        if self.place == "file" and self._next is not None and self._read_from is not None:
            self._next.replace(self._read_from)
            self._next = None

    def save(self, path: Path) -> None:
        """Writes all of them to `path`, whole or not at all; raises `OSError` that names the need."""
        needed = self._offset(len(self))
        with committed(path, needed) as new:
            if self.place == "file" and self._next is not None:
                self._next.replace(new)
            else:
                with new.open("wb") as file:
                    for i in range(len(self)):
                        file.write(as_bytes(self[i] if self.place == "file" else self._held[i]))
        if self.place == "file":
            self._read_from, self._next = path, None

    def load(self, path: Path, shapes: Sequence[Sequence[int]], dtype: str) -> Activations:
        """Takes up what `save` has written."""
        self._shapes, self._dtype = [tuple(shape) for shape in shapes], getattr(torch, dtype)
        if path.stat().st_size != self._offset(len(self)):
            raise OSError(
                f"{path} has {path.stat().st_size} bytes, not the {self._offset(len(self))} that were written."
            )
        if self.place == "file":
            self._read_from = path
        else:
            self._held = [self._kept(self._from_file(path, i)) for i in range(len(self))]
        return self

    @property
    def layout(self) -> dict[str, Any]:
        """What `load` must be told."""
        return {"shapes": [list(shape) for shape in self._shapes], "dtype": str(self._dtype).removeprefix("torch.")}

    @property
    def length(self) -> int:
        """Tokens of a sample."""
        return self._shapes[0][1]

    def samples(self, i: int) -> int:
        """Of a micro-batch."""
        return self._shapes[i][0]

    def _generation(self) -> Path:
        if self._next is None:
            assert self._read_from is not None
            self._next = self._read_from.with_name(f".{self._read_from.name}.next.new")
            self._next.unlink(missing_ok=True)
        return self._next

    def _write(self, path: Path, i: int, tensor: Tensor) -> None:
        data = as_bytes(tensor)
        try:
            with path.open("r+b" if path.exists() else "wb") as file:
                file.seek(self._offset(i))
                file.write(data)
        except OSError as error:
            free = shutil.disk_usage(path.parent).free
            raise not_written(path, self._offset(len(self)), free, error) from error

    def _kept(self, tensor: Tensor) -> Tensor:
        if self.place == "device":
            return tensor.to(self.device)
        return tensor.cpu().pin_memory() if torch.cuda.is_available() else tensor.cpu()

    def _offset(self, i: int) -> int:
        return self._dtype.itemsize * sum(math.prod(shape) for shape in self._shapes[:i])

    def _from_file(self, path: Path, i: int) -> Tensor:
        count = self._dtype.itemsize * math.prod(self._shapes[i])
        read = np.fromfile(path, dtype=np.uint8, count=count, offset=self._offset(i))
        return torch.from_numpy(read).view(self._dtype).reshape(self._shapes[i])
