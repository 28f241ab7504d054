# SPDX-License-Identifier: Apache-2.0
"""Fused experts in the walk: the same bytes however much is resident, a plain twin, starved experts, and their names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig, MixtralConfig, PreTrainedModel

from optimum_calibprune.pruning import allocation, blocks, experts, schedule
from optimum_calibprune.pruning.activations import Activations
from optimum_calibprune.pruning.experts import least_tokens
from optimum_calibprune.pruning.forward import ThreadForward
from optimum_calibprune.pruning.hessian import Hessian
from optimum_calibprune.pruning.schedule import Cancelled, Settings, prune_blocks
from optimum_calibprune.pruning.sparsegpt import Solution, solve_together
from optimum_calibprune.pruning.stops import Experts, matrices_in, matrix
from optimum_calibprune.records import CalibrationRow, CalibrationSet, LayerReport, Sparsity, SparsityPattern


HALF = SparsityPattern(0.5)
SETTINGS = Settings(HALF, micro_batch=2)
SAMPLES, LENGTH, EXPERTS, LAYERS = 5, 48, 3, 2
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 160,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ATTENTION = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))


def mixtral(dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = MixtralConfig(**SHAPE, num_local_experts=EXPERTS, num_experts_per_tok=1, **options)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def gpt_oss() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GptOssConfig(
        **SHAPE,
        head_dim=8,
        num_local_experts=EXPERTS,
        num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=6,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def deepseek() -> PreTrainedModel:
    torch.manual_seed(0)
    config = DeepseekV3Config(
        **{**SHAPE, "num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=1,
        moe_intermediate_size=48,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def calibration(
    groups: str = "abbab", normalise: str = "none", weights: Sequence[float] | None = None
) -> CalibrationSet:
    """Micro-batches of two mix the groups; one letter a sample."""
    ids = np.random.default_rng(1).integers(0, 63, (len(groups), LENGTH))
    rows = [CalibrationRow("random", i, g, weights[i] if weights else 1.0) for i, g in enumerate(groups)]
    return CalibrationSet(ids, tuple(rows), normalise)


def prune(model: PreTrainedModel, settings: Settings = SETTINGS, **options: Any) -> list[LayerReport]:
    chosen = options.pop("calibration", None) or calibration()
    return [report for part in prune_blocks(model, chosen, settings, **options) for report in part]


def as_bytes(model: PreTrainedModel) -> dict[str, bytes]:
    return {key: value.contiguous().view(torch.uint8).numpy().tobytes() for key, value in model.state_dict().items()}


def hooks(model: PreTrainedModel) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def by_name(reports: list[LayerReport]) -> dict[str, LayerReport]:
    return {report.module: report for report in reports}


# ------------------------------------------------------------------------------------------ a plain twin


def seen_by(model: PreTrainedModel, modules: Sequence[nn.Module]) -> list[list[tuple[Tensor, ...]]]:
    """The arguments of modules in plain forwards of the whole model, micro-batch by micro-batch."""
    seen: list[list[tuple[Tensor, ...]]] = [[] for _ in modules]
    handles = [
        module.register_forward_pre_hook(lambda _, args, found=found: found.append(args))
        for module, found in zip(modules, seen, strict=True)
    ]
    for batch in torch.from_numpy(calibration().input_ids.copy()).split(SETTINGS.micro_batch):
        model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def hessian_of(inputs: Sequence[Tensor]) -> Hessian:
    hessian = Hessian(inputs[0].shape[-1])
    for x in inputs:
        if len(x):
            hessian.add(x)
    return hessian


def solve_in_place(weights: Sequence[Tensor], hessian: Hessian) -> None:
    for weight, solution in zip(weights, solve_together(weights, hessian, HALF), strict=True):
        weight.copy_(solution.weight)


def twin_of_expert(module: nn.Module, expert: int, inputs: list[Tensor], dense: bool) -> None:
    both, down = module.gate_up_proj.data[expert], module.down_proj.data[expert]

    def last() -> Hessian:
        halves = [F.linear(x, both).chunk(2, dim=-1) for x in inputs]
        return hessian_of([F.silu(gate) * up for gate, up in halves])

    before = last() if dense else None
    solve_in_place(both.chunk(2), hessian_of(inputs))
    solve_in_place([down], before or last())


@torch.no_grad()
def plain_twin(model: PreTrainedModel, sequential: str) -> None:
    """True-sequential pruning of a Mixtral without any cleverness: forwards of the whole model for every stop."""
    for layer in model.model.layers:
        groups = [[layer.get_submodule(name) for name in group] for group in ATTENTION]
        stops = [*(group[0] for group in groups), layer.mlp.experts]
        dense = seen_by(model, stops) if sequential == "block" else None
        for position, group in enumerate(groups):
            seen = dense[position] if dense else seen_by(model, [group[0]])[0]
            solve_in_place([module.weight.data for module in group], hessian_of([args[0] for args in seen]))
        seen = dense[-1] if dense else seen_by(model, [layer.mlp.experts])[0]
        for expert in range(EXPERTS):
            inputs = [x[(index == expert).any(dim=1)] for x, index, _ in seen]
            twin_of_expert(layer.mlp.experts, expert, inputs, dense is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sequential", ["module", "block"])
def test_residency_does_not_change_a_byte_and_equals_the_plain_twin(
    sequential: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "least_tokens", lambda total, columns: 1)  # the twin knows nothing of starving
    twin = mixtral(dtype)
    plain_twin(twin, sequential)
    expected = as_bytes(twin)
    for resident in (None, 1, 0):
        model = mixtral(dtype)
        reports = prune(model, replace(SETTINGS, sequential=sequential, resident=resident))
        assert not any(report.starved for report in reports)
        assert as_bytes(model) == expected, resident


@pytest.mark.parametrize("make", [gpt_oss, deepseek])
@pytest.mark.parametrize("sequential", ["module", "block"])
def test_threads_and_replays_give_the_same_bytes(make: Any, sequential: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, replayed, threaded = make(), make(), make()
    prune(expected, replace(SETTINGS, sequential=sequential))
    prune(replayed, replace(SETTINGS, sequential=sequential, resident=0))
    monkeypatch.setattr(schedule, "Forward", ThreadForward)
    prune(threaded, replace(SETTINGS, sequential=sequential, resident=1))
    assert as_bytes(replayed) == as_bytes(expected)
    assert as_bytes(threaded) == as_bytes(expected)


def test_blocks_that_are_moved_one_by_one_give_the_same_bytes() -> None:
    """`cpu:0` is another name of the same place, so that all is done that a GPU would ask for."""
    expected, model = mixtral(), mixtral()
    prune(expected)
    prune(model, device=torch.device("cpu:0"))
    assert as_bytes(model) == as_bytes(expected)


# ----------------------------------------------------------------------------------- weights and groups


def recorded(model: PreTrainedModel, chosen: CalibrationSet, monkeypatch: pytest.MonkeyPatch) -> list[Hessian]:
    """The Hessians of a walk that changes nothing."""
    seen: list[Hessian] = []

    def recording(weights: Sequence[Tensor], H: Hessian, *_: Any, **__: Any) -> list[Solution]:
        seen.append(H)
        return [Solution(W.clone(), W.isnan(), 0, 0, "", 0.0, 0.01, "") for W in weights]

    with monkeypatch.context() as patch:
        patch.setattr(schedule, "solve_together", recording)
        prune(model, calibration=chosen)
    return seen


def test_a_weight_of_two_counts_as_the_sample_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "least_tokens", lambda total, columns: 1)
    chosen = calibration("aaaaa", weights=[1, 2, 1, 1, 2])
    twice = [0, 1, 1, 2, 3, 4, 4]
    duplicated = CalibrationSet(chosen.input_ids[twice], tuple(CalibrationRow("random", i, "a") for i in twice))
    weighted, plain = (recorded(mixtral(), each, monkeypatch) for each in (chosen, duplicated))
    assert len(weighted) == len(plain) == LAYERS * (2 + 2 * EXPERTS)
    for one, other in zip(weighted, plain, strict=True):
        assert one.tokens == other.tokens
        assert float((one.matrix - other.matrix).norm() / other.matrix.norm()) < 1e-6


def test_groups_are_told_apart_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hessians of two groups, each divided by its trace, are those of the groups alone."""
    monkeypatch.setattr(experts, "least_tokens", lambda total, columns: 1)
    together = recorded(mixtral(), calibration(normalise="trace"), monkeypatch)
    chosen = calibration()
    alone = []
    for letter in "ab":
        mine = [i for i, row in enumerate(chosen.rows) if row.group == letter]
        rows = tuple(chosen.rows[i] for i in mine)
        alone.append(recorded(mixtral(), CalibrationSet(chosen.input_ids[mine], rows), monkeypatch))
    for both, a, b in zip(together, *alone, strict=True):
        expected = sum(part.matrix / part.matrix.trace() / 2 for part in (a, b))
        assert both.tokens == a.tokens + b.tokens
        assert float((both.matrix - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("normalise", ["trace", "minimax"])
def test_groups_give_the_same_bytes_however_much_is_resident(normalise: str) -> None:
    found = []
    for resident in (None, 0):
        model = mixtral()
        reports = prune(model, replace(SETTINGS, resident=resident), calibration=calibration(normalise=normalise))
        assert all(report.zeros_found == math.prod(report.shape) // 2 for report in reports)
        found.append(as_bytes(model))
    assert found[0] == found[1]


# -------------------------------------------------------------------------------------------- by name


@pytest.mark.parametrize("sequential", ["module", "block"])
def test_each_expert_and_each_of_its_matrices_can_be_named(sequential: str) -> None:
    model = gpt_oss()
    rules = {"*.experts.1.*": "dense", "*.0.mlp.experts.2.up_proj": 0, "*.down_proj": 0.25, "*": 0.5}
    sparsity = Sparsity.parse(rules)
    blocks.check_model(model, sparsity)
    groups = blocks.find_groups(model, sparsity)
    before = {name: W.clone() for name, W in everything(model).items()}
    reports = by_name(prune(model, Settings(sparsity, sequential=sequential, micro_batch=2), groups=groups))
    for name, W in everything(model).items():
        if sparsity.of(name) is None:
            assert name not in reports
            assert torch.equal(W, before[name])
        else:
            assert reports[name].zeros_found == int((W == 0).sum()) == sparsity.of(name).fraction * W.numel()
    entries = {entry.name: entry for entry in blocks.untouched(model, groups, sparsity)}
    left = [name for name in before if sparsity.of(name) is None]
    assert len(left) == LAYERS * 3 + 1
    assert all(entries[name].shape == tuple(before[name].shape) for name in left)
    assert entries["model.layers.0.mlp.experts.2.up_proj"].reason.endswith("'*.0.mlp.experts.2.up_proj'")


def everything(model: PreTrainedModel) -> dict[str, Tensor]:
    layers = enumerate(model.model.layers)
    return {f"model.layers.{i}.{name}": W for i, layer in layers for name, W in matrices_in(layer).items()}


def test_experts_that_all_stay_dense_are_no_stop() -> None:
    model = mixtral()
    sparsity = Sparsity.parse("*.experts.*=dense,*=50%")
    groups = blocks.find_groups(model, sparsity)
    assert not any(isinstance(stop, Experts) for block in groups for stop in block)
    assert len(prune(model, Settings(sparsity, micro_batch=2), groups=groups)) == LAYERS * 4
    reasons = {entry.name: entry.reason for entry in blocks.untouched(model, groups, sparsity)}
    assert reasons["model.layers.1.mlp.experts.down_proj"] == "left dense, as asked by '*.experts.*'"


def test_owl_counts_the_outliers_of_experts_and_keeps_the_total() -> None:
    model = mixtral()
    groups, settings = blocks.find_groups(model), replace(SETTINGS, sparsity=Sparsity.parse("50%"))
    model.model.layers[1].mlp.experts.down_proj.data[0, :3] *= 50
    zeros = allocation.owl(model, calibration(), settings, groups)
    assert zeros.keys() == everything(model).keys()
    assert sum(zeros.values()) == sum(W.numel() for W in everything(model).values()) // 2
    of_block = [sum(count for name, count in zeros.items() if f"layers.{i}." in name) for i in range(LAYERS)]
    shares = allocation.outlier_shares(model, calibration(), 2, groups)
    assert shares[0] != shares[1]
    assert (of_block[0] < of_block[1]) == (shares[0] > shares[1])
    reports = prune(model, replace(settings, zeros=zeros), groups=groups)
    assert {report.module: report.zeros_asked for report in reports} == zeros


@torch.no_grad()
def test_owl_measures_what_each_expert_is_sent() -> None:
    model, chosen = mixtral(), calibration("aaaaa", weights=[1, 2, 1, 1, 2])
    groups, layer = blocks.find_groups(model), model.model.layers[0]
    seen = seen_by(model, [layer.mlp.experts])[0]
    ids = torch.from_numpy(chosen.input_ids.copy())
    first, calls = blocks.enter(model, ids, 2, ids.device)
    hidden = Activations("device", ids.device).fill(first)
    weights = torch.tensor([row.weight for row in chosen.rows])
    squares = allocation._pass(layer, groups[0], hidden, [of_all[0] for of_all in calls], weights.split(2))
    x, index = (torch.cat([args[i] for args in seen]) for i in range(2))
    of_token = weights.repeat_interleave(LENGTH)
    for expert in range(EXPERTS):
        mine = (index == expert).any(dim=1)
        gate, up = F.linear(x[mine], layer.mlp.experts.gate_up_proj[expert]).chunk(2, dim=-1)
        for kind, rows in (("gate_proj", x[mine]), ("up_proj", x[mine]), ("down_proj", F.silu(gate) * up)):
            expected = (of_token[mine][:, None] * rows.square()).sum(dim=0)
            assert torch.allclose(squares[f"mlp.experts.{expert}.{kind}"].float(), expected, rtol=1e-4), kind


# --------------------------------------------------------------------------------------------- starved


def test_fewer_tokens_than_columns_are_too_few_unless_all_tokens_are_few() -> None:
    assert least_tokens(100_000, columns=2048) == 2048
    assert least_tokens(4096, columns=2048) == 2048
    assert least_tokens(4095, columns=2048) == 1


def forbid(model: PreTrainedModel, expert: int, layer: int = 0) -> None:
    """No router sends anything to this expert any more."""
    gate = model.model.layers[layer].mlp.gate
    gate.e_score_correction_bias[expert] = -100.0


@pytest.mark.parametrize("resident", [None, 0])
@pytest.mark.parametrize("sequential", ["module", "block"])
def test_an_expert_without_tokens_is_pruned_for_all_tokens_and_named(sequential: str, resident: int | None) -> None:
    model = deepseek()
    forbid(model, 1)
    reports = by_name(prune(model, replace(SETTINGS, sequential=sequential, resident=resident)))
    for kind in ("gate_proj", "up_proj", "down_proj"):
        report = reports[f"model.layers.0.mlp.experts.1.{kind}"]
        assert (report.routed, report.starved, report.tokens) == (0, True, SAMPLES * LENGTH)
        assert report.zeros_found == report.zeros_asked == math.prod(report.shape) // 2
        assert report.relative_error > 0
    others = [report for report in reports.values() if report.routed]
    assert len(others) == 3 * (LAYERS * EXPERTS - 1)
    assert all(report.tokens == (SAMPLES * LENGTH if report.starved else report.routed) for report in others)
    first = [report.routed for name, report in reports.items() if "layers.0." in name and name.endswith(".up_proj")]
    assert sum(count or 0 for count in first) == SAMPLES * LENGTH


def test_a_starved_expert_is_solved_with_all_tokens_through_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deepseek()
    forbid(model, 1)
    module = model.model.layers[0].mlp.experts
    with torch.no_grad():
        x = torch.cat([args[0] for args in seen_by(model, [module])[0]])
        gate, up = F.linear(x, module.gate_up_proj[1]).chunk(2, dim=-1)
    expected = [hessian_of([x]).matrix, hessian_of([F.silu(gate) * up]).matrix]
    experts_of_the_first = recorded(model, calibration(), monkeypatch)[4:]  # behind four inputs of latent attention
    for hessian, wanted in zip(experts_of_the_first[2:4], expected, strict=True):
        assert float((hessian.matrix - wanted).norm() / wanted.norm()) < 1e-6


def test_each_matrix_is_judged_by_its_own_columns() -> None:
    """An expert with about 40 of 240 tokens has enough for 32 columns, and too few for 48."""
    model = deepseek()
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad():
        x = torch.cat([args[0] for args in seen_by(model, [gate])[0]]).flatten(0, -2)
        scores = F.linear(x, gate.weight).sigmoid()
        others = scores[:, [0, 2]].amax(dim=1)
        gate.e_score_correction_bias[1] = float((others - scores[:, 1]).sort().values[40:42].mean())
    reports = by_name(prune(model))
    kinds = {kind: reports[f"model.layers.0.mlp.experts.1.{kind}"] for kind in ("gate_proj", "up_proj", "down_proj")}
    assert {kind: report.starved for kind, report in kinds.items()} == {
        "gate_proj": False,
        "up_proj": False,
        "down_proj": True,
    }
    (routed,) = {report.routed for report in kinds.values()}
    assert 32 <= routed < 48
    assert kinds["up_proj"].tokens == routed
    assert kinds["down_proj"].tokens == SAMPLES * LENGTH


# ---------------------------------------------------------------------------------------- ways to end


@pytest.mark.parametrize("resident", [None, 0])
@pytest.mark.parametrize("sample", [0, 3, 4])
def test_what_is_not_finite_names_the_expert_and_the_sample(sample: int, resident: int | None) -> None:
    model, chosen = mixtral(), calibration()
    ids = chosen.input_ids.copy()
    ids[sample, 7] = 63
    model.get_input_embeddings().weight.data[63] = 1e4
    norm = model.model.layers[0].post_attention_layernorm
    norm.register_forward_hook(lambda _, args, out: out.masked_fill(args[0][..., :1].abs() > 1e3, math.inf))
    with pytest.raises(ValueError, match=rf"layers\.0\.mlp\.experts\.\d\.gate_proj receives .* sample {sample}\."):
        prune(model, replace(SETTINGS, resident=resident), calibration=CalibrationSet(ids, chosen.rows))
    norm._forward_hooks.clear()
    assert hooks(model) == 0


def test_cancelling_stops_before_the_next_expert() -> None:
    model, names = mixtral(), []
    before = as_bytes(model)
    with pytest.raises(Cancelled, match=r"model\.layers\.0\.mlp\.experts\.1,"):
        prune(
            model,
            on_progress=lambda done, total, name: names.append((done, total, name)),
            cancelled=lambda: len(names) == 4 + 3,
        )
    after = as_bytes(model)
    assert {key for key in before if after[key] != before[key]} == {
        *(f"model.layers.0.{name}.weight" for group in ATTENTION for name in group),
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    }
    total = LAYERS * (4 + 3 * EXPERTS)
    assert names[-1] == (7, total, "model.layers.0.mlp.experts.0.down_proj")
    assert hooks(model) == 0


# ----------------------------------------------------------------------------------------------- stops


@pytest.mark.parametrize("make", [mixtral, gpt_oss, deepseek])
def test_every_matrix_of_an_expert_is_a_view_that_is_found_by_its_name(make: Any) -> None:
    model = make()
    for i, block in enumerate(blocks.find_groups(model)):
        stop = next(stop for stop in block if isinstance(stop, Experts))
        tensors = (stop.module.gate_up_proj, stop.module.down_proj)
        assert stop.per_token == 1
        assert sum(given.rows * given.columns for given in stop.inputs) == sum(tensor.numel() for tensor in tensors)
        for name in stop.names:
            matrix(model, f"model.layers.{i}.{name}").fill_(0.0)
        assert not any(bool(tensor.any()) for tensor in tensors)


def test_zeros_are_counted_anew_expert_by_expert() -> None:
    model = gpt_oss()
    reports = prune(model)
    name = "model.layers.1.mlp.experts.2.up_proj"
    matrix(model, name)[0] = 0.0
    counted = by_name(list(schedule.recount(model, reports)))
    changed = {module for module, report in by_name(reports).items() if counted[module] != report}
    assert changed == {name}
    assert counted[name].zeros_found == int((model.model.layers[1].mlp.experts.gate_up_proj[2, :, 1::2] == 0).sum())
