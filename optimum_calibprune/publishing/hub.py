# SPDX-License-Identifier: Apache-2.0
"""Writes a finished run to a folder, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..records import CalibrationSet, Mix, RunRecord, Scores
from . import figure
from .card import render


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


RECORD_NAME = "calibprune.json"
CALIBRATION_NAME = "calibration.safetensors"
SCORES_FOLDER = "scores"


def check_output(folder: str | Path, overwrite: bool, needed_bytes: int = 0) -> None:
    """Raises before anything is computed where a result could not be written: `FileExistsError` for a folder that is
    not empty (unless `overwrite`), `NotADirectoryError` for a file, `OSError` for a disk without room."""
    target = Path(folder).resolve()
    if target.is_file():
        raise NotADirectoryError(f"{target} is a file; name a folder that is new or empty.")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{target} is not empty. Name another folder, or allow it to be replaced with --overwrite."
        )
    if target.is_mount() or target == Path.cwd():
        raise OSError(
            f"{target} cannot be replaced as a whole (a mount, or the current folder); name a folder inside it."
        )
    existing = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OSError(f"{target} needs {needed_bytes / 2**20:,.0f} MiB; {free / 2**20:,.0f} MiB are free on its disk.")
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"{existing} cannot be written to; name another output folder.")


def save_run(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    run: RunRecord,
    calibration: CalibrationSet,
    scores: dict[str, Scores],
    *,
    repo_id: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes model, tokenizer, records and card to `folder`; a crash leaves it as it was, or complete."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with _replaced(Path(folder), overwrite) as new:
        try:
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            save_file({"input_ids": calibration.input_ids}, new / CALIBRATION_NAME)
        except Exception as error:
            if type(error) not in (
                SafetensorError,
                Exception,
            ):  # a full disk, as safetensors and tokenizers tell of it
                raise
            raise OSError(f"{folder} could not be written: {error}") from error
        (new / RECORD_NAME).write_text(run.to_json(), encoding="utf-8")
        drawn = figure.retention(run, new)
        (new / "README.md").write_text(render(run, repo_id, figure=drawn), encoding="utf-8")
        for name, measured in scores.items():
            (new / SCORES_FOLDER).mkdir(exist_ok=True)
            (new / SCORES_FOLDER / f"{name}.json").write_text(measured.to_json(), encoding="utf-8")
    return Path(folder)


def save_calibration(folder: Path, calibration: CalibrationSet, mix: Mix) -> None:
    """Writes a calibration set, where each of its rows comes from, and the account of its choice, without a model."""
    from safetensors.numpy import save_file

    with _replaced(folder, overwrite=False) as new:
        save_file({"input_ids": calibration.input_ids}, new / CALIBRATION_NAME)
        (new / "mix.json").write_text(mix.to_json(), encoding="utf-8")
        rows = [row.to_dict() for row in calibration.rows]
        (new / "rows.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _replaced(target: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `target`, which takes its place when the body has ended well."""
    check_output(target, overwrite)
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    old = Path(f"{new}.old")
    try:
        new.chmod(0o755)
        yield new
        if target.exists():
            target.rename(old)
        new.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
