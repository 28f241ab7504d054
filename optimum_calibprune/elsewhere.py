# SPDX-License-Identifier: Apache-2.0
"""The plan of a run on a machine that is not this one, from the model's config alone: no weights are fetched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .calibration import mix as mixes
from .choices import SAMPLES, choose_sources, choose_tasks, listed, source_names, with_defaults
from .loading import fits, load_shape
from .planning import Machine, make_plan
from .pruning import blocks
from .pruning.homes import Absent
from .records import CalibPruneConfig, Plan


def plan_elsewhere(
    model: str,
    machine: Machine,
    *,
    sources: Sequence[str] | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    **config: Any,
) -> Plan:
    """What `CalibPruner.prune()` would do on another machine, as `CalibPruner.plan()` tells it of this one.

    A model that does not fit into the machine's memory is planned as a streamed one. Only its config is fetched; no code that
    comes with it is run.

    Args:
        model: Hub id, folder, or `"pocket"`.
        machine: its memory, which is all free, and its rates.
        sources: names, as in `CalibPruner.from_pretrained`.
        token: of the Hub; False for none.
        cache_dir: where the config is kept.
        **config: the fields of `CalibPruneConfig`.

    Raises:
        ValueError: for bad options, models that cannot be pruned, and text that a streamed model would have to write.
        OSError: where the config cannot be had.
    """
    asked = CalibPruneConfig(model=model, sources=source_names(listed(sources)), **config)
    tasks = choose_tasks(asked)
    opened = [entry.source for entry in choose_sources(asked, listed(sources))]
    with FakeTensorMode(allow_non_fake_inputs=True):  # tensors that have a shape and no content
        empty = load_shape(model, revision=asked.revision, dtype=asked.dtype, token=token, cache_dir=cache_dir)
        asked = with_defaults(asked, empty, machine.device)
        blocks.check_structure(empty, asked.sparsity)
        groups = blocks.find_groups(empty, asked.sparsity)
    weight_bytes = empty.num_parameters() * empty.dtype.itemsize
    streamed = not fits(weight_bytes, min(machine.free, machine.free_host))
    if streamed and any(source.written for source in opened):
        raise ValueError(
            f"{model} has {weight_bytes / 2**30:,.1f} GiB of weights and would be read from disk block by block, so it cannot "
            f"write its own calibration text, as the mix {str(asked.mix)!r} does. Take mix='uniform', or name sources."
        )
    wanted = mixes.windows_wanted(asked.mix, opened, asked.samples or SAMPLES)
    written = sum(wanted.get(source.name, 0) for source in opened if source.written)
    home = Absent(empty, torch.device(machine.device), streamed)
    too_much = streamed and asked.capabilities == ("auto",) and not asked.tasks  # as `CalibPruner.plan` has it
    measured = () if too_much else tasks.capabilities
    return make_plan(home, asked, groups, sorted(wanted), written, measured, machine=machine)
