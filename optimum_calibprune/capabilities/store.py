# SPDX-License-Identifier: Apache-2.0
"""Keeps the scores of each task on disk, so that a model is asked once, and an evaluation that was killed goes on."""

from __future__ import annotations

import logging
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ..calibration import store as texts
from ..records import TaskScore


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

SCORING = 3  # grows when the same answers of a model are scored in another way, or more is kept of them


def of_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: str | None = None) -> str:
    """SHA-256 over weights, configs, tokenizer, kind of device and library versions, lm-eval's among them. `weights` is the
    fingerprint of those of a streamed model, which are on disk."""
    generation = getattr(model, "generation_config", None)  # says which tokens end a text
    settings = generation.to_json_string(use_diff=False) if generation is not None else ""
    made = {"lm_eval": version("lm_eval"), "scoring": SCORING, "generation": settings}
    return texts.fingerprint(model, tokenizer, weights, **made)


def place(key: str) -> Path:
    """The file of a key, in the assets folder of the Hugging Face cache (`HF_HOME`, `HF_ASSETS_CACHE`)."""
    from huggingface_hub import cached_assets_path

    return cached_assets_path("optimum_calibprune", namespace="scores") / f"{key}.json"


def load(key: str) -> TaskScore | None:
    """What was saved under a key; None where there is nothing, or the file is damaged, which is said."""
    path = place(key)
    if not path.is_file():
        return None
    try:
        return TaskScore.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        logger.warning("The cached scores %s are damaged (%s); the task is measured anew.", path, error)
        return None


def save(key: str, score: TaskScore) -> None:
    """Another process sees the whole file or none. Failing is no error."""
    path = place(key)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            temporary.write_text(score.to_json(), encoding="utf-8")
            os.replace(temporary, path)
    except OSError as error:
        logger.warning("The scores of %s could not be kept in the cache: %s", score.task, error)
