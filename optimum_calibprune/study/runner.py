# SPDX-License-Identifier: Apache-2.0
"""Runs a study cell by cell and goes on where it was stopped. A cell is one run of CalibPruner and its measurement."""

from __future__ import annotations

import dataclasses
import gc
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from .. import machine, pocket
from ..calibration.measure import Likelihood, profile_source
from ..calibration.sources import open_sources
from ..calibration.table import SOURCES
from ..capabilities.score import measure
from ..capabilities.tasks import Task, pocket_tasks, read
from ..pruner import CalibPruner
from ..records import CAPABILITIES, CalibrationSource, RunRecord, Scores, SourceProfile, require
from ..values import SELF
from . import fingerprints
from .cells import ALL, Cell, CellResult, Measured, TaskItems, grid
from .store import StudyFolder, StudySettings


SHARED = ("samples", "length", "method", "sequential", "damping", "micro_batch")
OnCell = Callable[[int, int, CellResult], None]  # cells that are done, all cells, the one that ended last


@dataclass(frozen=True)
class Job:
    """Everything that a worker needs to run one cell. `options` are keywords of `CalibPruner.from_pretrained`."""

    cell: Cell
    model: str
    sources: tuple[str | CalibrationSource, ...]
    tasks: tuple[Task, ...]
    options: dict[str, Any]


class Study:
    """Mixes x patterns x seeds on one model, kept in a folder that a later start goes on with.

    Example:
        >>> study = Study.open("pocket", "my-study", mixes=["single", "uniform"], sparsity=["50%"], seeds=range(5))
        >>> study.run(workers=2)
        >>> study.failed()
        []

    Attributes:
        folder: the `StudyFolder`.
        settings: what all its cells share.
        cells: those that were asked for, in the order in which they run.
    """

    def __init__(
        self,
        folder: StudyFolder,
        settings: StudySettings,
        cells: Sequence[Cell],
        dense: CalibPruner,
        jobs: Sequence[Job],
    ) -> None:
        self.folder, self.settings, self.cells = folder, settings, list(cells)
        self._dense_pruner: CalibPruner | None = dense
        self._jobs = list(jobs)

    @classmethod
    def open(
        cls,
        model: str,
        output: str | Path,
        *,
        sources: Sequence[str | CalibrationSource] | None = None,
        mixes: Sequence[str] = (ALL,),
        sparsity: Sequence[str | float] = ("50%",),
        seeds: Sequence[int] = (0, 1, 2),
        probes: str | Path | None = None,
        perplexity_text: str | Path | None = None,
        seed_texts: str | Path | None = None,
        capabilities: str | Sequence[str] = "auto",
        **options: Any,
    ) -> Self:
        """Checks everything, loads the dense model, and claims the folder; nothing is measured yet.

        Args:
            model: Hub id, folder, or `"pocket"`.
            output: a new or empty folder, or one that holds this study.
            sources: as `CalibPruner.from_pretrained` takes them, without data in memory.
            mixes, sparsity, seeds: see `cells.grid`.
            probes: a folder with other probes for the pocket model; see `tasks.pocket_tasks`.
            perplexity_text, capabilities: as `CalibPruner.from_pretrained` takes them.
            seed_texts: the field of `CalibPruneConfig`, for the cells of `igsp`.
            **options: other fields of `CalibPruneConfig` that all cells share: `samples`, `length`, `method`, ...

        Raises:
            `ValueError` for bad arguments and for a folder with other settings, `OSError` where something cannot be had.
        """
        folder = StudyFolder(output)
        folder.check()
        of_pocket = model == pocket.NAME
        given = list(sources or (pocket.default_sources() if of_pocket else SOURCES))
        table = {**SOURCES, **pocket.sources()} if of_pocket else SOURCES
        opened = tuple(entry.source for entry in open_sources(given, table))
        cells = grid(list(mixes), opened, list(sparsity), list(seeds))
        if perplexity_text is not None:
            options["perplexity_text"] = str(perplexity_text)
        dense = CalibPruner.from_pretrained(
            model, sources=list(opened), sparsity=cells[0].pattern, capabilities=capabilities, **options
        )
        proposals = {} if seed_texts is None else {"seed_texts": str(seed_texts)}
        tasks = _tasks(dense, None if probes is None else Path(probes))
        options |= {"samples": dense.config.samples, "length": dense.config.length}
        settings = StudySettings(
            model=dense.base.name,
            revision=dense.base.revision,
            weights=fingerprints.of_model(dense.model, dense.tokenizer),
            options={name: str(getattr(dense.config, name)) for name in SHARED}
            | {"dtype": str(dense.model.dtype).removeprefix("torch.")}
            | ({"allocation": dense.config.allocation} if dense.config.allocation != "uniform" else {}),
            capabilities=tuple(name for name in CAPABILITIES if name in {task.capability for task in tasks}),
            probes={task.name: fingerprints.of_path(task.path) for task in tasks},
            perplexity_text=fingerprints.of_path(Path(perplexity_text)) if perplexity_text is not None else "",
            seed_texts=fingerprints.of_path(Path(seed_texts)) if seed_texts is not None else "",
            versions=machine.versions(),
            sources={source.name: fingerprints.of_source(source) for source in opened},
        )
        by_name: dict[str, str | CalibrationSource] = {SELF: SELF} | {source.name: source for source in opened}
        jobs = [
            Job(
                *(cell, model, tuple(by_name[name] for name in cell.sources), tuple(tasks)),
                options | (proposals if cell.mix.kind == "igsp" else {}),
            )
            for cell in cells
        ]
        return cls(folder, folder.claim(settings), cells, dense, jobs)

    def run(self, *, workers: int = 1, threads: int = 1, on_cell: OnCell | None = None) -> None:
        """Measures the dense model and runs every cell that has no result yet, each in a file of its own.

        A cell that fails is stored with its sentence and tried again by the next `run`. `workers` processes run cells side
        by side, with `threads` threads each.

        Raises `ChildProcessError` where a worker process died, and whatever the dense model's measurement raises.
        """
        require(workers >= 1 and threads >= 1, f"workers and threads must be at least 1; {workers}, {threads} given.")
        with _threads(threads):
            dense = self.dense()
            self._let_go()
            known = [result for cell in self.cells if (result := self.folder.result(cell, dense)) is not None]
            finished = {result.cell for result in known if not result.failed}
            jobs = [job for job in self._jobs if job.cell not in finished]
            for i, result in enumerate(_results(jobs, workers, threads)):
                result = _comparable(result, dense)
                self.folder.write(result)
                if on_cell is not None:
                    on_cell(len(finished) + i + 1, len(self.cells), result)

    def dense(self) -> Measured:
        """What was measured of the dense model, now or by an earlier run."""
        found = self.folder.dense()
        if found is None:
            assert self._dense_pruner is not None
            found = _measured(self._dense_pruner, self._jobs[0].tasks)
            self.folder.write_dense(found)
        return found

    def failed(self) -> list[CellResult]:
        """Those of the study's cells that failed when they ran last."""
        dense = self.dense()
        results = [self.folder.result(cell, dense) for cell in self.cells]
        return [result for result in results if result is not None and result.failed]

    def _let_go(self) -> None:
        """The cells load models of their own; two at once may not fit."""
        self._dense_pruner = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _tasks(pruner: CalibPruner, probes: Path | None) -> list[Task]:
    """The tasks of the pruner's capabilities, on other probes where a folder of them is given; each file is read once."""
    asked = pruner.config.capabilities
    if not pruner.is_pocket:
        require(probes is None, f"--probes are questions for the pocket model; {pruner.base.name} is another one.")
        require(
            asked in (("auto",), ("none",)),
            f"Capabilities {', '.join(asked)} were asked for, but a study measures those of the pocket model only; use 'auto'.",
        )
        return []
    tasks = pocket_tasks(pruner.plan().capabilities, probes)
    for task in tasks:
        read(task)
    return tasks


def _comparable(result: CellResult, dense: Measured) -> CellResult:
    """A cell on which less could be measured than on the dense model has failed: totals over other sets do not compare."""
    missing = [name for name in dense.capabilities if name not in result.sparse.capabilities]
    if result.failed or not missing:
        return result
    reasons = "; ".join(f"{name} was not measured: {result.sparse.not_measured.get(name, '')}" for name in missing)
    return CellResult(result.cell, failed=reasons, seconds=result.seconds)


# ------------------------------------------------------------------------------------------------ one cell


def run_cell(job: Job) -> CellResult:
    """Loads the model, prunes it with the cell's mix, measures it. What goes wrong becomes the result's sentence."""
    started = time.perf_counter()
    try:
        return _run_cell(job, started)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        sentence = " ".join(str(error).split()) or type(error).__name__
        return CellResult(job.cell, failed=sentence, seconds={"all": time.perf_counter() - started})


def _run_cell(job: Job, started: float) -> CellResult:
    cell = job.cell
    pruner = CalibPruner.from_pretrained(
        job.model,
        sources=list(job.sources) or None,
        mix=cell.mix,
        sparsity=cell.pattern,
        seed=cell.seed,
        capabilities="none",  # they are measured below, on the study's own probes
        **job.options,
    )
    loaded = time.perf_counter()
    record = pruner.prune()
    pruned = time.perf_counter()
    sparse = _measured(pruner, job.tasks, record)
    ended = time.perf_counter()
    stages = {"load": loaded - started, **record.seconds, "measure": ended - pruned, "all": ended - started}
    return CellResult(
        cell=cell,
        sparse=sparse,
        metrics=_numbers(_profile(pruner, record)),
        sample_means=_means(record.samples),
        source_metrics={profile.name: _numbers(profile) for profile in record.profiles},
        capabilities={profile.name: profile.capability for profile in record.profiles},
        shares=record.mix.shares,
        upper_bound=tuple(s.name for s in record.sources if s.upper_bound and s.name in record.mix.shares),
        fingerprint=record.fingerprint,
        zeros=record.prune.zeros / record.prune.weights,
        seconds={stage: round(seconds, 2) for stage, seconds in stages.items()},
        hardware=record.hardware,
    )


def _measured(pruner: CalibPruner, tasks: Sequence[Task], record: RunRecord | None = None) -> Measured:
    """Scores of the model as it is now; its perplexity from the record of the run that pruned it, else measured."""
    scores = measure(pruner.model, pruner.tokenizer, tasks) if tasks else Scores(())
    if record is None:
        found = pruner.perplexity()
        perplexity = found.dense if found is not None else None
    else:
        found = record.perplexity
        perplexity = found.sparse if found is not None else None
    return Measured(
        tasks=tuple(TaskItems.of(task) for task in scores.tasks),
        not_measured=scores.not_measured,
        perplexity=perplexity,
        text=found.text if found is not None and perplexity is not None else "",
    )


def _profile(pruner: CalibPruner, record: RunRecord) -> SourceProfile:
    """The calibration set as a whole, profiled as if it were one source."""
    assert pruner.calibration is not None
    ids = pruner.calibration.input_ids
    found = Likelihood(
        nll=np.log([sample.perplexity for sample in record.samples]),
        entropy=np.array([sample.model_entropy for sample in record.samples], dtype=float),
    )
    texts = (
        pruner.tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for row in ids.tolist()
    )
    return profile_source("calibration set", CAPABILITIES[0], ids, found, texts)


def _numbers(profile: Any) -> dict[str, float]:
    """The numeric fields of a profile, whichever it has."""
    values = {entry.name: getattr(profile, entry.name) for entry in dataclasses.fields(profile)}
    return {
        name: value for name, value in values.items() if isinstance(value, int | float) and math.isfinite(float(value))
    }


def _means(profiles: Sequence[Any]) -> dict[str, float]:
    """The mean of each numeric field; of perplexity the geometric mean, as everywhere."""
    rows = [_numbers(profile) for profile in profiles]
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {
        name: math.exp(math.fsum(math.log(row[name]) for row in rows) / len(rows))
        if name == "perplexity"
        else math.fsum(row[name] for row in rows) / len(rows)
        for name in names
    }


# ----------------------------------------------------------------------------------------------- processes


def _results(jobs: Sequence[Job], workers: int, threads: int) -> Iterator[CellResult]:
    """Each job's result as soon as it is there: in this process, or from several."""
    if workers == 1 or len(jobs) < 2:
        yield from map(run_cell, jobs)
        return
    context = multiprocessing.get_context("spawn")  # torch does not survive a fork
    reader, writer = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=context, initializer=_start_worker, initargs=(reader, threads)
    )
    try:
        pending: list[Future[CellResult]] = [pool.submit(run_cell, job) for job in jobs]
        for future in as_completed(pending):
            yield future.result()
        pool.shutdown()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "A worker process died, most likely for want of memory; finished cells are kept. Run the study again, with "
            "fewer workers."
        ) from error
    finally:
        writer.close()  # workers that are still at work leave
        pool.shutdown(cancel_futures=True)
        reader.close()


def _start_worker(reader: Connection, threads: int) -> None:
    """A worker leaves the interrupt to its parent, and ends when the parent closes the pipe or is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)

    def leave() -> None:
        try:
            reader.recv_bytes()
        except EOFError:
            os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
