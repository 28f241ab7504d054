# SPDX-License-Identifier: Apache-2.0
"""What a config means for a model: defaults, tasks, sources, the text for perplexity; checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import pocket
from .calibration import mix as mixes
from .calibration.selfgen import read_seeds, sampling, written_sources
from .calibration.sources import OpenSource, open_sources
from .calibration.table import SOURCES
from .capabilities import benchmarks
from .capabilities.benchmarks import Benchmark
from .capabilities.perplexity import LOCAL_WIKITEXT2, WIKITEXT2, WIKITEXT2_FILE
from .capabilities.tasks import Task, pocket_tasks
from .loading import pruned_from
from .records import CAPABILITIES, CalibPruneConfig, CalibrationSource
from .values import SELF


if TYPE_CHECKING:
    from transformers import PreTrainedModel


SAMPLES, LENGTH = 128, 2048
MICRO_BATCH_TOKENS = {"cuda": 16384}  # a GPU wants larger products, and fewer of them
FEW_TOKENS = 2048
SGS_CORPUS = "wikitext2"  # the source whose documents SGS continues, unless the user names others
NO_CODE = "code that a model has written runs only with allow_code_execution=True (--allow-code-execution)"
Sources = Sequence[str | CalibrationSource] | Mapping[str, Any] | None


def is_pocket(config: CalibPruneConfig) -> bool:
    """Whether the model is the bundled one, or was pruned from it."""
    return pocket.NAME in (config.model, pruned_from(config.model, config.revision))


def listed(sources: Sources | str | Path | CalibrationSource) -> Sources:
    """Sources as a list or a mapping, also where one alone was given."""
    if sources is None or isinstance(sources, Mapping):
        return sources
    several = [sources] if isinstance(sources, str | Path | CalibrationSource) else sources
    return [str(source) if isinstance(source, Path) else source for source in several]


def calibration_sources(model: str = pocket.NAME) -> dict[str, CalibrationSource]:
    """The calibration sources that have a name, with capability, licence and where they are: those of the bundled model
    for `"pocket"`, those on the Hub for any other."""
    return pocket.sources() if model == pocket.NAME else dict(SOURCES)


def source_names(sources: Sources) -> tuple[str, ...]:
    """What the config keeps of sources that may hold data."""
    if isinstance(sources, Mapping):
        return tuple(key.partition(":")[0] for key in sources)
    return tuple(s.name if isinstance(s, CalibrationSource) else s for s in sources or ())


def with_defaults(config: CalibPruneConfig, model: PreTrainedModel, device: str | None = None) -> CalibPruneConfig:
    """The config with samples, length and micro-batch filled in, for the kind of `device` (default: where the model is);
    `ValueError` for samples longer than the context."""
    samples, length = (pocket.SAMPLES, pocket.LENGTH) if is_pocket(config) else (SAMPLES, LENGTH)
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    length = config.length or min(length, context or length)
    if context is not None and length > context:
        raise ValueError(f"length {length} exceeds the model's context of {context} tokens.")
    samples = config.samples or samples
    tokens = MICRO_BATCH_TOKENS.get(device or model.device.type, FEW_TOKENS)
    step = config.micro_batch or max(1, min(samples, tokens // length))
    return replace(config, samples=samples, length=length, micro_batch=step)


@dataclass(frozen=True)
class Measurement:
    """The tasks of a run, those that are not allowed with the reason, and whether a task that cannot be had is an error:
    where the user named it, or its capability."""

    tasks: list[Task | Benchmark] = field(default_factory=list)
    refused: dict[str, tuple[str, str]] = field(default_factory=dict)
    required: bool = False

    @property
    def capabilities(self) -> list[str]:
        found = {task.capability for task in self.tasks}
        return [name for name in CAPABILITIES if name in found]


def choose_tasks(config: CalibPruneConfig) -> Measurement:
    """The tasks that a config asks for; `ValueError` or `FileNotFoundError` for those that do not exist or go together."""
    asked = config.capabilities
    given = [name for name in ("suite", "tasks", "limit", "task_data") if getattr(config, name)]
    if asked == ("none",):
        if given:
            raise ValueError(f"capabilities='none' measures nothing, but {', '.join(given)} was given; leave one out.")
        return Measurement()
    suite = config.suite or ("pocket" if is_pocket(config) and not config.tasks else None)
    tasks = _named(config, suite)
    wanted = CAPABILITIES if asked == ("auto",) else asked
    tasks = [task for task in tasks if task.capability in wanted]
    if missing := [name for name in wanted if asked != ("auto",) and name not in {task.capability for task in tasks}]:
        raise ValueError(
            f"Capabilities {', '.join(missing)} were asked for, but none of the tasks measures them; name other tasks."
        )
    code = {task.name: task for task in tasks if task.runs_code and not (isinstance(task, Task) and _is_own(config))}
    refused: dict[str, tuple[str, str]] = {}
    if code and not config.allow_code_execution:
        if "code" in asked or config.tasks:
            raise ValueError(f"Task {', '.join(code)}: {NO_CODE}.")
        refused = {name: (task.capability, NO_CODE) for name, task in code.items()}
    return Measurement(
        [task for task in tasks if task.name not in refused], refused, bool(config.tasks) or asked != ("auto",)
    )


def _is_own(config: CalibPruneConfig) -> bool:
    """Whether the model is the bundled one, or in a folder of the user's. What a repo says of itself is not enough to run
    the code that its model writes."""
    return config.model == pocket.NAME or Path(config.model).is_dir()


def _named(config: CalibPruneConfig, suite: str | None) -> list[Task | Benchmark]:
    """The tasks of a suite, or those that are named, with their limit and data."""
    probes = {task.name: task for task in pocket_tasks(CAPABILITIES)}
    names = config.tasks or (probes if suite == "pocket" else benchmarks.BENCHMARKS)
    data = Path(config.task_data) if config.task_data is not None else None
    if data is not None and not data.is_dir():
        raise FileNotFoundError(f"There is no folder {config.task_data!r} with the data of tasks.")
    if suite == "pocket" and (other := [name for name in names if name not in probes]):
        raise ValueError(
            f"The suite 'pocket' does not have {', '.join(other)}; leave the suite out, or name its probes."
        )
    limit = config.limit or benchmarks.SUITES.get(suite or ("full" if config.tasks else "quick"))
    if config.limit and (clash := [name for name in names if name in probes]):
        raise ValueError(f"limit is for benchmarks; {', '.join(clash)} is measured as a whole.")
    if data is not None and all(name in probes for name in names):
        raise ValueError("task_data is for benchmarks, and none is asked for; name a suite (quick, full) or tasks.")
    tasks = [
        probes.get(name) or replace(benchmarks.find(name, tuple(probes)), limit=limit, data=data) for name in names
    ]
    if twice := [task.name for i, task in enumerate(tasks) if task.name in {other.name for other in tasks[:i]}]:
        raise ValueError(f"Task {twice[0]!r} was named twice.")
    return tasks


def choose_sources(config: CalibPruneConfig, given: Sources, token: str | None = None) -> list[OpenSource]:
    """Those that were given, else those that the mix names or the model writes, else the default ones; checked.

    With SGS, the sources beside the model's own are those whose documents it continues.
    """
    table = {**SOURCES, **pocket.sources()} if is_pocket(config) else SOURCES
    default = pocket.default_sources() if is_pocket(config) else list(SOURCES)
    named = [name for name, _ in config.mix.weights]
    asked = given or config.sources
    rule = config.mix
    if rule.kind == "self-cal" and asked:
        raise ValueError("The mix 'self-cal' is written by the model alone; leave the sources out, or choose 'igsp'.")
    if config.seed_texts is not None and rule.kind != "igsp":
        raise ValueError(f"Seed texts are what the model's proposals for 'igsp' begin with; the mix is {str(rule)!r}.")
    if rule.kind in ("self-cal", "sgs", "igsp"):
        sampling(rule)
    if rule.kind == "sgs":
        opened = written_sources(rule) + open_sources(asked or [SGS_CORPUS], table, token)
    elif rule.kind == "self-cal" or (rule.kind == "igsp" and not asked):
        opened = written_sources(rule)
    elif not isinstance(asked, Mapping) and SELF in (asked or ()):
        if rule.kind != "igsp":
            raise ValueError(f"The source {SELF!r} is for the mix 'igsp'; the mix is {str(rule)!r}.")
        opened = written_sources(rule) + open_sources([name for name in asked if name != SELF], table, token)
    else:
        opened = open_sources(asked or named or default, table, token)
    if rule.kind == "igsp":
        read_seeds(config.seed_texts)
    mixes.quotas(rule, [entry.source for entry in opened], config.samples or SAMPLES)
    return opened


def choose_perplexity_text(config: CalibPruneConfig, given: str | Path | None) -> CalibrationSource | None:
    """The text that the user named, else WikiText-2, from the folder with the tasks' data where it is there; none for the
    pocket with its own probes alone, which need no other data."""
    if given is None:
        local = Path(config.task_data) / WIKITEXT2_FILE if config.task_data is not None else None
        if is_pocket(config) and not any(isinstance(task, Benchmark) for task in choose_tasks(config).tasks):
            return None
        if local is not None and local.is_file():
            return CalibrationSource(LOCAL_WIKITEXT2, "general", path=str(local))
        return WIKITEXT2
    if not Path(given).exists():
        raise FileNotFoundError(f"There is no file {str(given)!r} to measure perplexity on.")
    return CalibrationSource(Path(given).stem, "general", path=str(given))
