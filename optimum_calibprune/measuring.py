# SPDX-License-Identifier: Apache-2.0
"""What a run measures before and after: its tasks and its text for perplexity, each read once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .calibration.choose import Choice
from .capabilities import contamination, store
from .capabilities import perplexity as perplexities
from .capabilities.harness import Loaded
from .capabilities.metrics import fingerprint_of, name_of
from .capabilities.score import Prepared, measure, prepare, scored
from .choices import LENGTH, choose_perplexity_text, choose_tasks
from .pruning.homes import Home
from .records import CAPABILITIES, CalibPruneConfig, CalibrationSource, PerplexityReport, Scores, TaskOverlap


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .capabilities.metrics import Metric


Progress = Callable[[int, int, str], None]
READS_TOO_MUCH = (
    "a streamed model would be read from disk for every batch of questions; name the capabilities to do it"
)


class Measuring:
    """The tasks and the text that a config asks for, and the model that they are asked of.

    Args:
        config: with all defaults filled in.
        metrics: by task, a function that scores what the model writes for it.

    Attributes:
        chosen: which tasks these are, before any of them is read, and which are refused.
    """

    def __init__(
        self,
        home: Home,
        tokenizer: PreTrainedTokenizerBase,
        config: CalibPruneConfig,
        perplexity_text: str | Path | None,
        metrics: Mapping[str, Metric] | None,
        token: str | None,
    ) -> None:
        self._home, self._tokenizer, self._config, self._token = home, tokenizer, config, token
        self.chosen = choose_tasks(config)
        self._metrics = dict(metrics or {})
        names = [task.name for task in self.chosen.tasks]
        if other := [name for name in self._metrics if name not in names]:
            raise ValueError(f"A metric is given for {other[0]!r}; this run measures {', '.join(names) or 'no task'}.")
        self._text_source = choose_perplexity_text(config, perplexity_text)
        self._tasks: Prepared | None = None

    @property
    def capabilities(self) -> list[str]:
        """Those that will be measured."""
        return [] if self._reads_too_much else self.chosen.capabilities

    @property
    def metrics(self) -> dict[str, str]:
        """The names of the metrics that the user gave, by task."""
        return {task: name_of(metric) for task, metric in self._metrics.items()}

    def metric_fingerprints(self) -> dict[str, str | None]:
        """What tells them from others of the same name, by task; None where nothing does."""
        return {task: fingerprint_of(metric) for task, metric in self._metrics.items()}

    @property
    def repos(self) -> dict[str, str]:
        """The data set on the Hub of each benchmark whose items are from there."""
        benchmarks = [task.benchmark for task in self.tasks.tasks if isinstance(task, Loaded)]
        return {benchmark.name: benchmark.repo for benchmark in benchmarks if benchmark.data is None}

    @property
    def tasks(self) -> Prepared:
        """The tasks with their data."""
        if self._tasks is None:
            chosen = self.chosen
            asked = [] if self._reads_too_much else chosen.tasks
            self._tasks = prepare(asked, required=chosen.required, token=self._token)
            self._tasks.missing |= chosen.refused
            self._tasks.missing |= {t.name: (t.capability, READS_TOO_MUCH) for t in chosen.tasks if not asked}
        return self._tasks

    @property
    def _reads_too_much(self) -> bool:
        """Whether capabilities that nobody has asked for by name would be measured with a model that is on disk."""
        return self._home.streamed and self._config.capabilities == ("auto",) and not self._config.tasks

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of what each task asks."""
        return {task.name: task.fingerprint() for task in self.tasks.tasks}

    def scores(self, on_progress: Progress | None = None) -> Scores:
        """Of the model as it is now; capabilities that cannot be measured here are named with the reason."""
        tasks = self.tasks
        asked = {*self.chosen.capabilities, *(capability for capability, _ in tasks.missing.values())}
        missing = {name: "not asked for" for name in CAPABILITIES if name not in asked}
        if not tasks.tasks:
            return Scores((), missing | tasks.not_measured(())[0])
        model, weights = self._home.model, self._home.fingerprint() if self._home.streamed else None
        found = measure(
            model,
            self._tokenizer,
            tasks,
            on_progress=on_progress,
            required=self.chosen.required,
            identity=store.of_model(model, self._tokenizer, weights),
            metrics=self._metrics,
        )
        return replace(found, not_measured=missing | found.not_measured)

    def check_scores(self, given: Scores) -> None:
        """Raises `ValueError` for scores of other tasks or items than this run's, or scored differently."""
        tasks = {task.name: task for task in self.tasks.tasks}
        measured = {task.task for task in given.tasks}
        left_out = {*given.not_measured, *given.missing_tasks}
        wanted = {name for name, task in tasks.items() if name in measured or not left_out & {name, task.capability}}
        if measured != wanted:
            raise ValueError(
                f"dense_scores are of {', '.join(sorted(measured)) or 'no task'}; this run measures "
                f"{', '.join(sorted(wanted)) or 'no task'}."
            )
        for score in given.tasks:
            task, metric = tasks[score.task], self.metrics.get(score.task, score.metric)
            alike = score.fingerprint in ("", scored(task, self._metrics.get(score.task)))
            if len(score.item_scores) != task.items() or not alike or metric != score.metric:
                raise ValueError(
                    f"dense_scores of task {score.task!r} are of other items than this run's, or were asked or scored "
                    "differently; measure the dense model again with this run's options."
                )

    def overlaps(self, choice: Choice) -> tuple[TaskOverlap, ...]:
        """What the calibration set gives away of the items; `ValueError` where that is more than is allowed."""
        texts: dict[str, list[str]] = {}
        for row, ids in zip(choice.calibration.rows, choice.calibration.input_ids.tolist(), strict=True):
            texts.setdefault(row.origin, []).append(self._tokenizer.decode(ids))
        exempt = contamination.exempt_sources(choice.sources)
        items = {task.name: task.texts() for task in self.tasks.tasks}
        overlaps = contamination.count_overlaps(texts, items, exempt=exempt)
        contamination.check_overlaps(overlaps, exempt, self._config.max_overlap)
        return overlaps

    @property
    def named_text(self) -> CalibrationSource | None:
        """The text that the user named to measure perplexity on."""
        source = self._text_source
        local = source is not None and source.path is not None
        return source if local and source.name != perplexities.LOCAL_WIKITEXT2 else None

    def text(self) -> perplexities.Text | None:
        """The text for perplexity, in windows; None where none is set (the pocket with its own probes)."""
        if self._text_source is None:
            return None
        model_config = self._home.model.config.get_text_config(decoder=True)
        context = getattr(model_config, "max_position_embeddings", None) or LENGTH
        wanted = self._config.length if self.named_text else LENGTH
        return perplexities.read(self._text_source, self._tokenizer, min(wanted or LENGTH, context), self._token)

    def perplexity(self, text: perplexities.Text | None, on_progress: Progress | None = None) -> PerplexityReport:
        """Of the model as it is now, in the field `dense`; an empty report where there is no text."""
        if text is None:
            return PerplexityReport("", 0)
        if text.windows is None:
            return text.filled(None, None)
        found = perplexities.perplexity(self._home.model, text.windows, on_progress, self._home.logits)
        return text.filled(found, None)
