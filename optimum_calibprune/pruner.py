# SPDX-License-Identifier: Apache-2.0
"""CalibPruner: the pipeline as one class. It knows the order of the rooms and holds no algorithm of its own."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from . import machine
from .calibration import mix as mixes
from .calibration.choose import Choice, choose
from .capabilities import perplexity as perplexities
from .capabilities.retention import capability_report
from .capabilities.score import measure
from .choices import (
    LENGTH,
    NO_SUITE,
    SAMPLES,
    Sources,
    choose_perplexity_text,
    choose_sources,
    choose_tasks,
    is_pocket,
    listed,
    source_names,
    with_defaults,
)
from .loading import fetch_record, load_model, made_by
from .planning import make_plan
from .pruning import allocation, blocks, schedule
from .publishing import hub, push, reproduce
from .publishing.dataset import check_licences
from .records import (
    CAPABILITIES,
    BaseModel,
    CalibPruneConfig,
    CalibrationSet,
    LayerReport,
    PerplexityReport,
    Plan,
    PruneReport,
    RunRecord,
    Scores,
    TaskRetention,
)


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Progress = Callable[[int, int, str], None]


class CalibPruner:
    """Chooses calibration data, prunes a language model with it, measures what was kept, and publishes the result.

    Example:
        >>> pruner = CalibPruner.from_pretrained("pocket", sparsity="50%")
        >>> record = pruner.prune()
        >>> pruner.save_pretrained("pocket-50")

    Attributes:
        model: the transformers model; sparse after `prune()`.
        tokenizer: its tokenizer.
        config: the `CalibPruneConfig` with all defaults filled in.
        record: the `RunRecord`, or None before `prune()`.
        made_by: the `RunRecord` of the run that made this model, or None for one that was not pruned here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: CalibPruneConfig,
        *,
        base: BaseModel | None = None,
        sources: Sources = None,
        perplexity_text: str | Path | None = None,
        token: str | None = None,
    ) -> None:
        """Takes a model that is in memory; `from_pretrained` loads one. `config.model` is then only its name.

        Raises `ValueError` for everything that would stop the run later: a model that cannot be pruned, columns that
        n:m does not fit, unknown sources, a mix that names no source, capabilities that cannot be measured.
        """
        self.model, self.tokenizer, self.token = model.eval(), tokenizer, token
        self.base = base or BaseModel(config.model, parameters=model.num_parameters())
        self.is_pocket = is_pocket(config)
        self.config = with_defaults(config, self.model)
        self.record: RunRecord | None = None
        self.made_by = made_by(config.model, config.revision)
        self.calibration: CalibrationSet | None = None
        self.scores: dict[str, Scores] = {}
        self._pruned = False
        self._tasks = choose_tasks(self.config)
        self._sources = choose_sources(self.config, listed(sources), token)
        self._perplexity_source = choose_perplexity_text(self.config, perplexity_text)
        blocks.check_model(self.model, self.config.sparsity)
        self._groups = blocks.find_groups(self.model, self.config.sparsity)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        sources: Sources = None,
        perplexity_text: str | Path | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        **config: Any,
    ) -> Self:
        """Loads a model of the Hub, of a local folder, or the bundled `"pocket"`.

        Args:
            model: Hub id, folder, or `"pocket"`.
            sources: names of the table, paths, `"NAME=PATH:CAPABILITY"`, `"hub:ID"` for a published calibration set,
                `CalibrationSource`s; or a mapping from `"NAME:CAPABILITY"` to data in memory. Default: what the mix names
                or the model writes, else the pocket's real texts, or the table's sources.
            perplexity_text: a local text file on which perplexity is measured instead of WikiText-2.
            token: of the Hub, as everywhere in transformers.
            cache_dir: where downloads are kept.
            local_files_only: use what is there already.
            trust_remote_code: run code that comes with the model.
            allow_pickle: load weights that are pickles (`.bin`), where there are no others.
            **config: the fields of `CalibPruneConfig`: `sparsity`, `mix`, `samples`, `length`, `seed`, ...

        Raises:
            ValueError: for bad options and models that cannot be pruned.
            OSError: where a model cannot be had.
        """
        sources = listed(sources)
        asked = CalibPruneConfig(model=model, sources=source_names(sources), **config)
        fetch_record(model, asked.revision, token, local_files_only)
        choose_tasks(asked)
        choose_sources(asked, sources, token)
        choose_perplexity_text(asked, perplexity_text)
        loaded, tokenizer, base = load_model(
            model,
            revision=asked.revision,
            dtype=asked.dtype,
            device=asked.device,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            check=lambda empty: blocks.check_structure(empty, with_defaults(asked, empty).sparsity),
        )
        return cls(loaded, tokenizer, asked, base=base, sources=sources, perplexity_text=perplexity_text, token=token)

    # ----------------------------------------------------------------------------------------- pipeline

    def plan(self) -> Plan:
        """What `prune()` will do: modules, matrices left alone, memory by place, replays, estimated seconds."""
        sources = [entry.source for entry in self._sources]
        config = reproduce.public_config(self.config, self.base, sources)
        wanted = mixes.windows_wanted(config.mix, sources, config.samples or SAMPLES)
        written = sum(wanted.get(source.name, 0) for source in sources if source.written)
        capabilities = [name for name in CAPABILITIES if name in {task.capability for task in self._tasks}]
        return make_plan(self.model, config, self._groups, sorted(wanted), written, capabilities)

    def prune(
        self,
        *,
        dense_scores: Scores | None = None,
        on_progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> RunRecord:
        """Measures the dense model, chooses the calibration set, prunes the model in place, measures it again.

        Args:
            dense_scores: of `evaluate()` on the same dense model, where they are known already.
            on_progress: called with (done, total, "stage: detail").
            cancelled: asked between modules; True raises `schedule.Cancelled` and leaves the model half pruned.
        """
        if self._pruned:
            raise ValueError("This model is pruned already; load it again for another run.")
        if dense_scores is not None:
            self._check_dense_scores(dense_scores)
        sources = [entry.source for entry in self._sources]
        seconds: dict[str, float] = {}
        plan = self.plan()
        with _timed(seconds, "calibrate"):  # first, since text that cannot be had is the likeliest failure
            text = self._perplexity_text()
            choice = self.choose_calibration(on_progress=on_progress)
            self.calibration = choice.calibration
        with _timed(seconds, "measure dense"):
            dense = self._measure("measure dense", on_progress) if dense_scores is None else dense_scores
            before = self._perplexity(text, on_progress)
        with _timed(seconds, "prune"):
            self._pruned = True
            prune = self._prune(self.calibration, plan, on_progress, cancelled)
        with _timed(seconds, "measure sparse"):
            sparse = self._measure("measure sparse", on_progress)
            after = self._perplexity(text, on_progress)
        self.scores = {"dense": dense, "sparse": sparse}
        self.record = RunRecord(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=reproduce.command(self.config, self.base, sources, self._perplexity_source),
            config=reproduce.public_config(self.config, self.base, sources),
            base=self.base,
            plan=plan,
            sources=tuple(reproduce.public_source(source) for source in choice.sources),
            profiles=choice.profiles,
            mix=choice.mix,
            samples=choice.samples,
            rows=self.calibration.rows,
            fingerprint=self.calibration.fingerprint,
            prune=prune,
            capabilities=capability_report(dense, sparse),
            perplexity=text.filled(before, after) if text is not None else None,
            versions=machine.versions(),
            hardware=machine.hardware(self.model.device),
            seconds=seconds,
            peak_memory=machine.peak_memory(),
            tasks=TaskRetention.of(dense, sparse),
        )
        return self.record

    def _check_dense_scores(self, given: Scores) -> None:
        measured = {task.task for task in given.tasks}
        wanted = {task.name for task in self._tasks if task.capability not in given.not_measured}
        if measured != wanted:
            raise ValueError(
                f"dense_scores are of {', '.join(sorted(measured)) or 'no task'}; this run measures "
                f"{', '.join(sorted(wanted)) or 'no task'}."
            )

    def choose_calibration(self, *, on_progress: Progress | None = None) -> Choice:
        """The calibration set of the mix, the account of it, and profiles of its samples and sources."""
        assert self.config.samples is not None and self.config.length is not None
        return choose(
            self.model,
            self.tokenizer,
            self._sources,
            self.config.mix,
            samples=self.config.samples,
            length=self.config.length,
            seed=self.config.seed,
            seed_texts=self.config.seed_texts,
            token=self.token,
            on_read=_stage(on_progress, "read"),
            on_measure=_stage(on_progress, "measure"),
        )

    def _prune(
        self,
        calibration: CalibrationSet,
        plan: Plan,
        on_progress: Progress | None,
        cancelled: Callable[[], bool] | None,
    ) -> PruneReport:
        config = self.config
        settings = schedule.Settings(
            sparsity=config.sparsity,
            method=config.method,
            damping=config.damping,
            sequential=config.sequential,
            micro_batch=plan.micro_batch,
            resident=plan.resident,
        )
        device = torch.device(plan.device)
        if config.allocation == "owl":
            zeros = allocation.owl(
                self.model,
                calibration,
                settings,
                self._groups,
                device=device,
                on_progress=_stage(on_progress, "find outliers"),
                cancelled=cancelled,
            )
            settings = replace(settings, zeros=zeros)
        layers: list[LayerReport] = []
        for reports in schedule.prune_blocks(
            self.model,
            calibration,
            settings,
            groups=self._groups,
            device=device,
            on_progress=_stage(on_progress, "prune"),
            cancelled=cancelled,
        ):
            layers += reports
        return PruneReport(
            pattern=config.sparsity,
            method=config.method,
            layers=schedule.recount(self.model, layers),
            untouched=plan.untouched,
            micro_batch=plan.micro_batch,
            resident=plan.resident,
            replays=plan.replays,
        )

    def evaluate(self, *, on_progress: Progress | None = None) -> Scores:
        """Scores of the model as it is now; capabilities that cannot be measured here are named with the reason."""
        return self._measure("evaluate", on_progress)

    def perplexity(self, *, on_progress: Progress | None = None) -> PerplexityReport | None:
        """Perplexity of the model as it is now, in the field `dense`; None where no text is set (the pocket)."""
        text = self._perplexity_text()
        return text.filled(self._perplexity(text, on_progress), None) if text is not None else None

    def _measure(self, stage: str, on_progress: Progress | None) -> Scores:
        reason = NO_SUITE if not self.is_pocket else "not asked for"
        asked = {task.capability for task in self._tasks}
        missing = {name: reason for name in CAPABILITIES if name not in asked}
        if not self._tasks:
            return Scores((), missing)
        found = measure(self.model, self.tokenizer, self._tasks, on_progress=_stage(on_progress, stage))
        return Scores(found.tasks, missing | found.not_measured)

    def _perplexity_text(self) -> perplexities.Text | None:
        source = self._perplexity_source
        if source is None:
            return None
        context = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None) or LENGTH
        wanted = self.config.length if source.path is not None else LENGTH
        return perplexities.read(source, self.tokenizer, min(wanted or LENGTH, context), self.token)

    def _perplexity(self, text: perplexities.Text | None, on_progress: Progress | None) -> float | None:
        if text is None or text.windows is None:
            return None
        return perplexities.perplexity(self.model, text.windows, _stage(on_progress, "perplexity"))

    # --------------------------------------------------------------------------------------- publishing

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        overwrite: bool = False,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> None:
        """Writes checkpoint, tokenizer, records and card; the folder is replaced as a whole or not at all.

        Args:
            save_directory: new or empty, unless `overwrite`.
            push_to_hub: upload it afterwards to `repo_id` (default: the folder's name), with the arguments `options`.
        """
        run, calibration = self._finished()
        if push_to_hub and repo_id is None:
            repo_id = Path(save_directory).resolve().name
        folder = hub.save_run(
            save_directory,
            self.model,
            self.tokenizer,
            run,
            calibration,
            self.scores,
            repo_id=repo_id,
            overwrite=overwrite,
        )
        if push_to_hub and repo_id is not None:
            push.push_folder(folder, repo_id, token=options.pop("token", self.token), **options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        push_calibration: bool = False,
    ) -> CommitInfo:
        """Uploads checkpoint, tokenizer, records and card to `repo_id` in one commit; creates the repo if needed.

        With `push_calibration` the calibration text becomes the data set `ID-calibration`, which `sources=["hub:..."]` takes;
        `ValueError`, before anything is uploaded, where the licence of a source is not known to allow that. Where a push fails,
        the run stays in a temporary folder, and the error ends with the command that finishes the push.
        """
        run, calibration = self._finished()
        if push_calibration:
            check_licences(run)
        folder = Path(tempfile.mkdtemp(prefix="calibprune-")) / "run"
        hub.save_run(folder, self.model, self.tokenizer, run, calibration, self.scores, repo_id=repo_id)
        options = {"private": private, "token": token or self.token, "revision": revision, "create_pr": create_pr}
        commit = push.push_folder(folder, repo_id, commit_message=commit_message, **options)
        if push_calibration:
            push.push_calibration(folder, f"{commit.repo_url.repo_id}-calibration", **options)
        shutil.rmtree(folder.parent, ignore_errors=True)
        return commit

    def _finished(self) -> tuple[RunRecord, CalibrationSet]:
        if self.record is None or self.calibration is None:
            raise ValueError("There is nothing to save yet: call prune() first.")
        return self.record, self.calibration


# ------------------------------------------------------------------------------------------------ helpers


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started


def _stage(on_progress: Progress | None, stage: str) -> Progress | None:
    if on_progress is None:
        return None
    return lambda done, total, text: on_progress(done, total, f"{stage}: {text}" if text else stage)
