# SPDX-License-Identifier: Apache-2.0
"""CalibPruner: the pipeline as one class. It knows the order of the rooms and holds no algorithm of its own."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from transformers import PreTrainedModel

from . import __version__, machine
from .calibration import mix as mixes
from .calibration.choose import Choice, choose
from .calibration.sources import fingerprint
from .capabilities.retention import report_of_both, task_retentions
from .choices import (
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
from .measuring import Measuring, Progress
from .planning import make_plan
from .pruning import allocation, blocks, schedule
from .pruning.activations import Activations
from .pruning.homes import Home, InMemory
from .pruning.journal import Journal
from .pruning.ranks import Ranks
from .publishing import hub, push, reproduce
from .publishing.dataset import check_licences
from .records import (
    BaseModel,
    CalibPruneConfig,
    CalibrationSet,
    LayerReport,
    PerplexityReport,
    Plan,
    PruneReport,
    Record,
    RunRecord,
    Scores,
)


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedTokenizerBase

    from .capabilities.metrics import Metric
    from .capabilities.perplexity import Text


R = TypeVar("R", bound=Record)


class CalibPruner:
    """Chooses calibration data, prunes a language model with it, measures what was kept, and publishes the result.

    Example:
        >>> pruner = CalibPruner.from_pretrained("pocket", sparsity="50%")
        >>> record = pruner.prune()
        >>> pruner.save_pretrained("pocket-50")

    Attributes:
        model: the transformers model; sparse after `prune()`. Where it is `streamed`, its blocks are on disk, and each is
            read when it is called.
        tokenizer: its tokenizer.
        config: the `CalibPruneConfig` with all defaults filled in.
        record: the `RunRecord`, or None before `prune()`.
        made_by: the `RunRecord` of the run that made this model, or None for one that was not pruned here.
    """

    def __init__(
        self,
        model: PreTrainedModel | Home,
        tokenizer: PreTrainedTokenizerBase,
        config: CalibPruneConfig,
        *,
        base: BaseModel | None = None,
        sources: Sources = None,
        perplexity_text: str | Path | None = None,
        metrics: Mapping[str, Metric] | None = None,
        token: str | None = None,
    ) -> None:
        """Takes a model that is in memory; `from_pretrained` loads one. `config.model` is then only its name.

        Raises `ValueError` for everything that would stop the run later: a model that cannot be pruned, columns that
        n:m does not fit, unknown sources, a mix that names no source, capabilities that cannot be measured.
        """
        self._home: Home = InMemory(model) if isinstance(model, PreTrainedModel) else model
        self.model, self.tokenizer, self.token = self._home.model.eval(), tokenizer, token
        self.base = base or BaseModel(config.model, parameters=self.model.num_parameters())
        self.is_pocket = is_pocket(config)
        self.config = with_defaults(config, self.model)
        self.record: RunRecord | None = None
        self.made_by = made_by(config.model, config.revision)
        self.calibration: CalibrationSet | None = None
        self.scores: dict[str, Scores] = {}
        self._pruned = False
        self._allow_pickle = False
        self._journal: Journal | None = None
        self._ranks = Ranks.current()
        self._measuring = Measuring(self._home, tokenizer, self.config, perplexity_text, metrics, token)
        self._sources = choose_sources(self.config, listed(sources), token)
        if self.streamed and any(entry.source.written for entry in self._sources):
            raise ValueError(
                f"The mix {str(self.config.mix)!r} is text that the model writes, and a streamed model would be read from disk "
                "once a token. Name sources to choose from, take mix='uniform', or load the model in memory (stream=False)."
            )
        blocks.check_model(self.model, self.config.sparsity, self.streamed)
        self._groups = blocks.find_groups(self.model, self.config.sparsity)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        sources: Sources = None,
        perplexity_text: str | Path | None = None,
        metrics: Mapping[str, Metric] | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        stream: bool | str = "auto",
        allow_pickle: bool = False,
        **config: Any,
    ) -> Self:
        """Loads a model of the Hub, of a local folder, or the bundled `"pocket"`.

        Where torchrun or accelerate has launched several processes, they prune together: each calls the same methods.

        Args:
            model: Hub id, folder, or `"pocket"`.
            sources: names of the table, paths, `"NAME=PATH:CAPABILITY"`, `"hub:ID"` for a published calibration set,
                `CalibrationSource`s; or a mapping from `"NAME:CAPABILITY"` to data in memory. Default: what the mix names
                or the model writes, else the pocket's real texts, or the table's sources.
            perplexity_text: a local text file on which perplexity is measured instead of WikiText-2.
            metrics: by task, what `evaluate.load` returns or any function of (predictions, references), lists of one text each:
                it scores what the model writes for the task, 0 to 1, instead of the task's own scoring.
            token: of the Hub, as everywhere in transformers.
            cache_dir: where downloads are kept.
            local_files_only: use what is there already.
            trust_remote_code: run code that comes with the model.
            allow_pickle: load weights that are pickles (`.bin`), where there are no others.
            stream: True leaves the blocks on disk, where each is read, pruned and written in its turn; False loads the whole
                model; `"auto"` does so where it takes at most 70 % of the free memory.
            **config: the fields of `CalibPruneConfig`: `sparsity`, `mix`, `samples`, `length`, `seed`, ...

        Raises:
            ValueError: for bad options and models that cannot be pruned.
            OSError: where a model cannot be had.
        """
        with Ranks.join().one_voice():
            options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
            options |= {"trust_remote_code": trust_remote_code, "stream": stream, "allow_pickle": allow_pickle}
            return cls._loaded(model, listed(sources), perplexity_text, metrics, options, config)

    @classmethod
    def _loaded(
        cls,
        model: str,
        sources: Sources,
        perplexity_text: str | Path | None,
        metrics: Mapping[str, Metric] | None,
        options: dict[str, Any],
        config: dict[str, Any],
    ) -> Self:
        asked = CalibPruneConfig(model=model, sources=source_names(sources), **config)
        fetch_record(model, asked.revision, options["token"], options["cache_dir"], options["local_files_only"])
        choose_tasks(asked)
        choose_sources(asked, sources, options["token"])
        choose_perplexity_text(asked, perplexity_text)
        home, tokenizer, base = load_model(
            model,
            revision=asked.revision,
            dtype=asked.dtype,
            device=asked.device,
            **options,
            check=lambda empty: blocks.check_structure(empty, with_defaults(asked, empty).sparsity),
        )
        given = {"sources": sources, "perplexity_text": perplexity_text, "metrics": metrics}
        pruner = cls(home, tokenizer, asked, base=base, token=options["token"], **given)
        pruner._allow_pickle = options["allow_pickle"]
        return pruner

    @property
    def speaks(self) -> bool:
        """Whether this process, of those that prune together, is the one that writes and speaks."""
        return self._ranks.first

    @property
    def streamed(self) -> bool:
        """Whether the blocks are on disk, and not in memory."""
        return self._home.streamed

    # ----------------------------------------------------------------------------------------- pipeline

    def plan(self) -> Plan:
        """What `prune()` will do: modules, matrices left alone, memory by place, replays, estimated seconds."""
        sources = [entry.source for entry in self._sources]
        config = reproduce.public_config(self.config, self.base, sources)
        wanted = mixes.windows_wanted(config.mix, sources, config.samples or SAMPLES)
        written = sum(wanted.get(source.name, 0) for source in sources if source.written)
        capabilities = self._measuring.capabilities
        return make_plan(self._home, config, self._groups, sorted(wanted), written, capabilities, self._ranks.size)

    def prune(
        self,
        *,
        work_dir: str | Path | None = None,
        resume: bool = False,
        dense_scores: Scores | None = None,
        on_progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> RunRecord:
        """Measures the dense model, chooses the calibration set, prunes the model in place, measures it again.

        Args:
            work_dir: a folder, new or empty, that keeps each block as soon as it is finished. A streamed model needs one,
                and is saved from there; it may be removed when this model is no longer called, saved or pushed.
            resume: go on with the run that stopped in `work_dir`.
            dense_scores: of `evaluate()` on the same dense model, where they are known already.
            on_progress: called with (done, total, "stage: detail").
            cancelled: asked between modules; True raises `schedule.Cancelled` and leaves the model half pruned.

        Raises:
            ValueError: where `work_dir` is missing or does not fit, or the calibration set has more in common with the
                evaluated items than `config.max_overlap` allows.
            FileExistsError: where `work_dir` is not empty.
            FileNotFoundError: where there is no run in `work_dir` to resume.
            OSError: where its disk is full: what was finished before is kept there.
        """
        with self._ranks.one_voice():
            return self._run(work_dir, resume, dense_scores, on_progress, cancelled)

    def _run(
        self,
        work_dir: str | Path | None,
        resume: bool,
        dense_scores: Scores | None,
        on_progress: Progress | None,
        cancelled: Callable[[], bool] | None,
    ) -> RunRecord:
        if self._pruned:
            raise ValueError("This model is pruned already; load it again for another run.")
        measuring = self._measuring
        if dense_scores is not None:
            measuring.check_scores(dense_scores)
        sources = [entry.source for entry in self._sources]
        journal = self._journal = self._opened(work_dir, resume)
        seconds: dict[str, float] = (
            {"before it was resumed": journal.earlier} if resume and journal is not None else {}
        )
        plan = self.plan()
        with _timed(seconds, "calibrate"):  # first, since data that cannot be had is the likeliest failure
            tasks = measuring.fingerprints()
            text = self._ranks.once(measuring.text)
            choice = self._kept("choice", Choice, lambda: self.choose_calibration(on_progress=on_progress))
            self.calibration = choice.calibration
            overlaps = measuring.overlaps(choice)
        if journal is not None:
            journal.expect("calibration", self.calibration.fingerprint)
            journal.expect("perplexity text", text.fingerprint if text is not None else None)
            journal.expect("tasks", tasks)
        with _timed(seconds, "measure dense"):
            dense = dense_scores or self._scores("dense", on_progress)
            before = self._perplexity("dense", text, on_progress)
        with _timed(seconds, "prune"):
            self._pruned = True
            prune = self._prune(self.calibration, plan, on_progress, cancelled)
        with _timed(seconds, "measure sparse"):
            sparse = self._scores("sparse", on_progress)
            after = self._perplexity("sparse", text, on_progress)
        self.scores = {"dense": dense, "sparse": sparse}
        self.record = RunRecord(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=reproduce.command(
                self.config, self.base, sources, measuring.named_text, allow_pickle=self._allow_pickle
            ),
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
            capabilities=report_of_both(dense, sparse),
            perplexity=text.filled(before.dense, after.dense) if text is not None else None,
            versions=machine.versions(),
            hardware=machine.hardware(self._home.device),
            seconds=seconds,
            peak_memory=machine.peak_memory(),
            overlaps=overlaps,
            tasks=task_retentions(dense, sparse, measuring.repos),
        )
        return self.record

    def _opened(self, work_dir: str | Path | None, resume: bool) -> Journal | None:
        """The journal in `work_dir`, where one was given."""
        if work_dir is None:
            if resume or self.streamed:
                size = self.model.get_memory_footprint(return_buffers=False) / 2**30
                why = "To resume a run" if resume else f"The model is streamed ({size:,.1f} GiB): to prune it on disk"
                raise ValueError(f"{why}, a folder is needed that keeps the finished blocks; give it as work_dir.")
            return None
        identity = self._ranks.once(self._identity)
        return Journal(work_dir, identity, len(self._groups), resume=resume, ranks=self._ranks)

    def _identity(self) -> dict[str, Any]:
        """All that decides the result of a run."""
        return {
            "version": __version__,
            "config": {k: v for k, v in self.config.to_dict().items() if k not in ("model", "device")},
            "device": self._home.device.type,
            "weights": self._home.fingerprint(),
            "sources": {entry.source.name: fingerprint(entry) for entry in self._sources},
            "streamed": self.streamed,
            "metrics": self._measuring.metrics,
            "metric_fingerprints": self._measuring.metric_fingerprints(),
        }

    def _scores(self, which: str, on_progress: Progress | None) -> Scores:
        shown = _stage(on_progress, f"measure {which}")
        if None in self._measuring.metric_fingerprints().values():  # the next run could not tell whose scores they are
            return self._ranks.once(lambda: self._measuring.scores(shown))
        return self._kept(f"{which}-scores", Scores, lambda: self._measuring.scores(shown))

    def _perplexity(self, which: str, text: Text | None, on_progress: Progress | None) -> PerplexityReport:
        shown = _stage(on_progress, "perplexity")
        return self._kept(f"{which}-perplexity", PerplexityReport, lambda: self._measuring.perplexity(text, shown))

    def _kept(self, name: str, kind: type[R], compute: Callable[[], R]) -> R:
        """The result of a stage, computed once for all processes; of a run that is resumed it is in the journal already."""
        return self._ranks.once(lambda: self._kept_here(name, kind, compute))

    def _kept_here(self, name: str, kind: type[R], compute: Callable[[], R]) -> R:
        journal = self._journal
        text = journal.kept(name) if journal is not None else None
        if text is not None:
            return kind.from_json(text)
        found = compute()
        if journal is not None:
            journal.keep(name, found.to_json())
        return found

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
            logits_of=self._home.logits,
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
            activations=plan.activations,
        )
        if config.allocation == "owl":
            settings = replace(settings, zeros=self._owl(calibration, settings, on_progress, cancelled))
        layers: list[LayerReport] = []
        for reports in schedule.prune_blocks(
            self.model,
            calibration,
            settings,
            groups=self._groups,
            home=self._home,
            journal=self._journal,
            ranks=self._ranks,
            on_progress=_stage(on_progress, "prune"),
            cancelled=cancelled,
        ):
            layers += reports
        return PruneReport(
            pattern=config.sparsity,
            method=config.method,
            layers=tuple(layers),
            untouched=plan.untouched,
            micro_batch=plan.micro_batch,
            resident=plan.resident,
            replays=plan.replays,
        )

    def _owl(
        self,
        calibration: CalibrationSet,
        settings: schedule.Settings,
        on_progress: Progress | None,
        cancelled: Callable[[], bool] | None,
    ) -> Mapping[str, int]:
        """How many zeros each module gets; from the journal of a run that is resumed, where it got so far."""
        journal = self._journal
        text = self._ranks.once(lambda: journal.kept("zeros") if journal is not None else None)
        if text is not None:
            return json.loads(text)
        found = allocation.owl(
            self.model,
            calibration,
            settings,
            self._groups,
            home=self._home,
            hidden=Activations(
                settings.activations, self._home.device, journal.hidden_states(0) if journal is not None else None
            ),
            ranks=self._ranks,
            on_progress=_stage(on_progress, "find outliers"),
            cancelled=cancelled,
        )
        if journal is not None and self._ranks.first:
            journal.keep("zeros", json.dumps(found))
        return found

    def evaluate(self, *, on_progress: Progress | None = None) -> Scores:
        """Scores of the model as it is now; capabilities that cannot be measured here are named with the reason."""
        return self._measuring.scores(_stage(on_progress, "evaluate"))

    def perplexity(self, *, on_progress: Progress | None = None) -> PerplexityReport | None:
        """Perplexity of the model as it is now, in the field `dense`; None where no text is set (the pocket with its own probes)."""
        text = self._measuring.text()
        return self._measuring.perplexity(text, _stage(on_progress, "perplexity")) if text is not None else None

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
        if not self._ranks.first:
            return
        if push_to_hub and repo_id is None:
            repo_id = Path(save_directory).resolve().name
        folder = hub.save_run(
            save_directory,
            self._write_model,
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
        options = {"private": private, "revision": revision, "create_pr": create_pr}
        token = token or self.token

        def upload() -> CommitInfo:
            beside = self._journal.folder.parent if self._journal is not None else None  # where the shards are linked
            folder = Path(tempfile.mkdtemp(prefix="calibprune-", dir=beside)) / "run"
            hub.save_run(folder, self._write_model, self.tokenizer, run, calibration, self.scores, repo_id=repo_id)
            finish = push.finishing(folder, repo_id, message=commit_message, calibration=push_calibration, **options)
            given = options | {"token": token, "finish": finish}
            commit = push.push_folder(folder, repo_id, commit_message=commit_message, **given)
            if push_calibration:
                push.push_calibration(folder, f"{commit.repo_url.repo_id}-calibration", **given)
            shutil.rmtree(folder.parent, ignore_errors=True)
            return commit

        return self._ranks.once(upload)

    def _write_model(self, folder: Path) -> None:
        if self.streamed and self._journal is not None:
            self._journal.save(folder, self.model)
        else:
            self.model.save_pretrained(folder)

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
