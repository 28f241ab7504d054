# SPDX-License-Identifier: Apache-2.0
"""lm-eval's engine for transformers models, without work done twice: a prompt is computed once for all its choices, equal
requests are asked once, and texts that are finished leave their batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from torch.nn.utils.rnn import pad_sequence

from ..calibration.writer import continue_rows


if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


TOKENS = 4096  # in one forward; more does not make it faster
WRITTEN_TOKENS = 2**15  # prompts and texts of one batch, which bound its key-value cache
Tokens = tuple[int, ...]


class Engine(HFLM):
    """Answers the requests of lm-eval's tasks as `HFLM` does, up to rounding; what it does not override is `HFLM`'s.

    Log-likelihoods: prompts of one length go through the model together, so nothing is padded, and their choices
    continue from its cache. Texts: greedy, in batches that are padded on the left.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, softmax_dtype="float32", device=str(model.device))
        self._accepted = set(inspect.signature(model.forward).parameters)

    @torch.inference_mode()
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Of each request (prompt, choice): the log-likelihood of the choice, in nats, and whether it is the greedy one."""
        pairs = list(dict.fromkeys(request.args for request in requests))
        tokens = dict(zip(pairs, self._encode_pairs(pairs), strict=True))
        choices: dict[Tokens, dict[Tokens, None]] = {}
        for prompt, choice in tokens.values():
            choices.setdefault(prompt, {})[choice] = None
        found = {}
        for length in sorted({len(prompt) for prompt in choices}):
            prompts = [prompt for prompt in choices if len(prompt) == length]
            for batch in _batches(prompts, max(1, TOKENS // length)):
                found |= self._score({prompt: list(choices[prompt]) for prompt in batch})
        return [found[tokens[request.args]] for request in requests]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What the model finds most likely after each prompt, before the first of the request's stop sequences."""
        if any(request.args[1].get("do_sample") for request in requests):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        asked = [self._wish(*request.args) for request in requests]
        found = {}
        for until, limit in dict.fromkeys((until, limit) for _, until, limit in asked):
            prompts = list(dict.fromkeys(prompt for prompt, *rest in asked if rest == [until, limit]))
            room = self.max_length - limit
            tokens = {p: ids[-room:] for p, ids in zip(prompts, self._encode(prompts), strict=True)}
            prompts.sort(key=lambda prompt: len(tokens[prompt]))
            for batch in _batches(prompts, max(1, WRITTEN_TOKENS // (len(tokens[prompts[-1]]) + limit))):
                texts = self._continue([tokens[prompt] for prompt in batch], until, limit)
                found |= {(prompt, until, limit): text for prompt, text in zip(batch, texts, strict=True)}
        return [found[wish] for wish in asked]

    def _wish(self, prompt: str, options: dict[str, Any]) -> tuple[str, tuple[str, ...], int]:
        """What a request to write is about: the prompt, where the text stops, and how many tokens it has at most."""
        return prompt, tuple(options.get("until") or ()), options.get("max_gen_toks", self.max_gen_toks)

    def _continue(self, prompts: Sequence[Tokens], until: tuple[str, ...], limit: int) -> list[str]:
        window = 2 + max((len(stop.encode()) for stop in until), default=0)  # a token holds a byte or more

        def finished(text: list[int]) -> bool:
            end = self.tokenizer.decode(text[-window:])
            return text[-1] == self.eot_token_id or any(stop in end for stop in until)

        texts = continue_rows(
            self.model,
            prompts,
            limits=[limit] * len(prompts),
            draw=lambda logits, text, step: logits.argmax(dim=-1),
            finished=finished,
        )
        whole = self.tokenizer.batch_decode(texts, skip_special_tokens=True)
        return [min((text.partition(stop)[0] for stop in until), key=len, default=text) for text in whole]

    def _encode_pairs(self, pairs: list[tuple[str, str]]) -> list[tuple[Tokens, Tokens]]:
        """Token ids of prompts and choices, split where the prompt's ids end; its last spaces belong to the choice. An empty
        prompt is the token with which a text begins."""
        prompts = [prompt.rstrip() for prompt, _ in pairs]
        ids = self._encode([*prompts, *(prompt + choice for prompt, choice in pairs)])
        starts, wholes = ids[: len(pairs)], ids[len(pairs) :]
        begin = (self.prefix_token_id,)
        return [(start or begin, whole[len(start) :]) for start, whole in zip(starts, wholes, strict=True)]

    def _encode(self, texts: Sequence[str]) -> list[Tokens]:
        special = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        distinct = list(dict.fromkeys(texts))
        ids = dict(zip(distinct, map(tuple, self.tokenizer(distinct, **special)["input_ids"]), strict=True))
        return [ids[text] for text in texts]

    def _score(self, choices: dict[Tokens, list[Tokens]]) -> dict[tuple[Tokens, Tokens], tuple[float, bool]]:
        """Of prompts that have the same length."""
        pairs = [(prompt, choice) for prompt, some in choices.items() for choice in some]
        rows = self._tensor([row for row, some in enumerate(choices.values()) for _ in some])
        targets = self._padded([choice for _, choice in pairs], -1)  # [pairs, longest choice]
        output = self._forward(input_ids=self._tensor(list(choices)))
        logits = output.logits[:, -1:][rows]
        if targets.shape[1] > 1:
            output.past_key_values.reorder_cache(rows)
            inputs = targets[:, :-1].clamp(min=0)
            more = self.model(input_ids=inputs, past_key_values=output.past_key_values, use_cache=True).logits
            logits = torch.cat([logits, more], dim=1)  # [pairs, longest choice, vocabulary]
        padded = targets < 0
        greedy = ((logits.argmax(dim=2) == targets) | padded).all(dim=1)
        logits = logits.log_softmax(dim=2, dtype=torch.float32)
        likelihoods = logits.gather(2, targets.clamp(min=0)[:, :, None])[:, :, 0].masked_fill(padded, 0).sum(dim=1)
        return dict(zip(pairs, zip(likelihoods.tolist(), greedy.tolist(), strict=True), strict=True))

    def _forward(self, **inputs: Any) -> Any:
        if "logits_to_keep" in self._accepted:
            inputs["logits_to_keep"] = 1
        return self.model(use_cache=True, **inputs)

    def _tensor(self, rows: Sequence[Any]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self.device)

    def _padded(self, rows: Sequence[Tokens], value: int, side: str = "right") -> torch.Tensor:
        return pad_sequence([self._tensor(row) for row in rows], True, value, side)


def _batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (rows[i : i + size] for i in range(0, len(rows), size))
