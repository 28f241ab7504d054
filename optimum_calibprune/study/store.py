# SPDX-License-Identifier: Apache-2.0
"""A study's folder: what it was made with, one file a finished cell, each written whole or not at all."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from ..records import Record
from .cells import Cell, CellResult, Measured


logger = logging.getLogger(__name__)
R = TypeVar("R", bound=Record)

SETTINGS_NAME, DENSE_NAME, CELLS_FOLDER = "study.json", "dense.json", "cells"


@dataclass(frozen=True)
class StudySettings(Record):
    """What all cells of a study share.

    `weights` is the SHA-256 of the dense model and its tokenizer, `probes` that of each task's file, `perplexity_text` and
    `seed_texts` those of the files of that name (empty: none was given), `sources` that of each source's text (of a Hub
    source: where it lies); sources may be added later. `options` are the fields of `CalibPruneConfig` that decide a number
    and are the same in every cell.
    """

    model: str
    revision: str | None
    weights: str
    options: dict[str, str]
    capabilities: tuple[str, ...]
    probes: dict[str, str]
    perplexity_text: str
    seed_texts: str
    versions: dict[str, str]
    sources: dict[str, str] = field(default_factory=dict)


def differences(there: StudySettings, here: StudySettings) -> list[str]:
    """What keeps the cells of one study from standing beside those of another, a phrase each."""
    found = []
    for entry in dataclasses.fields(StudySettings):
        old, new = getattr(there, entry.name), getattr(here, entry.name)
        if isinstance(old, Mapping):
            both = sorted(old.keys() & new.keys()) if entry.name == "sources" else sorted(old.keys() | new.keys())
            found += [
                f"{_phrase(entry.name)}{name}: {_short(old.get(name))} there, {_short(new.get(name))} here"
                for name in both
                if old.get(name) != new.get(name)
            ]
        elif old != new:
            found.append(f"{entry.name}: {_short(old)} there, {_short(new)} here")
    return found


def _phrase(field_name: str) -> str:
    return {"options": "", "probes": "probes of ", "versions": "version of ", "sources": "source "}[field_name]


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text[:12] + "..." if len(text) == 64 and " " not in text else text  # a SHA-256


class StudyFolder:
    """Where a study is kept. Files appear under their name only when they are complete."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)

    def check(self) -> None:
        """Raises where nothing could be written, or where something else than a study lies: nothing is overwritten."""
        if self.path.is_file():
            raise NotADirectoryError(f"{self.path} is a file; name a folder that is new, empty or holds a study.")
        if self.path.exists() and any(self.path.iterdir()) and not (self.path / SETTINGS_NAME).exists():
            raise FileExistsError(f"{self.path} is not empty and holds no study; name a folder that is new or empty.")
        existing = next(p for p in (self.path.resolve(), *self.path.resolve().parents) if p.exists())
        if not os.access(existing, os.W_OK):
            raise PermissionError(f"{existing} cannot be written to; name another output folder.")

    def claim(self, settings: StudySettings) -> StudySettings:
        """Writes the settings, or checks them against those that lie there and adds the new sources.

        Raises `ValueError` that names every difference.
        """
        path = self.path / SETTINGS_NAME
        if path.exists():
            there = _read(path, StudySettings)
            if there is None:
                raise ValueError(f"{path} cannot be read; restore it, or name another folder.")
            found = differences(there, settings)
            if found:
                raise ValueError(
                    f"{self.path} holds a study with other settings ({'; '.join(found)}). Name another folder, or repeat "
                    "the command that began it."
                )
            settings = replace(settings, sources=there.sources | settings.sources)
        (self.path / CELLS_FOLDER).mkdir(parents=True, exist_ok=True)
        write_whole(path, settings.to_json())
        return settings

    def dense(self) -> Measured | None:
        """What was measured of the dense model; None where it has not been, or its file is damaged."""
        return self._good(self.path / DENSE_NAME, Measured)

    def write_dense(self, measured: Measured) -> None:
        write_whole(self.path / DENSE_NAME, measured.to_json())

    def write(self, result: CellResult) -> None:
        write_whole(self._file(result.cell), result.to_json())

    def result(self, cell: Cell, dense: Measured) -> CellResult | None:
        """A cell's result; None where there is none, or its file is damaged."""
        return self._checked(self._file(cell), dense)

    def results(self, dense: Measured) -> list[CellResult]:
        """Every result that lies there, whichever command made it, in a fixed order."""
        found = [self._checked(path, dense) for path in (self.path / CELLS_FOLDER).glob("*.json")]
        return sorted((r for r in found if r is not None), key=lambda r: (r.cell.seed, r.cell.key))

    def _file(self, cell: Cell) -> Path:
        return self.path / CELLS_FOLDER / f"{cell.key}.json"

    def _checked(self, path: Path, dense: Measured) -> CellResult | None:
        result = self._good(path, CellResult)
        if result is None:
            return None
        same = [(t.task, len(t.score().item_scores)) for t in dense.tasks]
        if path != self._file(result.cell):
            why = "belongs to another cell"
        elif not result.failed and [(t.task, len(t.score().item_scores)) for t in result.sparse.tasks] != same:
            why = "was not measured on the items of the dense model"
        else:
            return result
        logger.warning("%s %s; the cell counts as not run.", path, why)
        return None

    def _good(self, path: Path, kind: type[R]) -> R | None:
        if not path.exists():
            return None
        found = _read(path, kind)
        if found is None:
            logger.warning("%s is damaged; what it held counts as not measured.", path)
        return found


def _read(path: Path, kind: type[R]) -> R | None:
    """The record of a file; None where the file does not hold one, whole."""
    try:
        return kind.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError, AttributeError):  # not JSON, or JSON of another shape
        return None


def write_whole(path: Path, text: str) -> None:
    """A reader finds the old file or the new one, never a part of it, whenever the writer is killed."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
