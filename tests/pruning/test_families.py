# SPDX-License-Identifier: Apache-2.0
"""A tiny random model of each supported family: walked, compared with plain forwards, saved and loaded again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    DbrxConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    NemotronHConfig,
    Olmo2Config,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
    Starcoder2Config,
    Zamba2Config,
)
from transformers.pytorch_utils import Conv1D

from optimum_calibprune.pruning import blocks, schedule
from optimum_calibprune.pruning.hessian import Hessian
from optimum_calibprune.pruning.schedule import Settings, prune_blocks
from optimum_calibprune.records import CalibrationRow, CalibrationSet, LayerReport, SparsityPattern


TABLE = Path(__file__).parents[2] / "docs" / "families.md"
VOCABULARY, LENGTH, SAMPLES, MICRO_BATCH = 64, 24, 7, 3
EXPERTS = 4
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# An intermediate size of 160 makes two windows, 128 and 32 columns wide.
SHAPE = {**TOKENS, "hidden_size": 32, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "max_position_embeddings": 64}
FALCON = {**TOKENS, "hidden_size": 32, "ffn_hidden_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {**TOKENS, "n_embd": 32, "n_inner": 160, "n_layer": 2, "n_head": 4, "n_positions": 64}
BLOOM = {**TOKENS, "hidden_size": 40, "n_layer": 2, "n_head": 4}
OPT = {key: value for key, value in SHAPE.items() if key != "intermediate_size"}
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
ROUTED = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 160}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


@dataclass(frozen=True)
class Family:
    """How to make a model, and what each of its blocks holds: linear layers that are pruned, groups of them that share an
    input, whether it has experts; one number where all blocks are alike.

    `special` is for the table, `key` what a checkpoint calls a matrix of an expert (empty where that is not tested), `parts`
    how many matrices make an expert.
    """

    config: Callable[[], PretrainedConfig]
    linears: int | tuple[int, ...]
    groups: int | tuple[int, ...]
    dtype: torch.dtype = torch.float32
    special: str = ""
    experts: bool | tuple[bool, ...] = False
    key: str = ""
    parts: int = 3


FAMILIES = {
    "llama": Family(lambda: LlamaConfig(**GROUPED), 7, 4),
    "llama, tied, bf16": Family(
        lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True), 7, 4, torch.bfloat16, "tied embeddings"
    ),
    "qwen2": Family(lambda: Qwen2Config(**GROUPED), 7, 4, special="biases in attention"),
    "qwen3": Family(lambda: Qwen3Config(**GROUPED, head_dim=8), 7, 4),
    "mistral": Family(lambda: MistralConfig(**GROUPED, sliding_window=6), 7, 4, special="sliding window"),
    "gemma2": Family(lambda: Gemma2Config(**GROUPED, head_dim=8, **SLIDING), 7, 4, special="sliding and full layers"),
    "gemma3": Family(
        lambda: Gemma3TextConfig(**GROUPED, head_dim=8, **SLIDING),
        7,
        4,
        special="sliding and full layers, each with its own rotary embedding",
    ),
    "cohere2": Family(
        lambda: Cohere2Config(**GROUPED, **SLIDING), 7, 3, special="sliding and full layers, attention beside the MLP"
    ),
    "smollm3": Family(
        lambda: SmolLM3Config(**GROUPED, no_rope_layers=[1, 0]), 7, 4, special="layers without rotary embedding"
    ),
    "olmo2": Family(lambda: Olmo2Config(**GROUPED), 7, 4, special="norms behind the layers"),
    "granite": Family(lambda: GraniteConfig(**GROUPED, residual_multiplier=0.5), 7, 4, special="scaled residuals"),
    "glm4": Family(lambda: Glm4Config(**GROUPED, head_dim=8), 6, 4, special="gate and up in one matrix"),
    "phi": Family(lambda: PhiConfig(**GROUPED), 6, 3, special="attention beside the MLP"),
    "phi3": Family(lambda: Phi3Config(**GROUPED), 4, 4, special="query, key and value in one matrix"),
    "starcoder2": Family(lambda: Starcoder2Config(**GROUPED, sliding_window=6), 6, 4, special="sliding window"),
    "opt": Family(
        lambda: OPTConfig(**OPT, ffn_dim=160, word_embed_proj_dim=16, max_position_embeddings=64),
        6,
        4,
        special="projected embeddings",
    ),
    "opt, fp16": Family(
        lambda: OPTConfig(**OPT, ffn_dim=160, word_embed_proj_dim=32, max_position_embeddings=64), 6, 4, torch.float16
    ),
    "gpt2": Family(lambda: GPT2Config(**GPT2), 4, 4, special="weights stored as inputs x outputs"),
    "gpt-neox": Family(
        lambda: GPTNeoXConfig(**SHAPE, max_position_embeddings=64), 4, 4, special="attention beside the MLP"
    ),
    "falcon, parallel": Family(
        lambda: FalconConfig(**FALCON, parallel_attn=True, alibi=False), 4, 3, special="attention beside the MLP"
    ),
    "falcon, alibi": Family(lambda: FalconConfig(**FALCON, parallel_attn=False, alibi=True), 4, 4, special="ALiBi"),
    "falcon, new": Family(lambda: FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2), 4, 4),
    "bloom": Family(lambda: BloomConfig(**BLOOM), 4, 4, special="ALiBi"),
    "mamba": Family(
        lambda: MambaConfig(**{**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
        3,
        3,
        special="state space; convolution, decay and time-step projection stay dense",
    ),
    "lfm2": Family(
        lambda: Lfm2Config(**GROUPED, block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"]),
        (5, 7),
        (4, 4),
        special="short convolutions, which stay dense, and full attention",
    ),
    "mixtral": Family(
        lambda: MixtralConfig(**GROUPED, num_local_experts=EXPERTS, num_experts_per_tok=2),
        4,
        2,
        experts=True,
        key="model.layers.{layer}.block_sparse_moe.experts.{expert}.{gate_proj=w1|up_proj=w3|down_proj=w2}.weight",
    ),
    "mixtral, sliding, bf16": Family(
        lambda: MixtralConfig(**GROUPED, num_local_experts=EXPERTS, num_experts_per_tok=2, sliding_window=6),
        4,
        2,
        torch.bfloat16,
        "sliding window",
        experts=True,
        key="model.layers.{layer}.block_sparse_moe.experts.{expert}.{gate_proj=w1|up_proj=w3|down_proj=w2}.weight",
    ),
    "qwen2-moe": Family(
        lambda: Qwen2MoeConfig(**GROUPED, **ROUTED, shared_expert_intermediate_size=64),
        7,
        4,
        special="a shared expert, pruned as linear layers; its gate stays dense",
        experts=True,
        key="model.layers.{layer}.mlp.experts.{expert}.{kind}.weight",
    ),
    "qwen3-moe": Family(
        lambda: Qwen3MoeConfig(**GROUPED, **ROUTED, head_dim=8, mlp_only_layers=[0]),
        (7, 4),
        (4, 2),
        special="blocks with and without experts",
        experts=(False, True),
        key="model.layers.{layer}.mlp.experts.{expert}.{kind}.weight",
    ),
    "olmoe": Family(
        lambda: OlmoeConfig(**GROUPED, num_experts=EXPERTS, num_experts_per_tok=2),
        4,
        2,
        experts=True,
        key="model.layers.{layer}.mlp.experts.{expert}.{kind}.weight",
    ),
    "deepseek-v3": Family(
        lambda: DeepseekV3Config(
            **{**GROUPED, "num_key_value_heads": 4},
            **LATENT,
            n_routed_experts=EXPERTS,
            num_experts_per_tok=2,
            moe_intermediate_size=160,
            n_group=2,
            topk_group=2,
            first_k_dense_replace=1,
        ),
        (8, 8),
        (6, 6),
        special="latent attention, shared experts, blocks with and without experts",
        experts=(False, True),
        key="model.layers.{layer}.mlp.experts.{expert}.{kind}.weight",
    ),
    "granitemoe": Family(
        lambda: GraniteMoeConfig(**GROUPED, num_local_experts=EXPERTS, num_experts_per_tok=2),
        4,
        2,
        special="the checkpoint, too, has its experts fused",
        experts=True,
    ),
    "qwen3-next": Family(
        lambda: Qwen3NextConfig(
            **GROUPED,
            **ROUTED,
            **DELTA,
            head_dim=8,
            shared_expert_intermediate_size=64,
            layer_types=["linear_attention", "full_attention"],
        ),
        (6, 7),
        (4, 4),
        special="linear and full attention, a shared expert; convolutions stay dense",
        experts=True,
        key="model.layers.{layer}.mlp.experts.{expert}.{kind}.weight",
    ),
    "gpt-oss": Family(
        lambda: GptOssConfig(**GROUPED, **SLIDING, head_dim=8, num_local_experts=EXPERTS, num_experts_per_tok=2),
        4,
        2,
        special="experts transposed, with biases, gate and up interleaved; fused in the checkpoint, too",
        experts=True,
    ),
    "nemotron-h": Family(
        lambda: NemotronHConfig(
            **TOKENS,
            hidden_size=32,
            layers_block_type=["attention", "moe"],
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            n_routed_experts=EXPERTS,
            num_experts_per_tok=2,
            moe_intermediate_size=160,
            moe_shared_expert_intermediate_size=64,
            moe_latent_size=16,
        ),
        (4, 4),
        (2, 4),
        special="blocks of attention or experts alone; experts without gates, behind a projection",
        experts=(False, True),
        parts=2,
    ),
}
MOE = [name for name, family in FAMILIES.items() if family.experts]

REFUSED = {
    "gemma4": (
        lambda: Gemma4TextConfig(
            **GROUPED, head_dim=8, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, global_head_dim=8
        ),
        r"model\.layers\.0 cannot run by itself",
        "its blocks read the token embeddings, and keys and values of other blocks",
    ),
    "zamba2": (
        lambda: Zamba2Config(
            **GROUPED,
            layers_block_type=["mamba", "hybrid"],
            num_mem_blocks=1,
            n_mamba_heads=8,
            mamba_headdim=8,
            mamba_d_state=8,
        ),
        r"model\.layers\.1 cannot run by itself",
        "its blocks read the token embeddings",
    ),
    "dbrx": (
        lambda: DbrxConfig(
            **TOKENS,
            d_model=32,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            ffn_config={"ffn_hidden_size": 48, "moe_num_experts": EXPERTS, "moe_top_k": 2},
        ),
        r"Most weights of DbrxForCausalLM are not in linear layers: transformer\.blocks\.0\.ffn\.experts\.mlp\.",
        "its experts are fused in a layout of their own",
    ),
    "llama4": (
        lambda: Llama4TextConfig(**GROUPED, head_dim=8, intermediate_size_mlp=160, num_local_experts=EXPERTS),
        r"model\.layers\.0\.feed_forward\.experts\.gate_up_proj holds several matrices in one tensor",
        "its experts are fused in a layout of their own",
    ),
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
    """All linear layers with a block's number in their name, but for gates of one output, and for Mamba's time steps, whose
    layer is never called."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and any(part.isdigit() for part in name.split("."))
        and not name.endswith(("shared_expert_gate", "dt_proj"))
    }


def fused(model: PreTrainedModel) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "down_proj", None), nn.Parameter)
    }


def of_expert(module: nn.Module, expert: int) -> dict[str, Tensor]:
    """`[outputs, inputs]`, written here anew; gpt-oss is the one with biases."""
    down = module.down_proj.detach()[expert]
    if not hasattr(module, "gate_up_proj"):
        return {"up_proj": module.up_proj.detach()[expert], "down_proj": down}
    both = module.gate_up_proj.detach()[expert]
    if hasattr(module, "gate_up_proj_bias"):
        return {"gate_proj": both[:, ::2].T, "up_proj": both[:, 1::2].T, "down_proj": down.T}
    gate, up = both.chunk(2)
    return {"gate_proj": gate, "up_proj": up, "down_proj": down}


def matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    """All that has to be pruned, `[outputs, inputs]`, by its name in the reports."""
    found = {name: weight(module) for name, module in linears(model).items()}
    for name, module in fused(model).items():
        for expert in range(EXPERTS):
            found |= {f"{name}.{expert}.{kind}": W for kind, W in of_expert(module, expert).items()}
    return found


def in_each_block(model: PreTrainedModel, value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple) else [value] * model.config.num_hidden_layers


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
    names = {W.data_ptr(): name for name, W in matrices(model).items()}
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


def test_every_matrix_of_every_block_is_pruned_once(name: str, walked: Walked) -> None:
    family, reported = FAMILIES[name], [report.module for report in walked.reports]
    each = [in_each_block(walked.model, value) for value in (family.linears, family.groups, family.experts)]
    assert sorted(reported) == sorted(matrices(walked.model))
    assert len(reported) == sum(
        linears + family.parts * EXPERTS * experts for linears, _, experts in zip(*each, strict=True)
    )
    groups = blocks.find_groups(walked.model)
    assert [len(block) for block in groups] == [groups + experts for _, groups, experts in zip(*each, strict=True)]


def test_zeros_are_exactly_those_asked_for_in_each_window(walked: Walked) -> None:
    found = matrices(walked.model)
    for report in walked.reports:
        matrix = found[report.module]
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
    experts = {name for name, tensor in walked.model.named_parameters() if tensor.ndim == 3 and "experts" in name}
    assert changed == {f"{name}.weight" for name in linears(walked.model)} | experts


def test_what_is_left_alone_is_listed_and_is_no_linear_layer_but_a_gate(walked: Walked) -> None:
    entries = {entry.name: entry.reason for entry in blocks.untouched(walked.model, blocks.find_groups(walked.model))}
    pruned = {f"{name}.weight" for name in linears(walked.model)}
    experts = {name for name, tensor in walked.model.named_parameters() if tensor.ndim == 3 and "experts" in name}
    all_matrices = {name for name, tensor in walked.model.named_parameters() if tensor.ndim >= 2}
    biases = {name for name in all_matrices if name.endswith("proj_bias")}
    assert entries.keys() == all_matrices - pruned - experts - biases
    for name, reason in entries.items():
        if name.endswith((".mlp.gate.weight", ".mixer.gate.weight", ".router.weight")):
            assert reason == "a router, which is never pruned"
        elif name.endswith("shared_expert_gate.weight"):
            assert reason == "a gate of one output, which is never pruned"
        elif name.endswith("dt_proj.weight"):
            assert reason == "not reached by a forward pass, or shared with another module"
        elif any(part.isdigit() for part in name.split(".")):
            assert reason == "not a linear layer", name


@torch.no_grad()
def test_each_matrix_was_solved_with_what_the_pruned_model_brings_to_it(walked: Walked) -> None:
    model, found = walked.model, matrices(walked.model)
    seen = {name: Hessian(matrix.shape[1]) for name, matrix in found.items()}
    starved = {report.module for report in walked.reports if report.starved}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: seen[name].add(args[0])

    def record_experts(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x, index = args[:2]
            for expert in range(EXPERTS):
                for kind in of_expert(module, expert):
                    part = f"{name}.{expert}.{kind}"
                    sent = [x[t] for t in range(len(x)) if part in starved or expert in index[t].tolist()]
                    if sent:
                        rows = torch.stack(sent)
                        seen[part].add(between(module, expert, rows) if kind == "down_proj" else rows)

        return add

    handles = [module.register_forward_pre_hook(record(name)) for name, module in linears(model).items()]
    handles += [module.register_forward_pre_hook(record_experts(name)) for name, module in fused(model).items()]
    logits(model)
    for handle in handles:
        handle.remove()
    assert walked.hessians.keys() == seen.keys()
    for name, hessian in seen.items():
        assert torch.equal(hessian.matrix, walked.hessians[name]), name


def between(module: nn.Module, expert: int, x: Tensor) -> Tensor:
    """The inputs of an expert's last matrix, from those of its first, written here anew."""
    if not hasattr(module, "gate_up_proj"):
        return F.relu(F.linear(x, module.up_proj[expert])).square()
    if not hasattr(module, "gate_up_proj_bias"):
        gate, up = F.linear(x, module.gate_up_proj[expert]).chunk(2, dim=-1)
        return F.silu(gate) * up
    both = x @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
    gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(1.702 * gate))


def test_the_saved_model_loads_with_the_same_logits_and_zeros(walked: Walked, tmp_path: Path) -> None:
    walked.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.dtype == walked.model.dtype
    assert torch.equal(as_bytes(logits(loaded)), as_bytes(logits(walked.model)))
    found = matrices(loaded)
    for report in walked.reports:
        assert int((found[report.module] == 0).sum()) == report.zeros_found


@pytest.mark.parametrize("family", [name for name in MOE if FAMILIES[name].key])
def test_experts_are_saved_one_by_one_under_the_keys_of_their_family(family: str, tmp_path: Path) -> None:
    model = make(family)
    settings = Settings(SparsityPattern(0.37), micro_batch=MICRO_BATCH)
    reports = [report for part in prune_blocks(model, calibration(), settings) for report in part]
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    experts = {report.module: report for report in reports if report.routed is not None}
    for name, report in experts.items():
        tensor = saved.pop(key_of(FAMILIES[family].key, name))
        assert torch.equal(tensor, matrices(model)[name])
        assert int((tensor == 0).sum()) == report.zeros_found
    assert not any("experts.0." in key or "gate_up_proj" in key for key in saved)


def key_of(template: str, module: str) -> str:
    """The key in a checkpoint of an expert's matrix, as `Family.key` has it."""
    layer, expert, kind = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(\w+)", module).groups()
    kinds = re.search(r"{(\w+=.*)}", template)
    if kinds:
        template = template.replace(kinds[0], dict(part.split("=") for part in kinds[1].split("|"))[kind])
    return template.format(layer=layer, expert=expert, kind=kind)


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_cannot_be_pruned_are_refused_in_one_sentence(family: str) -> None:
    config, message, _ = REFUSED[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config()).eval()
    with pytest.raises(ValueError, match=message):
        blocks.check_model(model, SparsityPattern(0.5))


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon, parallel", "llama, tied, bf16", "mixtral", "gpt-oss"])
def test_two_of_every_four_inputs_are_zero_in_each_row(family: str, tmp_path: Path) -> None:
    model = make(family)
    settings = Settings(SparsityPattern.parse("2:4"), micro_batch=MICRO_BATCH)
    reports = [report for part in prune_blocks(model, calibration(), settings) for report in part]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = matrices(loaded)
    assert len(reports) == len(found)
    for report in reports:
        fours = found[report.module].unflatten(1, (-1, 4))
        assert bool(((fours == 0).sum(dim=2) == 2).all()), report.module


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt-oss"])
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_the_other_methods_leave_what_they_keep_as_it_was(method: str, family: str) -> None:
    model, dense = make(family), make(family)
    for _ in prune_blocks(model, calibration(), Settings(SparsityPattern(0.5), method, micro_batch=MICRO_BATCH)):
        pass
    before = matrices(dense)
    for name, sparse in matrices(model).items():
        assert int((sparse == 0).sum()) == sparse.numel() // 2
        assert torch.equal(sparse, before[name].masked_fill(sparse == 0, 0.0))


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


# --------------------------------------------------------------------------------------------- the table


def table() -> str:
    """docs/families.md, from what stands above."""

    def counted(value: Any) -> str:
        return " / ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    rows = []
    for name, family in FAMILIES.items():
        experts = {False: "", True: "yes"}.get(family.experts, "in some blocks")
        rows.append(
            f"| {name} | {counted(family.linears)} | {counted(family.groups)} | {experts} | {family.special} |"
        )
    refused = [f"| {name} | {reason} |" for name, (_, _, reason) in REFUSED.items()]
    return "\n".join(
        [
            "# Families",
            "",
            "Written by `tests/pruning/test_families.py`, which prunes a tiny random model of each: zeros as asked in every",
            "matrix, head, embeddings, norms and routers untouched, every Hessian equal to one of plain forwards, logits equal",
            "after saving and loading. Pretrained models of these families have not all been tried.",
            "",
            "Linear layers and the inputs that they share are counted for a block, where blocks differ for each of two. Experts",
            "are three matrices each, and each expert is pruned for the tokens that it is sent.",
            "",
            "| family | linear layers | inputs | experts | what is special |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "Refused, before anything is changed:",
            "",
            "| family | why |",
            "|---|---|",
            *refused,
            "",
            "So is every other model whose blocks need more than hidden states, or in whose blocks most weights are not in linear",
            "layers; quantised models, encoder-decoders, and models that are not in memory, too.",
            "",
        ]
    )


def test_the_table_in_the_docs_is_the_one_of_these_tests() -> None:
    """After a change that is meant, write it anew: `python -m tests.pruning.test_families`."""
    assert TABLE.read_text(encoding="utf-8") == table()


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
