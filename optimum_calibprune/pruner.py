# SPDX-License-Identifier: Apache-2.0
"""CalibPruner: the pipeline as one class. It knows the order of the rooms and holds no algorithm of its own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from . import machine, pocket
from .calibration import measure as measures
from .calibration import mix as mixes
from .calibration.sources import SOURCES, OpenSource, build_pool, open_sources
from .capabilities import perplexity as perplexities
from .capabilities.retention import capability_report
from .capabilities.score import measure
from .capabilities.tasks import Task, pocket_tasks
from .loading import load_model
from .planning import make_plan
from .pruning import blocks, schedule
from .publishing import hub, reproduce
from .records import (
    CAPABILITIES,
    BaseModel,
    CalibPruneConfig,
    CalibrationSet,
    CalibrationSource,
    LayerReport,
    Mix,
    PerplexityReport,
    Plan,
    PruneReport,
    RunRecord,
    Scores,
    SourceProfile,
)


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Progress = Callable[[int, int, str], None]
SAMPLES, LENGTH, MICRO_BATCH_TOKENS = 128, 2048, 2048
NO_SUITE = "this release measures capabilities of the pocket model only"


class CalibPruner:
    """Chooses calibration data, prunes a language model with it, measures what was kept, and publishes the result.

    Example:
        >>> pruner = CalibPruner.from_pretrained("pocket", sparsity="50%", mix="igsp")
        >>> record = pruner.prune()
        >>> pruner.save_pretrained("pocket-50")

    Attributes:
        model: the transformers model; sparse after `prune()`.
        tokenizer: its tokenizer.
        config: the `CalibPruneConfig` with all defaults filled in.
        record: the `RunRecord`, or None before `prune()`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: CalibPruneConfig,
        *,
        base: BaseModel | None = None,
        sources: Sequence[str | CalibrationSource] | Mapping[str, Any] | None = None,
        perplexity_text: str | Path | None = None,
        token: str | None = None,
    ) -> None:
        """Takes a model that is in memory; `from_pretrained` loads one. `config.model` is then only its name.

        Raises `ValueError` for everything that would stop the run later: a model that cannot be pruned, columns that
        n:m does not fit, unknown sources, a mix that names no source, capabilities that cannot be measured.
        """
        self.model, self.tokenizer, self.token = model.eval(), tokenizer, token
        self.base = base or BaseModel(config.model, parameters=model.num_parameters())
        self.is_pocket = self.base.name == pocket.NAME
        self.config = self._with_defaults(config)
        self.record: RunRecord | None = None
        self.calibration: CalibrationSet | None = None
        self.scores: dict[str, Scores] = {}
        self._pruned = False
        blocks.check_model(self.model, self.config.sparsity)
        self._tasks = self._choose_tasks()
        table = {**SOURCES, **pocket.sources()} if self.is_pocket else SOURCES
        given = sources if sources is not None else self.config.sources
        self._sources = open_sources(given or self._default_sources(), table)
        self._quotas = mixes.quotas(self.config.mix, [o.source for o in self._sources], self._samples)
        self._perplexity_source = self._choose_perplexity_text(perplexity_text)
        self._groups = blocks.find_groups(self.model)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        sources: Sequence[str | CalibrationSource] | Mapping[str, Any] | None = None,
        perplexity_text: str | Path | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        **config: Any,
    ) -> Self:
        """Loads a model of the Hub, of a local folder, or the bundled `"pocket"`.

        Args:
            model: Hub id, folder, or `"pocket"`.
            sources: names of the table, paths, `"NAME=PATH:CAPABILITY"`, `CalibrationSource`s; or a mapping from
                `"NAME:CAPABILITY"` to data in memory. Default: the pocket's real texts, or the table's sources.
            perplexity_text: a local text file on which perplexity is measured instead of WikiText-2.
            token, cache_dir, local_files_only, trust_remote_code: as everywhere in transformers.
            **config: the fields of `CalibPruneConfig`: `sparsity`, `mix`, `samples`, `length`, `seed`, ...

        Raises:
            `ValueError` for bad options and models that cannot be pruned; `OSError` where a model cannot be had.
        """
        names = [o.source.name for o in open_sources(sources)] if isinstance(sources, Mapping) else list(sources or ())
        asked = CalibPruneConfig(
            model=model,
            sources=tuple(s.name if isinstance(s, CalibrationSource) else s for s in names),
            **config,
        )
        loaded, tokenizer, base = load_model(
            model,
            revision=asked.revision,
            dtype=asked.dtype,
            device=asked.device,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
        )
        return cls(loaded, tokenizer, asked, base=base, sources=sources, perplexity_text=perplexity_text, token=token)

    # ------------------------------------------------------------------------------------------ choices

    def _with_defaults(self, config: CalibPruneConfig) -> CalibPruneConfig:
        samples, length = (pocket.SAMPLES, pocket.LENGTH) if self.is_pocket else (SAMPLES, LENGTH)
        context = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        length = config.length or min(length, context or length)
        if context is not None and length > context:
            raise ValueError(f"length {length} exceeds the model's context of {context} tokens.")
        samples = config.samples or samples
        step = config.micro_batch or max(1, min(samples, MICRO_BATCH_TOKENS // length))
        return replace(config, samples=samples, length=length, micro_batch=step)

    @property
    def _samples(self) -> int:
        assert self.config.samples is not None
        return self.config.samples

    def _choose_tasks(self) -> list[Task]:
        asked = self.config.capabilities
        if asked == ("none",):
            return []
        if not self.is_pocket:
            if asked != ("auto",):
                raise ValueError(
                    f"Capabilities {', '.join(asked)} were asked for, but {NO_SUITE}; use 'auto' or 'none'."
                )
            return []
        return pocket_tasks(CAPABILITIES if asked == ("auto",) else asked)

    def _default_sources(self) -> list[str]:
        if self.is_pocket:
            return pocket.default_sources()
        return [name for name, _ in self.config.mix.weights] or list(SOURCES)

    def _choose_perplexity_text(self, given: str | Path | None) -> CalibrationSource | None:
        if given is not None:
            if not Path(given).exists():
                raise FileNotFoundError(f"There is no file {str(given)!r} to measure perplexity on.")
            return CalibrationSource(Path(given).stem, "general", path=str(given))
        return None if self.is_pocket else perplexities.WIKITEXT2

    # ----------------------------------------------------------------------------------------- pipeline

    def plan(self) -> Plan:
        """What `prune()` will do: modules, matrices left alone, memory by place, replays, estimated seconds."""
        config = reproduce.public_config(self.config, self.base)
        return make_plan(self.model, config, self._groups, sorted(self._quotas), self._capability_names())

    def _capability_names(self) -> tuple[str, ...]:
        return tuple(name for name in CAPABILITIES if name in {task.capability for task in self._tasks})

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
        seconds: dict[str, float] = {}
        plan = self.plan()
        with _timed(seconds, "calibrate"):  # first, since text that cannot be had is the likeliest failure
            windows, report = self._perplexity_windows()
            self.calibration, mix, profiles, used = self.choose_calibration(on_progress)
        with _timed(seconds, "measure dense"):
            dense = self._measure("measure dense", on_progress) if dense_scores is None else dense_scores
            before = self._perplexity(windows, on_progress)
        with _timed(seconds, "prune"):
            self._pruned = True
            prune = self._prune(self.calibration, plan, on_progress, cancelled)
        with _timed(seconds, "measure sparse"):
            sparse = self._measure("measure sparse", on_progress)
            after = self._perplexity(windows, on_progress)
        self.scores = {"dense": dense, "sparse": sparse}
        self.record = RunRecord(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=reproduce.command(self.config, self.base),
            config=reproduce.public_config(self.config, self.base),
            base=self.base,
            plan=plan,
            sources=tuple(reproduce.public_source(source) for source in used),
            profiles=profiles,
            mix=mix,
            rows=self.calibration.rows,
            fingerprint=self.calibration.fingerprint,
            prune=prune,
            capabilities=capability_report(dense, sparse),
            perplexity=replace(report, dense=before, sparse=after) if report is not None else None,
            versions=machine.versions(),
            hardware=machine.hardware(self.model.device),
            seconds=seconds,
            peak_memory=machine.peak_memory(),
        )
        return self.record

    def choose_calibration(
        self, on_progress: Progress | None = None
    ) -> tuple[CalibrationSet, Mix, tuple[SourceProfile, ...], tuple[CalibrationSource, ...]]:
        """The calibration set of the mix, the account of it, a profile of each source, and the sources as resolved."""
        wanted = mixes.windows_wanted(self.config.mix, [o.source for o in self._sources], self._samples)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        assert self.config.length is not None
        pools = [
            build_pool(
                opened,
                self.tokenizer,
                self.config.length,
                wanted[opened.source.name],
                vocabulary=vocabulary,
                token=self.token,
                on_progress=_stage(on_progress, "read"),
            )
            for opened in self._used_sources(wanted)
        ]
        candidates = mixes.draw(pools, wanted, self.config.seed)
        nll = measures.mean_nll(self.model, candidates.input_ids, _stage(on_progress, "measure"))
        calibration, mix = mixes.calibration_set(self.config.mix, candidates, self._quotas, nll)
        profiles = _profiles(candidates, nll)
        return calibration, mix, profiles, tuple(pool.source for pool in pools)

    def _used_sources(self, wanted: Mapping[str, int]) -> list[OpenSource]:
        return [opened for opened in self._sources if wanted.get(opened.source.name)]

    def _prune(
        self,
        calibration: CalibrationSet,
        plan: Plan,
        on_progress: Progress | None,
        cancelled: Callable[[], bool] | None,
    ) -> PruneReport:
        config = self.config
        settings = schedule.Settings(
            pattern=config.sparsity,
            method=config.method,
            damping=config.damping,
            sequential=config.sequential,
            micro_batch=plan.micro_batch,
            resident=plan.resident,
        )
        layers: list[LayerReport] = []
        for reports in schedule.prune_blocks(
            self.model,
            calibration,
            settings,
            groups=self._groups,
            device=torch.device(plan.device),
            on_progress=_stage(on_progress, "prune"),
            cancelled=cancelled,
        ):
            layers += reports
        return PruneReport(
            pattern=config.sparsity,
            method=config.method,
            layers=_recount(self.model, layers),
            untouched=plan.untouched,
            micro_batch=plan.micro_batch,
            resident=plan.resident,
            replays=plan.replays,
        )

    def evaluate(self, *, on_progress: Progress | None = None) -> Scores:
        """Scores of the model as it is now; capabilities that cannot be measured here are named with the reason."""
        return self._measure("evaluate", on_progress)

    def perplexity(self, *, on_progress: Progress | None = None) -> PerplexityReport | None:
        """Perplexity of the model as it is now; None where no text is set (the pocket), with a reason where it fails."""
        windows, report = self._perplexity_windows()
        return replace(report, dense=self._perplexity(windows, on_progress)) if report is not None else None

    def _not_measured(self) -> dict[str, str]:
        reason = "not asked for" if self.config.capabilities == ("none",) else NO_SUITE
        return dict.fromkeys(CAPABILITIES, reason)

    def _measure(self, stage: str, on_progress: Progress | None) -> Scores:
        if not self._tasks:
            return Scores((), self._not_measured())
        return measure(self.model, self.tokenizer, self._tasks, on_progress=_stage(on_progress, stage))

    def _perplexity_windows(self) -> tuple[Any, PerplexityReport | None]:
        """The windows of the text, and the report to fill in; where the text cannot be had, the report says why."""
        source = self._perplexity_source
        if source is None:
            return None, None
        assert self.config.length is not None
        length = min(LENGTH, self.config.length) if source.path else LENGTH
        context = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", length)
        length = min(length, context)
        try:
            windows = perplexities.text_windows(self.tokenizer, perplexities.read_text(source, self.token), length)
        except (ConnectionError, ValueError) as error:
            if source.path is not None:  # the user named this text
                raise
            return None, PerplexityReport(source.name, length, reason=str(error))
        return windows, PerplexityReport(source.name, length, tokens=int(windows.size))

    def _perplexity(self, windows: Any, on_progress: Progress | None) -> float | None:
        if windows is None:
            return None
        return perplexities.perplexity(self.model, windows, _stage(on_progress, "perplexity"))

    # --------------------------------------------------------------------------------------- publishing

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        overwrite: bool = False,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **push: Any,
    ) -> None:
        """Writes checkpoint, tokenizer, records and card; the folder is replaced as a whole or not at all.

        Args:
            save_directory: new or empty, unless `overwrite`.
            push_to_hub: upload it afterwards to `repo_id` (default: the folder's name), with the arguments `push`.
        """
        run, calibration = self._finished()
        repo_id = repo_id or (Path(save_directory).name if push_to_hub else None)
        hub.save_run(
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
            hub.push_folder(save_directory, repo_id, token=push.pop("token", self.token), **push)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
    ) -> CommitInfo:
        """Uploads checkpoint, tokenizer, records and card to `repo_id` in one commit; creates the repo if needed."""
        run, calibration = self._finished()
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "run"
            hub.save_run(folder, self.model, self.tokenizer, run, calibration, self.scores, repo_id=repo_id)
            return hub.push_folder(
                folder,
                repo_id,
                private=private,
                token=token or self.token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )

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


def _profiles(candidates: mixes.Candidates, nll: Any) -> tuple[SourceProfile, ...]:
    """Of each source, over all its windows that were measured: its quota, for IGSP its candidates."""
    origins = [row.origin for row in candidates.rows]
    capability = {row.origin: row.group for row in candidates.rows}
    profiles = []
    for name in sorted(set(origins)):
        chosen = [i for i, origin in enumerate(origins) if origin == name]
        profiles.append(measures.profile_source(name, capability[name], candidates.input_ids[chosen], nll[chosen]))
    return tuple(profiles)


def _recount(model: PreTrainedModel, layers: Sequence[LayerReport]) -> tuple[LayerReport, ...]:
    """The reports with the zeros that the model holds at the end, counted anew."""
    return tuple(
        replace(layer, zeros_found=int((blocks.weight_of(model.get_submodule(layer.module)) == 0).sum()))
        for layer in layers
    )
