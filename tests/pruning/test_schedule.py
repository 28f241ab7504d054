# SPDX-License-Identifier: Apache-2.0
"""The walk over the blocks: the same bytes however much is resident, plain twins of both schemes, and its ways to end."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PhiConfig, PreTrainedModel

from optimum_calibprune import pocket
from optimum_calibprune.pruning import blocks, schedule
from optimum_calibprune.pruning.forward import ThreadForward
from optimum_calibprune.pruning.hessian import Hessian
from optimum_calibprune.pruning.homes import InMemory
from optimum_calibprune.pruning.schedule import Cancelled, Settings, prune_blocks
from optimum_calibprune.pruning.sparsegpt import Solution, solve_together
from optimum_calibprune.records import CalibrationRow, CalibrationSet, LayerReport, Sparsity, SparsityPattern


HALF = SparsityPattern(0.5)
SETTINGS = Settings(HALF, micro_batch=2)
LLAMA_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
MODULES_IN_A_BLOCK = 7


def tiny(dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **options,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def short_pocket(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The first two blocks of the pocket model."""
    config = LlamaConfig.from_pretrained(pocket.MODEL, num_hidden_layers=2)
    return AutoModelForCausalLM.from_pretrained(pocket.MODEL, config=config, dtype=dtype).eval()


def calibration(samples: int = 5, length: int = 16, weights: dict[int, float] | None = None) -> CalibrationSet:
    ids = np.random.default_rng(1).integers(0, 64, (samples, length))
    rows = [CalibrationRow("random", i, "general", (weights or {}).get(i, 1.0)) for i in range(samples)]
    return CalibrationSet(ids, tuple(rows))


def prune(model: PreTrainedModel, settings: Settings = SETTINGS, **options: Any) -> list[LayerReport]:
    chosen = options.pop("calibration", None) or calibration()
    return [report for part in prune_blocks(model, chosen, settings, **options) for report in part]


def as_bytes(model: PreTrainedModel) -> dict[str, bytes]:
    return {key: value.contiguous().view(torch.uint8).numpy().tobytes() for key, value in model.state_dict().items()}


def hooks(model: PreTrainedModel) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def alive() -> list[schedule.Forward]:
    return [item for item in gc.get_objects() if type(item) is schedule.Forward and not item.dead]


def hessians_of(model: PreTrainedModel, names: list[str], chosen: CalibrationSet, step: int) -> dict[str, Hessian]:
    """By plain forwards of the whole model, with a hook on each module."""
    seen = {name: Hessian(model.get_submodule(name).in_features) for name in names}

    def record(hessian: Hessian) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: hessian.add(args[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(record(seen[name])) for name in names]
    with torch.no_grad():
        for batch in torch.from_numpy(chosen.input_ids.copy()).split(step):
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def solve_in_place(
    modules: Sequence[nn.Module], hessian: Hessian, patterns: SparsityPattern | Sequence[SparsityPattern] = HALF
) -> None:
    weights = [module.weight.data for module in modules]
    for weight, solution in zip(weights, solve_together(weights, hessian, patterns), strict=True):
        weight.copy_(solution.weight)


@torch.no_grad()
def plain_twin(
    model: PreTrainedModel,
    chosen: CalibrationSet,
    step: int,
    sequential: str,
    sparsity: Sparsity | SparsityPattern = HALF,
) -> None:
    """True-sequential pruning without any cleverness: as many forwards of the whole model as there are groups."""
    sparsity = Sparsity.parse(sparsity)
    groups = LLAMA_GROUPS if sequential == "module" else (sum(LLAMA_GROUPS, ()),)
    for i in range(len(model.model.layers)):
        for group in groups:
            names = [f"model.layers.{i}.{name}" for name in group]
            hessians = hessians_of(model, names, chosen, step)
            for several in LLAMA_GROUPS:
                together = [
                    name for name in names if name.partition(f"layers.{i}.")[2] in several and sparsity.of(name)
                ]
                if together:
                    modules = [model.get_submodule(name) for name in together]
                    solve_in_place(modules, hessians[together[0]], [sparsity.of(name) for name in together])


# --------------------------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("make", [tiny, short_pocket])
def test_residency_does_not_change_a_byte_and_equals_the_plain_twin(
    make: Callable[[torch.dtype], PreTrainedModel], dtype: torch.dtype
) -> None:
    twin = make(dtype)
    dense = as_bytes(twin)
    plain_twin(twin, calibration(), SETTINGS.micro_batch, "module")
    expected = as_bytes(twin)
    assert expected != dense
    for resident in (None, 3, 1, 0):
        model = make(dtype)
        prune(model, replace(SETTINGS, resident=resident))
        assert as_bytes(model) == expected, resident


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("make", [tiny, short_pocket])
def test_block_mode_equals_its_plain_twin(make: Callable[[torch.dtype], PreTrainedModel], dtype: torch.dtype) -> None:
    twin, model = make(dtype), make(dtype)
    plain_twin(twin, calibration(), SETTINGS.micro_batch, "block")
    prune(model, replace(SETTINGS, sequential="block"))
    assert as_bytes(model) == as_bytes(twin)


@pytest.mark.parametrize("resident", [None, 1, 0])
@pytest.mark.parametrize("sequential", ["module", "block"])
def test_threads_in_place_of_greenlets_give_the_same_bytes(
    sequential: str, resident: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, model = tiny(), tiny()
    prune(expected, replace(SETTINGS, sequential=sequential))
    monkeypatch.setattr(schedule, "Forward", ThreadForward)
    prune(model, replace(SETTINGS, sequential=sequential, resident=resident))
    assert as_bytes(model) == as_bytes(expected)
    assert threads_of_forwards() == []


def test_an_error_in_a_thread_reaches_the_caller_and_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "Forward", ThreadForward)
    model = tiny()
    groups = blocks.find_groups(model)
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        prune(model, groups=groups)
    handle.remove()
    assert hooks(model) == 0
    assert threads_of_forwards() == []


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def threads_of_forwards() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if isinstance(thread, ThreadForward)]


def test_blocks_that_are_moved_one_by_one_give_the_same_bytes() -> None:
    """`cpu:0` is another name of the same place, so that all is done that a GPU would ask for."""
    expected, model = tiny(), tiny()
    prune(expected)
    prune(model, device=torch.device("cpu:0"))
    assert as_bytes(model) == as_bytes(expected)


def test_the_next_block_is_on_its_way_while_one_is_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    home, moved, move = InMemory(tiny()), [], InMemory._move
    arrived = threading.Event()

    def watched(self: InMemory, i: int, device: torch.device) -> Callable[[], None]:
        moved.append(i)
        if len(moved) == 2:
            arrived.set()
        return move(self, i, device)

    monkeypatch.setattr(InMemory, "_move", watched)
    brought = home.brought(torch.device("cpu:0"))
    assert next(brought) is home.blocks[0]
    assert arrived.wait(10)
    assert moved == [0, 1]
    assert list(brought) == [home.blocks[1]]


def test_the_two_schemes_differ() -> None:
    one, other = tiny(), tiny()
    prune(one)
    prune(other, replace(SETTINGS, sequential="block"))
    assert as_bytes(one) != as_bytes(other)


@pytest.mark.parametrize("sequential", ["module", "block"])
def test_a_second_run_gives_the_same_bytes(sequential: str) -> None:
    one, other = tiny(), tiny()
    for model in (one, other):
        prune(model, replace(SETTINGS, sequential=sequential))
    assert as_bytes(one) == as_bytes(other)


def test_a_model_in_train_mode_is_pruned_without_dropout() -> None:
    expected, model = tiny(attention_dropout=0.5), tiny(attention_dropout=0.5).train()
    for each in (expected, model):
        prune(each)
    assert as_bytes(model) == as_bytes(expected)


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions", "use_cache"])
def test_outputs_that_the_config_asks_for_do_not_matter(option: str) -> None:
    expected, model = tiny(attn_implementation="eager"), tiny(attn_implementation="eager", **{option: True})
    for each in (expected, model):
        prune(each)
    assert as_bytes(model) == as_bytes(expected)


def test_micro_batches_change_no_more_than_rounding() -> None:
    one, other = tiny(), tiny()
    reports = prune(one, replace(SETTINGS, micro_batch=1))
    for alone, together in zip(reports, prune(other, replace(SETTINGS, micro_batch=100)), strict=True):
        assert together.relative_error == pytest.approx(alone.relative_error, rel=1e-2)
        weights = [model.get_submodule(alone.module).weight for model in (one, other)]
        differ = float(((weights[0] == 0) != (weights[1] == 0)).float().mean())
        assert differ < 0.005, alone.module


def test_a_single_sample_is_enough() -> None:
    reports = prune(tiny(), calibration=calibration(samples=1))
    assert [report.tokens for report in reports] == [16.0] * 2 * MODULES_IN_A_BLOCK


# ----------------------------------------------------------------------------------- sparsity by module


@pytest.mark.parametrize("sequential", ["module", "block"])
@pytest.mark.parametrize(
    "asked", ["*.mlp.*=70%,*=50%", "*.q_proj=2:4,*.k_proj=60%,*.0.mlp.*=dense,*=1:4", "*.gate_proj=dense,*=50%"]
)
def test_each_module_has_its_own_sparsity_as_the_plain_twin_has(asked: str, sequential: str) -> None:
    sparsity = Sparsity.parse(asked)
    twin, dense = tiny(), as_bytes(tiny())
    plain_twin(twin, calibration(), SETTINGS.micro_batch, sequential, sparsity)
    for resident in (None, 0):
        model = tiny()
        reports = prune(model, replace(SETTINGS, sparsity=sparsity, sequential=sequential, resident=resident))
        assert as_bytes(model) == as_bytes(twin), resident
    after = as_bytes(model)
    assert {f"{report.module}.weight" for report in reports} == {key for key in dense if after[key] != dense[key]}
    for report in reports:
        pattern, (rows, columns) = sparsity.of(report.module), report.shape
        assert pattern is not None
        exact = sum(round(pattern.fraction * rows * min(128, columns - start)) for start in range(0, columns, 128))
        assert report.zeros_asked == report.zeros_found == exact


def test_groups_stay_in_the_order_in_which_they_run_when_their_first_module_is_left_dense() -> None:
    """In Phi `fc1` reads what `q_proj` reads, and runs after `dense`."""
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(PhiConfig(**shape, num_attention_heads=4, max_position_embeddings=64))
    sparsity = Sparsity.parse("*.q_proj=dense,*.k_proj=dense,*.v_proj=dense,*=50%")
    for sequential in ("module", "block"):
        reports = prune(model.eval(), replace(SETTINGS, sparsity=sparsity, sequential=sequential))
        names = [report.module.removeprefix("model.layers.0.") for report in reports[:3]]
        assert names == ["self_attn.dense", "mlp.fc1", "mlp.fc2"]


# ---------------------------------------------------------------------------------------- the Hessians


def test_a_weight_of_two_counts_as_the_sample_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = calibration(weights={1: 2.0, 4: 2.0})
    twice = [0, 1, 1, 2, 3, 4, 4]
    rows = tuple(CalibrationRow("random", i, "general") for i in twice)
    duplicated = CalibrationSet(chosen.input_ids[twice], rows)
    seen: list[Hessian] = []

    def recording(weights: Sequence[Tensor], H: Hessian, *_: Any, **__: Any) -> list[Solution]:
        seen.append(H)
        return [Solution(W.clone(), W.isnan(), 0, 0, "", 0.0, 0.01, "") for W in weights]

    monkeypatch.setattr(schedule, "solve_together", recording)
    prune(tiny(), calibration=chosen)
    weighted, seen[:] = list(seen), []
    prune(tiny(), calibration=duplicated)
    assert len(weighted) == len(seen) == 2 * len(LLAMA_GROUPS)
    for one, other in zip(weighted, seen, strict=True):
        assert one.tokens == other.tokens == 7 * 16
        assert float((one.matrix - other.matrix).norm() / other.matrix.norm()) < 1e-6


# --------------------------------------------------------------------------------------- several groups


def grouped(normalise: str, groups: str = "abbab", weights: dict[int, float] | None = None) -> CalibrationSet:
    """Micro-batches of two mix the groups; one letter a sample."""
    chosen = calibration(len(groups), weights=weights)
    rows = tuple(replace(row, group=group) for row, group in zip(chosen.rows, groups, strict=True))
    return CalibrationSet(chosen.input_ids, rows, normalise)


@torch.no_grad()
def balanced_twin(model: PreTrainedModel, chosen: CalibrationSet, weights: Sequence[float], sequential: str) -> None:
    """By plain forwards of the whole model: one Hessian a group, of its samples in each micro-batch of two."""
    letters = [row.group for row in chosen.rows]
    names = sorted(set(letters))
    parts = LLAMA_GROUPS if sequential == "module" else (sum(LLAMA_GROUPS, ()),)
    for i in range(len(model.model.layers)):
        for part in parts:
            modules = {name: model.get_submodule(f"model.layers.{i}.{name}") for name in part}
            seen = {name: [Hessian(module.in_features) for _ in names] for name, module in modules.items()}
            handles, batch = [], [0]

            def record(hessians: list[Hessian], batch: list[int] = batch) -> Callable[..., None]:
                def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                    for group, hessian in zip(names, hessians, strict=True):
                        mine = [j for j in range(len(args[0])) if letters[batch[0] + j] == group]
                        if mine:
                            hessian.add(args[0][mine])

                return add

            for name, module in modules.items():
                handles.append(module.register_forward_pre_hook(record(seen[name])))
            for start in range(0, len(letters), 2):
                batch[0] = start
                model(input_ids=torch.from_numpy(chosen.input_ids[start : start + 2].copy()), use_cache=False)
            for handle in handles:
                handle.remove()
            for group in LLAMA_GROUPS:
                together = [name for name in part if name in group]
                if together:
                    H = Hessian.balanced(seen[together[0]], weights)
                    solve_in_place([modules[name] for name in together], H)


@pytest.mark.parametrize("make", [tiny, short_pocket])
def test_groups_balanced_by_trace_equal_the_plain_twin_however_much_is_resident(
    make: Callable[[], PreTrainedModel],
) -> None:
    twin, plain = make(), make()
    balanced_twin(twin, grouped("trace"), [1, 1], "module")
    expected = as_bytes(twin)
    prune(plain, calibration=grouped("none"))
    assert expected != as_bytes(plain)
    for resident in (None, 1, 0):
        model = make()
        prune(model, replace(SETTINGS, resident=resident), calibration=grouped("trace"))
        assert as_bytes(model) == expected, resident


def test_groups_balanced_by_trace_in_block_mode_equal_their_plain_twin() -> None:
    twin, model = tiny(), tiny()
    balanced_twin(twin, grouped("trace"), [1, 1], "block")
    prune(model, replace(SETTINGS, sequential="block"), calibration=grouped("trace"))
    assert as_bytes(model) == as_bytes(twin)


def test_a_group_counts_as_its_rows_weigh() -> None:
    """Equal weights inside a group leave its own Hessian as it was up to rounding, and move its share of the sum."""
    twin, model = tiny(), tiny()
    balanced_twin(twin, grouped("trace"), [4, 1], "module")
    prune(model, calibration=grouped("trace", weights={0: 4.0, 3: 4.0}))  # 4 and its root are exact
    differ = [float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), twin.parameters(), strict=True)]
    assert max(differ) < 1e-5
    equal = tiny()
    prune(equal, calibration=grouped("trace"))
    assert as_bytes(equal) != as_bytes(model)


def test_without_normalising_the_groups_do_not_matter() -> None:
    expected, model = tiny(), tiny()
    prune(expected)
    prune(model, calibration=grouped("none"))
    assert as_bytes(model) == as_bytes(expected)


def test_a_single_group_is_what_it_is_without_balance_up_to_rounding() -> None:
    expected, model = tiny(), tiny()
    reports = prune(expected)
    for one, other in zip(prune(model, calibration=grouped("trace", "aaaaa")), reports, strict=True):
        assert one.tokens == other.tokens == 5 * 16
        assert one.relative_error == pytest.approx(other.relative_error, rel=1e-3)


def test_serving_the_worst_group_gives_the_same_bytes_however_much_is_resident() -> None:
    balanced = tiny()
    prune(balanced, calibration=grouped("trace"))
    found = []
    for resident in (None, 1, 0):
        model = tiny()
        reports = prune(model, replace(SETTINGS, resident=resident), calibration=grouped("minimax"))
        assert {report.tokens for report in reports} == {5 * 16.0}
        assert all(report.zeros_found == math.prod(report.shape) // 2 for report in reports)
        found.append(as_bytes(model))
    assert found[0] == found[1] == found[2]
    assert found[0] != as_bytes(balanced)


@pytest.mark.parametrize("resident", [None, 0])
@pytest.mark.parametrize("sample", range(5))
def test_nan_names_the_sample_in_mixed_micro_batches(sample: int, resident: int | None) -> None:
    model, chosen = tiny(), grouped("trace")
    ids = np.where(chosen.input_ids == 63, 0, chosen.input_ids)
    ids[sample, 7] = 63
    model.get_input_embeddings().weight.data[63] = float("nan")
    with pytest.raises(ValueError, match=rf"model\.layers\.0\.self_attn\.q_proj .* sample {sample}\."):
        prune(model, replace(SETTINGS, resident=resident), calibration=CalibrationSet(ids, chosen.rows, "trace"))


# ----------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("resident", [None, 0])
@pytest.mark.parametrize("sequential", ["module", "block"])
@pytest.mark.parametrize("sample", [0, 3, 4])
def test_nan_names_module_and_sample(sample: int, sequential: str, resident: int | None) -> None:
    model, chosen = tiny(), calibration()
    ids = np.where(chosen.input_ids == 63, 0, chosen.input_ids)
    ids[sample, 7] = 63
    model.get_input_embeddings().weight.data[63] = float("nan")
    before = as_bytes(model)
    with pytest.raises(ValueError, match=rf"model\.layers\.0\.self_attn\.q_proj .* sample {sample}\."):
        prune(
            model,
            replace(SETTINGS, sequential=sequential, resident=resident),
            calibration=CalibrationSet(ids, chosen.rows),
        )
    assert as_bytes(model) == before
    assert hooks(model) == 0
    assert alive() == []


def test_values_whose_squares_overflow_name_the_sample() -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=32,
        word_embed_proj_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        do_layer_norm_before=False,
    )
    model, chosen = AutoModelForCausalLM.from_config(config), calibration()
    ids = np.where(chosen.input_ids == 63, 0, chosen.input_ids)
    ids[3, 7] = 63
    model.get_input_embeddings().weight.data[63] = 1e25
    with pytest.raises(ValueError, match=r"decoder\.layers\.0\.self_attn\.q_proj .* sample 3\."):
        prune(model, calibration=CalibrationSet(ids, chosen.rows))


@pytest.mark.parametrize("resident", [None, 0])
@pytest.mark.parametrize("sequential", ["module", "block"])
def test_a_module_that_is_passed_by_is_an_error(sequential: str, resident: int | None) -> None:
    model = tiny()
    groups = blocks.find_groups(model)
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(torch.cat([x] * 5, dim=-1))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate_proj is not reached"):
        prune(model, replace(SETTINGS, sequential=sequential, resident=resident), groups=groups)
    assert hooks(model) == 0
    assert alive() == []


# ------------------------------------------------------------------------------------------ ways to end


def test_progress_counts_every_module_in_the_order_of_the_reports() -> None:
    seen: list[tuple[int, int, str]] = []
    reports = prune(tiny(), on_progress=lambda *step: seen.append(step))
    total = 2 * MODULES_IN_A_BLOCK
    assert seen == [(i, total, report.module) for i, report in enumerate(reports, start=1)]
    assert [report.module for report in reports] == [
        f"model.layers.{i}.{name}" for i in range(2) for group in LLAMA_GROUPS for name in group
    ]


@pytest.mark.parametrize("resident", [None, 1, 0])
@pytest.mark.parametrize("sequential", ["module", "block"])
def test_cancelling_stops_before_the_next_group(sequential: str, resident: int | None) -> None:
    model = tiny()
    before, names = as_bytes(model), []
    with pytest.raises(Cancelled, match=r"model\.layers\.1\.mlp\.gate_proj"):
        prune(
            model,
            replace(SETTINGS, sequential=sequential, resident=resident),
            on_progress=lambda done, total, name: names.append(name),
            cancelled=lambda: len(names) == MODULES_IN_A_BLOCK + 4,
        )
    after = as_bytes(model)
    assert {key for key in before if after[key] != before[key]} == {f"{name}.weight" for name in names}
    assert hooks(model) == 0
    assert alive() == []


@pytest.mark.parametrize("resident", [None, 1, 0])
@pytest.mark.parametrize("sequential", ["module", "block"])
def test_an_interrupt_leaves_no_hook_and_no_waiting_forward(sequential: str, resident: int | None) -> None:
    def interrupt(done: int, total: int, name: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    model = tiny()
    with pytest.raises(KeyboardInterrupt):
        prune(model, replace(SETTINGS, sequential=sequential, resident=resident), on_progress=interrupt)
    assert hooks(model) == 0
    assert alive() == []
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("resident", [None, 0])
def test_an_interrupt_inside_a_block_arrives_at_the_caller(resident: int | None) -> None:
    model = tiny()
    groups, gate = blocks.find_groups(model), model.model.layers[1].mlp.gate_proj

    generator = prune_blocks(model, calibration(), replace(SETTINGS, resident=resident), groups=groups)
    next(generator)
    handle = gate.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(generator)
    handle.remove()
    assert hooks(model) == 0
    assert alive() == []


def test_a_caller_that_takes_one_block_only_leaves_the_others_as_they_were() -> None:
    model = tiny()
    before = as_bytes(model)
    generator = prune_blocks(model, calibration(), SETTINGS)
    reports = next(generator)
    assert alive() == []
    generator.close()
    after = as_bytes(model)
    assert {key for key in before if after[key] != before[key]} == {f"{r.module}.weight" for r in reports}
    assert {report.module.split(".")[2] for report in reports} == {"0"}
    assert hooks(model) == 0


def test_a_solver_error_names_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum_calibprune.pruning.hessian.inverse_factor_", lambda H, ranks: torch.tensor(False))
    model = tiny()
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj, .*v_proj: The Hessian could not"):
        prune(model)
    assert hooks(model) == 0
    assert alive() == []


def test_a_finished_walk_leaves_nothing_behind() -> None:
    model = tiny()
    prune(model, replace(SETTINGS, resident=1))
    assert hooks(model) == 0
    assert alive() == []


# --------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(("fits", "asked"), [(0, 0.9), (3, 3.1)])
def test_half_of_the_free_memory_may_be_resident(fits: int, asked: float) -> None:
    model = tiny()
    inputs = 32 + 32 + 32 + 160
    outputs = (32 + 16 + 16) + 32 + (160 + 160) + 32
    one = (inputs + outputs) * 10 * 4
    groups = blocks.find_groups(model)
    assert schedule.resident_micro_batches(model, groups, 10, int(2 * one * asked)) == fits


def test_hidden_states_of_the_block_before_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    propagate = schedule._BlockWalk.propagate

    def watched(walk: schedule._BlockWalk) -> None:
        old = [weakref.ref(hidden) for hidden in walk.hidden]
        propagate(walk)
        kept.append(sum(reference() is not None for reference in old))

    monkeypatch.setattr(schedule._BlockWalk, "propagate", watched)
    prune(tiny())
    assert kept == [0], "behind the last block nothing is computed"
