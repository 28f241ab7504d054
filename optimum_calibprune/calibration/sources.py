# SPDX-License-Identifier: Apache-2.0
"""Text in, pools of packed samples out: the table of Hub sources, local files, and data that is in memory already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..records import CAPABILITIES, CalibrationSource, unknown
from .readers import document


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


POOL_SEED = 0
POOL_FACTOR = 4
SHUFFLE_BUFFER = 10_000
SUFFIXES = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}

# Licences and revisions are not repeated here: the data set's own card states the one, a run resolves the other.
SOURCES: dict[str, CalibrationSource] = {
    source.name: source
    for source in (
        CalibrationSource("c4", "general", "allenai/c4", "en"),
        CalibrationSource(
            "wikitext2", "general", "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", text="{page}"
        ),
        CalibrationSource(
            "ultrachat", "general", "HuggingFaceH4/ultrachat_200k", split="train_sft", text="chat:messages"
        ),
        CalibrationSource("arc", "general", "allenai/ai2_arc", "ARC-Easy", text="arc"),
        CalibrationSource("winogrande", "commonsense", "allenai/winogrande", "winogrande_xl", text="winogrande"),
        CalibrationSource("hellaswag", "commonsense", "Rowan/hellaswag", text="hellaswag"),
        CalibrationSource("piqa", "commonsense", "baber/piqa", text="piqa"),
        CalibrationSource(
            "evol_codealpaca", "code", "theblackcat102/evol-codealpaca-v1", text="{instruction}\n\n{output}"
        ),
        CalibrationSource("mbpp", "code", "google-research-datasets/mbpp", "full", text="{text}\n\n{code}"),
        CalibrationSource("gsm8k", "math", "openai/gsm8k", "main", text="gsm8k"),
        CalibrationSource(
            "hendrycks_math", "math", "EleutherAI/hendrycks_math", "algebra", text="{problem}\n\n{solution}"
        ),
    )
}


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
    given: Sequence[str | CalibrationSource] | Mapping[str, Any], table: Mapping[str, CalibrationSource] = SOURCES
) -> list[OpenSource]:
    """Turns what a user names into sources.

    Args:
        given: names of `table`, paths, `"NAME=PATH:CAPABILITY"` and `CalibrationSource`s; or a mapping from
            `"NAME:CAPABILITY"` to data in memory: a list of strings, of rows or of token ids, an array of token ids,
            or a `datasets` object.

    Raises:
        `ValueError` for an unknown name, capability or file type, `FileNotFoundError` for a missing path.
    """
    if isinstance(given, Mapping):
        opened = [OpenSource(_in_memory(key), data) for key, data in given.items()]
    else:
        opened = [OpenSource(s if isinstance(s, CalibrationSource) else _parse(s, table)) for s in given]
    names = [o.source.name for o in opened]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two sources are named {name!r}; give each its own name with NAME=PATH:CAPABILITY.")
    return opened


def _in_memory(key: str) -> CalibrationSource:
    name, _, capability = key.partition(":")
    if not capability:
        raise ValueError(f"Data in memory needs its capability: {name + ':CAPABILITY'!r}, one of {CAPABILITIES}.")
    return CalibrationSource(name, capability)


def _parse(given: str, table: Mapping[str, CalibrationSource]) -> CalibrationSource:
    if given in table:
        return table[given]
    name, equals, rest = given.partition("=")
    if equals:
        path, colon, capability = rest.rpartition(":")
        if not colon:
            raise ValueError(f"{given!r} does not name a capability; allowed: NAME=PATH:CAPABILITY.")
        return CalibrationSource(name, capability, path=str(_existing(Path(path))))
    path = Path(given)
    if path.exists() or path.suffix in SUFFIXES or "/" in given:
        return CalibrationSource(path.stem, "general", path=str(_existing(path)))
    raise unknown("source", given, [*table, "a path", "NAME=PATH:CAPABILITY"])


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {str(path)!r}.")
    if not _files(path):
        raise ValueError(f"{str(path)!r} holds no file that can be read; allowed: {', '.join(SUFFIXES)}.")
    return path


def _files(path: Path) -> list[Path]:
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in found if file.suffix in SUFFIXES]


# ------------------------------------------------------------------------------------------------- rows


def rows(
    opened: OpenSource, token: str | None = None, shuffle: bool = True
) -> tuple[CalibrationSource, Iterable[Any]]:
    """The source with its revision resolved, and its rows: from all over it, or with `shuffle=False` in their order."""
    source, data = opened.source, opened.data
    if data is not None:
        return source, _memory_rows(data, shuffle)
    if source.path is not None:
        return source, _local_rows(Path(source.path), shuffle)
    return _hub_rows(source, token, shuffle)


def _memory_rows(data: Any, shuffle: bool) -> Iterable[Any]:
    if hasattr(data, "map") and hasattr(data, "features"):  # a datasets object
        return _shuffled(data) if shuffle else data
    items = data.tolist() if hasattr(data, "tolist") else list(data)
    order = np.random.default_rng(POOL_SEED).permutation(len(items)) if shuffle else range(len(items))
    return [items[i] for i in order]


def _shuffled(data: Any) -> Any:
    """A `datasets` object in the order of the pool seed; of a stream, as far as the buffer reaches."""
    streamed = not hasattr(data, "__len__")
    return data.shuffle(seed=POOL_SEED, buffer_size=SHUFFLE_BUFFER) if streamed else data.shuffle(seed=POOL_SEED)


def _local_rows(path: Path, shuffle: bool) -> Iterable[Any]:
    """Files are read through `datasets`, which maps them from disk; a text file's documents are its paragraphs."""
    import datasets

    kinds: dict[str, list[str]] = {}
    for file in _files(path):
        kinds.setdefault(SUFFIXES[file.suffix], []).append(str(file))
    parts = []
    for kind, files in kinds.items():
        options = {"sample_by": "paragraph"} if kind == "text" else {}
        try:
            parts.append(datasets.load_dataset(kind, data_files=files, split="train", **options))
        except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as {kind}: {error.__cause__ or error}") from error
    whole = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    return _shuffled(whole) if shuffle else whole


def _hub_rows(source: CalibrationSource, token: str | None, shuffle: bool) -> tuple[CalibrationSource, Iterable[Any]]:
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    repo, name = str(source.repo), source.name
    offline = huggingface_hub.is_offline_mode()
    try:
        revision = source.revision
        if not offline:
            revision = huggingface_hub.HfApi(token=token).dataset_info(repo, revision=source.revision).sha
        found = datasets.load_dataset(
            repo, source.subset, split=source.split, revision=revision, token=token, streaming=not offline
        )
    except GatedRepoError as error:
        raise ValueError(
            f"{name!r}: {repo} is gated. Accept its terms on the Hub, then log in or pass a token."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{name!r}: {repo} is not on the Hub, or it is private and needs a token.") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{name!r}: {repo} has no revision {source.revision!r}.") from error
    except (OSError, HfHubHTTPError) as error:  # every failure to connect is an OSError
        why = "HF_HUB_OFFLINE is set and it is not in the local cache" if offline else "it cannot be reached"
        raise ConnectionError(
            f"{name!r} needs the Hub data set {repo}, but {why}. Local files work without the Hub: NAME=PATH:CAPABILITY."
        ) from error
    return replace(source, revision=revision), _shuffled(found) if shuffle else found


# ------------------------------------------------------------------------------------------------ pools


def build_pool(
    opened: OpenSource,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    wanted: int,
    *,
    vocabulary: int | None = None,
    token: str | None = None,
    on_progress: Progress | None = None,
) -> Pool:
    """Tokenises documents from all over a source, joins them with the end-of-sequence token, and cuts windows.

    Reads until there are 4 x `wanted` windows of `length` tokens, or the source ends; nothing is padded. Token ids that
    come in rows of exactly `length` are samples already and stay as they are.

    Raises:
        `ValueError` where the source gives fewer than `wanted` windows, or ids outside `vocabulary`.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end-of-sequence token to put between documents; set tokenizer.eos_token."
        )
    source, stream = rows(opened, token)
    target = POOL_FACTOR * wanted
    windows, documents_read, tokens = _fill(source, stream, tokenizer, length, target, on_progress)
    if len(windows) < wanted:
        raise ValueError(
            f"Source {source.name!r} is too short: {wanted} samples of {length} tokens were asked of it, its "
            f"{documents_read} documents give {len(windows)} ({tokens:,} tokens). Take fewer or shorter samples."
        )
    if vocabulary is not None and (windows.min() < 0 or windows.max() >= vocabulary):
        raise ValueError(
            f"Source {source.name!r} holds token id {windows.max() if windows.max() >= vocabulary else windows.min()}; "
            f"the model's vocabulary has ids 0 to {vocabulary - 1}."
        )
    return Pool(replace(source, pool=_provenance(source, documents_read, len(windows))), windows)


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
    for ids in _token_ids(source, stream, tokenizer):
        count += 1
        tokens += len(ids)
        if len(ids) == length and not buffer:
            ready.append(ids)
        else:
            buffer += [*ids, int(tokenizer.eos_token_id)]
        done = len(ready) + len(buffer) // length
        if on_progress is not None:
            on_progress(min(done, target), target, source.name)
        if done >= target:
            break
    cut = [buffer[i : i + length] for i in range(0, len(buffer) - length + 1, length)]
    return np.array((ready + cut)[:target], dtype=np.int64).reshape(-1, length), count, tokens


def _token_ids(
    source: CalibrationSource, stream: Iterable[Any], tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[int]]:
    """Each document's token ids, without special tokens; texts are tokenised 32 at a time."""
    texts: list[str] = []
    for row in stream:
        found = document(source, row, tokenizer)
        if isinstance(found, list):
            yield found
        elif found.strip():
            texts.append(found)
        if len(texts) == 32:
            yield from tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            texts = []
    if texts:
        yield from tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _provenance(source: CalibrationSource, documents: int, windows: int) -> dict[str, str]:
    import datasets

    made = {"documents": str(documents), "windows": str(windows), "shuffle_seed": str(POOL_SEED)}
    if source.repo is not None:
        made |= {"shuffle_buffer": str(SHUFFLE_BUFFER), "datasets": datasets.__version__}
    return made
