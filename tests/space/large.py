# SPDX-License-Identifier: Apache-2.0
"""A model that is too large for the page: its config, which is all that is fetched of it."""

from __future__ import annotations

from transformers import LlamaConfig


PARAMETERS = 8_030_261_248


def config() -> str:
    """Of the shape of Llama 3 8B, as JSON."""
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32}
    sizes = {"hidden_size": 4096, "intermediate_size": 14_336, "vocab_size": 128_256, "max_position_embeddings": 8192}
    return LlamaConfig(**heads, **sizes, tie_word_embeddings=False, dtype="bfloat16").to_json_string()
