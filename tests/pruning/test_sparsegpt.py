# SPDX-License-Identifier: Apache-2.0
"""The solver against computations that share nothing with it, on made-up layers and on those of real models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_calibprune import pocket
from optimum_calibprune.pruning.hessian import Hessian
from optimum_calibprune.pruning.sparsegpt import METHODS, Solution, solve, solve_together
from optimum_calibprune.records import SparsityPattern


STORIES = Path(__file__).resolve().parents[2] / "../shared/models/stories260K"
WINDOW = 128
Layers = dict[str, tuple[Tensor, Tensor]]  # name -> weight [rows, columns], inputs [tokens, columns]
pattern = SparsityPattern.parse


def hessian_of(X: Tensor, dtype: torch.dtype = torch.float64) -> Hessian:
    H = Hessian(X.shape[1], dtype=dtype)
    H.add(X)
    return H


def random_layer(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights and correlated inputs whose sizes differ from column to column, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    X = torch.randn(2 * columns + 10, columns, generator=generator, dtype=torch.float64) @ mixing
    X = X * torch.rand(columns, generator=generator, dtype=torch.float64).add(0.2)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), X


def windows(columns: int) -> list[slice]:
    return [slice(start, min(start + WINDOW, columns)) for start in range(0, columns, WINDOW)]


def output_error(W: Tensor, weight: Tensor, X: Tensor) -> float:
    """Squared error of the layer's outputs over their energy, from the inputs themselves."""
    W, weight, X = W.double(), weight.double(), X.double()
    return float((X @ (weight - W).t()).square().sum() / (X @ W.t()).square().sum())


# ------------------------------------------------------------------------------------------ real layers


@pytest.fixture(scope="module", params=["pocket", "stories260K"])
def real_layers(request: pytest.FixtureRequest) -> Layers:
    if request.param == "pocket":
        files = [pocket.MODEL.parent / "texts" / f"{name}.jsonl" for name in ("wikitext2", "gsm8k")]
        lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()[:200]]
        return layers_of(pocket.MODEL, [json.loads(line)["text"] for line in lines])
    if not STORIES.is_dir():
        pytest.skip(f"needs the model stories260K in {STORIES}")
    text = (STORIES / "tinystories_sample.txt").read_text(encoding="utf-8")
    return layers_of(STORIES, text.split("<|endoftext|>")[:150])


def layers_of(path: Path, texts: list[str]) -> Layers:
    """Every linear layer of the decoder with what it reads from 16 x 256 tokens, in fp32; found by their plain names."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    inputs: dict[str, Tensor] = {}
    linears = {name: m for name, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _, args: inputs.__setitem__(name, args[0].flatten(0, 1))

    for name, module in linears.items():
        module.register_forward_pre_hook(keep(name))
    ids = tokenizer("\n".join(texts), verbose=False)["input_ids"][: 16 * 256]
    with torch.no_grad():
        model(input_ids=torch.tensor(ids).view(16, 256), use_cache=False)
    return {name: (module.weight.detach(), inputs[name]) for name, module in linears.items()}


# ------------------------------------------------------------------- the paper, without our shortcuts


def smallest_by_sorting(scores: Tensor, count: int) -> Tensor:
    """The `count` smallest of all scores, by sorting pairs of (score, position)."""
    order = sorted((score, position) for position, score in enumerate(scores.flatten().tolist()))
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[[position for _, position in order[:count]]] = True
    return mask.view(scores.shape)


def eliminated_rows(H: Tensor) -> list[Tensor]:
    """For each column j, the first row of the inverse of H without the rows and columns before j, by elimination of one
    row of the inverse after the other (Frantar and Alistarh 2023, equation 5); no Cholesky factor is involved."""
    inverse = torch.linalg.inv(H)
    rows = []
    for _ in range(len(H)):
        rows.append(inverse[0].clone())
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return rows


def paper_sparsegpt(W: Tensor, X: Tensor, asked: SparsityPattern) -> tuple[Tensor, Tensor]:
    """SparseGPT column by column, each update over all columns to the right; new weights, and True where removed."""
    H = 2 / len(X) * X.t() @ X
    rows = eliminated_rows(H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype))
    pivots = torch.stack([row[0] for row in rows])
    W, removed = W.clone(), torch.zeros_like(W, dtype=torch.bool)
    for j in range(W.shape[1]):
        if asked.m is None and j % WINDOW == 0:
            part = slice(j, j + WINDOW)
            scores = W[:, part] ** 2 / pivots[part]
            removed[:, part] = smallest_by_sorting(scores, round(asked.fraction * scores.numel()))
        elif asked.m is not None and j % asked.m == 0:
            part = slice(j, j + asked.m)
            for i, scores in enumerate(W[:, part] ** 2 / pivots[part]):
                removed[i, part] = smallest_by_sorting(scores, asked.m - asked.n)
        errors = torch.where(removed[:, j], W[:, j] / pivots[j], 0.0)
        W[:, j:] -= torch.outer(errors, rows[j])
    return W.masked_fill(removed, 0.0), removed


def assert_equals_paper(W: Tensor, X: Tensor, asked: SparsityPattern) -> None:
    solution = solve(W, hessian_of(X), asked)
    weight, removed = paper_sparsegpt(W, X, asked)
    assert torch.equal(solution.mask, removed)
    torch.testing.assert_close(solution.weight, weight, rtol=1e-9, atol=1e-9 * float(W.abs().max()))
    assert solution.relative_error == pytest.approx(output_error(W, weight, X), rel=1e-9)


@pytest.mark.parametrize("asked", ["50%", "2:4"])
def test_float64_equals_the_paper_on_real_layers(real_layers: Layers, asked: str) -> None:
    wide = [name for name in real_layers if name.startswith(("0.", "4.")) and name.endswith(("o_proj", "down_proj"))]
    assert len(wide) == 4
    for name in wide:
        W, X = real_layers[name]
        assert_equals_paper(W.double(), X.double(), pattern(asked))


@pytest.mark.parametrize(
    ("rows", "columns", "asked"),
    [
        (1, 37, "50%"),
        (6, 129, "60%"),
        (3, 300, "37.3%"),
        (5, 128, "80%"),
        (9, 40, "1:4"),
        (4, 136, "4:8"),
        (5, 130, "3:5"),
        (3, 258, "1:3"),
        (3, 256, "32:128"),
        (2, 200, "30:100"),
    ],
)
def test_float64_equals_the_paper_on_odd_shapes_and_patterns(rows: int, columns: int, asked: str) -> None:
    assert_equals_paper(*random_layer(rows, columns), pattern(asked))


def answers_of_float64(W: Tensor, X: Tensor, asked: str) -> Iterator[float]:
    """Errors of the float64 solution, first for W, then for weights that fp32 can hardly tell from W: where two weights
    tie at a window's threshold, the last digit decides which one goes, and what follows from it."""
    H = hessian_of(X)
    yield solve(W.double(), H, pattern(asked)).relative_error
    half_a_digit = torch.finfo(torch.float32).eps / 2
    for seed in range(8):
        noise = torch.randn(W.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        yield solve(W.double() * (1 + half_a_digit * noise), H, pattern(asked)).relative_error


@pytest.mark.parametrize("asked", ["50%", "2:4"])
def test_fp32_agrees_with_float64_on_every_real_layer(real_layers: Layers, asked: str) -> None:
    for name, (W, X) in real_layers.items():
        single = solve(W, hessian_of(X, torch.float32), pattern(asked))
        double = solve(W.double(), hessian_of(X), pattern(asked))
        assert (single.mask == double.mask).double().mean() >= 0.999, name
        assert any(single.relative_error == pytest.approx(e, rel=5e-3) for e in answers_of_float64(W, X, asked)), name
        assert single.relative_error == pytest.approx(output_error(W, single.weight, X), rel=1e-4), name


def ill_conditioned(kind: str) -> tuple[Tensor, Tensor]:
    """Weights `[192, 256]` and inputs: of condition 1e8, with dead columns, or of fewer tokens than columns; float64 that
    fp32 holds exactly."""
    W, X = random_layer(192, 256, seed=7)
    if kind == "condition 1e8":  # of X^T X
        left, _, right = torch.linalg.svd(X, full_matrices=False)
        X = left @ torch.diag(torch.logspace(2, -2, 256, dtype=torch.float64)) @ right
    elif kind == "dead inputs":
        X[:, ::5] = 0
    else:
        X = X[:100]
    return W.float().double(), X.float().double()


@pytest.mark.parametrize("asked", ["60%", "2:4"])
@pytest.mark.parametrize("kind", ["condition 1e8", "dead inputs", "rank-deficient"])
def test_fp32_agrees_with_float64_on_ill_conditioned_layers(kind: str, asked: str) -> None:
    W, X = ill_conditioned(kind)
    single = solve(W.float(), hessian_of(X.float(), torch.float32), pattern(asked))
    double = solve(W, hessian_of(X), pattern(asked))
    assert (single.rescue, double.rescue) == ("", "")
    assert (single.mask == double.mask).double().mean() >= 0.999
    assert single.relative_error == pytest.approx(double.relative_error, rel=5e-3)
    assert single.relative_error == pytest.approx(output_error(W, single.weight, X), rel=5e-3)


# --------------------------------------------------------------------------------- matrices of one input


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("asked", ["37.3%", "2:4"])
def test_matrices_solved_together_are_those_solved_alone(method: str, asked: str) -> None:
    """Each keeps its own count of zeros, its own error, and its own dtype."""
    W, X = random_layer(60, 260)
    H = hessian_of(X)
    parts = [W[:1], W[1:4], W[4:].float()]
    for one, together in zip(parts, solve_together(parts, H, pattern(asked), method=method), strict=True):
        alone = solve(one, H, pattern(asked), method=method)
        assert torch.equal(together.mask, alone.mask)
        assert together.weight.dtype == one.dtype
        torch.testing.assert_close(together.weight, alone.weight, rtol=1e-6, atol=1e-9)
        assert (together.zeros_asked, together.why) == (alone.zeros_asked, alone.why)
        assert together.relative_error == pytest.approx(alone.relative_error, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "asked", [("37.3%", "80%", "5%"), ("2:4", "50%", "2:4"), ("1:4", "2:4", "30%"), ("1:5", "60%", "61%")]
)
def test_matrices_with_patterns_of_their_own_are_those_solved_alone(method: str, asked: tuple[str, ...]) -> None:
    W, X = random_layer(60, 260)
    H = hessian_of(X)
    parts, patterns = [W[:1], W[1:4], W[4:].float()], [pattern(text) for text in asked]
    solutions = solve_together(parts, H, patterns, method=method)
    for one, of_one, together in zip(parts, patterns, solutions, strict=True):
        alone = solve(one, H, of_one, method=method)
        assert torch.equal(together.mask, alone.mask)
        torch.testing.assert_close(together.weight, alone.weight, rtol=1e-6, atol=1e-9)
        assert together.zeros_asked == alone.zeros_asked
        assert together.relative_error == pytest.approx(alone.relative_error, rel=1e-6)


def test_the_matrix_that_is_at_fault_is_named() -> None:
    W, X = random_layer(4, 40)
    broken = W.clone()
    broken[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"^up holds NaN"):
        solve_together([W, broken], hessian_of(X), pattern("50%"), names=("gate", "up"))
    with pytest.raises(ValueError, match=r"^gate, up: 40 columns"):
        solve_together([W, W], hessian_of(X), pattern("1:3"), names=("gate", "up"))
    with pytest.raises(ValueError, match=r"^up: 40 columns are not divisible by m = 3 of the pattern 1:3"):
        solve_together([W, W], hessian_of(X), [pattern("50%"), pattern("1:3")], names=("gate", "up"))


# ------------------------------------------------------------------------------ better than the others


def wanda_in_windows(W: Tensor, X: Tensor, fraction: float) -> Tensor:
    """Wanda's score with SparseGPT's freedom: compared within windows of rows by 128 columns."""
    scores = W.abs() * X.norm(dim=0)
    weight = W.clone()
    for part in windows(W.shape[1]):
        window = weight[:, part].flatten()
        window[scores[:, part].flatten().argsort()[: round(fraction * len(window))]] = 0
        weight[:, part] = window.view(len(W), -1)
    return weight


def test_two_of_four_is_better_than_wanda_and_magnitude_on_every_real_layer(real_layers: Layers) -> None:
    for name, (W, X) in real_layers.items():
        H = hessian_of(X, torch.float32)
        errors = {method: solve(W, H, pattern("2:4"), method=method).relative_error for method in METHODS}
        assert errors["sparsegpt"] < min(errors["wanda"], errors["magnitude"]), name


def test_half_is_better_than_wanda_and_magnitude_on_every_real_layer(real_layers: Layers) -> None:
    """With one exception: in this layer whole heads read almost nothing, which Wanda sees across all columns of a row.
    SparseGPT removes the same share in each window of 128 columns, and beats Wanda where that is held to the windows."""
    better_by_wanda = set()
    for name, (W, X) in real_layers.items():
        H = hessian_of(X, torch.float32)
        errors = {method: solve(W, H, pattern("50%"), method=method).relative_error for method in METHODS}
        assert errors["sparsegpt"] < errors["magnitude"], name
        assert errors["sparsegpt"] < output_error(W, wanda_in_windows(W, X, 0.5), X), name
        if errors["sparsegpt"] >= errors["wanda"]:
            better_by_wanda.add(name)
    assert better_by_wanda <= {"1.self_attn.o_proj"}


def test_bfloat16_error_is_that_of_the_stored_weights(real_layers: Layers) -> None:
    W, X = next(iter(real_layers.values()))
    W = W.bfloat16()
    solution = solve(W, hessian_of(X, torch.float32), pattern("50%"))
    assert solution.relative_error == pytest.approx(output_error(W, solution.weight, X), rel=1e-4)


# -------------------------------------------------------------------------------------- closed forms


def data_with_damping(X: Tensor) -> Tensor:
    """Rows whose squares sum to the damped H, so that least squares on them is least squares under it."""
    share = 0.01 * (2 / len(X) * X.square().sum(dim=0)).mean()
    return torch.cat([(2 / len(X)) ** 0.5 * X, share.sqrt() * torch.eye(X.shape[1], dtype=X.dtype)])


def reoptimised(w: Tensor, A: Tensor, removed: Tensor) -> Tensor:
    """One row: after each removed column the columns to its right are fitted anew to what the dense row gives."""
    new = w.clone()
    for j in removed.nonzero().flatten().tolist():
        new[j] = 0
        if j + 1 < len(w):
            rest = A @ w - A[:, : j + 1] @ new[: j + 1]
            new[j + 1 :] = torch.linalg.lstsq(A[:, j + 1 :], rest).solution
    return new


@pytest.mark.parametrize(("columns", "asked"), [(150, "60%"), (40, "2:4"), (132, "1:4")])
def test_equals_refitting_the_columns_to_the_right_of_each_removed_one(columns: int, asked: str) -> None:
    W, X = random_layer(3, columns, seed=1)
    A = data_with_damping(X)
    solution = solve(W, hessian_of(X), pattern(asked))
    expected = torch.stack([reoptimised(w, A, removed) for w, removed in zip(W, solution.mask, strict=True)])
    torch.testing.assert_close(solution.weight, expected, rtol=1e-8, atol=1e-8)


def test_equals_least_squares_where_all_removed_columns_precede_all_kept_ones() -> None:
    W, X = random_layer(4, 160, seed=2)
    W[:, :40] *= 1e-6  # 40 of the first 128 columns are far below all others
    W[:, 128:144] *= 1e-6
    first = solve(W[:, :128], hessian_of(X[:, :128]), SparsityPattern(40 / 128))
    assert first.mask[:, :40].all()
    A = data_with_damping(X[:, :128])
    expected = torch.linalg.lstsq(A[:, 40:], A @ W[:, :128].t()).solution.t()
    torch.testing.assert_close(first.weight[:, 40:], expected, rtol=1e-8, atol=1e-8)


def test_one_removed_weight_has_the_closed_form_of_the_optimal_brain_surgeon() -> None:
    """delta = -w_p / [H^-1]_pp * H^-1[:, p], at a cost of w_p^2 / [H^-1]_pp (Hassibi and Stork 1992)."""
    W, X = random_layer(1, 20, seed=3)
    W[0, 0] = 1e-3
    A = data_with_damping(X)
    inverse = torch.linalg.inv(A.t() @ A)
    solution = solve(W, hessian_of(X), SparsityPattern(1 / 20))
    assert solution.mask.nonzero().tolist() == [[0, 0]]
    change = solution.weight - W
    torch.testing.assert_close(change[0], -W[0, 0] / inverse[0, 0] * inverse[:, 0], rtol=1e-9, atol=1e-15)
    torch.testing.assert_close((A @ change[0]).square().sum(), W[0, 0] ** 2 / inverse[0, 0], rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("asked", ["55%", "2:4"])
def test_is_magnitude_pruning_in_each_window_where_the_hessian_is_the_identity(asked: str) -> None:
    W, _ = random_layer(5, 300)
    solution = solve(W, hessian_of(torch.eye(300, dtype=torch.float64) * 3), pattern(asked))
    if asked == "2:4":
        expected = torch.stack([smallest_by_sorting(group, 2) for group in W.abs().view(-1, 4)]).view(W.shape)
    else:
        parts = [W[:, part].abs() for part in windows(300)]
        expected = torch.cat([smallest_by_sorting(part, round(0.55 * part.numel())) for part in parts], dim=1)
    assert torch.equal(solution.mask, expected)
    assert torch.equal(solution.weight, W.masked_fill(expected, 0.0))


@pytest.mark.parametrize("asked", ["50%", "2:4"])
@pytest.mark.parametrize("scale", [2.0**-50, 2.0**50])
def test_scaling_the_inputs_changes_nothing(scale: float, asked: str) -> None:
    """A power of two scales exactly, so H may be 1e-30 or 1e+30 times as large and not one bit may differ."""
    W, X = (t.float() for t in random_layer(8, 160, seed=4))
    plain = solve(W, hessian_of(X, torch.float32), pattern(asked))
    scaled = solve(W, hessian_of(X * scale, torch.float32), pattern(asked))
    assert torch.equal(scaled.mask, plain.mask)
    assert torch.equal(scaled.weight, plain.weight)
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-6)
    assert (scaled.damping, scaled.rescue) == (plain.damping, "")


@pytest.mark.parametrize("asked", ["50%", "2:4"])
@pytest.mark.parametrize("scale", [2.0**-66, 2.0**60])
def test_scaling_the_weights_scales_the_answer(scale: float, asked: str) -> None:
    """Weights of 1e-20: their squares are below what fp32 can hold."""
    W, X = (t.float() for t in random_layer(8, 160, seed=5))
    H = hessian_of(X, torch.float32)
    plain, scaled = solve(W, H, pattern(asked)), solve(W * scale, H, pattern(asked))
    assert torch.equal(scaled.mask, plain.mask)
    assert torch.equal(scaled.weight, plain.weight * scale)
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-6)


# -------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("fraction", [0.001, 0.3, 0.5, 0.6, 0.999])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 37), (4, 1), (2, 129), (5, 300), (7, 128)])
def test_unstructured_count_is_exact_in_each_window(rows: int, columns: int, fraction: float) -> None:
    W, X = random_layer(rows, columns)
    solution = solve(W, hessian_of(X), SparsityPattern(fraction))
    found = [int(solution.mask[:, part].sum()) for part in windows(columns)]
    assert found == [round(fraction * rows * (part.stop - part.start)) for part in windows(columns)]
    assert solution.zeros_asked == solution.zeros_found == sum(found)
    assert torch.equal(solution.weight == 0, solution.mask)
    assert solution.why == ""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("asked", "columns"), [("1:4", 132), ("2:4", 132), ("4:8", 8), ("3:5", 130), ("32:128", 256)])
def test_n_of_m_leaves_n_in_every_group_of_every_row(method: str, asked: str, columns: int) -> None:
    W, X = random_layer(3, columns)
    solution = solve(W, hessian_of(X), pattern(asked), method=method)
    n, m = (int(part) for part in asked.split(":"))
    assert ((solution.weight != 0).view(3, -1, m).sum(dim=2) == n).all()
    assert solution.zeros_asked == solution.zeros_found == 3 * columns * (m - n) // m


def test_magnitude_counts_in_the_whole_matrix_and_wanda_in_each_row() -> None:
    W, X = random_layer(5, 131)
    magnitude = solve(W, hessian_of(X), pattern("30%"), method="magnitude")
    assert torch.equal(magnitude.mask, smallest_by_sorting(W.abs(), round(0.3 * W.numel())))
    wanda = solve(W, hessian_of(X), pattern("30%"), method="wanda")
    expected = torch.stack([smallest_by_sorting(row, round(0.3 * 131)) for row in W.abs() * X.norm(dim=0)])
    assert torch.equal(wanda.mask, expected)
    for solution in (magnitude, wanda):
        assert torch.equal(solution.weight, W.masked_fill(solution.mask, 0.0))
        assert (solution.damping, solution.rescue) == (0.0, "")


def test_ties_go_by_position() -> None:
    W, H = torch.ones(3, 10), hessian_of(torch.eye(10), torch.float32)
    assert solve(W, H, pattern("40%")).mask.flatten().nonzero().flatten().tolist() == list(range(12))
    columns = solve(W, H, pattern("2:5")).mask.nonzero()[:, 1].tolist()
    assert columns == [0, 1, 2, 5, 6, 7] * 3


def test_constant_weights_lose_the_exact_count_in_every_window() -> None:
    """The threshold of the authors' code removes all of them."""
    solution = solve(torch.ones(4, 200), hessian_of(torch.eye(200), torch.float32), pattern("50%"))
    assert solution.zeros_found == 400
    assert solution.mask[:2, :128].all()
    assert not solution.mask[2:, :128].any()


# ----------------------------------------------------------------------------------------- boundaries


def test_already_sparse_weights_stay_as_they_are() -> None:
    W, X = random_layer(6, 200)
    zero = torch.rand(W.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    zero[:, ::2] |= torch.rand(6, 100, generator=torch.Generator().manual_seed(1)) < 0.5
    W = W.masked_fill(zero, 0.0)
    solution = solve(W, hessian_of(X), pattern("50%"))
    assert torch.equal(solution.weight, W)
    assert solution.relative_error == 0
    extra = int(zero.sum()) - solution.zeros_asked
    assert solution.zeros_asked == 3 * 128 + 3 * 72
    assert solution.why == f"{extra} were zero or rounded to zero"


def test_a_matrix_of_zeros_stays_one() -> None:
    _, X = random_layer(1, 20)
    solution = solve(torch.zeros(3, 20, dtype=torch.float64), hessian_of(X), pattern("50%"))
    assert (solution.zeros_asked, solution.zeros_found, solution.relative_error) == (30, 60, 0.0)


@pytest.mark.parametrize(("asked", "count"), [("50%", 444), ("2:4", 444)])
def test_all_inputs_dead_gives_zeros_and_says_so(asked: str, count: int) -> None:
    W, _ = random_layer(6, 148)
    solution = solve(W, hessian_of(torch.zeros(10, 148, dtype=torch.float64)), pattern(asked))
    assert not solution.weight.any()
    assert (solution.zeros_asked, solution.zeros_found) == (count, 888)
    assert solution.why == "444 in dead inputs"
    assert (solution.relative_error, solution.rescue) == (0.0, "")


def test_dead_inputs_lose_their_weights_and_harm_no_other() -> None:
    W, X = random_layer(4, 20)
    X[:, [3, 11]] = 0
    solution = solve(W, hessian_of(X), pattern("5%"))
    assert not solution.weight[:, [3, 11]].any()
    assert (solution.zeros_asked, solution.zeros_found, solution.why) == (4, 8, "4 in dead inputs")
    alive = [j for j in range(20) if j not in (3, 11)]
    assert torch.equal(solution.weight[:, alive], W[:, alive])
    assert solution.relative_error == 0


def test_dead_inputs_count_towards_what_is_asked() -> None:
    W, X = random_layer(4, 40)
    X[:, :6] = 0
    solution = solve(W, hessian_of(X), pattern("50%"))
    assert solution.mask[:, :6].all()
    assert (solution.zeros_asked, solution.zeros_found, solution.why) == (80, 80, "")
    assert solution.relative_error == pytest.approx(output_error(W, solution.weight, X), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_round_to_zero_are_found_and_explained(dtype: torch.dtype) -> None:
    """Weights of a few of the smallest steps that the type has: some updated ones fall below half a step."""
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    W, X = random_layer(40, 64, seed=6)
    W = ((W * 2).round().clamp(1, 4) * step).to(dtype)
    solution = solve(W, hessian_of(X, torch.float32), pattern("50%"))
    extra = int(((solution.weight == 0) & ~solution.mask).sum())
    assert (W != 0).all()
    assert extra > 0
    assert solution.zeros_found == solution.zeros_asked + extra == 1280 + extra
    assert solution.why == f"{extra} were zero or rounded to zero"


@pytest.mark.parametrize("asked", ["50%", "2:4"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_minus_zero_is_never_written(dtype: torch.dtype, method: str, asked: str) -> None:
    W, X = random_layer(6, 132)
    W[:, ::3] = W[:, 2::3] = -0.0  # more zeros than are removed
    W[:, 1::9] = -W[:, 1::9].abs()
    X[:, 5] = 0
    weight = solve(W.to(dtype), hessian_of(X, torch.float32), pattern(asked), method=method).weight
    assert (weight == 0).sum() > 0
    assert not torch.signbit(weight[weight == 0]).any()


# ---------------------------------------------------------------------------------- manners of solve()


def same(a: Solution, b: Solution) -> bool:
    return torch.equal(a.weight, b.weight) and torch.equal(a.mask, b.mask) and a.relative_error == b.relative_error


@pytest.mark.parametrize("asked", ["50%", "2:4"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arguments_are_left_alone_in_either_layout(dtype: torch.dtype, method: str, asked: str) -> None:
    W, X = random_layer(6, 132)
    X[:, 7] = 0
    H = hessian_of(X, torch.float32)
    matrix = H.matrix
    row_major = W.to(dtype)
    column_major = row_major.t().contiguous().t()
    before = row_major.clone()
    solutions = [solve(weight, H, pattern(asked), method=method) for weight in (row_major, column_major)]
    assert same(*solutions)
    for solution in solutions:
        assert (solution.weight.dtype, solution.weight.shape) == (dtype, W.shape)
        assert solution.weight.is_contiguous()
    assert torch.equal(row_major, before)
    assert torch.equal(column_major, before)
    assert torch.equal(H.matrix, matrix)


def test_a_parameter_is_taken_and_no_graph_is_built() -> None:
    W, X = random_layer(4, 40)
    solution = solve(nn.Parameter(W), hessian_of(X), pattern("50%"))
    assert not solution.weight.requires_grad
    assert same(solution, solve(W, hessian_of(X), pattern("50%")))


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_weights_that_no_one_updates_keep_every_bit(method: str) -> None:
    W, X = random_layer(4, 40)
    solution = solve(W, hessian_of(X, torch.float32), pattern("50%"), method=method)
    assert torch.equal(solution.weight, W.masked_fill(solution.mask, 0.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_is_an_error_for_every_method(method: str, bad: float) -> None:
    W, X = random_layer(3, 8)
    broken = W.clone()
    broken[1, 2] = bad
    with pytest.raises(ValueError, match="weight holds NaN or infinity"):
        solve(broken, hessian_of(X), pattern("50%"), method=method)
    X[4, 5] = bad
    with pytest.raises(ValueError, match="Hessian holds NaN or infinity"):
        solve(W, hessian_of(X), pattern("50%"), method=method)
    with pytest.raises(ValueError, match="no tokens"):
        solve(W, Hessian(8), pattern("50%"), method=method)


def test_an_update_beyond_the_range_of_the_dtype_is_an_error() -> None:
    """Two inputs that are almost one: what the small weight loses moves, enlarged, into the large one."""
    X = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)) @ torch.tensor([[30.0, 1.0]])
    W = torch.tensor([[6e4, 6e4]], dtype=torch.float16)
    with pytest.raises(ValueError, match=r"does not fit into torch\.float16"):
        solve(W, hessian_of(X, torch.float32), SparsityPattern(0.5), damping=1e-6)


def test_columns_that_m_does_not_divide_are_an_error() -> None:
    W, X = random_layer(3, 10)
    with pytest.raises(ValueError, match="10 columns are not divisible by m = 4"):
        solve(W, hessian_of(X), pattern("2:4"))


def test_damping_and_rescue_of_the_hessian_stand_in_the_solution() -> None:
    W, X = (t.float() for t in random_layer(3, 64))
    X = X[:, :1] + 1e-3 * X  # nearly one input: singular in fp32 unless it is damped
    plain = solve(W, hessian_of(X, torch.float32), pattern("50%"), damping=0.02)
    assert (plain.damping, plain.rescue) == (0.02, "")
    saved = solve(W, hessian_of(X, torch.float32), pattern("50%"), damping=1e-9)
    assert (saved.damping, saved.rescue) == (0.1, "float64, damping 10%")
