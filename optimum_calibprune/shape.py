# SPDX-License-Identifier: Apache-2.0
"""A model without its weights: the plan of a run on a machine that is not this one, from the model's config alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .calibration import mix as mixes
from .choices import SAMPLES, choose_sources, choose_tasks, listed, source_names, with_defaults
from .loading import fits, load_shape
from .planning import Machine, make_plan
from .pruning import blocks
from .pruning.homes import Absent
from .records import CalibPruneConfig, Plan


if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelShape:
    """What can be known of a model, and of pruning it, before its weights are there.

    Example:
        >>> shape = ModelShape.from_pretrained("meta-llama/Llama-3.1-70B", sparsity="60%", mix="uniform")
        >>> shape.plan(Machine("cuda", 80 * 2**30, 128 * 2**30, products=3e14, exact_products=2e13, sweep=6e10)).streamed
        True

    Attributes:
        parameters: how many the model has.
        weight_bytes: what they take.
    """

    def __init__(self, model: PreTrainedModel, config: CalibPruneConfig) -> None:
        """Takes a model whose tensors are those of a `FakeTensorMode`; `from_pretrained` makes one."""
        self.config = config
        self.parameters = model.num_parameters()
        self.weight_bytes = self.parameters * model.dtype.itemsize
        self._model = model
        self._tasks = choose_tasks(config)
        self._sources = [entry.source for entry in choose_sources(config, config.sources)]
        blocks.check_structure(model, config.sparsity)
        self._groups = blocks.find_groups(model, config.sparsity)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        sources: Sequence[str] | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        **config: Any,
    ) -> Self:
        """Fetches the config of a model, and nothing else; no code that comes with it is run.

        Args:
            model: Hub id, folder, or `"pocket"`.
            sources: names, as in `CalibPruner.from_pretrained`.
            token: of the Hub; False for none.
            cache_dir: where the config is kept.
            **config: the fields of `CalibPruneConfig`.

        Raises:
            ValueError: for bad options and models that cannot be pruned.
            OSError: where the config cannot be had.
        """
        asked = CalibPruneConfig(model=model, sources=source_names(listed(sources)), **config)
        with FakeTensorMode(allow_non_fake_inputs=True):  # tensors that have a shape and no content
            empty = load_shape(model, revision=asked.revision, dtype=asked.dtype, token=token, cache_dir=cache_dir)
            return cls(empty, asked)

    def plan(self, machine: Machine) -> Plan:
        """What `CalibPruner.prune()` would do on a machine with this memory, which is all free, and these rates, as
        `CalibPruner.plan()` tells it of the one that it runs on. A model that does not fit is planned as a streamed one.

        Raises `ValueError` where that would have to write its own calibration text.
        """
        config = with_defaults(self.config, self._model, machine.device)
        streamed = not fits(self.weight_bytes, min(machine.free, machine.free_host))
        if streamed and any(source.written for source in self._sources):
            raise ValueError(
                f"{config.model} has {self.weight_bytes / 2**30:,.1f} GiB of weights and would be read from disk block by block, "
                f"so it cannot write its own calibration text, as the mix {str(config.mix)!r} does. Take mix='uniform', or name "
                "sources."
            )
        wanted = mixes.windows_wanted(config.mix, self._sources, config.samples or SAMPLES)
        written = sum(wanted.get(source.name, 0) for source in self._sources if source.written)
        too_much = streamed and config.capabilities == ("auto",) and not config.tasks  # as `CalibPruner` has it
        measured = () if too_much else self._tasks.capabilities
        home = Absent(self._model, torch.device(machine.device), streamed)
        return make_plan(home, config, self._groups, sorted(wanted), written, measured, machine=machine)
