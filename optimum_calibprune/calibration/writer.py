# SPDX-License-Identifier: Apache-2.0
"""The model writes documents: batched sampling with a key-value cache, from prompts of token ids."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    The temperature moves linearly from `t_initial` to `t_final` over a document's first `tokens` new tokens and stays
    there (Williams et al. 2024, section 3). Then come the `top_k` most likely tokens (0: all), of these the smallest
    set that holds `top_p` of the probability. `repetition_penalty` divides the logits of tokens that stand in the text
    already (Keskar et al. 2019; 1: none).
    """

    t_initial: float = 1.0
    t_final: float = 1.0
    tokens: int = 0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if min(self.t_initial, self.t_final) <= 0:
            raise ValueError(
                f"A sampling temperature must be positive; {self.t_initial:g} and {self.t_final:g} were given."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1]; {self.top_p:g} was given.")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be positive; {self.repetition_penalty:g} was given.")

    @property
    def constant(self) -> bool:
        """Whether each token is drawn the same way, whatever stands before it."""
        return self.t_initial == self.t_final and self.repetition_penalty == 1

    def temperature(self, step: int) -> float:
        """Of new token number `step`, counted from 0."""
        share = min(1.0, step / self.tokens) if self.tokens else 1.0
        return self.t_initial + share * (self.t_final - self.t_initial)


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    length: int,
    seed: int,
) -> list[list[int]]:
    """What the model writes after each prompt: token ids up to its end token, or until prompt and text are `length`.

    On CUDA the continuous batching of transformers serves draws that do not depend on the text before them; elsewhere
    the prompts are one batch, so that the same seed gives the same text.
    """
    prompts = [list(prompt) for prompt in prompts]
    ends = end_tokens(model, tokenizer)
    device = model.get_input_embeddings().weight.device
    if device.type == "cuda" and sampling.constant:
        return write_continuously(model, prompts, sampling, ends, length, seed)
    return write_batch(model, prompts, sampling, ends, length, seed)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a document: the tokenizer's, then those that the model's generation config adds."""
    of_model = model.generation_config.eos_token_id if model.generation_config is not None else None
    several = of_model if isinstance(of_model, list) else [of_model]
    return list(dict.fromkeys(token for token in (tokenizer.eos_token_id, *several) if token is not None))


def write_continuously(
    model: PreTrainedModel,
    prompts: list[list[int]],
    sampling: Sampling,
    ends: list[int],
    length: int,
    seed: int,
    **memory: Any,
) -> list[list[int]]:
    """`write` by the continuous batching of transformers, which fills the place of a document that has ended.

    `memory` holds fields of its `ContinuousBatchingConfig`; on CUDA it finds them by itself.
    """
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = GenerationConfig(
        do_sample=True,
        temperature=sampling.t_final,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        eos_token_id=ends or None,
        max_new_tokens=length - min(map(len, prompts)),
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        outputs = model.generate_batch(
            inputs=prompts,
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(seed=seed % 2**32, **memory),
        )
    texts = [output.generated_tokens for output in outputs.values()]
    return [
        text[: next((i for i, token in enumerate(text) if token in ends), length - len(prompt))][
            : length - len(prompt)
        ]
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def write_batch(
    model: PreTrainedModel,
    prompts: list[list[int]],
    sampling: Sampling,
    ends: list[int],
    length: int,
    seed: int,
) -> list[list[int]]:
    """`write` in one batch."""
    import torch

    generator = torch.Generator(model.get_input_embeddings().weight.device).manual_seed(seed)
    texts = continue_rows(
        model,
        prompts,
        limits=[length - len(prompt) for prompt in prompts],
        draw=lambda logits, text, step: _draw(logits, text, sampling, step, generator),
        finished=lambda text: text[-1] in ends,
    )
    return [text[:-1] if text[-1] in ends else text for text in texts]


def continue_rows(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    limits: Sequence[int],
    draw: Callable[[Tensor, Tensor, int], Tensor],
    finished: Callable[[list[int]], bool],
    begun: tuple[Cache, int] | None = None,
) -> list[list[int]]:
    """What follows each prompt, as one batch with a key-value cache, which rows leave when they are finished: a step costs
    what the texts still being written cost.

    Args:
        prompts: token ids, one or more each; they are padded on the left.
        limits: how many tokens each text has at most, one or more.
        draw: fp32 logits `[rows, vocabulary]`, the ids so far `[rows, tokens]` and the number of the step, from 0 on ->
            the next tokens `[rows]`.
        finished: whether a text, of one token or more, is complete.
        begun: the cache of tokens that stand before every prompt, a row each, and how many they are.
    """
    import torch
    from transformers import DynamicCache

    device = model.get_input_embeddings().weight.device
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    cache, before = begun or (DynamicCache(config=model.config), 0)
    mask = torch.tensor([[1] * before + [0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    text = ids
    kept = {"past_key_values" if "past_key_values" in _parameters(model) else "cache_params": cache}  # Mamba's name
    live = list(range(len(prompts)))
    written: list[list[int]] = [[] for _ in prompts]
    with torch.inference_mode():
        for step in range(max(limits)):
            where = places(model, mask, ids)
            logits = model(input_ids=ids, **kept, use_cache=True, logits_to_keep=1, **where).logits[:, -1]
            drawn = draw(logits.float(), text, step)
            for row, token in zip(live, drawn.tolist(), strict=True):
                written[row].append(token)
            stay = [i for i, row in enumerate(live) if step + 1 < limits[row] and not finished(written[row])]
            if not stay:
                break
            if len(stay) < len(live):
                live = [live[i] for i in stay]
                chosen = torch.tensor(stay, device=device)
                cache.reorder_cache(chosen)
                mask, text, drawn = mask[chosen], text[chosen], drawn[chosen]
            ids = drawn[:, None]
            text = torch.cat([text, ids], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return written


def _parameters(model: PreTrainedModel) -> Collection[str]:
    return inspect.signature(model.forward).parameters


def places(model: PreTrainedModel, mask: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """What tells left-padded rows where their text begins; models without `position_ids` take it from the mask, and Mamba
    wants the mask of what it reads now, not of what it has read."""
    if "cache_params" in _parameters(model):
        return {"attention_mask": mask[:, -ids.shape[1] :]}
    places = {"attention_mask": mask}
    if "position_ids" in _parameters(model):
        places["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return places


def _draw(logits: Tensor, text: Tensor, sampling: Sampling, step: int, generator: torch.Generator) -> Tensor:
    """The next token of each row `[rows]` from fp32 logits `[rows, vocabulary]`."""
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

    if sampling.repetition_penalty != 1:
        logits = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(text, logits)
    logits = logits / sampling.temperature(step)
    if sampling.top_k:
        logits = TopKLogitsWarper(sampling.top_k)(text, logits)
    if sampling.top_p < 1:
        logits = TopPLogitsWarper(sampling.top_p)(text, logits)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
