# SPDX-License-Identifier: Apache-2.0
"""The model writes its own calibration text: Self-Cal, SGS, and the proposals of IGSP."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..records import CAPABILITIES, CalibrationSource, MixRule
from ..values import ANY, SELF, require
from . import store
from .sources import OpenSource, Pool, document_ids
from .writer import Sampling, end_tokens, write


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


SEEDS = Path(__file__).with_name("seeds.json")
PREFIXES = 1000  # documents whose beginnings SGS continues
BATCH_TOKENS = 2**16  # tokens of one batch at most: what bounds the key-value cache
SPARE = 1.25  # documents written in a batch over those that the mean length asks for, so that one batch is enough
BARREN = 64  # documents without a token, one after the other, that make an error
LOGIT_BYTES = 2**28  # fp32 logits that may be in memory at once
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Request:
    """What is to be written: the source it makes, prompts of token ids, and how tokens are drawn.

    The first `hidden` tokens of each prompt are not part of its document; `keep` is the share of the documents, those
    with the lowest perplexity, that stay. `notes` say the rest of what decides the text.
    """

    source: CalibrationSource
    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    hidden: int = 0
    keep: float = 1.0
    notes: dict[str, str] = field(default_factory=dict)


# -------------------------------------------------------------------------------------- what is asked for


def written_sources(rule: MixRule) -> list[OpenSource]:
    """The sources that the model itself is for a mix: one for Self-Cal and for SGS, one a capability for IGSP."""
    if rule.kind in ("self-cal", "sgs"):
        return [OpenSource(CalibrationSource(rule.kind, ANY, written=rule.kind))]
    return [OpenSource(CalibrationSource(f"{SELF}:{name}", name, written="proposals")) for name in CAPABILITIES]


def read_seeds(path: str | Path | None = None) -> dict[str, list[str]]:
    """The short texts with which proposals begin, by capability; `ValueError` for a table of another form."""
    path = Path(path or SEEDS)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"The table of seeds {str(path)!r} cannot be read: {error}") from error
    lists = isinstance(table, dict) and all(isinstance(texts, list) and texts for texts in table.values())
    if not lists or set(table) != set(CAPABILITIES) or not all(_is_text(t) for texts in table.values() for t in texts):
        raise ValueError(
            f"{str(path)!r} is no table of seeds; allowed: a JSON object with a list of short texts for each of "
            f"{', '.join(CAPABILITIES)}."
        )
    return table


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def sampling(rule: MixRule) -> Sampling:
    """How the model draws for a mix; `ValueError` for an option out of range."""
    if rule.kind == "self-cal":
        return Sampling(rule.option("t_initial"), rule.option("t_final"), tokens=int(rule.option("tokens")))
    temperature = rule.option("temperature")
    if rule.kind == "igsp":
        return Sampling(temperature, temperature)
    prefix, keep = rule.option("prefix"), rule.option("keep")
    require(prefix == int(prefix) >= 1, f"sgs:prefix is a whole number of tokens from 1 on; {prefix:g} was given.")
    require(0 < keep <= 1, f"sgs:keep is a share of the documents in (0, 1]; {keep:g} was given.")
    return Sampling(
        temperature,
        temperature,
        top_k=int(rule.option("top_k")),
        top_p=rule.option("top_p"),
        repetition_penalty=rule.option("repetition_penalty"),
    )


def request(
    source: CalibrationSource,
    rule: MixRule,
    tokenizer: PreTrainedTokenizerBase,
    *,
    corpora: Sequence[OpenSource] = (),
    seed_texts: str | Path | None = None,
    token: str | None = None,
) -> Request:
    """What to write for one of `written_sources`.

    Self-Cal (Williams et al. 2024): from the beginning-of-sequence token alone, or the end token where there is none.
    SGS, self-generate then sample: after the first tokens of documents of `corpora`. Proposals: after the seeds.

    Raises:
        `ValueError` where the tokenizer has neither token, the corpora hold no text, or the seeds are no table.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    begin = [] if start is None else [int(start)]
    if source.written == "self-cal":
        if not begin:
            raise ValueError(
                "Self-Cal begins with the beginning- or the end-of-sequence token, and the tokenizer has neither; set "
                "tokenizer.bos_token, or choose another mix."
            )
        return Request(source, [begin], sampling(rule), hidden=1)
    if source.written == "sgs":
        prompts = [begin + prefix for prefix in _prefixes(corpora, tokenizer, int(rule.option("prefix")), token)]
        notes = {"prefixes of": ", ".join(entry.source.name for entry in corpora)}
        return Request(source, prompts, sampling(rule), len(begin), keep=rule.option("keep"), notes=notes)
    texts = read_seeds(seed_texts)[source.capability]
    prompts = [begin + ids for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return Request(source, prompts, sampling(rule), len(begin))


def _prefixes(
    corpora: Sequence[OpenSource], tokenizer: PreTrainedTokenizerBase, size: int, token: str | None
) -> list[list[int]]:
    """The first `size` tokens of documents of the corpora, the same number of each."""
    share = math.ceil(PREFIXES / max(1, len(corpora)))
    found = [
        ids[:size]
        for entry in corpora
        for ids in islice((ids for ids in document_ids(entry, tokenizer, token) if len(ids) >= size), share)
    ]
    if not found:
        names = ", ".join(entry.source.name for entry in corpora) or "none"
        raise ValueError(f"SGS continues documents of at least {size} tokens; its sources ({names}) hold none.")
    return found


# ---------------------------------------------------------------------------------------- what is written


def write_pool(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Request,
    *,
    windows: int,
    length: int,
    seed: int,
    on_progress: Progress | None = None,
) -> Pool:
    """Exactly `windows` samples of `length` tokens that the model wrote, from the cache if they stand there.

    A document of `length` tokens is a sample; shorter ones are joined with the end-of-sequence token, and cut.

    Raises:
        `ValueError` where the model writes nothing.
    """
    settings = {
        "prompts": [list(map(int, prompt)) for prompt in wanted.prompts],
        "sampling": asdict(wanted.sampling),
        "hidden": wanted.hidden,
        "keep": wanted.keep,
        "name": wanted.source.name,
        "windows": windows,
        "length": length,
        "seed": seed,
        "batch_tokens": BATCH_TOKENS,
    }
    key = store.fingerprint(model, tokenizer, **settings)
    found = store.load(key)
    if found is None:
        documents = _documents(model, tokenizer, wanted, windows, length, seed, on_progress)
        found = (
            _pack(documents, end_tokens(model, tokenizer)[:1], length)[:windows],
            {"documents": str(len(documents))},
        )
        store.save(key, *found)
    ids, made = found
    notes = {"seed": str(seed), "sampling": _text(wanted.sampling), **wanted.notes}
    return Pool(replace(wanted.source, pool=notes | made | {"windows": str(len(ids))}), ids)


def _text(sampling: Sampling) -> str:
    """A sampling in short: what differs from plain drawing at temperature 1."""
    plain = asdict(Sampling())
    changed = [f"{name} {value:g}" for name, value in asdict(sampling).items() if value != plain[name]]
    return ", ".join(changed) or "temperature 1"


def _documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Request,
    windows: int,
    length: int,
    seed: int,
    on_progress: Progress | None,
) -> list[list[int]]:
    """Documents until those that stay make `windows` samples."""
    draws = np.random.default_rng([seed, zlib.crc32(wanted.source.name.encode())])
    documents: list[list[int]] = []
    losses: list[float] = []
    staying: list[list[int]] = []
    barren, started = 0, time.perf_counter()
    while (have := _windows(staying, length)) < windows:
        mean = sum(map(len, documents)) / len(documents) + 1 if documents else length
        missing = (windows - have) * length / wanted.keep
        rows = min(max(1, BATCH_TOKENS // length), math.ceil(SPARE * missing / mean))
        prompts = [wanted.prompts[i] for i in draws.integers(0, len(wanted.prompts), rows)]
        texts = write(
            model, tokenizer, prompts, wanted.sampling, length=length + wanted.hidden, seed=int(draws.integers(2**62))
        )
        new = [[*prompt[wanted.hidden :], *text] for prompt, text in zip(prompts, texts, strict=True) if text]
        barren = 0 if new else barren + rows
        if barren >= BARREN:
            raise ValueError(
                f"The model writes nothing for {wanted.source.name!r}: it ended {barren} documents at once. Calibrate on "
                "text from elsewhere, or give it other seeds."
            )
        documents += new
        staying = documents
        if wanted.keep < 1 and documents:
            losses += _losses(model, new)
            staying = _lowest(documents, losses, wanted.keep)
        if on_progress is not None:
            rate = sum(map(len, documents)) / (time.perf_counter() - started)
            done = min(_windows(staying, length), windows)
            on_progress(done, windows, f"{wanted.source.name}, {rate:,.0f} tokens/s")
    return staying


def _windows(documents: list[list[int]], length: int) -> int:
    whole = sum(len(document) == length for document in documents)
    return whole + sum(len(document) + 1 for document in documents if len(document) < length) // length


def _pack(documents: list[list[int]], end: list[int], length: int) -> np.ndarray:
    """Samples `[windows, length]`, in the order in which their documents were written; only an `end` can make one short."""
    ready: list[list[int]] = []
    buffer: list[int] = []
    for document in documents:
        if len(document) == length:
            ready.append(document)
        else:
            buffer += document + end
        while len(buffer) >= length:
            ready.append(buffer[:length])
            buffer = buffer[length:]
    return np.array(ready, dtype=np.int64).reshape(-1, length)


def _lowest(documents: list[list[int]], losses: list[float], keep: float) -> list[list[int]]:
    """The share `keep` of the documents with the lowest perplexity, in their order."""
    order = np.argsort(losses, kind="stable")[: max(1, round(keep * len(documents)))]
    return [documents[i] for i in sorted(order)]


def _losses(model: PreTrainedModel, documents: list[list[int]]) -> list[float]:
    """Mean negative log-likelihood (nats) of tokens 2.. of each document; rows are padded on the right, where a causal
    model does not look."""
    import torch

    embedding = model.get_input_embeddings()
    losses = np.zeros(len(documents))
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    longest = len(documents[order[-1]]) if order else 1
    step = max(1, LOGIT_BYTES // (4 * longest * embedding.num_embeddings))
    with torch.inference_mode():
        for start in range(0, len(order), step):
            rows = order[start : start + step]
            width = max(2, len(documents[rows[-1]]))
            ids = torch.tensor([documents[i] + [0] * (width - len(documents[i])) for i in rows])
            ids = ids.to(embedding.weight.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            for row, i in zip(loss.tolist(), rows, strict=True):
                losses[i] = float(np.mean(row[: len(documents[i]) - 1])) if len(documents[i]) > 1 else math.inf
    return losses.tolist()
