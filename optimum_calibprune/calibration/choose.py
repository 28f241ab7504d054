# SPDX-License-Identifier: Apache-2.0
"""The calibration room in one call: sources and a dense model in, the calibration set and the account of it out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..records import CalibrationSet, CalibrationSource, Mix, MixRule, Record, SampleProfile, SourceProfile
from . import cola, measure, mix, selfgen
from .measure import LogitsOf
from .sources import OpenSource, build_pool


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Choice(Record):
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
    seed_texts: str | Path | None = None,
    token: str | None = None,
    on_read: Progress | None = None,
    on_measure: Progress | None = None,
    logits_of: LogitsOf | None = None,
) -> Choice:
    """Reads or writes a pool of each source that the rule needs, draws by `seed`, measures under the dense model, selects.

    With SGS, the sources that are not the model's own are those whose documents it continues.

    Raises what `sources.build_pool` and `selfgen.write_pool` raise, before anything is measured.
    """
    sources = [entry.source for entry in opened]
    counts = mix.quotas(rule, sources, samples)
    wanted = mix.windows_wanted(rule, sources, samples)
    vocabulary = model.get_input_embeddings().num_embeddings
    corpora = [entry for entry in opened if not entry.source.written]
    pools = []
    for entry in opened:
        windows, enough = wanted.get(entry.source.name, 0), counts.get(entry.source.name, 0)
        if windows and entry.source.written:
            asked = selfgen.request(entry.source, rule, tokenizer, corpora=corpora, seed_texts=seed_texts, token=token)
            made = {"windows": windows, "length": length, "seed": seed, "on_progress": on_read}
            pools.append(selfgen.write_pool(model, tokenizer, asked, **made))
        elif windows:
            limits = {"enough": enough, "vocabulary": vocabulary, "token": token, "on_progress": on_read}
            pools.append(build_pool(entry, tokenizer, length, windows, **limits))
    candidates = mix.draw(pools, wanted, seed)
    measured = measure.likelihood(model, candidates.input_ids, on_measure, logits_of)
    bad = np.flatnonzero(~(np.isfinite(measured.nll) & np.isfinite(measured.entropy)))
    if len(bad):
        row = candidates.rows[bad[0]]
        raise ValueError(
            f"The dense model has no finite likelihood on sample {row.index} of source {row.origin!r}; its activations "
            "overflow in this dtype. Try dtype='bfloat16' or 'float32'."
        )
    activations = None
    if rule.kind == "cola":
        layers = int(rule.option("layers"))
        activations = cola.pooled_activations(model, candidates.input_ids, layers, on_measure)
    calibration, account = mix.calibration_set(rule, candidates, counts, measured.nll, activations, seed)
    places = {(row.origin, row.index): i for i, row in enumerate(candidates.rows)}
    chosen = [places[row.origin, row.index] for row in calibration.rows]
    return Choice(
        calibration=calibration,
        mix=account,
        samples=measure.profile_samples(
            calibration.input_ids, measured.of(chosen), _texts(calibration.input_ids, tokenizer)
        ),
        profiles=_source_profiles(candidates, measured, tokenizer),
        sources=tuple(pool.source for pool in pools),
    )


def _source_profiles(
    candidates: mix.Candidates, measured: measure.Likelihood, tokenizer: PreTrainedTokenizerBase
) -> tuple[SourceProfile, ...]:
    origins = np.array([row.origin for row in candidates.rows])
    capability = {row.origin: row.group for row in candidates.rows}
    profiles = []
    for name in sorted(capability):
        here = np.flatnonzero(origins == name)
        ids = candidates.input_ids[here]
        texts = _texts(ids, tokenizer)
        profiles.append(measure.profile_source(name, capability[name], ids, measured.of(here), texts))
    return tuple(profiles)


def _texts(input_ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What each sample says, special tokens included; one at a time, since all together may be large."""
    for ids in input_ids:
        yield tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
