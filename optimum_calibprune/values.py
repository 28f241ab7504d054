# SPDX-License-Identifier: Apache-2.0
"""The values that a user writes as text: a sparsity, the rule of a mix; and the names that are allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from .record import unknown


CAPABILITIES = ("general", "commonsense", "code", "math")
ANY = "any"  # of text that the model wrote unguided
SELF = "self"  # the source that is the model itself, as a user names it
HUB = "hub:"  # what the name of a published calibration set begins with
METHODS = ("sparsegpt", "wanda", "magnitude")
SEQUENTIAL = ("module", "block")
NORMALISE = ("none", "trace", "minimax")
ALLOCATIONS = ("uniform", "owl")
SUITES = ("pocket", "quick", "full")

# The options of each mix, with their defaults; what they mean stands where they are used.
OPTIONS: dict[str, dict[str, float]] = {
    "single": {},
    "uniform": {},
    "weighted": {},
    "self-cal": {"t_initial": 1.0, "t_final": 1.0, "tokens": 10},
    "sgs": {"prefix": 4, "temperature": 0.6, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.2, "keep": 0.8},
    "igsp": {
        **{"temperature": 0.7, "oversample": 4, "level": 3, "imbalance": 0},
        **{"general": 1, "commonsense": 1, "code": 2, "math": 2},
    },
    "cola": {"layers": 1},
    "balanced": {"worst": 0},
    "mixcal": {"general": 0.5},
}
MIXES = tuple(OPTIONS)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class SparsityPattern:
    """Which share of the weights is zero: unstructured (`"60%"`), or n:m (`"2:4"`: n of every m may be non-zero)."""

    fraction: float
    n: int | None = None
    m: int | None = None

    def __post_init__(self) -> None:
        require(
            0 < self.fraction < 1, f"Sparsity must lie between 0 and 1, both excluded; {self.fraction:g} was given."
        )
        require((self.n is None) == (self.m is None), "An n:m pattern needs both n and m.")
        if self.n is not None and self.m is not None:
            require(0 < self.n < self.m <= 128, f"An n:m pattern needs 0 < n < m <= 128; {self.n}:{self.m} was given.")
            require(
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
                require(0 < n < m <= 128, f"An n:m pattern needs 0 < n < m <= 128; {text!r} was given.")
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


EVERY_MODULE = "*"
DENSE = "dense"


@dataclass(frozen=True)
class Sparsity:
    """What each module is pruned to: the pattern of the first rule whose glob fits its full name; None leaves it dense.

    `"60%"`, `0.6` and `"2:4"` hold for every module. By module: `"*.mlp.*=70%,*.o_proj=dense,*=50%"`, or a mapping
    `{"*.mlp.*": 0.7, "*.o_proj": "dense", "*": 0.5}`, read in its order. Globs are those of `fnmatch` (`*`, `?`, `[01]`)
    on names such as `model.layers.3.mlp.up_proj`, and case counts. A sparsity of 0 means dense, too.
    """

    rules: tuple[tuple[str, SparsityPattern | None], ...]

    def __post_init__(self) -> None:
        require(bool(self.rules), "A sparsity by module names at least one, as in '*.mlp.*=70%,*=50%'.")
        for glob, _ in self.rules:
            require(
                bool(glob) and not set(glob) & set(",= \t\n"),
                f"{glob!r} is no pattern for names of modules; write one such as '*.mlp.*', without ',', '=' and spaces.",
            )
        require(len(dict(self.rules)) == len(self.rules), "A sparsity by module names each pattern once.")
        require(any(pattern for _, pattern in self.rules), f"{self} leaves every module dense.")

    @classmethod
    def parse(cls, given: str | float | SparsityPattern | Mapping[str, Any] | Sparsity) -> Sparsity:
        """What the class says, as text, number or mapping; `ValueError` for anything else."""
        if isinstance(given, cls):
            return given
        if isinstance(given, Mapping):
            return cls(tuple((str(glob).strip(), _pattern_or_dense(asked)) for glob, asked in given.items()))
        if not isinstance(given, str) or "=" not in given:
            return cls(((EVERY_MODULE, SparsityPattern.parse(given)),))
        parts = [part.rpartition("=") for part in given.split(",")]
        return cls(tuple((glob.strip(), _pattern_or_dense(asked)) for glob, _, asked in parts))

    def of(self, module: str) -> SparsityPattern | None:
        """The pattern of one module, by its full name; `ValueError` where no glob fits it."""
        return dict(self.rules)[self.glob_of(module)]

    def glob_of(self, module: str) -> str:
        """The glob that decides about a module; `ValueError` where none fits it."""
        for glob, _ in self.rules:
            if fnmatchcase(module, glob):
                return glob
        raise ValueError(f"The sparsity {self} says nothing about {module}; end it with '*=50%', or with '*={DENSE}'.")

    def check(self, modules: Iterable[str]) -> None:
        """Raises `ValueError` for a module that no glob fits, and for a glob that decides about none of the modules."""
        modules = list(modules)
        used = {self.glob_of(module) for module in modules}
        for glob, _ in self.rules:
            if glob not in used and any(fnmatchcase(module, glob) for module in modules):
                raise ValueError(
                    f"{glob!r} of the sparsity {self} decides about no module: the first pattern that fits counts, and "
                    "those before it fit all that it fits. Write it before them."
                )
            require(
                glob in used,
                f"{glob!r} of the sparsity {self} fits no module that can be pruned; their names are like {modules[0]!r}.",
            )

    @property
    def structured(self) -> tuple[SparsityPattern, ...]:
        """Those of its patterns that are n:m."""
        return tuple(pattern for _, pattern in self.rules if pattern is not None and pattern.m is not None)

    @property
    def by_module(self) -> bool:
        """Whether it is not one pattern for all."""
        return len(self.rules) > 1 or self.rules[0][0] != EVERY_MODULE

    def __str__(self) -> str:
        if not self.by_module:
            return str(self.rules[0][1] or DENSE)
        return ",".join(f"{glob}={pattern or DENSE}" for glob, pattern in self.rules)


def _pattern_or_dense(given: Any) -> SparsityPattern | None:
    if not isinstance(given, SparsityPattern) and str(given).strip() in (DENSE, "0", "0.0", "0%"):
        return None
    return SparsityPattern.parse(given)


@dataclass(frozen=True)
class MixRule:
    """How samples are chosen: a kind of `MIXES`, alone or with what belongs to it after a colon.

    `"single:NAME"`, `"weighted:NAME=w,..."` with positive weights of sources, or the options of a kind, as in
    `"self-cal:t_initial=1.5,tokens=20"`; `option` gives what was set, else the default in `OPTIONS`.
    """

    kind: str
    weights: tuple[tuple[str, float], ...] = ()
    options: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in MIXES:
            raise unknown("mix", self.kind, MIXES)
        if self.kind == "single":
            require(
                len(self.weights) == 1 and bool(self.weights[0][0]), "A single mix names its source: 'single:NAME'."
            )
        elif self.kind == "weighted":
            require(bool(self.weights), "A weighted mix names its sources: 'weighted:NAME=2,OTHER=1'.")
        else:
            require(not self.weights, f"The mix {self.kind!r} takes no source names.")
        for name, weight in self.weights:
            require(0 < weight < math.inf, f"The weight of {name!r} must be positive; {weight:g} was given.")
        require(len(dict(self.weights)) == len(self.weights), "A weighted mix names each source once.")
        for name, value in self.options:
            if name not in OPTIONS[self.kind]:
                raise _unknown_option(self.kind, name)
            require(0 <= value < math.inf, f"The option {name!r} must not be negative; {value:g} was given.")
        require(len(dict(self.options)) == len(self.options), f"{self.kind!r} takes each option once.")

    @classmethod
    def parse(cls, given: str | MixRule) -> MixRule:
        if isinstance(given, cls):
            return given
        kind, _, rest = given.strip().partition(":")
        if kind not in MIXES:
            raise unknown("mix", kind, MIXES)
        if kind == "single":
            return cls(kind, ((rest, 1.0),))
        parts = [part.partition("=") for part in rest.split(",") if part]
        try:
            pairs = tuple((name.strip(), float(value)) for name, _, value in parts)
        except ValueError:
            raise ValueError(f"{given!r}: each value is a number, as in 'weighted:c4=2,gsm8k=1'.") from None
        return cls(kind, pairs) if kind == "weighted" else cls(kind, options=pairs)

    def option(self, name: str) -> float:
        return (OPTIONS[self.kind] | dict(self.options))[name]

    def __str__(self) -> str:
        if self.kind == "single":
            return f"single:{self.weights[0][0]}"
        pairs = ",".join(f"{name}={value!r}".removesuffix(".0") for name, value in (*self.weights, *self.options))
        return f"{self.kind}:{pairs}" if pairs else self.kind


def _unknown_option(kind: str, name: str) -> ValueError:
    if not OPTIONS[kind]:
        return ValueError(f"The mix {kind!r} takes neither source names nor options; {name!r} was given.")
    return unknown(f"option of the mix {kind!r}", name, tuple(OPTIONS[kind]))


HALF = Sparsity(((EVERY_MODULE, SparsityPattern(0.5)),))  # the default sparsity
IGSP = MixRule("igsp")  # the default mix
