# SPDX-License-Identifier: Apache-2.0
"""What of a model is pruned, what is left alone, and which models are refused, by name, before anything is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils.quantization_config import Mxfp4Config

from optimum_calibprune.pruning import blocks
from optimum_calibprune.records import Sparsity, SparsityPattern


SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
HALF, TWO_OF_FOUR = SparsityPattern(0.5), SparsityPattern.parse("2:4")


def llama(**options: Any) -> PreTrainedModel:
    return build(LlamaConfig(**{**SHAPE, **options}))


def build(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def llava() -> PreTrainedModel:
    """As many blocks in the vision tower as in the language model."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SHAPE), image_token_index=63)
    ).eval()


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


# -------------------------------------------------------------------------------------- finding blocks


def test_blocks_are_found_with_their_name() -> None:
    model = llama()
    name, found = blocks.find_blocks(model)
    assert name == "model.layers"
    assert found is model.model.layers


def test_blocks_of_a_vision_tower_are_not_those_of_the_language_model() -> None:
    model = llava()
    model.aside = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    name, found = blocks.find_blocks(model)
    assert name == "model.language_model.layers"
    assert found is model.model.language_model.layers
    blocks.check_model(model, HALF)
    names = {entry.name for entry in blocks.untouched(model, blocks.find_groups(model))}
    assert "model.vision_tower.encoder.layers.0.mlp.fc1.weight" in names
    assert not any(name.startswith("model.language_model.layers") for name in names)


@pytest.mark.parametrize("count", [0, 5])
def test_a_model_without_decoder_blocks_is_refused(count: int) -> None:
    model = llama()
    model.config.num_hidden_layers = count
    with pytest.raises(ValueError, match=f"LlamaForCausalLM has no decoder blocks .* num_hidden_layers = {count} "):
        blocks.find_blocks(model)


def test_a_config_without_a_number_of_layers_is_refused() -> None:
    model = llama()
    del model.config.num_hidden_layers
    with pytest.raises(ValueError, match="LlamaForCausalLM has no decoder blocks"):
        blocks.find_blocks(model)


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration .* encoder-decoder"):
        blocks.check_model(T5ForConditionalGeneration(config), HALF)


# -------------------------------------------------------------------------------------------- refusals


def test_experts_of_an_unknown_layout_are_refused_by_name() -> None:
    model = build(MixtralConfig(**SHAPE, num_local_experts=2))
    blocks.check_model(model, HALF)
    del model.model.layers[0].mlp.experts.is_transposed
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj .*\(2, 96, 32\).*not known"):
        blocks.check_model(model, HALF)


def test_columns_of_experts_are_checked_by_name() -> None:
    model = build(MixtralConfig(**{**SHAPE, "intermediate_size": 50}, num_local_experts=2))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts\.0\.down_proj has 50 columns"):
        blocks.check_model(model, TWO_OF_FOUR)


def test_experts_that_are_not_finite_are_refused_by_name() -> None:
    model = build(MixtralConfig(**SHAPE, num_local_experts=2))
    model.model.layers[1].mlp.experts.down_proj.data[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.down_proj holds NaN or infinity"):
        blocks.check_model(model, HALF)


def test_experts_that_no_forward_reaches_are_refused_by_name() -> None:
    model = build(MixtralConfig(**SHAPE, num_local_experts=2))
    model.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts is not reached"):
        blocks.find_groups(model)


def test_a_linear_router_beside_fused_experts_is_left_alone() -> None:
    model = build(MixtralConfig(**SHAPE, num_local_experts=2))
    moe = model.model.layers[0].mlp
    moe.gate.linear = nn.Linear(32, 2, bias=False)
    moe.gate.forward = lambda x: (None, *moe.gate.linear(x).softmax(-1).topk(1))
    groups = blocks.find_groups(model)
    assert not any("gate" in name for stop in groups[0] for name in stop.names if "experts" not in name)
    entries = {entry.name: entry.reason for entry in blocks.untouched(model, groups)}
    assert entries["model.layers.0.mlp.gate.linear.weight"] == "a router, which is never pruned"


def test_columns_that_m_does_not_divide_are_refused_by_name() -> None:
    model = llama(intermediate_size=50)
    blocks.check_model(model, HALF)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj has 50 columns, which m = 4 of 2:4"):
        blocks.check_model(model, TWO_OF_FOUR)


def test_each_module_is_checked_with_its_own_pattern() -> None:
    model = llama(intermediate_size=50)
    blocks.check_model(model, Sparsity.parse("*.down_proj=50%,*=2:4"))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj has 50 columns, which m = 4 of 1:4"):
        blocks.check_model(model, Sparsity.parse("*.down_proj=1:4,*=2:4"))
    with pytest.raises(ValueError, match=r"fits no module .* like 'model\.layers\.0\.self_attn\.q_proj'"):
        blocks.check_model(model, Sparsity.parse("lm_head=dense,*=50%"))


def test_columns_of_conv1d_are_its_inputs() -> None:
    model = build(GPT2Config(vocab_size=64, n_embd=32, n_inner=50, n_layer=2, n_head=4, n_positions=64))
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.mlp\.c_proj has 50 columns"):
        blocks.check_model(model, TWO_OF_FOUR)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    model = llama()
    model.model.layers[1].self_attn.o_proj.weight.data[3, 4] = value
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.o_proj\.weight holds NaN or infinity"):
        blocks.check_model(model, HALF)


def test_weights_that_are_not_in_memory_are_refused_by_name() -> None:
    model = llama()
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight is on meta: offloaded"):
        blocks.check_model(model, HALF)


def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = llama()
    with pytest.raises(ValueError, match="is on meta: offloaded"):
        blocks.check_model(model, HALF)


def test_blocks_without_linear_layers_are_refused() -> None:
    model = llama()
    model.model.layers = nn.ModuleList(nn.Identity() for _ in range(2))
    with pytest.raises(ValueError, match="The blocks of LlamaForCausalLM hold no linear layer"):
        blocks.check_model(model, HALF)


def test_blocks_between_which_the_model_does_something_are_refused() -> None:
    model = llama()
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
    with pytest.raises(ValueError, match=r"model\.layers\.0 cannot run by itself"):
        blocks.check_model(model, HALF)


def test_a_block_that_runs_twice_is_refused() -> None:
    model = llama()
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ValueError, match="All linear layers of LlamaForCausalLM are shared"):
        blocks.find_groups(model)


def test_a_module_that_runs_twice_in_its_block_is_refused_by_name() -> None:
    model = llama()
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x)) + mlp.down_proj(mlp.gate_proj(x))
    with pytest.raises(ValueError, match=r"mlp\.down_proj runs more than once"):
        blocks.find_groups(model)


def test_checking_a_sound_model_changes_nothing_and_leaves_no_hook() -> None:
    model = llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    blocks.check_model(model, TWO_OF_FOUR)
    blocks.find_groups(model)
    assert all(torch.equal(as_bytes(value), as_bytes(before[key])) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("form", [{"quant_method": "mxfp4"}, Mxfp4Config()], ids=["dictionary", "object"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_quantised_config_is_refused(form: Any, nested: bool) -> None:
    config = LlavaConfig(text_config=LlamaConfig(**SHAPE)) if nested else LlamaConfig(**SHAPE)
    blocks.check_config(config)
    config.get_text_config(decoder=True).quantization_config = form
    with pytest.raises(ValueError, match=r"(?i)is quantised already .*mxfp4.* dequantize=True"):
        blocks.check_config(config)


def test_a_quantised_model_in_memory_is_refused() -> None:
    model = llama()
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ValueError, match="quantised already"):
        blocks.check_model(model, HALF)


# ------------------------------------------------------------------------------------ what is left alone


def test_groups_of_llama_share_their_input() -> None:
    found = [[group.names for group in block] for block in blocks.find_groups(llama())]
    one = [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]
    assert found == [one, one]


def test_groups_are_the_same_in_train_mode_with_dropout() -> None:
    options = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    expected = [[group.names for group in block] for block in blocks.find_groups(build(GPT2Config(**options)))]
    model = build(GPT2Config(**options, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)).train()
    blocks.check_model(model, HALF)
    assert [[group.names for group in block] for block in blocks.find_groups(model)] == expected


def test_embeddings_head_and_norms_are_left_alone_with_reasons() -> None:
    model = llama(tie_word_embeddings=False)
    entries = blocks.untouched(model, blocks.find_groups(model))
    assert [(entry.name, entry.shape, entry.reason) for entry in entries] == [
        ("model.embed_tokens.weight", (64, 32), "embeddings, which are never pruned"),
        ("lm_head.weight", (64, 32), "the output head, which is never pruned"),
    ]


def test_modules_that_the_sparsity_leaves_dense_are_in_no_group_and_listed_with_its_pattern() -> None:
    model, sparsity = llama(), Sparsity.parse("*.0.mlp.*=dense,*.q_proj=dense,*=50%")
    first, second = blocks.find_groups(model, sparsity)
    assert [group.names for group in first] == [("self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)]
    assert [group.names for group in second][2:] == [("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
    reasons = {e.name: e.reason for e in blocks.untouched(model, [first, second], sparsity) if "layers" in e.name}
    assert reasons == {
        "model.layers.0.self_attn.q_proj.weight": "left dense, as asked by '*.q_proj'",
        "model.layers.0.mlp.gate_proj.weight": "left dense, as asked by '*.0.mlp.*'",
        "model.layers.0.mlp.up_proj.weight": "left dense, as asked by '*.0.mlp.*'",
        "model.layers.0.mlp.down_proj.weight": "left dense, as asked by '*.0.mlp.*'",
        "model.layers.1.self_attn.q_proj.weight": "left dense, as asked by '*.q_proj'",
    }


def test_a_tied_head_is_listed_once_as_embeddings() -> None:
    model = llama(tie_word_embeddings=True)
    entries = blocks.untouched(model, blocks.find_groups(model))
    assert [entry.name for entry in entries] == ["model.embed_tokens.weight"]


def test_position_embeddings_are_outside_the_blocks() -> None:
    model = build(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    reasons = {entry.name: entry.reason for entry in blocks.untouched(model, blocks.find_groups(model))}
    assert reasons == {
        "transformer.wte.weight": "embeddings, which are never pruned",
        "transformer.wpe.weight": "outside the decoder blocks",
    }


@pytest.mark.parametrize("share", ["weight", "module"])
def test_a_weight_of_two_modules_is_left_alone_and_reported(share: str) -> None:
    model = llama()
    one, other = (model.model.layers[i].mlp for i in range(2))
    if share == "weight":
        other.up_proj.weight = one.up_proj.weight
    else:
        other.up_proj = one.up_proj
    blocks.check_model(model, HALF)
    groups = blocks.find_groups(model)
    assert "mlp.up_proj" not in {name for block in groups for group in block for name in group.names}
    entries = {entry.name: entry.reason for entry in blocks.untouched(model, groups)}
    assert (
        entries["model.layers.0.mlp.up_proj.weight"] == "not reached by a forward pass, or shared with another module"
    )


def test_a_layer_that_no_forward_reaches_is_left_alone_and_reported() -> None:
    model = llama()
    model.model.layers[1].spare = nn.Linear(32, 32)
    groups = blocks.find_groups(model)
    assert "spare" not in {name for group in groups[1] for name in group.names}
    assert "model.layers.1.spare.weight" in {entry.name for entry in blocks.untouched(model, groups)}


def test_a_weight_that_is_computed_is_left_alone() -> None:
    model = llama()
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    blocks.check_model(model, HALF)
    groups = blocks.find_groups(model)
    assert "mlp.up_proj" not in {name for group in groups[0] for name in group.names}
    names = {entry.name for entry in blocks.untouched(model, groups)}
    assert "model.layers.0.mlp.up_proj.parametrizations.weight.original1" in names


# ------------------------------------------------------------------------------------- running one block


def test_weight_of_is_a_view_with_outputs_first() -> None:
    model = build(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    module = model.transformer.h[0].attn.c_attn
    blocks.weight_of(module)[5, 7] = 1.25
    assert blocks.weight_of(module).shape == (96, 32)
    assert module.weight[7, 5] == 1.25


def test_each_block_is_captured_with_its_own_mask_and_rope() -> None:
    model = build(
        Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    )
    ids = torch.arange(2 * 12).view(2, 12) % 64
    hidden, (sliding, full) = blocks.capture(model, ids, torch.device("cpu"))
    assert hidden.shape == (2, 12, 32)
    assert not torch.equal(sliding.kwargs["position_embeddings"][0], full.kwargs["position_embeddings"][0])
    first, second = model.model.layers
    with torch.no_grad():
        alone = blocks.run(second, blocks.run(first, hidden, sliding), full)
        expected = model.model(input_ids=ids, use_cache=False).last_hidden_state
        swapped = blocks.run(second, blocks.run(first, hidden, full), sliding)
        assert torch.equal(model.model.norm(alone), expected)
        assert not torch.allclose(model.model.norm(swapped), expected, atol=1e-4)


def test_embed_gives_what_capture_gives_and_both_stop_early() -> None:
    model = llama()
    ids = torch.arange(24).view(2, 12)
    reached: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: reached.append(1))
    hidden, calls = blocks.capture(model, ids, torch.device("cpu"))
    assert torch.equal(blocks.embed(model, ids, torch.device("cpu")), hidden)
    assert len(calls) == 2
    assert reached == []
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_failing_forward_leaves_no_hooks() -> None:
    model = llama()
    ids = torch.full((1, 8), 1000)
    for attempt in (blocks.capture, blocks.embed):
        with pytest.raises(IndexError):
            attempt(model, ids, torch.device("cpu"))
    assert not any(m._forward_pre_hooks for m in model.modules())
