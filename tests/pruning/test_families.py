# SPDX-License-Identifier: Apache-2.0
"""A tiny random model of each supported family: walked, compared with plain forwards, saved and loaded again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

from optimum_calibprune.pruning import blocks, schedule
from optimum_calibprune.pruning.hessian import Hessian
from optimum_calibprune.pruning.schedule import Settings, prune_blocks
from optimum_calibprune.records import CalibrationRow, CalibrationSet, LayerReport, SparsityPattern


VOCABULARY, LENGTH, SAMPLES, MICRO_BATCH = 64, 24, 7, 3
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# An intermediate size of 160 makes two windows, 128 and 32 columns wide.
SHAPE = {**TOKENS, "hidden_size": 32, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "max_position_embeddings": 64}
FALCON = {**TOKENS, "hidden_size": 32, "ffn_hidden_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {**TOKENS, "n_embd": 32, "n_inner": 160, "n_layer": 2, "n_head": 4, "n_positions": 64}
BLOOM = {**TOKENS, "hidden_size": 40, "n_layer": 2, "n_head": 4}


@dataclass(frozen=True)
class Family:
    """How to make a model, and what one of its blocks holds: linear layers, and groups of them that share an input."""

    config: Callable[[], PretrainedConfig]
    linears: int
    groups: int
    dtype: torch.dtype = torch.float32


FAMILIES = {
    "llama": Family(lambda: LlamaConfig(**GROUPED), 7, 4),
    "llama tied, bf16": Family(lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True), 7, 4, torch.bfloat16),
    "qwen3": Family(lambda: Qwen3Config(**GROUPED, head_dim=8), 7, 4),
    "mistral": Family(lambda: MistralConfig(**GROUPED, sliding_window=6), 7, 4),
    "gemma3": Family(
        lambda: Gemma3TextConfig(
            **{**GROUPED, "num_hidden_layers": 4},
            head_dim=8,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        7,
        4,
    ),
    "phi3": Family(lambda: Phi3Config(**GROUPED), 4, 4),
    "opt": Family(
        lambda: OPTConfig(
            **{key: value for key, value in SHAPE.items() if key != "intermediate_size"},
            ffn_dim=160,
            word_embed_proj_dim=16,
            max_position_embeddings=64,
        ),
        6,
        4,
    ),
    "opt, fp16": Family(
        lambda: OPTConfig(
            **{key: value for key, value in SHAPE.items() if key != "intermediate_size"},
            ffn_dim=160,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
        ),
        6,
        4,
        torch.float16,
    ),
    "gpt2": Family(lambda: GPT2Config(**GPT2), 4, 4),
    "gpt-neox": Family(lambda: GPTNeoXConfig(**SHAPE, max_position_embeddings=64), 4, 4),
    "falcon, parallel": Family(lambda: FalconConfig(**FALCON, parallel_attn=True, alibi=False), 4, 3),
    "falcon, alibi": Family(lambda: FalconConfig(**FALCON, parallel_attn=False, alibi=True), 4, 4),
    "falcon, new": Family(lambda: FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2), 4, 4),
    "bloom": Family(lambda: BloomConfig(**BLOOM), 4, 4),
}


def make(name: str) -> PreTrainedModel:
    """A random model whose norms and biases are not the ones and zeros they are initialised to."""
    family = FAMILIES[name]
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(family.config(), dtype=family.dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def calibration() -> CalibrationSet:
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (SAMPLES, LENGTH))
    return CalibrationSet(ids, tuple(CalibrationRow("random", i, "general") for i in range(SAMPLES)))


def micro_batches() -> Iterator[Tensor]:
    return iter(torch.from_numpy(calibration().input_ids.copy()).split(MICRO_BATCH))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return torch.cat([model(input_ids=batch, use_cache=False).logits for batch in micro_batches()])


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def weight(module: nn.Module) -> Tensor:
    """`[outputs, inputs]`, written here anew."""
    return module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()


def linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """All linear layers with a block's number in their name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and any(part.isdigit() for part in name.split("."))
    }


def windows(rows: int, columns: int, sparsity: float) -> int:
    return sum(round(sparsity * rows * min(128, columns - start)) for start in range(0, columns, 128))


@dataclass
class Walked:
    """A model after the walk, its dense tensors, the reports, and the Hessian with which each module was solved."""

    model: PreTrainedModel
    dense: dict[str, Tensor]
    reports: list[LayerReport]
    hessians: dict[str, Tensor]


@pytest.fixture(scope="module", params=list(FAMILIES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def walked(name: str) -> Walked:
    """Pruned to 37 % in micro-batches of 3, 3 and 1, of which the first waits and the others are replayed."""
    model = make(name)
    pattern = SparsityPattern(0.37)
    blocks.check_model(model, pattern)
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    names = {weight(module).data_ptr(): name for name, module in linears(model).items()}
    hessians: dict[str, Tensor] = {}
    solve = schedule.solve_together

    def recording(weights: Sequence[Tensor], H: Hessian, *args: object, **kwargs: object) -> object:
        hessians.update({names[W.data_ptr()]: H.matrix for W in weights})
        return solve(weights, H, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "solve_together", recording)
        settings = Settings(pattern, micro_batch=MICRO_BATCH, resident=1)
        reports = [report for part in prune_blocks(model, calibration(), settings) for report in part]
    return Walked(model, dense, reports, hessians)


def test_every_linear_layer_of_every_block_is_pruned_once(name: str, walked: Walked) -> None:
    reported = [report.module for report in walked.reports]
    count = walked.model.config.num_hidden_layers
    assert sorted(reported) == sorted(linears(walked.model))
    assert len(reported) == FAMILIES[name].linears * count
    groups = blocks.find_groups(walked.model)
    assert [len(block) for block in groups] == [FAMILIES[name].groups] * count


def test_zeros_are_exactly_those_asked_for_in_each_window(walked: Walked) -> None:
    for report in walked.reports:
        matrix = weight(walked.model.get_submodule(report.module))
        asked = windows(*matrix.shape, 0.37)
        assert report.shape == tuple(matrix.shape)
        assert report.zeros_asked == asked, report.module
        assert report.zeros_found == int((matrix == 0).sum()) == asked, report.module
        for start in range(0, matrix.shape[1], 128):
            window = matrix[:, start : start + 128]
            assert int((window == 0).sum()) == round(0.37 * window.numel()), report.module


def test_everything_but_these_weights_keeps_its_bytes(walked: Walked) -> None:
    changed = {
        key
        for key, value in walked.model.state_dict().items()
        if not torch.equal(as_bytes(value), as_bytes(walked.dense[key]))
    }
    assert changed == {f"{report.module}.weight" for report in walked.reports}


def test_each_module_was_solved_with_what_the_pruned_model_brings_to_it(walked: Walked) -> None:
    seen = {name: Hessian(weight(module).shape[1]) for name, module in linears(walked.model).items()}

    def record(hessian: Hessian) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: hessian.add(args[0])

    handles = [module.register_forward_pre_hook(record(seen[name])) for name, module in linears(walked.model).items()]
    logits(walked.model)
    for handle in handles:
        handle.remove()
    assert walked.hessians.keys() == seen.keys()
    for name, hessian in seen.items():
        assert torch.equal(hessian.matrix, walked.hessians[name]), name


def test_the_saved_model_loads_with_the_same_logits_and_zeros(walked: Walked, tmp_path: Path) -> None:
    walked.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.dtype == walked.model.dtype
    assert torch.equal(as_bytes(logits(loaded)), as_bytes(logits(walked.model)))
    for report in walked.reports:
        assert int((weight(loaded.get_submodule(report.module)) == 0).sum()) == report.zeros_found


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon, parallel", "llama tied, bf16"])
def test_two_of_every_four_inputs_are_zero_in_each_row(family: str, tmp_path: Path) -> None:
    model = make(family)
    settings = Settings(SparsityPattern.parse("2:4"), micro_batch=MICRO_BATCH)
    reports = [report for part in prune_blocks(model, calibration(), settings) for report in part]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(reports) == len(linears(model))
    for report in reports:
        fours = weight(loaded.get_submodule(report.module)).unflatten(1, (-1, 4))
        assert bool(((fours == 0).sum(dim=2) == 2).all()), report.module


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_the_other_methods_leave_what_they_keep_as_it_was(method: str) -> None:
    model, dense = make("gpt2"), make("gpt2")
    for _ in prune_blocks(model, calibration(), Settings(SparsityPattern(0.5), method, micro_batch=MICRO_BATCH)):
        pass
    for name, module in linears(model).items():
        sparse, before = weight(module), weight(dense.get_submodule(name))
        assert int((sparse == 0).sum()) == sparse.numel() // 2
        assert torch.equal(sparse, before.masked_fill(sparse == 0, 0.0))


def test_a_pruned_model_can_be_pruned_further() -> None:
    model = make("llama")
    for fraction in (0.3, 0.6):
        zeros = {name: weight(module) == 0 for name, module in linears(model).items()}
        for _ in prune_blocks(model, calibration(), Settings(SparsityPattern(fraction), micro_batch=MICRO_BATCH)):
            pass
    for name, module in linears(model).items():
        matrix = weight(module)
        assert int((matrix == 0).sum()) == windows(*matrix.shape, 0.6)
        first = slice(0, 128)  # later windows receive errors before their own weights are chosen
        assert bool((matrix[:, first] == 0)[zeros[name][:, first]].all()), name
