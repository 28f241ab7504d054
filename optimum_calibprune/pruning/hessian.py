# SPDX-License-Identifier: Apache-2.0
"""The Hessian of a linear layer's squared output error: accumulate X^T X, then factor its inverse safely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import Kernels, kernels_for
from .kernels.precision import full_precision
from .ranks import ALONE, Ranks
from .triangular import WIDTH, factor_, invert_, spans


DIVIDED = 2 * WIDTH  # columns; with no more than these every rank makes the factor: two blocks leave little to divide


@dataclass(frozen=True)
class Factor:
    """`U` `[columns, columns]`, upper triangular with H^-1 = U^T U for the damped H; `dead` marks inputs that never fire
    (None: there is none).

    `rescue` is empty, or says what it took to factor (float64, more damping); `damping` is the share that was used.
    """

    U: Tensor
    dead: Tensor | None
    damping: float
    rescue: str


class NotFinite(ValueError):
    """NaN or infinity has entered a Hessian."""


class NotFactored(ValueError):
    """A Hessian is not positive definite, whatever was added to its diagonal."""


class Hessian:
    """H = 2/n X^T X over the n input tokens of one linear layer (Frantar and Alistarh 2023, section 3).

    The sum is kept in `dtype` (fp32 in use, float64 for oracles), its upper triangle only. It never passes through 16
    bits: products of 16-bit inputs are exact, and are summed in fp32.
    """

    def __init__(
        self,
        columns: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        kernels: Kernels | None = None,
    ) -> None:
        self.tokens = 0.0
        self.sum = torch.zeros(columns, columns, device=device, dtype=dtype)  # X^T X; below the diagonal: anything
        self.kernels = kernels or kernels_for(self.sum.device, dtype)

    @torch.no_grad()
    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Adds inputs `[..., columns]`; with `weights` `[samples]` (on the CPU), the rows of `x[i]` count `weights[i]` times."""
        rows = x.flatten(0, -2)
        of_each = len(rows) // len(weights) if weights is not None else len(rows)
        if weights is not None:
            roots = weights.to(self.sum.dtype).sqrt().to(rows.device, non_blocking=True)
            rows = rows.to(self.sum.dtype) * roots.repeat_interleave(of_each)[:, None]
        self.kernels.add_gram_(self.sum, rows)
        self.tokens += of_each * (float(weights.sum()) if weights is not None else 1.0)

    def merge(self, other: Hessian) -> None:
        """Adds what another Hessian of the same inputs has seen."""
        self.sum += other.sum.to(self.sum)
        self.tokens += other.tokens

    def add_up(self, ranks: Ranks, to: int | None = None) -> None:
        """Makes it the Hessian of all ranks' tokens: everywhere, or on one rank (elsewhere it is of no use then)."""
        if ranks.size == 1:
            return
        tokens = torch.tensor(self.tokens, dtype=torch.float64, device=self.sum.device)
        ranks.add_up(tokens, to)
        self.tokens = float(tokens)
        for span in spans(len(self.sum)):
            ranks.add_up(self.sum[: span.stop, span], to)

    @classmethod
    @torch.no_grad()
    def balanced(cls, parts: Sequence[Hessian], weights: Sequence[float]) -> Hessian:
        """H = sum_g w_g H_g / tr(H_g) of Hessians of the same inputs, the weights normalised to sum to 1.

        The scale of no part counts, only its shape. A part without energy (all inputs dead) adds nothing but its tokens.
        """
        first = parts[0]
        total = cls(len(first.sum), first.sum.device, first.sum.dtype, first.kernels)
        total.tokens = sum(part.tokens for part in parts)
        for part, weight in zip(parts, weights, strict=True):
            trace = float(part.sum.diagonal().sum(dtype=torch.float64))
            if trace != 0:
                total.sum.add_(part.sum, alpha=weight / sum(weights) / trace * total.tokens / 2)
        return total

    @property
    def finite(self) -> Tensor:
        """A flag on the device, False as soon as a NaN or an infinity has entered: it then stands on the diagonal."""
        return self.sum.diagonal().isfinite().all()

    @property
    def diagonal(self) -> Tensor:
        """The diagonal of H, `[columns]`; raises what `check` raises."""
        self.check()
        return self.sum.diagonal() * (2.0 / self.tokens)

    @property
    def matrix(self) -> Tensor:
        """H, undamped, `[columns, columns]`; raises what `check` raises."""
        self.check()
        upper = (self.sum * (2.0 / self.tokens)).triu_()
        return upper + upper.triu(1).t()

    def check(self) -> None:
        """Raises `ValueError` where it has seen no tokens, `NotFinite` where NaN or infinity has entered."""
        self._check_tokens()
        if not bool(self.finite):
            raise NotFinite("The Hessian holds NaN or infinity; the calibration inputs of this layer are not finite.")

    def _check_tokens(self) -> None:
        if self.tokens == 0:
            raise ValueError("The Hessian has no tokens; add inputs first.")

    @torch.no_grad()
    def factor(self, damping: float = 0.01, ranks: Ranks = ALONE) -> Factor:
        """The factor of the inverse, for all layers that share this input.

        `damping` times the mean of the diagonal is added to it. If the factorisation fails: float64 at the same damping,
        then 10 %, then 100 % (never less than was asked); then `NotFactored`; `NotFinite` where NaN has entered. Several
        `ranks` that have the same Hessian do it together, and end alike.
        """
        self._check_tokens()
        dead = self.sum.diagonal() == 0
        more = [share for share in (0.1, 1.0) if share > damping]
        own = self.sum.dtype
        for dtype, share in [(own, damping), *((torch.float64, share) for share in (damping, *more))]:
            damped = self.sum.to(dtype, copy=True).mul_(2.0 / self.tokens)
            diagonal = damped.diagonal()
            diagonal.add_(share * diagonal.mean()).masked_fill_(dead, 1.0)
            factored, some_dead = torch.stack([inverse_factor_(damped, ranks), dead.any()]).tolist()
            if not factored:
                self.check()  # a NaN fails here, too
                continue
            used = [] if dtype == own else [str(dtype).removeprefix("torch.")]
            used += [] if share == damping else [f"damping {share:.0%}"]
            return Factor(damped.to(own), dead if some_dead else None, share, ", ".join(used))
        raise NotFactored("The Hessian could not be factored, not even in float64 with 100 % damping.")


def inverse_factor_(H: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Overwrites H by the upper triangular `U` with H^-1 = U^T U; reads its upper triangle only.

    With H = F F^T, F upper triangular (a Cholesky factorisation from the last column to the first), U is the inverse of F:
    one Cholesky and one triangular inverse, 2/3 n^3 operations. Several `ranks` that have the same H
    divide them, and end with the same U and flag.

    Returns:
        A flag on the device: False where H is not positive definite as far as its dtype can tell; U is of no use then. A
        pivot that is all rounding error counts as a failure: Cholesky passes a singular matrix where the error happens
        to be positive.
    """
    diagonal, together = H.diagonal().clone(), ranks if len(H) > DIVIDED else ALONE
    with full_precision():
        failed = factor_(H, together)
        lost = H.diagonal().square() <= 16 * torch.finfo(H.dtype).eps * diagonal
        invert_(H, together)
    finite = torch.stack(H.aminmax()).isfinite().all()  # NaN where there is one
    return ranks.agree(~(failed | lost.any()) & finite)
