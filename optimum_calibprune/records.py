# SPDX-License-Identifier: Apache-2.0
"""Every record that passes between the rooms: frozen, validated when made, with a JSON round trip and without torch."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from .record import Record, unknown


CAPABILITIES = ("general", "commonsense", "code", "math")
METHODS = ("sparsegpt", "wanda", "magnitude")
MIXES = ("single", "uniform", "weighted", "igsp")
SEQUENTIAL = ("module", "block")
CONFIG_NAME = "calibprune_config.json"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


# ------------------------------------------------------------------------------------------ value types


@dataclass(frozen=True)
class SparsityPattern:
    """Which share of the weights is zero: unstructured (`"60%"`), or n:m (`"2:4"`: n of every m may be non-zero)."""

    fraction: float
    n: int | None = None
    m: int | None = None

    def __post_init__(self) -> None:
        _require(
            0 < self.fraction < 1, f"Sparsity must lie between 0 and 1, both excluded; {self.fraction:g} was given."
        )
        _require((self.n is None) == (self.m is None), "An n:m pattern needs both n and m.")
        if self.n is not None and self.m is not None:
            _require(
                0 < self.n < self.m <= 128, f"An n:m pattern needs 0 < n < m <= 128; {self.n}:{self.m} was given."
            )
            _require(
                self.fraction == 1 - self.n / self.m, f"{self.n}:{self.m} means a fraction of {1 - self.n / self.m}."
            )

    @classmethod
    def parse(cls, given: str | float | SparsityPattern) -> SparsityPattern:
        """`"60%"`, `0.6`, `"0.6"`, `"2:4"` -> a pattern; `ValueError` for anything else."""
        if isinstance(given, cls):
            return given
        text = str(given).strip()
        try:
            if ":" in text:
                n, m = (int(part) for part in text.split(":"))
                _require(0 < n < m <= 128, f"An n:m pattern needs 0 < n < m <= 128; {text!r} was given.")
                return cls(1 - n / m, n, m)
            fraction = float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
        except ValueError as error:
            if "pattern needs" in str(error):
                raise
            raise ValueError(f"Unknown sparsity {given!r}; allowed: '60%', 0.6, or n:m such as '2:4'.") from None
        return cls(fraction)

    def __str__(self) -> str:
        if self.n is not None:
            return f"{self.n}:{self.m}"
        percent = f"{self.fraction * 100:.10g}%"
        return percent if float(percent[:-1]) / 100 == self.fraction else repr(self.fraction)


@dataclass(frozen=True)
class MixRule:
    """How samples are chosen: `"single:NAME"`, `"uniform"`, `"weighted:NAME=w,..."` or `"igsp"`."""

    kind: str
    weights: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in MIXES:
            raise unknown("mix", self.kind, MIXES)
        if self.kind == "single":
            _require(
                len(self.weights) == 1 and bool(self.weights[0][0]), "A single mix names its source: 'single:NAME'."
            )
        elif self.kind == "weighted":
            _require(bool(self.weights), "A weighted mix names its sources: 'weighted:NAME=2,OTHER=1'.")
        else:
            _require(not self.weights, f"The mix {self.kind!r} takes no source names.")
        for name, weight in self.weights:
            _require(0 < weight < math.inf, f"The weight of {name!r} must be positive; {weight:g} was given.")
        _require(len(dict(self.weights)) == len(self.weights), "A weighted mix names each source once.")

    @classmethod
    def parse(cls, given: str | MixRule) -> MixRule:
        if isinstance(given, cls):
            return given
        kind, _, rest = given.strip().partition(":")
        if kind not in MIXES:
            raise unknown("mix", kind, MIXES)
        if kind == "single":
            return cls(kind, ((rest, 1.0),))
        pairs = [part.partition("=") for part in rest.split(",") if part]
        try:
            return cls(kind, tuple((name.strip(), float(weight)) for name, _, weight in pairs))
        except ValueError as error:
            if "could not convert" in str(error):
                raise ValueError(f"{given!r}: each weight is a number, as in 'weighted:c4=2,gsm8k=1'.") from None
            raise

    def __str__(self) -> str:
        if self.kind == "single":
            return f"single:{self.weights[0][0]}"
        return ":".join(
            [
                self.kind,
                *([",".join(f"{n}={w!r}".removesuffix(".0") for n, w in self.weights)] if self.weights else []),
            ]
        )


# --------------------------------------------------------------------------------------------- the job


@dataclass(frozen=True)
class CalibPruneConfig(Record):
    """Everything that decides a run. Python keywords, command-line options and the saved file use these names.

    `samples` and `length` (tokens) may be left out: 128 x 2048, for the pocket model 64 x 256. `micro_batch` is the number
    of samples whose arithmetic is done together; left out, it is as many as make about 2048 tokens. `sequential="module"`
    lets each module see what the pruned ones before it produce; `"block"` is the two-pass scheme of the SparseGPT paper.
    """

    model: str
    revision: str | None = None
    sparsity: SparsityPattern = SparsityPattern(0.5)
    method: str = "sparsegpt"
    mix: MixRule = MixRule("uniform")
    sources: tuple[str, ...] = ()
    samples: int | None = None
    length: int | None = None
    micro_batch: int | None = None
    sequential: str = "module"
    damping: float = 0.01
    capabilities: tuple[str, ...] = ("auto",)
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", SparsityPattern.parse(self.sparsity))
        object.__setattr__(self, "mix", MixRule.parse(self.mix))
        if isinstance(self.capabilities, str):
            object.__setattr__(self, "capabilities", tuple(part.strip() for part in self.capabilities.split(",")))
        object.__setattr__(self, "sources", (self.sources,) if isinstance(self.sources, str) else tuple(self.sources))
        _require(bool(self.model), "No model was given: a Hub id, a local folder, or 'pocket'.")
        for kind, given, allowed in (("method", self.method, METHODS), ("sequential", self.sequential, SEQUENTIAL)):
            if given not in allowed:
                raise unknown(kind, given, allowed)
        if len(self.capabilities) != 1 or self.capabilities[0] not in ("auto", "none"):
            for name in self.capabilities:
                if name not in CAPABILITIES:
                    raise unknown("capability", name, (*CAPABILITIES, "auto", "none"))
        for name, least in (("samples", 1), ("length", 8), ("micro_batch", 1)):
            value = getattr(self, name)
            _require(value is None or value >= least, f"{name} must be at least {least}; {value} was given.")
        _require(0 < self.damping < 1, f"damping is a share of the mean diagonal in (0, 1); {self.damping} was given.")
        _require(self.seed >= 0, f"seed must not be negative; {self.seed} was given.")

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / CONFIG_NAME).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        return cls.from_json((Path(folder) / CONFIG_NAME).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class BaseModel(Record):
    """The model that is pruned, as far as a card must know it."""

    name: str
    revision: str | None = None
    licence: str | None = None
    language: tuple[str, ...] = ()
    architecture: str | None = None
    parameters: int = 0


# ----------------------------------------------------------------------------------------- calibration


@dataclass(frozen=True)
class CalibrationSource(Record):
    """Where calibration text comes from. `text` says how a row becomes a document: a template over the row's columns
    (`"{question}\\n{answer}"`), `"chat:COLUMN"`, or the name of a reader in `calibration/sources.py`."""

    name: str
    capability: str
    repo: str | None = None
    subset: str | None = None
    split: str = "train"
    text: str = "{text}"
    revision: str | None = None
    path: str | None = None
    licence: str | None = None
    upper_bound: bool = False
    pool: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(bool(self.name), "A source needs a name.")
        if self.capability not in CAPABILITIES:
            raise unknown(f"capability of source {self.name!r}", self.capability, CAPABILITIES)
        _require(not (self.repo and self.path), f"Source {self.name!r} has both a repo and a path; give one of them.")


@dataclass(frozen=True)
class SampleProfile(Record):
    """What one sample is like under the dense model. `tokens` is its length; the rates are over its token 4-grams."""

    perplexity: float
    duplicate_rate: float
    collision_probability: float
    tokens: int


@dataclass(frozen=True)
class SourceProfile(Record):
    """The same over all measured samples of one source; `perplexity` is exp of the mean negative log-likelihood."""

    name: str
    capability: str
    samples: int
    perplexity: float
    duplicate_rate: float
    collision_probability: float


@dataclass(frozen=True)
class CalibrationRow(Record):
    """One sample of a CalibrationSet: the source and the index in its pool, its group (a capability), its weight in H."""

    origin: str
    index: int
    group: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        _require(0 < self.weight < math.inf, f"A row's weight must be positive; {self.weight:g} was given.")


@dataclass(frozen=True, eq=False)
class CalibrationSet(Record):
    """Token ids `[samples, length]` (int64) with one row of provenance each, in the order in which they are used."""

    input_ids: Any  # numpy.ndarray; this module imports no numpy, so that the command line starts fast
    rows: tuple[CalibrationRow, ...]

    def __post_init__(self) -> None:
        import numpy as np

        ids = np.ascontiguousarray(self.input_ids, dtype=np.int64)
        _require(ids.ndim == 2 and ids.size > 0, f"input_ids must be [samples, length]; got shape {ids.shape}.")
        _require(len(ids) == len(self.rows), f"{len(ids)} samples but {len(self.rows)} rows.")
        ids.setflags(write=False)
        object.__setattr__(self, "input_ids", ids)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over shape, ids, groups and weights: two sets with the same fingerprint give the same Hessians."""
        digest = hashlib.sha256(repr((self.input_ids.shape, [(r.group, r.weight) for r in self.rows])).encode())
        digest.update(self.input_ids.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Mix(Record):
    """Which samples of which source were taken, and why. `objective` is J and `parts` its terms (IGSP only);
    `trace` holds J after each choice."""

    rule: MixRule
    quotas: dict[str, int]
    shares: dict[str, float]
    note: str = ""
    objective: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    trace: tuple[float, ...] = ()


# --------------------------------------------------------------------------------------------- pruning


@dataclass(frozen=True)
class LayerReport(Record):
    """One pruned module. `relative_error` is tr(D H D^T) / tr(W H W^T); `rescue` names what saved a bad Hessian."""

    module: str
    shape: tuple[int, int]
    zeros_asked: int
    zeros_found: int
    why: str
    relative_error: float
    damping: float
    rescue: str
    tokens: float
    seconds: float
    kernel: str


@dataclass(frozen=True)
class Untouched(Record):
    """A matrix that was not pruned, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class PruneReport(Record):
    """All layers of a run. `replays` is the number of block forwards beyond the first that each micro-batch cost."""

    pattern: SparsityPattern
    method: str
    layers: tuple[LayerReport, ...]
    untouched: tuple[Untouched, ...]
    micro_batch: int
    resident: int
    replays: int

    @property
    def zeros(self) -> int:
        return sum(layer.zeros_found for layer in self.layers)

    @property
    def weights(self) -> int:
        return sum(math.prod(layer.shape) for layer in self.layers)


@dataclass(frozen=True)
class Plan(Record):
    """What a run will do, before it does it. Memory is in bytes by place; seconds are an estimate from measured rates."""

    model: str
    pattern: SparsityPattern
    method: str
    mix: MixRule
    sources: tuple[str, ...]
    samples: int
    length: int
    blocks: int
    modules: int
    weights: int
    untouched: tuple[Untouched, ...]
    capabilities: tuple[str, ...]
    micro_batch: int
    resident: int
    replays: int
    device: str
    memory: dict[str, int]
    seconds: float


# ---------------------------------------------------------------------------------------- capabilities


@dataclass(frozen=True)
class TaskScore(Record):
    """One task: `value` is the mean of `item_scores` (each in [0, 1]); `chance` is the score of guessing."""

    task: str
    capability: str
    metric: str
    chance: float
    item_scores: tuple[float, ...]

    def __post_init__(self) -> None:
        _require(bool(self.item_scores), f"Task {self.task!r} has no items.")

    @property
    def value(self) -> float:
        return sum(self.item_scores) / len(self.item_scores)


@dataclass(frozen=True)
class Scores(Record):
    """All tasks of one model, and the capabilities that could not be measured, with the reason."""

    tasks: tuple[TaskScore, ...]
    not_measured: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CapabilityRetention(Record):
    """Dense and sparse score of one capability. `retention` = sparse / dense, `interval` its 95 % bootstrap interval;
    both are None where the dense score is not above chance. `above_chance` has the chance level subtracted first."""

    capability: str
    items: int
    chance: float
    dense: float
    sparse: float
    retention: float | None
    interval: tuple[float, float] | None
    above_chance: float | None


@dataclass(frozen=True)
class CapabilityReport(Record):
    """Retention by capability; `total` is the mean over those in `measured`, and is compared over equal sets only."""

    capabilities: tuple[CapabilityRetention, ...]
    total: float | None
    total_interval: tuple[float, float] | None
    worst: str | None
    not_measured: dict[str, str] = field(default_factory=dict)

    @property
    def measured(self) -> tuple[str, ...]:
        return tuple(c.capability for c in self.capabilities if c.retention is not None)


@dataclass(frozen=True)
class PerplexityReport(Record):
    """Perplexity of dense and sparse model on one text; `reason` says why the numbers are missing where they are."""

    text: str
    length: int
    tokens: int = 0
    dense: float | None = None
    sparse: float | None = None
    reason: str = ""


# ------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class RunRecord(Record):
    """One finished run, from which card and figures are drawn without a model. `samples` profiles `rows`, one by one."""

    created: str
    command: str
    config: CalibPruneConfig
    base: BaseModel
    plan: Plan
    sources: tuple[CalibrationSource, ...]
    profiles: tuple[SourceProfile, ...]
    mix: Mix
    samples: tuple[SampleProfile, ...]
    rows: tuple[CalibrationRow, ...]
    fingerprint: str
    prune: PruneReport
    capabilities: CapabilityReport | None
    perplexity: PerplexityReport | None
    versions: dict[str, str]
    hardware: dict[str, str]
    seconds: dict[str, float]
    peak_memory: int
