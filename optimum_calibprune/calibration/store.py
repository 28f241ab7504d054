# SPDX-License-Identifier: Apache-2.0
"""Keeps what a model has written on disk, under a fingerprint of everything that decides it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


def fingerprint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: str | None = None, **settings: Any
) -> str:
    """SHA-256 over the model's config and weights, the tokenizer, the kind of device, library versions and `settings`,
    which must be JSON. Where the `weights` are not in memory, their fingerprint stands for them."""
    import torch
    import transformers

    device = model.get_input_embeddings().weight.device.type
    made = {"device": device, "torch": torch.__version__, "transformers": transformers.__version__, **settings}
    digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode())
    digest.update(model.config.to_json_string(use_diff=False).encode())
    digest.update(_tokenizer(tokenizer).encode())
    if weights is not None:
        digest.update(f"{weights} {model.dtype}".encode())
        return digest.hexdigest()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that decides how a tokenizer splits and joins a text; truncation and padding are those of its last call."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return repr([sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs])
    parts = json.loads(fast.to_str())
    return json.dumps({name: part for name, part in parts.items() if name not in ("truncation", "padding")})


def place(key: str) -> Path:
    """The file of a fingerprint, in the assets folder of the Hugging Face cache (`HF_HOME`, `HF_ASSETS_CACHE`)."""
    from huggingface_hub import cached_assets_path

    return cached_assets_path("optimum_calibprune", namespace="candidates") / f"{key}.safetensors"


def load(key: str) -> tuple[np.ndarray, dict[str, str]] | None:
    """Ids and notes that were saved under `key`; None where there are none, or the file is damaged, which is said."""
    from safetensors import safe_open

    path = place(key)
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            notes, ids = dict(file.metadata() or {}), file.get_tensor("input_ids")
        if notes.pop("sha256", None) == _digest(ids):
            return ids.astype(np.int64), notes
        reason = "its contents do not fit its checksum"
    except Exception as error:  # safetensors raises an exception type of its own for damaged files
        reason = str(error)
    logger.warning("The cached text %s is damaged (%s) and is written anew.", path, reason)
    return None


def save(key: str, ids: np.ndarray, notes: Mapping[str, str]) -> None:
    """Writes ids `[windows, length]` and notes; another process sees the whole file or none. Failing is no error."""
    from safetensors.numpy import save_file

    path = place(key)
    small = np.ascontiguousarray(ids, dtype=np.int32)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            save_file({"input_ids": small}, temporary, metadata={**notes, "sha256": _digest(small)})
            os.replace(temporary, path)
    except OSError as error:
        logger.warning("The model's text could not be kept in the cache: %s", error)


def _digest(ids: np.ndarray) -> str:
    return hashlib.sha256(repr(ids.shape).encode() + ids.astype("<i4").tobytes()).hexdigest()
