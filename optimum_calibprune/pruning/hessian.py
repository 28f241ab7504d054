# SPDX-License-Identifier: Apache-2.0
"""The Hessian of a linear layer's squared output error: accumulate X^T X, then factor its inverse safely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """`U` `[columns, columns]`, upper triangular with H^-1 = U^T U for the damped H; `dead` marks inputs that never fire.

    `rescue` is empty, or says what it took to factor (float64, more damping); `damping` is the share that was used.
    """

    U: Tensor
    dead: Tensor
    damping: float
    rescue: str


class Hessian:
    """H = 2/n X^T X over the n input tokens of one linear layer (Frantar and Alistarh 2023, section 3).

    The sum is kept in `dtype` (fp32 in use, float64 for oracles). It never passes through 16 bits: 16-bit inputs are
    multiplied with fp32 accumulation and fp32 result on CUDA, and cast to `dtype` first elsewhere.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.tokens = 0.0
        self._sum = torch.zeros(columns, columns, device=device, dtype=dtype)
        self._factors: dict[float, Factor] = {}

    @torch.no_grad()
    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Adds inputs `[..., columns]`; with `weights` `[samples]`, the rows of `x[i]` count `weights[i]` times."""
        rows = x.flatten(0, -2)
        count = float(len(rows))
        if weights is not None:
            per_row = weights.repeat_interleave(len(rows) // len(weights))
            count = float(per_row.sum())
            rows = rows.to(self._sum.dtype) * per_row.to(self._sum).sqrt()[:, None]
        if rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16) and self._sum.dtype == torch.float32:
            self._sum += torch.mm(rows.t(), rows, out_dtype=torch.float32)
        else:
            rows = rows.to(self._sum.dtype)
            self._sum.addmm_(rows.t(), rows)
        self.tokens += count
        self._factors.clear()

    def merge(self, other: Hessian) -> None:
        """Adds what another Hessian of the same inputs has seen."""
        self._sum += other._sum.to(self._sum)
        self.tokens += other.tokens
        self._factors.clear()

    @classmethod
    @torch.no_grad()
    def balanced(cls, parts: Sequence[Hessian], weights: Sequence[float]) -> Hessian:
        """H = sum_g w_g H_g / tr(H_g) of Hessians of the same inputs, the weights normalised to sum to 1.

        The scale of no part counts, only its shape. A part without energy (all inputs dead) adds nothing but its tokens.
        """
        total = cls(len(parts[0]._sum), parts[0]._sum.device, parts[0]._sum.dtype)
        total.tokens = sum(part.tokens for part in parts)
        for part, weight in zip(parts, weights, strict=True):
            trace = float(part._sum.diagonal().sum(dtype=torch.float64))
            if trace != 0:
                total._sum.add_(part._sum, alpha=weight / sum(weights) / trace * total.tokens / 2)
        return total

    @property
    def finite(self) -> bool:
        """False as soon as a NaN or an infinity has entered: it then stands on the diagonal."""
        return bool(self._sum.diagonal().isfinite().all())

    @property
    def matrix(self) -> Tensor:
        """H, undamped, `[columns, columns]`; `ValueError` where it has seen no tokens, or NaN or infinity."""
        if self.tokens == 0:
            raise ValueError("The Hessian has no tokens; add inputs first.")
        matrix = self._sum * (2.0 / self.tokens)
        if not bool(matrix.diagonal().isfinite().all()):
            raise ValueError("The Hessian holds NaN or infinity; the calibration inputs of this layer are not finite.")
        return matrix

    def factor(self, damping: float = 0.01) -> Factor:
        """The factor of the inverse, computed once for all layers that share this input.

        `damping` times the mean of the diagonal is added to it. If the factorisation fails: float64 at the same damping,
        then 10 %, then 100 % (never less than was asked); then `ValueError`.
        """
        if damping not in self._factors:
            self._factors[damping] = _factor(self.matrix, damping)
        return self._factors[damping]


def _factor(H: Tensor, damping: float) -> Factor:
    dead = H.diagonal() == 0
    more = [share for share in (0.1, 1.0) if share > damping]
    for dtype, share in [(H.dtype, damping), *((torch.float64, share) for share in (damping, *more))]:
        damped = H.to(dtype, copy=True)
        mean = damped.diagonal().mean()
        damped.diagonal().add_(share * mean)
        damped.diagonal()[dead] = 1.0
        U = inverse_factor(damped)
        if U is not None:
            used = [] if dtype == H.dtype else [str(dtype).removeprefix("torch.")]
            used += [] if share == damping else [f"damping {share:.0%}"]
            return Factor(U.to(H.dtype), dead, share, ", ".join(used))
    raise ValueError("The Hessian could not be factored, not even in float64 with 100 % damping.")


def inverse_factor(H: Tensor) -> Tensor | None:
    """Upper triangular `U` with H^-1 = U^T U, or None where H is not positive definite as far as its dtype can tell.

    With P the reversal of rows and columns and P H P = L L^T: H = (P L P)(P L P)^T, and U = P L^-1 P is the inverse of
    its left part: one Cholesky and one triangular inverse. A pivot that is all rounding error counts as a failure:
    Cholesky passes a singular matrix where the error happens to be positive.
    """
    reversed_H = H.flip(0, 1)
    L, info = torch.linalg.cholesky_ex(reversed_H)
    lost = L.diagonal().square() <= 16 * torch.finfo(H.dtype).eps * reversed_H.diagonal()
    if int(info) != 0 or bool(lost.any()):
        return None
    identity = torch.eye(len(H), device=H.device, dtype=H.dtype)
    U = torch.linalg.solve_triangular(L, identity, upper=False).flip(0, 1)
    return U if bool(U.isfinite().all()) else None
