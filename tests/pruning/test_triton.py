# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the reference: on the GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


triton = pytest.importorskip("triton", reason="triton is not installed")

from optimum_calibprune.pruning.hessian import Hessian  # noqa: E402
from optimum_calibprune.pruning.kernels import (  # noqa: E402
    TORCH,
    Kernels,
    reference,
    triton_gram,
    triton_kernels,
    triton_select,
    triton_sweep,
)
from optimum_calibprune.pruning.sparsegpt import solve_together, sweep_windows_  # noqa: E402
from optimum_calibprune.records import SparsityPattern  # noqa: E402


INTERPRETED = not isinstance(triton_sweep._sweep, triton.JITFunction)
DEVICE = "cpu" if INTERPRETED else "cuda"
assert INTERPRETED or torch.cuda.is_available(), (
    "without a GPU, TRITON_INTERPRET=1 must be set before triton is imported"
)

BY_COLUMN = pytest.mark.parametrize("by_column", [False, True], ids=["by-row", "by-column"])


@pytest.fixture(autouse=True)
def repaired_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 cannot take a range's end from a tensor with NumPy 2.4 (its issue 9171), nor multiply bf16."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patched(tensor: type, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widened(handle: object) -> object:
        if handle.data.dtype != np.uint16:  # which stands for bf16
            return handle
        numbers = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(numbers, triton.language.float32)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *others: dot(self, widened(a), widened(b), *others),
    )


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Framed:
    """A copy of `inside` as a view into a larger tensor full of `around`; `by_column`: rows are contiguous."""

    def __init__(self, inside: Tensor, by_column: bool = False, around: float = 7.0) -> None:
        rows, columns = inside.shape
        frame = torch.full((columns + 5, rows + 3) if by_column else (rows + 3, columns + 5), around)
        self.frame = frame.to(inside.dtype).to(DEVICE)
        self.view = (self.frame.t() if by_column else self.frame)[2 : 2 + rows, 4 : 4 + columns]
        self.view.copy_(inside)
        self.around = around

    def result(self) -> Tensor:
        """What is inside, after a look at what is around it."""
        inside = self.view.cpu().clone()
        self.view.fill_(self.around)
        assert (self.frame == torch.full_like(self.frame, self.around)).all(), "written outside"
        self.view.copy_(inside)
        return inside


def assert_near(found: Tensor, expected: Tensor, bound: float = 1e-6) -> None:
    assert found.isfinite().all()
    assert (found.double() - expected.double()).norm() <= bound * expected.double().norm()


# ----------------------------------------------------------------------------------------------- sweep


def window(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, a mask of about half, and an upper triangular factor with a positive diagonal."""
    W = random(rows, width, seed=width) * 2 - 1
    U = (random(width, width, seed=1) * 2 - 1).triu(1) / width
    U.diagonal().copy_(random(width, seed=2) + 0.5)
    return W.to(dtype), random(rows, width, seed=rows) < 0.5, U.to(dtype)


def check_sweep(rows: int, width: int, n: int, m: int, by_column: bool, dtype: torch.dtype = torch.float32) -> None:
    W, mask, U = window(rows, width, dtype)
    expected = W.clone(), torch.empty_like(W), mask.clone()
    reference.sweep_(*expected, U, n, m)
    poisoned = Framed(U + torch.full_like(U, torch.nan).tril(-1), around=torch.nan)
    found = Framed(W, by_column), Framed(torch.full_like(W, torch.nan), by_column), Framed(mask, by_column, True)
    triton_sweep.sweep_(*(tensor.view for tensor in found), poisoned.view, n, m)
    new, errors, chosen = (tensor.result() for tensor in found)
    assert torch.equal(chosen, expected[2])
    bound = 1e-6 if dtype == torch.float32 else 1e-14
    assert_near(new, expected[0], bound)
    assert_near(errors, expected[1], bound)
    assert not new[chosen].any() and not new[chosen].signbit().any()
    assert not errors[~chosen].any()


@BY_COLUMN
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 1), (1, 37), (33, 20), (3, 128)])
def test_sweep_with_a_given_mask(rows: int, width: int, by_column: bool) -> None:
    check_sweep(rows, width, 0, 0, by_column)


@BY_COLUMN
@pytest.mark.parametrize(
    ("rows", "width", "n", "m"),
    [(1, 4, 1, 4), (35, 20, 2, 4), (3, 128, 2, 4), (3, 16, 8, 16), (3, 45, 3, 5), (5, 6, 0, 2), (4, 6, 6, 6)],
)
def test_sweep_chooses_n_of_m(rows: int, width: int, n: int, m: int, by_column: bool) -> None:
    check_sweep(rows, width, n, m, by_column)


@BY_COLUMN
@pytest.mark.parametrize(("rows", "width", "n", "m"), [(2, 40, 10, 20), (5, 128, 64, 128), (5, 100, 30, 100)])
def test_sweep_chooses_in_groups_wider_than_a_step(rows: int, width: int, n: int, m: int, by_column: bool) -> None:
    check_sweep(rows, width, n, m, by_column)


@pytest.mark.parametrize(("n", "m"), [(0, 0), (2, 4), (10, 20)])
def test_sweep_in_float64(n: int, m: int) -> None:
    check_sweep(3, 40, n, m, True, torch.float64)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (5, 20)])
@pytest.mark.parametrize("values", [[0.25], [0.0, -1.0, 1.0, 2.0], [0.0, 1e-45, -1e-38, 1.0, -3e38]])
def test_ties_in_a_group_go_by_position(values: list[float], n: int, m: int) -> None:
    W = torch.tensor(values)[(random(8, 20, seed=m) * len(values)).long()]
    mask, expected = torch.zeros(8, 20, dtype=torch.bool), torch.zeros(8, 20, dtype=torch.bool)
    reference.sweep_(W.clone(), torch.empty_like(W), expected, torch.eye(20), n, m)
    mask = mask.to(DEVICE)
    triton_sweep.sweep_(W.to(DEVICE), torch.empty_like(W, device=DEVICE), mask, torch.eye(20, device=DEVICE), n, m)
    assert torch.equal(mask.cpu(), expected)


def test_division_is_exact() -> None:
    """Errors of one column are quotients; an approximate division misses the last bit of some."""
    W, U = (random(1000, 1) + 1).float(), torch.tensor([[1.3]])
    errors, mask = torch.empty_like(W, device=DEVICE), torch.ones(1000, 1, dtype=torch.bool, device=DEVICE)
    exact = (W.double() / U.double()).float()
    triton_sweep.sweep_(W.to(DEVICE), errors, mask, U.to(DEVICE))
    assert torch.equal(errors.cpu(), exact)


@pytest.mark.parametrize(("n", "m"), [(0, 0), (2, 4)])
def test_sweep_is_the_same_however_it_is_tiled(n: int, m: int) -> None:
    W, given, U = (tensor.to(DEVICE) for tensor in window(20, 24, torch.float64))
    results = []
    for tiling in ({}, {"step": 8, "held": 4}, {"step": 32, "held": 2}):
        new, errors, mask = W.clone(), torch.empty_like(W), given.clone()
        triton_sweep.sweep_(new, errors, mask, U, n, m, **tiling)
        results.append((new, errors, mask))
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


# ---------------------------------------------------------------------------------------------- select

SCORES = {
    "distinct": None,
    "ties": [0.0, -1.0, 1.0, 2.0, 3.0],
    "equal": [0.25],
    "extreme": [0.0, 1e-45, -1e-38, 1.0, 3e38, torch.inf],
}


def weights(rows: int, width: int, kind: str, seed: int = 0) -> Tensor:
    numbers, values = random(rows, width, seed=seed), SCORES[kind]
    return (numbers * 2 - 1).float() if values is None else torch.tensor(values)[(numbers * len(values)).long()]


def check_select(W: Tensor, diagonal: Tensor, rows: tuple[int, ...], counts: list[int], by_column: bool) -> None:
    expected = torch.empty(W.shape, dtype=torch.bool)
    reference.select_(expected, W, diagonal, rows, counts)
    for poison in (torch.ones_like(expected), random(*W.shape) < 0.5):
        found = Framed(poison, by_column, True)
        factor = torch.diag(diagonal).to(DEVICE)
        triton_select.select_(found.view, Framed(W, by_column).view, factor.diagonal(), rows, counts)
        assert torch.equal(found.result(), expected)
    assert [int(part.sum()) for part in expected.split(rows)] == counts


@BY_COLUMN
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(
    ("rows", "width"), [((1,), 1), ((1,), 37), ((5, 2), 1), ((3, 40, 1), 7), ((32, 64), 16), ((70,), 128)]
)
@pytest.mark.filterwarnings("ignore:overflow encountered in divide")
def test_selection_equals_the_reference(rows: tuple[int, ...], width: int, kind: str, by_column: bool) -> None:
    W, diagonal = weights(sum(rows), width, kind), (random(width, seed=1) + 0.1).float()
    if kind == "ties":
        diagonal = torch.ones(width)
    for share in (0.0, 0.3):
        counts = [round(share * several * width) for several in rows]
        counts[0] = round((1 - share) * rows[0] * width)  # another one: all of them beside none of the others
        check_select(W, diagonal, rows, counts, by_column)


def test_ties_are_counted_over_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_select, "BEFORE", 2)
    W = weights(300, 3, "ties")
    for count in (1, 250, 251, 899):
        check_select(W, torch.ones(3), (4, 296), [5, min(count, 888)], True)


def test_one_more_count_marks_one_more() -> None:
    W, diagonal = weights(2, 9, "ties").to(DEVICE), torch.ones(9, device=DEVICE)
    before = torch.zeros(2, 9, dtype=torch.bool, device=DEVICE)
    for count in range(1, 19):
        mask = torch.empty_like(before)
        triton_select.select_(mask, W, diagonal, [2], [count])
        assert int(mask.sum()) == count
        assert (mask | ~before).all()
        before = mask


def test_selection_can_be_repeated_and_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scratch memory of one call is that of the next, unless the call did not come to its end."""
    rows, counts, diagonal = (40, 3), [301, 20], torch.ones(10, device=DEVICE)
    kernel = triton_select._count

    class Interrupted:
        launched = False

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            if self.launched:
                raise KeyboardInterrupt
            self.launched = True
            return kernel[grid]

    for seed in range(6):
        W = weights(43, 10, "distinct", seed)
        mask, expected = torch.empty(2, 43, 10, dtype=torch.bool)
        reference.select_(expected, W, diagonal.cpu(), rows, counts)
        W, mask = W.to(DEVICE), mask.to(DEVICE)
        if seed in (2, 3):
            monkeypatch.setattr(triton_select, "_count", Interrupted())
            with pytest.raises(KeyboardInterrupt):
                triton_select.select_(mask, W, diagonal, rows, counts)
            monkeypatch.setattr(triton_select, "_count", kernel)
        triton_select.select_(mask, W, diagonal, rows, counts)
        assert torch.equal(mask.cpu(), expected)


# ------------------------------------------------------------------------------------------------ gram


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@BY_COLUMN
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (3, 130), (64, 128), (150, 200)])
def test_gram_is_added_to_the_upper_triangle(tokens: int, columns: int, by_column: bool, dtype: torch.dtype) -> None:
    x, total = (random(tokens, columns, seed=1) * 2 - 1).to(dtype), random(columns, columns, seed=2).float()
    total += torch.full_like(total, torch.nan).tril(-1)
    found = Framed(total, by_column)
    for _ in range(2):
        triton_gram.add_gram_(found.view, Framed(x, by_column, torch.nan).view)
    exact = total.double() + 2 * x.double().t() @ x.double()
    assert_near(found.result().triu().nan_to_num(), exact.triu().nan_to_num(), 1e-5)  # tensor cores truncate
    assert found.view.triu().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_16_bit_products_are_those_of_fp32(dtype: torch.dtype) -> None:
    """5000 ones are 5000, and (1 + 2^-7)^2 has more bits than either type."""
    x = torch.ones(5000, 3, dtype=dtype, device=DEVICE)
    total = torch.full((3, 3), 0.25, device=DEVICE)
    triton_gram.add_gram_(total, x)
    assert (total.triu() == torch.full_like(total, 5000.25).triu()).all()
    total.zero_()
    triton_gram.add_gram_(total, torch.full((1, 3), 1 + 2**-7, dtype=dtype, device=DEVICE))
    assert (total.triu() == torch.full_like(total, (1 + 2**-7) ** 2).triu()).all()


@pytest.mark.parametrize(("rows", "columns", "group"), [(16, 16, 3), (16, 32, 8), (32, 16, 1), (64, 16, 2)])
def test_every_tile_is_added_once(rows: int, columns: int, group: int) -> None:
    x, total = (random(20, 100) * 2 - 1).half().to(DEVICE), torch.zeros(100, 100, device=DEVICE)
    triton_gram.add_gram_(total, x, rows=rows, columns=columns, tokens=16, group=group)
    assert_near(total.triu().cpu(), (x.double().t() @ x.double()).triu().cpu())


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float64, torch.bfloat16)])
def test_other_types_are_summed_by_torch(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    total, x = random(20, 20, seed=1).to(DEVICE, dtypes[0]), random(50, 20, seed=2).to(DEVICE, dtypes[1])
    expected = total.clone()
    reference.add_gram_(expected, x)
    triton_gram.add_gram_(total, x)
    assert_near(total.triu().cpu(), expected.triu().cpu())


# -------------------------------------------------------------------------------------------- launches


class Operations(TorchDispatchMode):
    """Names the operations of torch that would be launched: views and empty tensors are none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if not (func.is_view or "empty" in func.name()):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    kind = type(triton_sweep._sweep)
    original, operations = kind.__getitem__, Operations()

    def counting(self: object, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, **kwargs: object) -> None:
            operations.names.append(self.__name__)
            with _disable_current_modes():
                original(self, grid)(*args, **kwargs)

        return launch

    with monkeypatch.context() as patched, operations:
        patched.setattr(kind, "__getitem__", counting)
        yield operations.names


def test_number_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, counts = (40, 5), (100, 7)
    W, mask, U = (tensor.to(DEVICE) for tensor in window(45, 8, torch.float32))
    x, total = torch.ones(5, 8, dtype=torch.float16, device=DEVICE), torch.zeros(8, 8, device=DEVICE)
    triton_select.select_(mask, W, U.diagonal(), rows, counts)  # makes its tables
    with launches(monkeypatch) as found:
        triton_select.select_(mask, W, U.diagonal(), rows, counts)
    assert found == ["_count", "_count", "_count", "_mark"]
    for n, m in ((0, 0), (2, 4)):
        with launches(monkeypatch) as found:
            triton_sweep.sweep_(W, torch.empty_like(W), mask, U, n, m)
        assert found == ["_sweep"]
    with launches(monkeypatch) as found:
        triton_gram.add_gram_(total, x)
    assert found == ["_add_gram"]


# ------------------------------------------------------------------------------------------ whole solver


def layer(columns: int, *rows: int) -> tuple[list[Tensor], Tensor]:
    X = random(2 * columns, columns, seed=3) - 0.5
    return [(random(several, columns, seed=several) - 0.5).bfloat16().to(DEVICE) for several in rows], X.bfloat16()


def hessian_of(X: Tensor, kernels: Kernels) -> Hessian:
    H = Hessian(X.shape[1], DEVICE, kernels=kernels)
    H.add(X.to(DEVICE))
    return H


@pytest.mark.parametrize("asked", ["60%", "2:4"])
def test_the_solver_gives_what_it_gives_with_torch(asked: str) -> None:
    weights, X = layer(300, 40, 7)
    found, expected = (
        solve_together(weights, hessian_of(X, kernels), SparsityPattern.parse(asked))
        for kernels in (triton_kernels(), TORCH)
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.mask, other.mask)
        assert_near(one.weight, other.weight, 2e-3)  # what one rounding to bf16 may move
        assert (one.zeros_asked, one.zeros_found) == (other.zeros_asked, other.zeros_found)
        assert one.relative_error == pytest.approx(other.relative_error, rel=1e-3)


@pytest.mark.parametrize(("asked", "most"), [("60%", 6), ("2:4", 2)])
def test_a_column_block_takes_one_sweep_and_few_launches(
    asked: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted as what the fourth window adds to three; factorisations stand apart."""
    added = []
    for columns in (3 * 128, 4 * 128):
        weights, X = layer(columns, 5, 3)
        kernels, U = triton_kernels(), hessian_of(X, triton_kernels()).factor().U
        W = torch.cat(weights).t().float().contiguous()
        sweep_windows_(W.clone(), U, [SparsityPattern.parse(asked)] * 2, [5, 3], kernels)  # makes its tables
        with launches(monkeypatch) as found:
            sweep_windows_(W, U, [SparsityPattern.parse(asked)] * 2, [5, 3], kernels)
        added.append(Counter(found))
    of_window = added[1] - added[0]
    assert of_window["_sweep"] == 1
    assert of_window.total() == most


# --------------------------------------------------------------------------------------------- compiling


@pytest.mark.skipif(not INTERPRETED, reason="the other tests have compiled them")
@pytest.mark.parametrize("arguments", ["--patterns 0:0 2:4", "--patterns 30:100 --by-row"])
def test_kernels_compile_for_hopper(arguments: str, tmp_path: Path) -> None:
    """The interpreter takes much that does not compile; compiling needs no GPU."""
    script = Path(__file__).parents[2] / "benchmarks" / "compile_kernels.py"
    shown = subprocess.run(
        [sys.executable, script, *arguments.split()],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    for kernel, times in {"_sweep": arguments.count(":"), "_count": 3, "_mark": 1, "_add_gram": 2}.items():
        assert shown.stdout.split().count(kernel) == times
