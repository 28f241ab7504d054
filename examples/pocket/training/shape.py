# SPDX-License-Identifier: Apache-2.0
"""How large a model is: its shape, the presets, and the Llama of that shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM


CONTEXT = 1024  # positions that the model's config allows, at least
END = 0  # id of <|end|>, which begins, ends and pads
POCKET_HIDDEN = (
    192  # the width for which learning rates and initialisation were found; they shrink with its square root
)


@dataclass(frozen=True)
class Shape:
    """A Llama with tied embeddings.

    Raises `ValueError` where the widths do not divide.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int

    def __post_init__(self) -> None:
        if min(self.hidden, self.layers, self.heads, self.kv_heads, self.mlp) < 1:
            raise ValueError(f"{self}: every number must be at least 1.")
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"hidden {self.hidden} over {self.heads} heads: each head must get an even number of columns."
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key-value heads evenly.")

    def parameters(self, vocabulary: int) -> int:
        """Weights of the model, embeddings (which are the output head, too) included."""
        keys = self.hidden // self.heads * self.kv_heads  # columns of the keys, and of the values
        block = 2 * self.hidden * (self.hidden + keys) + 3 * self.hidden * self.mlp + 2 * self.hidden
        return vocabulary * self.hidden + self.layers * block + self.hidden

    @property
    def width_factor(self) -> float:
        """What the width does to learning rates of embeddings and norms, and to the size of initial weights."""
        return (POCKET_HIDDEN / self.hidden) ** 0.5


@dataclass(frozen=True)
class Preset:
    """A shape and how it is trained by default: sequence length, sequences a step and at once, tokens in all."""

    shape: Shape
    length: int
    batch: int
    micro_batch: int
    tokens: int


# An H100 gives 989e12 dense bf16 operations a second, training takes 6 a parameter and token. At 40 % of that the 50m preset
# (51.5 million parameters) runs at 1.28 million tokens/s: 600 million tokens take 7.8 minutes, and the ten minutes that they
# are meant for are kept down to 31 %. The 160m preset (161.7 million) runs at 0.41 million tokens/s: 1.5 billion take an hour.
PRESETS = {
    "pocket": Preset(Shape(192, 6, 6, 3, 576), length=256, batch=32, micro_batch=32, tokens=24_000_000),
    "50m": Preset(Shape(640, 12, 10, 5, 1536), length=512, batch=256, micro_batch=128, tokens=600_000_000),
    "160m": Preset(Shape(1024, 14, 16, 8, 2688), length=512, batch=512, micro_batch=128, tokens=1_500_000_000),
}


def causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Fused attention `[batch, heads, length, head]` over whole windows. No mask is built, since building one makes the host
    wait for the device in each forward."""
    mixed = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register("causal_attention", causal_attention)


def make_model(shape: Shape, vocabulary: int, length: int, seed: int) -> LlamaForCausalLM:
    """A fresh model on the CPU, its weights drawn by the seed. The caller's random state is left as it was."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.mlp,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        vocab_size=vocabulary,
        max_position_embeddings=max(CONTEXT, length),
        tie_word_embeddings=True,
        initializer_range=0.04 * shape.width_factor,
        bos_token_id=END,
        eos_token_id=END,  # pad_token_id stays None: a padding embedding is held at zero, and this token is needed
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.set_attn_implementation("causal_attention")
    return model
