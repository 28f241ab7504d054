# SPDX-License-Identifier: Apache-2.0
"""The calibration room in one call: sources and a dense model in, the calibration set and the account of it out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..records import CalibrationSet, CalibrationSource, Mix, MixRule, SampleProfile, SourceProfile
from . import measure, mix
from .sources import OpenSource, build_pool


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Choice:
    """A calibration set; `samples` profiles its rows one by one, `profiles` each source over all its windows that were
    measured (for IGSP all candidates), `sources` are those that were read, with what was resolved."""

    calibration: CalibrationSet
    mix: Mix
    samples: tuple[SampleProfile, ...]
    profiles: tuple[SourceProfile, ...]
    sources: tuple[CalibrationSource, ...]


def choose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    opened: Sequence[OpenSource],
    rule: MixRule,
    *,
    samples: int,
    length: int,
    seed: int,
    token: str | None = None,
    on_read: Progress | None = None,
    on_measure: Progress | None = None,
) -> Choice:
    """Reads a pool of each source that the rule needs, draws by `seed`, measures under the dense model, selects.

    Raises what `sources.build_pool` raises, before anything is measured.
    """
    sources = [entry.source for entry in opened]
    counts = mix.quotas(rule, sources, samples)
    wanted = mix.windows_wanted(rule, sources, samples)
    vocabulary = model.get_input_embeddings().num_embeddings
    pools = [
        build_pool(
            entry,
            tokenizer,
            length,
            wanted[entry.source.name],
            enough=counts[entry.source.name],
            vocabulary=vocabulary,
            token=token,
            on_progress=on_read,
        )
        for entry in opened
        if wanted.get(entry.source.name)
    ]
    candidates = mix.draw(pools, wanted, seed)
    nll = measure.mean_nll(model, candidates.input_ids, on_measure)
    bad = np.flatnonzero(~np.isfinite(nll))
    if len(bad):
        row = candidates.rows[bad[0]]
        raise ValueError(
            f"The dense model has no finite likelihood on sample {row.index} of source {row.origin!r}; its activations "
            "overflow in this dtype. Try dtype='bfloat16' or 'float32'."
        )
    calibration, account = mix.calibration_set(rule, candidates, counts, nll)
    places = {(row.origin, row.index): i for i, row in enumerate(candidates.rows)}
    chosen = [places[row.origin, row.index] for row in calibration.rows]
    return Choice(
        calibration=calibration,
        mix=account,
        samples=measure.profile_samples(calibration.input_ids, nll[chosen]),
        profiles=_source_profiles(candidates, nll),
        sources=tuple(pool.source for pool in pools),
    )


def _source_profiles(candidates: mix.Candidates, nll: np.ndarray) -> tuple[SourceProfile, ...]:
    origins = np.array([row.origin for row in candidates.rows])
    capability = {row.origin: row.group for row in candidates.rows}
    return tuple(
        measure.profile_source(name, capability[name], candidates.input_ids[origins == name], nll[origins == name])
        for name in sorted(capability)
    )
