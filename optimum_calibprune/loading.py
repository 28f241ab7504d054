# SPDX-License-Identifier: Apache-2.0
"""A model's name in; the model, its tokenizer and what a card must know of it out."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import pocket
from .pruning.blocks import check_config
from .pruning.checkpoint import find_checkpoint
from .pruning.homes import Home, InMemory, Streamed, without_weights
from .pruning.memory import free_memory
from .records import BaseModel


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


DTYPES = ("auto", "bfloat16", "float16", "float32")
STREAM = ("auto", True, False)
LARGEST_SHARE = 0.7  # of the free memory, for weights: the rest is for Hessians and activations


def load_model(
    name: str,
    *,
    revision: str | None,
    dtype: str,
    device: str,
    token: str | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
    trust_remote_code: bool,
    stream: bool | str,
    check: Callable[[PreTrainedModel], None],
) -> tuple[Home, PreTrainedTokenizerBase, BaseModel]:
    """Loads a causal language model, or, where it is to `stream`, only what is outside its blocks; `"auto"` streams what
    does not fit. Before any weight is read, `check` is asked about it on the meta device.

    Raises `OSError` where it cannot be had (which repo, and what to do), `ValueError` where it cannot be pruned.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise ValueError(f"Unknown dtype {dtype!r}; allowed: {', '.join(DTYPES)}.")
    if stream not in STREAM:
        raise ValueError(f"Unknown value {stream!r} of stream; allowed: {', '.join(map(repr, STREAM))}.")
    place = _device(device)
    path = str(pocket.MODEL) if name == pocket.NAME else name
    options: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "trust_remote_code": trust_remote_code,
    }
    try:
        config = AutoConfig.from_pretrained(path, **options)
        check_config(config)
        empty = _without_weights(name, config, trust_remote_code)
        check(empty)
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        home: Home
        if stream is True or (stream == "auto" and not _fits(empty, dtype, place)):
            home = _streamed(name, path, config, dtype, place, options)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, **options)
            home = InMemory(model.to(place))
    except OSError as error:
        raise OSError(_why_not_loaded(name, error)) from error
    local = Path(path).exists()
    licence, language = _card(name, local, revision, token, cache_dir, local_files_only)
    base = BaseModel(
        name=Path(name).resolve().name if local and name != pocket.NAME else name,
        revision=None if local else _commit(name, revision, cache_dir),
        licence=licence,
        language=language,
        architecture=type(home.model).__name__,
        parameters=home.model.num_parameters(),
    )
    return home, tokenizer, base


def _fits(empty: PreTrainedModel, dtype: str, place: torch.device) -> bool:
    """Whether the weights leave enough of the memory free that is free now, in the host and on the device."""
    itemsize = empty.dtype.itemsize if dtype == "auto" else getattr(torch, dtype).itemsize
    free = free_memory()
    if place.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(place)[0])
    return empty.num_parameters() * itemsize <= LARGEST_SHARE * free


def _streamed(name: str, path: str, config: Any, dtype: str, place: torch.device, options: dict[str, Any]) -> Streamed:
    from transformers import GenerationConfig
    from transformers.utils import cached_file

    def fetch(file: str) -> Path | None:
        found = cached_file(path, file, **hub, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    hub = {key: value for key, value in options.items() if key != "trust_remote_code"}
    checkpoint = find_checkpoint(fetch)
    if checkpoint is None:
        raise OSError(
            f"{name} has no weights in safetensors, which streaming reads; load it in memory (stream=False), call "
            "save_pretrained, and prune the saved folder."
        )
    kept = config.get_text_config(decoder=True).dtype or checkpoint.dtype()
    model = without_weights(
        config,
        kept if dtype == "auto" else getattr(torch, dtype),
        trust_remote_code=options["trust_remote_code"],
    )
    with contextlib.suppress(OSError):  # not every model has one
        model.generation_config = GenerationConfig.from_pretrained(path, **hub)
    return Streamed(model, checkpoint, place)


def _device(asked: str) -> torch.device:
    if asked == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        place = torch.device(asked)
    except RuntimeError as error:
        raise ValueError(f"Unknown device {asked!r}; allowed: auto, cpu, cuda, cuda:0, ...") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"Device {asked!r} was asked for, but this machine has no CUDA device; use 'auto' or 'cpu'.")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"Device {asked!r} was asked for; this machine has {torch.cuda.device_count()} CUDA device(s)."
        )
    return place


def _why_not_loaded(name: str, error: OSError) -> str:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    causes: list[BaseException | None] = [error, error.__cause__, error.__context__]
    if any(isinstance(cause, GatedRepoError) for cause in causes) or "gated repo" in str(error):
        return f"{name} is gated. Accept its terms on the Hub, then run `hf auth login` or pass a token."
    near = difflib.get_close_matches(name, [pocket.NAME], n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if huggingface_hub.is_offline_mode():
        return (
            f"{name} is neither a local folder nor in the local cache, and HF_HUB_OFFLINE is set.{hint} "
            "Unset it, give a local folder, or use the bundled 'pocket'."
        )
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"The model {name!r} cannot be loaded: {first}{hint} Without a network: a local folder, the bundled 'pocket', or "
        "HF_HUB_OFFLINE=1 for what is in the cache."
    )


def _without_weights(name: str, config: Any, trust_remote_code: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"{name} is of type {config.model_type!r}, which transformers has no causal language model for. "
            "Only decoder-only language models can be pruned."
        ) from error


def _commit(name: str, revision: str | None, cache_dir: str | Path | None) -> str | None:
    """The commit that was loaded: the cache keeps each file in a folder of that name."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir, revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def pruned_from(name: str) -> str | None:
    """Of a folder that holds a saved run, the name of the model that was pruned."""
    record = Path(name) / "calibprune.json"
    return json.loads(record.read_text(encoding="utf-8")).get("base", {}).get("name") if record.is_file() else None


def _card(
    name: str,
    local: bool,
    revision: str | None,
    token: str | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> tuple[str | None, tuple[str, ...]]:
    """Licence and languages that the base model's own card states."""
    from huggingface_hub import ModelCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if name == pocket.NAME:
        return pocket.LICENCE, ("en",)
    options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    try:
        path = Path(name) / "README.md" if local else hf_hub_download(name, "README.md", **options)
        data = ModelCard(Path(path).read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (EntryNotFoundError, OSError, ValueError):  # a base model need not have a card
        return None, ()
    language = data.language or []
    return data.license, tuple([language] if isinstance(language, str) else language)
