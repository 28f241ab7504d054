# SPDX-License-Identifier: Apache-2.0
"""How a run is done again, told without the folders of the machine it ran on: what is saved may be published."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from ..records import BaseModel, CalibPruneConfig, CalibrationSource


OPTIONS = ("sparsity", "mix", "samples", "length", "micro_batch", "method", "sequential", "damping", "seed", "dtype")
ALWAYS = ("sparsity", "mix", "samples", "length", "seed")


def command(config: CalibPruneConfig, base: BaseModel) -> str:
    """The command line of a run whose config has all defaults filled in; `DIR` stands for the output folder."""
    defaults = CalibPruneConfig(base.name)
    words = ["optimum-cli", "calibprune", "prune", base.name]
    if base.revision:
        words += ["--revision", base.revision]
    for name in OPTIONS:
        value = getattr(config, name)
        if name in ALWAYS or value != getattr(defaults, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    if config.capabilities != defaults.capabilities:
        words += ["--capabilities", ",".join(config.capabilities)]
    if config.sources:
        words += ["--sources", *map(_without_folders, config.sources)]
    return " ".join(shlex.quote(word) for word in [*words, "--output", "DIR"])


def public_config(config: CalibPruneConfig, base: BaseModel) -> CalibPruneConfig:
    return replace(config, model=base.name, sources=tuple(_without_folders(given) for given in config.sources))


def public_source(source: CalibrationSource) -> CalibrationSource:
    return replace(source, path=Path(source.path).name) if source.path else source


def _without_folders(given: str) -> str:
    """A source as the user named it (`NAME`, `PATH` or `NAME=PATH:CAPABILITY`), its path cut to the last part."""
    name, equals, rest = given.partition("=")
    if not equals:
        return Path(given).name if "/" in given else given
    path, _, capability = rest.rpartition(":")
    return f"{name}={Path(path).name}:{capability}"
