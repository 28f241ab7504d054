# SPDX-License-Identifier: Apache-2.0
"""How a run is done again, told without the folders of the machine it ran on: what is saved may be published."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..records import BaseModel, CalibPruneConfig, CalibrationSource
from ..values import HUB, SELF


OPTIONS = (
    "sparsity",
    "allocation",
    "mix",
    "samples",
    "length",
    "micro_batch",
    "method",
    "sequential",
    "damping",
    "seed",
    "dtype",
    "max_overlap",
)
ALWAYS = ("sparsity", "mix", "samples", "length", "seed")


def command(
    config: CalibPruneConfig,
    base: BaseModel,
    sources: Sequence[CalibrationSource],
    text: CalibrationSource | None = None,
    *,
    allow_pickle: bool = False,
) -> str:
    """The command line of a run whose config has all defaults filled in; `DIR` stands for the output folder.

    `sources` are those that were opened, `text` the one on which perplexity was measured, and `allow_pickle` says whether
    weights might be pickles. Data that was in memory cannot be named on a command line; a comment says so.
    """
    defaults = CalibPruneConfig(base.name)
    words = ["optimum-cli", "calibprune", "prune", base.name]
    if base.revision:
        words += ["--revision", base.revision]
    if allow_pickle:
        words += ["--allow-pickle"]
    for name in OPTIONS:
        value = getattr(config, name)
        if name in ALWAYS or value != getattr(defaults, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    if config.capabilities != defaults.capabilities:
        words += ["--capabilities", ",".join(config.capabilities)]
    words += _measuring(config)
    if text is not None and text.path:
        words += ["--perplexity-text", Path(text.path).name]
    in_memory = [s.name for s in sources if not (s.path or s.repo or s.written)]
    if config.sources and not in_memory:
        words += ["--sources", *_public_names(config, sources)]
    if config.seed_texts is not None:
        words += ["--seed-texts", Path(config.seed_texts).name]
    line = " ".join(shlex.quote(word) for word in [*words, "--output", "DIR"])
    return f"{line}  # with sources in memory: {', '.join(in_memory)}" if in_memory else line


def public_config(config: CalibPruneConfig, base: BaseModel, sources: Sequence[CalibrationSource]) -> CalibPruneConfig:
    return replace(
        config,
        model=base.name,
        sources=_public_names(config, sources) if config.sources else (),
        seed_texts=Path(config.seed_texts).name if config.seed_texts is not None else None,
        tasks=_public_tasks(config),
        task_data=Path(config.task_data).name if config.task_data is not None else None,
    )


def _measuring(config: CalibPruneConfig) -> list[str]:
    """The words that say which tasks were measured."""
    words = []
    if config.suite is not None:
        words += ["--suite", config.suite]
    if config.tasks:
        words += ["--tasks", *_public_tasks(config)]
    if config.limit is not None:
        words += ["--limit", str(config.limit)]
    if config.task_data is not None:
        words += ["--task-data", Path(config.task_data).name]
    if config.allow_code_execution:
        words += ["--allow-code-execution"]
    return words


def _public_tasks(config: CalibPruneConfig) -> tuple[str, ...]:
    """The tasks as they were named, a user's own files without their folder."""
    return tuple(Path(name).name for name in config.tasks)


def public_source(source: CalibrationSource) -> CalibrationSource:
    return replace(source, path=Path(source.path).name) if source.path else source


def _public_names(config: CalibPruneConfig, sources: Sequence[CalibrationSource]) -> tuple[str, ...]:
    """Each source as a command line names it: by its name alone, or NAME=FILE:CAPABILITY for a user's own file; what the
    model writes only where it was asked for by name."""
    published = {name.removeprefix(HUB).partition("@")[0] for name in config.sources if name.startswith(HUB)}
    names = [_public_name(s, config, published) for s in sources if not s.written]
    names = list(dict.fromkeys(names))  # a published calibration set is one name for several sources
    return (SELF, *names) if SELF in config.sources else tuple(names)


def _public_name(source: CalibrationSource, config: CalibPruneConfig, published: set[str]) -> str:
    if source.path and source.name not in config.sources:
        return f"{source.name}={Path(source.path).name}:{source.capability}"
    if source.repo in published and source.name not in config.sources:
        return f"{HUB}{source.repo}@{source.revision}"
    return source.name
