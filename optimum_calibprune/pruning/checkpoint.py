# SPDX-License-Identifier: Apache-2.0
"""Safetensors checkpoints on disk: which file holds which tensor, read when wanted; shards written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True)
class Checkpoint:
    """The file of each tensor, by the tensor's key."""

    files: Mapping[str, Path]

    @classmethod
    def of_files(cls, paths: Iterable[Path]) -> Checkpoint:
        files = {}
        for path in paths:
            with _opened(path) as opened:
                files |= dict.fromkeys(opened.keys(), path)
        return cls(files)

    @contextmanager
    def read(self, keys: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Slices of the files, by key: `[...]` of one reads it. Read, not mapped: the memory is freed with the tensor."""
        keys = list(keys)
        with ExitStack() as opened:
            handles: dict[Path, Any] = {}
            for path in {self.files[key] for key in keys}:
                handles[path] = opened.enter_context(_opened(path))
            there = {path: set(handle.keys()) for path, handle in handles.items()}
            for key in keys:
                if key not in there[self.files[key]]:
                    raise OSError(f"{self.files[key]} lacks {key}, which the index of the checkpoint puts there.")
            yield {key: handles[self.files[key]].get_slice(key) for key in keys}

    def dtype(self) -> torch.dtype:
        """Of the first tensor that holds floating-point numbers."""
        with self.read(self.files) as slices:
            names = (_DTYPES.get(each.get_dtype()) for each in slices.values())
            return next((dtype for dtype in names if dtype is not None), torch.float32)

    def fingerprint(self) -> str:
        """SHA-256 of the digests of all files, in the order of their names.

        A file of the Hub's cache is not read again: there a large file is named by its SHA-256.
        """
        digest = hashlib.sha256()
        for path in sorted(set(self.files.values())):
            digest.update(f"{path.name} {_sha256(path)}\n".encode())
        return digest.hexdigest()


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", backend="pread")
    except SafetensorError as error:
        raise OSError(f"{path} is not a whole safetensors file ({error}); download or copy it again.") from error


def _sha256(path: Path) -> str:
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    with blob.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_checkpoint(fetch: Callable[[str], Path | None]) -> Checkpoint | None:
    """The safetensors of a model, or None where it has none; `fetch` gives the local path of a file of the model."""
    index = fetch(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        whole = fetch(SAFE_WEIGHTS_NAME)
        return None if whole is None else Checkpoint.of_files([whole])
    shards: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    paths = {name: fetch(name) for name in sorted(set(shards.values()))}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        raise OSError(f"The checkpoint lacks {', '.join(missing)}, which {SAFE_WEIGHTS_INDEX_NAME} names.")
    return Checkpoint({key: path for key, name in shards.items() if (path := paths[name]) is not None})


# --------------------------------------------------------------------------------------------- writing


def as_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes one safetensors file; after a crash it is there as a whole, or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    needed = sum(tensor.numel() * tensor.element_size() for tensor in whole.values())
    with committed(path, needed) as new:
        try:
            save_file(whole, new, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, as safetensors tells of it
            raise OSError(errno.EIO, str(error)) from error


@contextmanager
def committed(path: Path, needed: int) -> Iterator[Path]:
    """A new path beside `path`; what the body has written there is synced to the disk and then takes its place.

    Raises `OSError` that names the need of `needed` bytes where the body could not write them.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        yield new
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        new.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        new.unlink(missing_ok=True)
        raise not_written(path, needed, free, error) from error
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def not_written(path: Path, needed: int, free: int, error: OSError) -> OSError:
    return OSError(
        f"{path} could not be written: it needs {needed / 2**20:,.1f} MiB, and its disk has {free / 2**20:,.1f} MiB free "
        f"({error.strerror or error}). What was finished before is kept; make room, and resume."
    )


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder last; where folders cannot be synced (Windows) this is left to the system."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
