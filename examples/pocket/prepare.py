# SPDX-License-Identifier: Apache-2.0
"""Prepare a corpus: train a tokenizer, and turn real texts and generated tasks into token files for train.py.

    python examples/pocket/prepare.py --calibration DIR --books FILE --documents 30000 --output CORPUS

Each *.jsonl file of DIR is a source of its own, with one `{"text": ...}` a line; the books are one more. The tasks of each
capability are a source, too. How much of the training each gets stands in data/shares.json, or in the file of --shares.
"""

from __future__ import annotations

import argparse
import json
import logging
from array import array
from pathlib import Path
from random import Random

import numpy as np
import tasks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from training import corpus as corpora
from transformers import PreTrainedTokenizerFast


logger = logging.getLogger("prepare")

END = "<|end|>"  # after each document; id 0
VOCABULARIES = range(257, 2**16 + 1)  # 256 bytes and the end; ids fit 16 bits
ITEMS = {"general": 8, "commonsense": 4, "code": 4, "math": 5}  # tasks in one document, at most
HELD_OUT_PART, HELD_OUT_MOST = 12, 200  # one document in so many is held out, and never more than so many
FOR_TOKENIZER = 900  # documents a source that the tokenizer is trained on
AT_ONCE = 1000  # documents that are encoded together
Splits = dict[str, list[str]]


def read(path: Path) -> list[str]:
    """The texts of a jsonl file that are not blank; `ValueError` for a line without one."""
    texts = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{path}, line {number}: every line must be an object such as {{"text": "..."}}.'
                ) from error
            if text.strip():
                texts.append(text)
    if len(texts) < 2:
        raise ValueError(f"{path} has {len(texts)} texts; a source needs at least two, one of them held out.")
    return texts


def real_texts(calibration: Path | None, books: Path | None) -> dict[str, list[str]]:
    """source -> texts: one source a jsonl file of the folder, and the books."""
    paths = sorted(calibration.glob("*.jsonl")) if calibration is not None else []
    if calibration is not None and not paths:
        raise ValueError(f'{calibration} has no *.jsonl file; give a folder of files with one {{"text": ...}} a line.')
    texts = {path.stem: read(path) for path in paths} | ({"books": read(books)} if books is not None else {})
    if clash := sorted(set(texts) & set(tasks.KINDS)):
        raise ValueError(f"{clash[0]}.jsonl has the name of a source of generated tasks; rename the file.")
    return texts


def generated_texts(capability: str, documents: int, seed: int) -> list[str]:
    """Documents of one to `ITEMS` tasks with their solutions, a blank line between them."""
    random = Random(f"documents {capability} {seed}")
    return [
        "\n\n".join(tasks.draw(capability, random).text for _ in range(random.randint(1, ITEMS[capability])))
        for _ in range(documents)
    ]


def split(name: str, texts: list[str], seed: int) -> Splits:
    shuffled = list(texts)
    Random(f"split {name} {seed}").shuffle(shuffled)
    held_out = max(1, min(HELD_OUT_MOST, len(texts) // HELD_OUT_PART))
    return {"train": shuffled[held_out:], "held_out": shuffled[:held_out]}


def shares_of(names: list[str], path: Path) -> dict[str, float]:
    """The shares of the sources that are here; `ValueError` where one has none in the table."""
    table = json.loads(path.read_text(encoding="utf-8"))
    if unknown := [name for name in names if not table.get(name, 0) > 0]:
        raise ValueError(
            f"{path} gives {unknown[0]!r} no share; add it with a number above zero, or leave the source out."
        )
    if absent := sorted(set(table) - set(names)):
        logger.info("not here, so the others share what the table gives them: %s", ", ".join(absent))
    return {name: table[name] for name in names}


def train_tokenizer(sample: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE in which each digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Token ids `[n]`, uint16, of all texts one after the other, the end token after each."""
    ids = array("H")
    for first in range(0, len(texts), AT_ONCE):
        for encoding in tokenizer.encode_batch(texts[first : first + AT_ONCE]):
            ids.extend([*encoding.ids, tokenizer.token_to_id(END)])
    return np.frombuffer(ids, dtype=np.uint16)


def prepare(chosen: argparse.Namespace) -> None:
    texts = real_texts(chosen.calibration, chosen.books)
    shares = shares_of([*texts, *tasks.KINDS], chosen.shares)
    texts |= {name: generated_texts(name, chosen.documents, chosen.seed) for name in tasks.KINDS}
    splits = {name: split(name, found, chosen.seed) for name, found in texts.items()}
    sample = [text for parts in splits.values() for text in parts["train"][:FOR_TOKENIZER]]
    tokenizer = train_tokenizer(sample, chosen.vocabulary)
    tokens = {}
    for part in corpora.SPLITS:
        tokens[part] = {name: encode(tokenizer, parts[part]) for name, parts in splits.items()}
    corpora.save(chosen.output, tokenizer.get_vocab_size(), chosen.seed, shares, tokens)
    named = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(chosen.output / corpora.TOKENIZER)
    for name, ids in tokens["train"].items():
        share = shares[name] / sum(shares.values())
        logger.info("%-18s %9.3f M tokens, %5.1f %% of the training", name, len(ids) / 1e6, 100 * share)


def main(given: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, help="folder of jsonl files with real text")
    parser.add_argument("--books", type=Path, help="a jsonl file with text of books")
    parser.add_argument(
        "--documents", type=int, default=30_000, help="documents of generated tasks, of each capability"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the corpus")
    parser.add_argument("--vocabulary", type=int, default=2048, help="tokens of the tokenizer")
    parser.add_argument("--shares", type=Path, default=tasks.DATA / "shares.json", help="the table of shares")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args(given)
    if chosen.vocabulary not in VOCABULARIES:
        parser.error(f"--vocabulary {chosen.vocabulary}: allowed are {VOCABULARIES[0]} to {VOCABULARIES[-1]}.")
    if chosen.documents < 2:
        parser.error(f"--documents {chosen.documents}: there must be at least two, one of them held out.")
    try:
        prepare(chosen)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
