# SPDX-License-Identifier: Apache-2.0
"""When training ends, and how the learning rate gets there: warm-up, stable, decay."""

from __future__ import annotations

from dataclasses import dataclass


STABLE_UNTIL = 0.35  # of the budget; the rest is a linear decay
LAST = 0.02  # the learning rate never falls below this part of its peak


@dataclass(frozen=True)
class Budget:
    """Tokens, minutes, or both: then what is used up first ends the run."""

    tokens: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        given = [amount for amount in (self.tokens, self.minutes) if amount is not None]
        if not given or min(given) <= 0:
            raise ValueError(f"tokens {self.tokens}, minutes {self.minutes}: give one of them, above zero.")

    def used(self, tokens: int, seconds: float) -> float:
        """The part of the budget that is used up: 1 or more ends the run."""
        by_tokens = tokens / self.tokens if self.tokens is not None else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes is not None else 0.0
        return max(by_tokens, by_time)


def learning_rate(step: int, used: float, warmup: int) -> float:
    """Part of the peak learning rate at a step (0 is the first), when `used` of the budget is used up."""
    rising = min(1.0, (step + 1) / warmup)
    falling = 1.0 if used < STABLE_UNTIL else max(LAST, (1 - used) / (1 - STABLE_UNTIL))
    return rising * falling
