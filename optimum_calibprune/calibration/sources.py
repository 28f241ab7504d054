# SPDX-License-Identifier: Apache-2.0
"""Text in, pools of packed samples out: from the Hub, from local files, from data that is in memory already."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..records import CAPABILITIES, CalibrationSource, unknown
from ..values import HUB
from .from_hub import hub_errors, load_from_hub, published_sources, sentence
from .readers import document
from .table import SOURCES


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

POOL_SEED = 0
POOL_FACTOR = 4
SHUFFLE_BUFFER = 10_000  # rows
TOKENIZED_TOGETHER = 2**17  # characters
LONGEST_TEXT = 2**20  # characters
SUFFIXES = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}


@dataclass(frozen=True)
class OpenSource:
    """A source together with its rows, where they are in memory already."""

    source: CalibrationSource
    data: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class Pool:
    """Packed windows `[windows, length]` (int64) of one source; `source` says what the pool was made from."""

    source: CalibrationSource
    input_ids: np.ndarray


Progress = Callable[[int, int, str], None]


# ------------------------------------------------------------------------------------- which source is meant


def open_sources(
    given: Sequence[str | CalibrationSource] | Mapping[str, Any],
    table: Mapping[str, CalibrationSource] = SOURCES,
    token: str | None = None,
) -> list[OpenSource]:
    """Turns what a user names into sources.

    Args:
        given: names of `table`, paths, `"NAME=PATH:CAPABILITY"`, `"hub:ID"` or `"hub:ID@REVISION"` for a published
            calibration set, and `CalibrationSource`s; or a mapping from `"NAME:CAPABILITY"` to data in memory: a list of
            strings, of rows or of token ids, an array of token ids, or a `datasets` object.
        token: of the Hub, for a published calibration set.

    Raises:
        `ValueError` for an unknown name, capability or file type, `FileNotFoundError` for a missing path,
        `ConnectionError` for a published calibration set that cannot be had.
    """
    if isinstance(given, Mapping):
        opened = [_in_memory(key, data) for key, data in given.items()]
    else:
        opened = [OpenSource(source) for name in given for source in _named(name, table, token)]
    names = [o.source.name for o in opened]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two sources are named {name!r}; give each its own name with NAME=PATH:CAPABILITY.")
    for o in opened:
        if o.source.path is not None:
            _files(Path(o.source.path))
        elif o.source.repo is None and o.data is None:
            raise ValueError(f"Source {o.source.name!r} has neither a repo nor a path; give one of them.")
    return opened


def _in_memory(key: str, data: Any) -> OpenSource:
    name, _, capability = key.partition(":")
    if not capability:
        raise ValueError(f"Data in memory needs its capability: {name + ':CAPABILITY'!r}, one of {CAPABILITIES}.")
    listed = isinstance(data, Sequence) and not isinstance(data, str | bytes)
    if not (listed or hasattr(data, "tolist") or _is_dataset(data)):
        raise ValueError(
            f"Source {name!r} is of type {type(data).__name__}; allowed: a list of texts, of rows or of token ids, an "
            "array of token ids, one split of a `datasets` object. A file is named by NAME=PATH:CAPABILITY."
        )
    return OpenSource(CalibrationSource(name, capability), data)


def _is_dataset(data: Any) -> bool:
    return hasattr(data, "map") and hasattr(data, "features")  # neither a DatasetDict nor a pandas object


def _named(
    given: str | CalibrationSource, table: Mapping[str, CalibrationSource], token: str | None
) -> list[CalibrationSource]:
    if isinstance(given, CalibrationSource):
        return [given]
    return published_sources(given.removeprefix(HUB), token) if given.startswith(HUB) else [_parse(given, table)]


def _parse(given: str, table: Mapping[str, CalibrationSource]) -> CalibrationSource:
    if given in table:
        return table[given]
    path = Path(given)
    name, equals, rest = given.partition("=")
    if equals and not path.exists():
        file, colon, capability = rest.rpartition(":")
        if not colon:
            raise ValueError(f"{given!r} does not name a capability; allowed: NAME=PATH:CAPABILITY.")
        return CalibrationSource(name, capability, path=file)
    if path.exists() or path.suffix in SUFFIXES or "/" in given:
        return CalibrationSource(path.stem, "general", path=given)
    raise unknown("source", given, [*table, "a path", "NAME=PATH:CAPABILITY", f"{HUB}ID"])


def _files(path: Path) -> list[Path]:
    """The files of a path that can be read and are not empty; raises where there is none."""
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {str(path)!r}.")
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in found if file.suffix in SUFFIXES and file.is_file() and file.stat().st_size]
    if not files:
        raise ValueError(f"{str(path)!r} holds nothing to read; allowed: {', '.join(SUFFIXES)} with text inside.")
    return files


# ------------------------------------------------------------------------------------------------- rows


def rows(
    opened: OpenSource, token: str | None = None, shuffle: bool = True
) -> tuple[CalibrationSource, Iterable[Any]]:
    """The source's rows, from all over it, or with `shuffle=False` in their order.

    Beside them the source itself, with its revision resolved and, in `pool`, what made the order.

    Raises:
        `ConnectionError` where a Hub data set cannot be had, `ValueError` where a source cannot be read; both also
        while the rows are read.
    """
    source, found = opened.source, opened.data
    if found is None and source.path is not None:
        found = _load_files(Path(source.path))
    elif found is None:
        source, found = load_from_hub(source, token)
    if shuffle:
        source = replace(source, pool=_order(found))
        found = _shuffled(found)
    return source, _guarded(source, found)


def _guarded(source: CalibrationSource, found: Iterable[Any]) -> Iterator[Any]:
    """The rows; what fails while they are read is told as if it had failed at once."""
    if source.path is not None:
        guard = _file_errors(Path(source.path))
    elif source.repo is not None:
        guard = hub_errors(source)
    else:
        guard = contextlib.nullcontext()
    with guard:
        yield from found


def _is_stream(data: Any) -> bool:
    return not hasattr(data, "__len__")


def _shuffled(data: Any) -> Iterable[Any]:
    """Rows in the order of the pool seed; of a stream, as far as the buffer reaches."""
    if _is_dataset(data):
        return data.shuffle(seed=POOL_SEED, **({"buffer_size": SHUFFLE_BUFFER} if _is_stream(data) else {}))
    items = data.tolist() if hasattr(data, "tolist") else data
    return (items[i] for i in np.random.default_rng(POOL_SEED).permutation(len(items)))


def _order(data: Any) -> dict[str, str]:
    """What it takes to have the rows in the same order again."""
    made = {"shuffle_seed": str(POOL_SEED)}
    if _is_dataset(data):
        import datasets

        made |= {"datasets": datasets.__version__}
        if _is_stream(data):
            made |= {"shuffle_buffer": str(SHUFFLE_BUFFER)}
    return made


def _load_files(path: Path) -> Any:
    """Files are read through `datasets`, which maps them from disk; a text file's documents are its paragraphs."""
    import datasets

    kinds: dict[str, list[str]] = {}
    for file in _files(path):
        kinds.setdefault(SUFFIXES[file.suffix], []).append(glob.escape(str(file)))
    options = {"text": {"sample_by": "paragraph"}}
    with _file_errors(path):
        parts = [
            datasets.load_dataset(kind, data_files=files, split="train", **options.get(kind, {}))
            for kind, files in kinds.items()
        ]
        shared = [name for name in parts[0].column_names if all(name in part.column_names for part in parts)]
        if not shared:
            raise ValueError("its files have no column in common")
        return datasets.concatenate_datasets([part.select_columns(shared) for part in parts])


@contextlib.contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """Failures to read a local file become one sentence that names it."""
    import datasets

    try:
        yield
    except (datasets.exceptions.DatasetsError, ValueError, StopIteration) as error:  # StopIteration: only white space
        raise ValueError(f"{path} cannot be read: {sentence(error.__cause__ or error)}") from error


def fingerprint(entry: OpenSource) -> str:
    """SHA-256 of all that decides what a source gives, as far as it can be known before it is read: its description, its
    local files, and data in memory that is no stream."""
    digest = hashlib.sha256(entry.source.to_json().encode())
    for path in _files(Path(entry.source.path)) if entry.source.path is not None else []:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    for row in entry.data if entry.data is not None and not _is_stream(entry.data) else []:
        digest.update(repr(row).encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ pools


def build_pool(
    opened: OpenSource,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    wanted: int,
    *,
    enough: int | None = None,
    vocabulary: int | None = None,
    token: str | None = None,
    on_progress: Progress | None = None,
) -> Pool:
    """Tokenises documents from all over a source, joins them with the end-of-sequence token, and cuts windows.

    Reads until there are 4 x `wanted` windows of `length` tokens, or the source ends; nothing is padded. Token ids that
    come in rows of exactly `length` are samples already and stay as they are. A text of more than 2^20 characters
    counts as several documents, so that a file without blank lines is not tokenised whole.

    Raises:
        `ValueError` where the source gives fewer than `enough` windows (default: `wanted`), or ids outside `vocabulary`.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end-of-sequence token to put between documents; set tokenizer.eos_token."
        )
    if opened.source.text.startswith("chat:") and not tokenizer.chat_template:
        logger.warning("The tokenizer has no chat template; the messages of a chat are joined by blank lines.")
    source, stream = rows(opened, token)
    target = POOL_FACTOR * wanted
    windows, documents_read, tokens = _fill(source, stream, tokenizer, length, target, on_progress)
    enough = wanted if enough is None else enough
    if len(windows) < enough:
        raise ValueError(
            f"Source {source.name!r} is too short: {enough} samples of {length} tokens were asked of it, its "
            f"{documents_read} documents give {len(windows)} ({tokens:,} tokens). Take fewer or shorter samples."
        )
    if vocabulary is not None and (windows.min() < 0 or windows.max() >= vocabulary):
        raise ValueError(
            f"Source {source.name!r} holds token id {windows.max() if windows.max() >= vocabulary else windows.min()}; "
            f"the model's vocabulary has ids 0 to {vocabulary - 1}."
        )
    if len(windows) < target:
        logger.warning(
            "Source %r ends after %d windows, fewer than the %d that make draws by different seeds differ well.",
            *(source.name, len(windows), target),
        )
    made = {"documents": str(documents_read), "windows": str(len(windows))}
    return Pool(replace(source, pool=source.pool | made), windows)


def _fill(
    source: CalibrationSource,
    stream: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    target: int,
    on_progress: Progress | None,
) -> tuple[np.ndarray, int, int]:
    buffer: list[int] = []
    ready: list[list[int]] = []
    count = tokens = 0
    for ids, made_already in _token_ids(source, stream, tokenizer):
        if not ids:
            continue
        count += 1
        tokens += len(ids)
        if made_already and len(ids) == length:
            ready.append(ids)
        else:
            buffer += [int(tokenizer.eos_token_id), *ids] if buffer else ids
        done = len(ready) + len(buffer) // length
        if on_progress is not None:
            on_progress(min(done, target), target, source.name)
        if done >= target:
            break
    if on_progress is not None:
        on_progress(target, target, source.name)
    cut = [buffer[i : i + length] for i in range(0, len(buffer) - length + 1, length)]
    return np.array((ready + cut)[:target], dtype=np.int64).reshape(-1, length), count, tokens


def document_ids(
    opened: OpenSource, tokenizer: PreTrainedTokenizerBase, token: str | None = None
) -> Iterator[list[int]]:
    """The token ids of documents from all over a source, without special tokens."""
    source, stream = rows(opened, token)
    return (ids for ids, _ in _token_ids(source, stream, tokenizer))


def _token_ids(
    source: CalibrationSource, stream: Iterable[Any], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], bool]]:
    """Each document's token ids, without special tokens, and whether the source held them as ids."""
    texts: list[str] = []
    for found in _documents(source, stream, tokenizer):
        if isinstance(found, list):
            yield found, True
            continue
        texts.append(found)
        if sum(map(len, texts)) >= TOKENIZED_TOGETHER:
            yield from _tokenised(texts, tokenizer)
            texts = []
    if texts:
        yield from _tokenised(texts, tokenizer)


def _tokenised(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], bool]]:
    return ((ids, False) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])


def _documents(
    source: CalibrationSource, stream: Iterable[Any], tokenizer: PreTrainedTokenizerBase
) -> Iterator[str | list[int]]:
    """Each row's token ids or text; a long text in pieces from all over it."""
    for row in stream:
        found = document(source, row, tokenizer)
        if isinstance(found, str) and len(found) > LONGEST_TEXT:
            starts = np.random.default_rng(POOL_SEED).permutation(range(0, len(found), LONGEST_TEXT))
            yield from (found[i : i + LONGEST_TEXT] for i in starts)
        elif isinstance(found, list) or found.strip():
            yield found
