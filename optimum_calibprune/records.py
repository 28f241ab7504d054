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
from .values import (
    ALLOCATIONS,
    ANY,
    CAPABILITIES,
    HALF,
    IGSP,
    METHODS,
    NORMALISE,
    SEQUENTIAL,
    SUITES,
    MixRule,
    Sparsity,
    SparsityPattern,  # noqa: F401 (other rooms take it from here)
    require,
)


CONFIG_NAME = "calibprune_config.json"
LEFT_DENSE = "left dense, as asked by "


# --------------------------------------------------------------------------------------------- the job


@dataclass(frozen=True)
class CalibPruneConfig(Record):
    """Everything that decides a run. Python keywords, command-line options and the saved file use these names.

    `sparsity` is `"60%"`, 0.6 or `"2:4"`, or a mapping from names of modules to these: see `Sparsity`.
    `allocation="owl"` takes less from blocks with many outliers and more from the others, the same in total.
    `samples` and `length` (tokens) may be left out: 128 x 2048, for the pocket model 64 x 256. `micro_batch` is the number
    of samples whose arithmetic is done together; left out, it is as many as make about 2048 tokens, on a GPU 16,384.
    `sequential="module"` lets each module see what the pruned ones before it produce; `"block"` is the two-pass scheme of
    the SparseGPT paper.
    `seed_texts` is a JSON file with the short texts, by capability, that the model continues for `mix="igsp"`.
    `max_overlap` is the share of a task's items, 0 to 1, that may have 13 words in a row in common with the calibration set.
    `suite` is `"quick"` (a fixed draw of 200 items of each benchmark), `"full"`, or `"pocket"` (the probes of the pocket
    model, its default); other models are measured with `"quick"`. `tasks` names some of them instead, or files of lm-eval,
    `"FILE.yaml:CAPABILITY"`; they are measured completely unless a suite or a `limit` (items a task) says otherwise.
    `task_data` is a folder with the tasks' data in local files. Code that a model has written for benchmarks, or that a
    model of the Hub has written for probes, runs only with `allow_code_execution`; all code runs in the sandbox.
    """

    model: str
    revision: str | None = None
    sparsity: Sparsity = HALF
    allocation: str = "uniform"
    method: str = "sparsegpt"
    mix: MixRule = IGSP
    sources: tuple[str, ...] = ()
    samples: int | None = None
    length: int | None = None
    micro_batch: int | None = None
    sequential: str = "module"
    damping: float = 0.01
    capabilities: tuple[str, ...] = ("auto",)
    suite: str | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    task_data: str | None = None
    allow_code_execution: bool = False
    seed: int = 0
    seed_texts: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_overlap: float = 0.01

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", Sparsity.parse(self.sparsity))
        object.__setattr__(self, "mix", MixRule.parse(self.mix))
        if isinstance(self.capabilities, str):
            object.__setattr__(self, "capabilities", tuple(part.strip() for part in self.capabilities.split(",")))
        object.__setattr__(self, "sources", (self.sources,) if isinstance(self.sources, str) else tuple(self.sources))
        object.__setattr__(self, "tasks", (self.tasks,) if isinstance(self.tasks, str) else tuple(self.tasks))
        if self.task_data is not None:
            object.__setattr__(self, "task_data", str(self.task_data))
        require(bool(self.model), "No model was given: a Hub id, a local folder, or 'pocket'.")
        for kind, allowed in (("method", METHODS), ("sequential", SEQUENTIAL), ("allocation", ALLOCATIONS)):
            if getattr(self, kind) not in allowed:
                raise unknown(kind, getattr(self, kind), allowed)
        require(
            self.allocation == "uniform" or not self.sparsity.structured,
            f"allocation={self.allocation!r} moves zeros from block to block, which n:m does not allow; {self.sparsity} was "
            "given. Use an unstructured sparsity such as '50%', or allocation='uniform'.",
        )
        if len(self.capabilities) != 1 or self.capabilities[0] not in ("auto", "none"):
            for name in self.capabilities:
                if name not in CAPABILITIES:
                    raise unknown("capability", name, (*CAPABILITIES, "auto", "none"))
        if self.suite is not None and self.suite not in SUITES:
            raise unknown("suite", self.suite, SUITES)
        for name, least in (("samples", 1), ("length", 8), ("micro_batch", 1), ("limit", 1)):
            value = getattr(self, name)
            require(value is None or value >= least, f"{name} must be at least {least}; {value} was given.")
        require(0 < self.damping < 1, f"damping is a share of the mean diagonal in (0, 1); {self.damping} was given.")
        require(0 <= self.max_overlap <= 1, f"max_overlap is a share, 0 to 1; {self.max_overlap} was given.")
        require(self.seed >= 0, f"seed must not be negative; {self.seed} was given.")

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
    (`"{question}\\n{answer}"`), `"chat:COLUMN"`, or the name of a reader in `calibration/sources.py`. `written` names the
    way in which the model wrote the text itself (`"self-cal"`, `"sgs"`, `"proposals"`) and is empty for text from elsewhere;
    only such text may serve no capability in particular (`"any"`). `pool` says what the samples were made from. Of several
    subsets (`"algebra+geometry"`) one row each is read in turn."""

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
    written: str = ""
    pool: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(bool(self.name), "A source needs a name.")
        require(
            self.name.isprintable(), f"A source's name is one line of printable characters; {self.name!r} was given."
        )
        allowed = (*CAPABILITIES, ANY) if self.written else CAPABILITIES
        if self.capability not in allowed:
            raise unknown(f"capability of source {self.name!r}", self.capability, allowed)
        require(not (self.repo and self.path), f"Source {self.name!r} has both a repo and a path; give one of them.")


@dataclass(frozen=True)
class SampleProfile(Record):
    """What one sample is like; `docs/metrics.md` defines each metric. `tokens` is its length; the rates are over its token
    4-grams; `unigram_entropy` is in bits a token, `model_entropy` in nats. Records of the first release lack the last four.
    """

    perplexity: float
    duplicate_rate: float
    collision_probability: float
    tokens: int
    type_token_ratio: float | None = None
    unigram_entropy: float | None = None
    compression_ratio: float | None = None
    model_entropy: float | None = None


@dataclass(frozen=True)
class SourceProfile(Record):
    """The same over all measured samples of one source; `perplexity` is exp of the mean negative log-likelihood."""

    name: str
    capability: str
    samples: int
    perplexity: float
    duplicate_rate: float
    collision_probability: float
    type_token_ratio: float | None = None
    unigram_entropy: float | None = None
    compression_ratio: float | None = None
    model_entropy: float | None = None


@dataclass(frozen=True)
class CalibrationRow(Record):
    """One sample of a CalibrationSet: the source and the index in its pool, its group (a capability), its weight in H."""

    origin: str
    index: int
    group: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.weight < math.inf, f"A row's weight must be positive; {self.weight:g} was given.")


@dataclass(frozen=True, eq=False)
class CalibrationSet(Record):
    """Token ids `[samples, length]` (int64) with one row of provenance each, in the order in which they are used.

    `normalise` says how the rows make a layer's Hessian: `"none"`: one sum, each row with its weight; `"trace"`: one sum a
    group, each divided by its trace, added with the groups' mean row weights; `"minimax"`: the same, with weights that are
    then moved toward the group that loses most.
    """

    input_ids: Any  # numpy.ndarray; this module imports no numpy, so that the command line starts fast
    rows: tuple[CalibrationRow, ...]
    normalise: str = "none"

    def __post_init__(self) -> None:
        import numpy as np

        if self.normalise not in NORMALISE:
            raise unknown("normalise", self.normalise, NORMALISE)

        ids = np.ascontiguousarray(self.input_ids, dtype=np.int64)
        require(ids.ndim == 2 and ids.size > 0, f"input_ids must be [samples, length]; got shape {ids.shape}.")
        require(len(ids) == len(self.rows), f"{len(ids)} samples but {len(self.rows)} rows.")
        ids.setflags(write=False)
        object.__setattr__(self, "input_ids", ids)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that makes the Hessians: shape, ids, groups, weights, and how they are normalised."""
        made = (self.input_ids.shape, [(r.group, r.weight) for r in self.rows], self.normalise)
        digest = hashlib.sha256(repr(made).encode())
        digest.update(self.input_ids.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Mix(Record):
    """Which samples of which source were taken, and why. `objective` is J and `parts` its terms (IGSP only);
    `trace` holds J after each choice; `normalise` is that of the `CalibrationSet`."""

    rule: MixRule
    quotas: dict[str, int]
    shares: dict[str, float]
    note: str = ""
    objective: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    trace: tuple[float, ...] = ()
    normalise: str = "none"


# --------------------------------------------------------------------------------------------- pruning


@dataclass(frozen=True)
class LayerReport(Record):
    """One pruned matrix. `relative_error` is tr(D H D^T) / tr(W H W^T); `rescue` names what saved a bad Hessian.

    Of an expert's matrix `routed` is the number of tokens that the router sent to the expert; where they were too few the
    matrix is `starved`, and was pruned for all tokens of its layer.
    """

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
    routed: int | None = None
    starved: bool = False


@dataclass(frozen=True)
class Untouched(Record):
    """A matrix that was not pruned, and why; where the sparsity left it dense, the reason begins with `LEFT_DENSE`."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class PruneReport(Record):
    """All layers of a run. `replays` is the number of block forwards beyond the first that each micro-batch cost."""

    pattern: Sparsity
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

    @property
    def experts(self) -> dict[str, bool]:
        """The name of every expert, and whether one of its matrices was starved."""
        found: dict[str, bool] = {}
        for layer in self.layers:
            if layer.routed is not None:
                name = layer.module.rpartition(".")[0]
                found[name] = found.get(name, False) or layer.starved
        return found


@dataclass(frozen=True)
class Plan(Record):
    """What a run will do, before it does it. `modules` counts the matrices that are pruned, those of `experts` among them;
    `written` counts the tokens that the model writes for calibration; memory is in bytes by place; seconds are an estimate
    from measured rates, of the pruning alone. `streamed`: blocks are read from disk in their turn; `activations` says where
    the hidden states between them are kept. Of several `processes`, memory is that of each of them."""

    model: str
    pattern: Sparsity
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
    written: int = 0
    experts: int = 0
    allocation: str = "uniform"
    streamed: bool = False
    activations: str = "device"
    processes: int = 1


# ---------------------------------------------------------------------------------------- capabilities


@dataclass(frozen=True)
class TaskScore(Record):
    """One task: `value` is the mean of `item_scores` (each in [0, 1]); `chance` is the score of guessing. `fingerprint` is
    the SHA-256 of all that was asked and how it was scored; it is empty in records of runs that did not keep it. `shots`
    counts the examples in a prompt; `data` says where the items are from."""

    task: str
    capability: str
    metric: str
    chance: float
    item_scores: tuple[float, ...]
    fingerprint: str = ""
    shots: int = 0
    data: str = ""

    def __post_init__(self) -> None:
        require(bool(self.item_scores), f"Task {self.task!r} has no items.")

    @property
    def value(self) -> float:
        return sum(self.item_scores) / len(self.item_scores)


@dataclass(frozen=True)
class Scores(Record):
    """All tasks of one model, and with the reason the capabilities that could not be measured, and the tasks that are
    missing from those that were."""

    tasks: tuple[TaskScore, ...]
    not_measured: dict[str, str] = field(default_factory=dict)
    missing_tasks: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskOverlap(Record):
    """How many items of a task share 13 words in a row with the calibration set: by source, and together those of sources
    that are not exempt. `short` items have fewer words, so that nothing can be said about them."""

    task: str
    items: int
    overlapping: int
    short: int
    sources: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskRetention(Record):
    """One task before and after: the means of its items' scores. `shots`, `data` and `chance` are those of the `TaskScore`;
    `repo` is the data set on the Hub that the items are from, empty for others. `retention` and `interval` are defined as
    for a capability. Records of earlier releases lack all of these."""

    task: str
    capability: str
    metric: str
    items: int
    dense: float
    sparse: float
    shots: int = 0
    data: str = ""
    chance: float = 0.0
    repo: str = ""
    retention: float | None = None
    interval: tuple[float, float] | None = None


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
class CapabilityComparison(Record):
    """One capability of two runs; `difference` is the retention of the first minus that of the second, `interval` its 95 %
    bootstrap interval over the items, paired between all four models. Both are None where a retention is undefined."""

    first: CapabilityRetention
    second: CapabilityRetention
    difference: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class TaskComparison(Record):
    """One task of two sparse models: their scores, on how many items only one of them is right, and the p-value of
    McNemar's exact test, None for scores that are not 0 or 1."""

    task: str
    capability: str
    items: int
    first: float
    second: float
    only_first: int
    only_second: int
    p_value: float | None


@dataclass(frozen=True)
class RunComparison(Record):
    """Two runs over the tasks that both have; `unpaired` names the other tasks. `totals` are the two total retentions, None
    where the two are means over different capabilities."""

    first: str
    second: str
    capabilities: tuple[CapabilityComparison, ...]
    tasks: tuple[TaskComparison, ...]
    totals: tuple[float, float] | None
    unpaired: tuple[str, ...] = ()


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
    """One finished run, from which card and figures are drawn without a model. `samples` profiles `rows`, one by one.
    Records of the first release lack `tasks`."""

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
    overlaps: tuple[TaskOverlap, ...] = ()
    tasks: tuple[TaskRetention, ...] = ()
