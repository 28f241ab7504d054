# SPDX-License-Identifier: Apache-2.0
"""Writes a finished run to a folder, whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..records import CalibrationSet, Mix, RunRecord, Scores
from . import pictures, plots
from .card import render, title


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

RECORD_NAME = "calibprune.json"
CALIBRATION_NAME = "calibration.safetensors"
SCORES_FOLDER = "scores"
# What odd JSON makes of the code that reads it.
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, StopIteration, RecursionError)
NO_SCORES = "{run} has no {path}: name the folder, or the repo, of a run whose capabilities were measured."
FIGURES_FOLDER = "figures"


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
    write_model: Callable[[Path], None],
    tokenizer: PreTrainedTokenizerBase,
    run: RunRecord,
    calibration: CalibrationSet,
    scores: dict[str, Scores],
    *,
    repo_id: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes tokenizer, records, card and, with matplotlib, its pictures to `folder`, and the checkpoint with `write_model`; a
    crash leaves the folder as it was, or complete."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with _replaced(Path(folder), overwrite) as new:
        try:
            write_model(new)
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
        _draw(new, run, scores)
        (new / "README.md").write_text(render(run, repo_id, pictures_in(new)), encoding="utf-8")
        for name, measured in scores.items():
            (new / SCORES_FOLDER).mkdir(exist_ok=True)
            (new / SCORES_FOLDER / f"{name}.json").write_text(measured.to_json(), encoding="utf-8")
    return Path(folder)


def _draw(folder: Path, run: RunRecord, scores: dict[str, Scores]) -> None:
    """The pictures of a run; one that cannot be drawn is said, and costs no run."""
    if run.capabilities is None or not plots.available():
        return
    try:
        pictures.draw(folder / FIGURES_FOLDER, title(run), run.capabilities, scores)
    except Exception as error:
        logger.warning("The figures could not be drawn and are left out: %s: %s", type(error).__name__, error)
        shutil.rmtree(folder / FIGURES_FOLDER, ignore_errors=True)


def save_calibration(folder: Path, calibration: CalibrationSet, mix: Mix) -> None:
    """Writes a calibration set, where each of its rows comes from, and the account of its choice, without a model."""
    from safetensors.numpy import save_file

    with _replaced(folder, overwrite=False) as new:
        save_file({"input_ids": calibration.input_ids}, new / CALIBRATION_NAME)
        (new / "mix.json").write_text(mix.to_json(), encoding="utf-8")
        rows = [row.to_dict() for row in calibration.rows]
        (new / "rows.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def pictures_in(folder: Path) -> list[str]:
    """The pictures of a saved run, as its card names them."""
    return sorted(path.relative_to(folder).as_posix() for path in (folder / FIGURES_FOLDER).glob("*"))


def record_of(folder: str | Path) -> RunRecord:
    """The record of a saved run; `FileNotFoundError` for a folder without one, `ValueError` for one that cannot be read."""
    path = Path(folder) / RECORD_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {RECORD_NAME}; name a folder that a run was saved to.")
    return read_record(path)


def read_record(record: Path) -> RunRecord:
    try:
        return RunRecord.from_json(record.read_text(encoding="utf-8"))
    except UNREADABLE as error:
        raise ValueError(f"{record.name} is no record of a run: {type(error).__name__}: {error}") from error


def load_scores(run: str | Path, *, token: str | None = None) -> dict[str, Scores]:
    """The scores that a run was saved with, of the model before ("dense") and after ("sparse"), from its folder or from the
    repo of that name on the Hub: `ID`, or `ID@REVISION`. Both are of one commit.

    Raises `FileNotFoundError` where there are none, `PermissionError` for a gated repo, `ValueError` for files that hold no
    scores.
    """
    local = Path(run).exists()
    repo_id, _, revision = str(run).partition("@")
    found = {}
    for state in ("dense", "sparse"):
        path = f"{SCORES_FOLDER}/{state}.json"
        file = Path(run) / path if local else _downloaded(repo_id, path, revision or None, token)
        if not file.is_file():
            raise FileNotFoundError(NO_SCORES.format(run=run, path=path))
        if not local:
            revision = file.parents[1].name  # the commit: the cache keeps each file in a folder of that name
        found[state] = _scores(file, f"{run}: {path}")
    return found


def _downloaded(repo_id: str, path: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(hf_hub_download(repo_id, path, revision=revision, token=token))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"{repo_id} is no folder here, and the Hub cannot be reached.") from error
    except GatedRepoError as error:
        raise PermissionError(
            f"{repo_id} is gated. Accept its terms on the Hub, then run `hf auth login` or pass a token."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo_id} has no revision {revision!r}.") from error
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):
        raise FileNotFoundError(NO_SCORES.format(run=repo_id, path=path)) from None


def _scores(file: Path, where: str) -> Scores:
    """The scores in a file, which may come from anyone."""
    try:
        scores = Scores.from_json(file.read_text(encoding="utf-8"))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where} holds no scores: {type(error).__name__}: {error}") from error
    names = [task.task for task in scores.tasks]
    if len({*names}) < len(names) or not all(0 <= value <= 1 for task in scores.tasks for value in task.item_scores):
        raise ValueError(f"{where} holds no scores: each task stands there once, with scores between 0 and 1.")
    return scores


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
