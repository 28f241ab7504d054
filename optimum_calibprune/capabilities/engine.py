# SPDX-License-Identifier: Apache-2.0
"""lm-eval's engine for transformers models, without work done twice: a prompt is computed once for all its choices, equal
requests are asked once, and texts that are finished leave their batch."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from ..calibration.writer import continue_rows, end_tokens, places
from .batches import Tokens, by_beginning, of_similar_length, shared_beginning


if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

TOKENS = {"cpu": 4096, "cuda": 16384}  # in one forward; on a CPU more does not make it faster
CACHED_TOKENS = 2**15  # of all texts in a batch, which bound its key-value cache
Pair = tuple[Tokens, Tokens]  # prompt and choice
Answer = tuple[float, bool]  # log-likelihood of the choice, and whether it is the greedy one
Wish = tuple[str, tuple[str, ...], int]  # prompt, where its text stops, how many tokens that has at most


class Engine(HFLM):
    """Answers the requests of lm-eval's tasks as `HFLM` does, up to rounding; what it does not override is `HFLM`'s.

    Log-likelihoods: prompts of similar length go through the model together, from the cache of the tokens that they begin
    with, and their choices continue from theirs; where a state carries the text on (Mamba, Qwen3-Next), prompt and choice
    are computed in one go. Texts: greedy, in batches that are padded on the left, from the cache of the tokens that a whole
    batch begins with. The longest come first. A batch that does not fit into GPU memory is halved, and so are those after it.

    Attributes:
        on_answers: called with (done, total) after each batch, and where texts are written after each of their tokens; a total
            is what one call is asked for.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        own = copy.deepcopy(tokenizer)  # HFLM gives a tokenizer without padding token one, which must not be saved
        super().__init__(pretrained=model, tokenizer=own, softmax_dtype="float32", device=str(model.device))
        cache = DynamicCache(config=model.config)
        self._continues = not (model._is_stateful or any(cache.is_linear))
        self._shares = not any(cache.is_sliding)  # in whose windows padding between beginning and rest would count
        accepted = inspect.signature(model.forward).parameters
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._ends = set(end_tokens(model, tokenizer))
        self._tokens = TOKENS.get(self.device.type, TOKENS["cuda"])
        self._share = 1.0  # of a full batch, halved when memory runs out
        self.on_answers: Callable[[int, int], None] = lambda done, total: None

    @torch.inference_mode()
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Answer]:
        """Of each request (prompt, choice): the log-likelihood of the choice, in nats, and whether it is the greedy one.

        A prompt that is too long for the model's context loses its beginning. Raises `ValueError` for such a choice.
        """
        texts = list(dict.fromkeys(request.args for request in requests))
        tokens = dict(zip(texts, self._encode_pairs(texts), strict=True))
        pairs = set(tokens.values())
        found: dict[Pair, Answer] = {}
        for some in self._continued(pairs) if self._continues else self._whole(pairs):
            found |= some
            self.on_answers(len(found), len(pairs))
        return [found[tokens[request.args]] for request in requests]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What the model finds most likely after each prompt, before the first of the request's stop sequences.

        Raises `ValueError` where the texts may get as long as the model's context.
        """
        if any(request.args[1].get("do_sample") for request in requests):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        wishes = [self._wish(*request.args) for request in requests]
        distinct = dict.fromkeys(wishes)
        found: dict[Wish, str] = {}

        def on_written(done: int) -> None:
            self.on_answers(len(found) + done, len(distinct))

        for until, limit in dict.fromkeys((until, limit) for _, until, limit in distinct):
            prompts = [prompt for prompt, *rest in distinct if rest == [until, limit]]
            for some in self._texts(prompts, until, limit, on_written):
                found |= {(prompt, until, limit): text for prompt, text in some.items()}
                self.on_answers(len(found), len(distinct))
        return [found[wish] for wish in wishes]

    # ------------------------------------------------------------------------------------------- batches

    def _continued(self, pairs: set[Pair]) -> Iterator[dict[Pair, Answer]]:
        """Batches of prompts of similar length, with all their choices; what many begin with is computed once."""
        choices: dict[Tokens, list[Tokens]] = {}
        for prompt, choice in sorted(pairs):
            choices.setdefault(prompt, []).append(choice)
        for shared, prompts in by_beginning(list(choices)) if self._shares else [(0, list(choices))]:
            yield from self._beginning_alike(prompts, shared, choices)

    def _beginning_alike(
        self, prompts: list[Tokens], shared: int, choices: dict[Tokens, list[Tokens]]
    ) -> Iterator[dict[Pair, Answer]]:
        beginning = self._cache_of(prompts[0][:shared])
        for group in of_similar_length(prompts, len):
            answers = max(len(choices[prompt]) for prompt in group)
            widest = max(len(choice) for prompt in group for choice in choices[prompt])
            rows = answers if widest > 1 else 1  # of the cache, for each prompt
            size = min(
                self._tokens // max(len(group[0]) - shared, widest * answers),
                CACHED_TOKENS // ((len(group[0]) + widest) * rows),
            )
            yield from self._run(
                group,
                size,
                lambda batch: self._score({prompt: choices[prompt] for prompt in batch}, shared, beginning),
            )

    def _whole(self, pairs: set[Pair]) -> Iterator[dict[Pair, Answer]]:
        """Batches of prompts with one choice each, sorted by the length of both."""
        rows = sorted(pairs, key=lambda pair: (-len(pair[0]) - len(pair[1]), pair))
        longest = len(rows[0][0]) + len(rows[0][1])
        yield from self._run(rows, self._tokens // longest, self._score_whole)

    def _texts(
        self, prompts: list[str], until: tuple[str, ...], limit: int, on_written: Callable[[int], None]
    ) -> Iterator[dict[str, str]]:
        room = self.max_length - limit
        if room < 1:
            raise ValueError(
                f"its texts may have {limit} tokens, which must fit with the prompt into the model's context of "
                f"{self.max_length}"
            )
        tokens = {p: ids[-room:] for p, ids in zip(prompts, self._encode(prompts), strict=True)}
        rows = sorted(prompts, key=lambda prompt: -len(tokens[prompt]))
        size = CACHED_TOKENS // (len(tokens[rows[0]]) + limit)
        yield from self._run(
            rows,
            size,
            lambda batch: dict(
                zip(batch, self._continue([tokens[prompt] for prompt in batch], until, limit, on_written), strict=True)
            ),
        )

    def _run(self, rows: Sequence[Any], size: int, answer: Callable[[Sequence[Any]], dict]) -> Iterator[dict]:
        """The answers to batches of at most `size` rows, of fewer from where GPU memory has run out."""
        done = 0
        while done < len(rows):
            batch = rows[done : done + max(1, int(size * self._share))]
            found = None
            try:
                found = answer(batch)
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    raise _too_large(error) from error
            if found is None:  # outside of the handler, which keeps the tensors of the batch alive
                self._share = len(batch) / 2 / size
                torch.cuda.empty_cache()
                logger.warning("Out of GPU memory: batches are halved, from %d texts.", len(batch))
                continue
            done += len(batch)
            yield found

    # -------------------------------------------------------------------------------------------- tokens

    def _encode_pairs(self, texts: list[tuple[str, str]]) -> list[Pair]:
        """Token ids of prompts and choices, split where the prompt's ids end; its last spaces belong to the choice. An empty
        prompt is the token with which a text begins."""
        prompts = [prompt.rstrip() for prompt, _ in texts]
        ids = self._encode([*prompts, *(prompt + choice for prompt, choice in texts)])
        begin = (self.prefix_token_id,)
        pairs = []
        for (text, choice), start, whole in zip(texts, ids[: len(texts)], ids[len(texts) :], strict=True):
            prompt, answer = start or begin, whole[len(start) :]
            if not 0 < len(answer) <= self.max_length:
                raise ValueError(
                    f"the answer {(text[-20:] + choice)[:60]!r} has {len(answer)} tokens; it must have at least one and at "
                    f"most the {self.max_length} of the model's context"
                )
            pairs.append((prompt[-(self.max_length + 1 - len(answer)) :], answer))
        return pairs

    def _encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Token ids, with the tokens that the tokenizer adds where the text does not have them already."""
        begin = self.tokenizer.decode(self.prefix_token_id)
        added = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        ids: dict[str, Tokens] = {}
        for begins, special in ((False, added), (True, {"add_special_tokens": False})):
            some = [text for text in dict.fromkeys(texts) if text.startswith(begin) == begins]
            if some:
                ids |= dict(
                    zip(some, map(tuple, self.tokenizer(some, verbose=False, **special)["input_ids"]), strict=True)
                )
        return [ids[text] for text in texts]

    def _wish(self, prompt: str, options: dict[str, Any]) -> Wish:
        normal = normalize_gen_kwargs(options, self.max_gen_toks)
        return prompt, tuple(normal["until"] or ()), normal["max_gen_toks"]

    # --------------------------------------------------------------------------------------------- model

    @torch.inference_mode()
    def _cache_of(self, tokens: Tokens) -> Any:
        """The cache of what several prompts begin with, as one row; None where that is nothing."""
        if not tokens:
            return None
        try:
            return self.model(input_ids=self._tensor([tokens]), use_cache=True, **self._last).past_key_values
        except torch.OutOfMemoryError as error:
            raise _too_large(error) from error

    def _score(self, choices: dict[Tokens, list[Tokens]], shared: int, beginning: Any) -> dict[Pair, Answer]:
        """Of prompts that share the cache of their first tokens; all their choices go on from one computation of them."""
        rests = [prompt[shared:] for prompt in choices]
        longest = max(map(len, rests))
        ids = self._tensor([(0,) * (longest - len(rest)) + rest for rest in rests])
        seen = self._tensor([(1,) * shared + (0,) * (longest - len(rest)) + (1,) * len(rest) for rest in rests])
        cache = copy.deepcopy(beginning)
        if cache is not None:
            cache.reorder_cache(self._tensor([0] * len(rests)))
        output = self.model(
            input_ids=ids, past_key_values=cache, use_cache=True, **self._last, **self._places(seen, ids)
        )
        rows = {prompt: row for row, prompt in enumerate(choices)}
        found: dict[Pair, Answer] = {}
        pairs = [(prompt, choice) for prompt, some in choices.items() for choice in some]
        for group in of_similar_length(pairs, lambda pair: len(pair[1])):
            chosen = self._tensor([rows[prompt] for prompt, _ in group])
            targets = self._padded([choice for _, choice in group], -1)  # [pairs, longest choice]
            logits = output.logits[:, -1:][chosen]
            if targets.shape[1] > 1:
                cache = copy.deepcopy(output.past_key_values)
                cache.reorder_cache(chosen)
                inputs = targets[:, :-1].clamp(min=0)
                where = self._places(torch.cat([seen[chosen], torch.ones_like(inputs)], dim=1), inputs)
                more = self.model(input_ids=inputs, past_key_values=cache, use_cache=True, **where).logits
                logits = torch.cat([logits, more], dim=1)  # [pairs, longest choice, vocabulary]
            found |= _answers(group, logits, targets)
        return found

    def _places(self, seen: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Where in their texts the ids stand; nothing where there is no padding, which is faster."""
        return {} if bool(seen.all()) else places(self.model, seen, ids)

    def _score_whole(self, pairs: Sequence[Pair]) -> dict[Pair, Answer]:
        """Of prompts of any length, padded on the right, where no token before the padding sees it."""
        targets = self._padded([choice for _, choice in pairs], -1)  # [pairs, longest choice]
        logits = self.model(input_ids=self._padded([(p + c)[:-1] for p, c in pairs], 0), use_cache=False).logits
        starts = self._tensor([len(prompt) - 1 for prompt, _ in pairs])
        places = starts[:, None] + torch.arange(targets.shape[1], device=self.device)
        rows = torch.arange(len(pairs), device=self.device)[:, None]
        return _answers(pairs, logits[rows, places.clamp(max=logits.shape[1] - 1)], targets)

    def _continue(
        self, prompts: Sequence[Tokens], until: tuple[str, ...], limit: int, on_written: Callable[[int], None]
    ) -> list[str]:
        """The texts after the prompts of one batch; `on_written` is told after each token how many of them are finished."""
        window = 2 + max((len(stop.encode()) for stop in until), default=0)  # a token holds a byte or more

        def finished(text: list[int]) -> bool:
            end = self.tokenizer.decode(text[-window:])
            return text[-1] in self._ends or any(stop in end for stop in until)

        def draw(logits: torch.Tensor, text: torch.Tensor, step: int) -> torch.Tensor:
            on_written(len(prompts) - len(text))
            return logits.argmax(dim=-1)

        shared = shared_beginning(prompts) if self._continues and self._shares else 0
        beginning = self._cache_of(prompts[0][:shared])
        if beginning is not None:
            beginning.reorder_cache(self._tensor([0] * len(prompts)))
        texts = continue_rows(
            self.model,
            [prompt[shared:] for prompt in prompts],
            begun=(beginning, shared) if shared else None,
            limits=[limit] * len(prompts),
            draw=draw,
            finished=finished,
        )
        whole = self.tokenizer.batch_decode(texts, skip_special_tokens=True)
        return [min((text.partition(stop)[0] for stop in until), key=len, default=text) for text in whole]

    def _tensor(self, rows: Sequence[Any]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self.device)

    def _padded(self, rows: Sequence[Tokens], value: int) -> torch.Tensor:
        return pad_sequence([self._tensor(row) for row in rows], True, value)


def _too_large(error: torch.OutOfMemoryError) -> MemoryError:
    return MemoryError(f"Out of GPU memory with a single text; use a GPU with more, or --device cpu. {error}")


def _answers(pairs: Sequence[Pair], logits: torch.Tensor, targets: torch.Tensor) -> dict[Pair, Answer]:
    """From logits `[pairs, longest choice, vocabulary]` and the ids of the choices `[pairs, longest choice]`, -1 after them."""
    padded = targets < 0
    greedy = ((logits.argmax(dim=2) == targets) | padded).all(dim=1)
    of_choice = logits.gather(2, targets.clamp(min=0)[:, :, None])[:, :, 0].float()
    likelihoods = (of_choice - logits.float().logsumexp(dim=2)).masked_fill(padded, 0).sum(dim=1)
    return dict(zip(pairs, zip(likelihoods.tolist(), greedy.tolist(), strict=True), strict=True))
