# SPDX-License-Identifier: Apache-2.0
"""SHA-256 of what a study rests on: the model, its probes, its texts."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..records import CalibrationSource


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHUNK = 2**24  # bytes that are read at once


def of_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Over names, types and bytes of all weights, and over the vocabulary in the order of its ids."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        flat = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(flat.numpy())
    digest.update(repr(sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])).encode())
    return digest.hexdigest()


def of_path(path: Path) -> str:
    """Over a file, or the names and bytes of all files below a folder."""
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        digest.update(file.relative_to(path).as_posix().encode())
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def of_source(source: CalibrationSource) -> str:
    """Of a local text its bytes and how they are read; of a Hub source where it lies and how it is read."""
    place = of_path(Path(source.path)) if source.path else f"{source.repo} {source.subset} {source.revision}"
    return hashlib.sha256(repr((place, source.capability, source.split, source.text)).encode()).hexdigest()
