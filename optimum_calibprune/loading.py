# SPDX-License-Identifier: Apache-2.0
"""A model's name in; the model, its tokenizer and what a card must know of it out."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import pocket
from .pruning.blocks import check_config
from .pruning.checkpoint import find_checkpoint
from .pruning.homes import Home, InMemory, Streamed, without_weights
from .pruning.memory import free_memory
from .pruning.ranks import Ranks
from .records import BaseModel, RunRecord


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

NO_SAFETENSORS = ("Please do not set `use_safetensors=True`", "Error no file named model.safetensors found")
RECORD_NAME = "calibprune.json"
DOWNLOADS = 3  # how often a download that breaks off is asked for
XET_FAILED = "CAS Client Error"  # as the client of the Hub's chunk store begins, in a RuntimeError
WITHOUT_XET = " If it is the chunk store that fails, HF_HUB_DISABLE_XET=1 goes around it."
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
    allow_pickle: bool = False,
    check: Callable[[PreTrainedModel], None],
) -> tuple[Home, PreTrainedTokenizerBase, BaseModel]:
    """Loads a causal language model, or, where it is to `stream`, only what is outside its blocks; `"auto"` streams what
    does not fit. Before any weight is read, `check` is asked about it on the meta device.

    All files of a repo are taken from the commit that its config came from. Weights that are pickles are refused unless
    `allow_pickle`.

    Raises `OSError` where it cannot be had (which repo, and what to do), `ValueError` where it cannot be pruned.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise ValueError(f"Unknown dtype {dtype!r}; allowed: {', '.join(DTYPES)}.")
    if stream not in STREAM:
        raise ValueError(f"Unknown value {stream!r} of stream; allowed: {', '.join(map(repr, STREAM))}.")
    place = _device(device)
    path = str(pocket.MODEL) if name == pocket.NAME else name
    local = Path(path).exists()
    options: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "trust_remote_code": trust_remote_code,
    }
    try:
        config = AutoConfig.from_pretrained(path, **options)
        commit = None if local else _commit(name, revision, cache_dir)
        options["revision"] = commit or revision
        check_config(config)
        empty = _without_weights(name, config, trust_remote_code)
        check(empty)
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        home: Home
        in_memory = stream != "auto" or all(Ranks.current().everywhere(_fits(empty, dtype, place)))
        if stream is True or not in_memory:
            home = _streamed(name, path, config, dtype, place, options)
        else:
            options["use_safetensors"] = None if allow_pickle else True
            model = _downloaded(
                lambda: AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, **options)
            )
            home = InMemory(model.to(place))
    except OSError as error:
        raise OSError(_why_not_loaded(name, error, revision, cache_dir, local_files_only)) from error
    licence, language = _card(name, local, commit or revision, token, cache_dir, local_files_only)
    base = BaseModel(
        name=Path(name).resolve().name if local and name != pocket.NAME else name,
        revision=commit,
        licence=licence,
        language=language,
        architecture=type(home.model).__name__,
        parameters=home.model.num_parameters(),
    )
    return home, tokenizer, base


def load_shape(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> PreTrainedModel:
    """A causal language model without weights; within a `FakeTensorMode` forwards of it work, and compute nothing. Only its
    config is fetched, and no code that comes with it is run.

    Raises what `load_model` does.
    """
    from transformers import AutoConfig

    if dtype not in DTYPES:
        raise ValueError(f"Unknown dtype {dtype!r}; allowed: {', '.join(DTYPES)}.")
    path = str(pocket.MODEL) if name == pocket.NAME else name
    try:
        options = {"revision": revision, "token": token, "cache_dir": cache_dir}
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
    except OSError as error:
        raise OSError(_why_not_loaded(name, error, revision, cache_dir, False)) from error
    check_config(config)
    empty = _without_weights(name, config, trust_remote_code=False)
    empty.set_experts_implementation("batched_mm")  # whose shapes do not hang on values
    return empty if dtype == "auto" else empty.to(getattr(torch, dtype))


def fits(weight_bytes: int, free: int) -> bool:
    """Whether weights leave enough of the free memory for the rest."""
    return weight_bytes <= LARGEST_SHARE * free


def _fits(empty: PreTrainedModel, dtype: str, place: torch.device) -> bool:
    """Whether the weights fit into what is free now, in the host and on the device; each process of a host has its own copy
    of them."""
    itemsize = empty.dtype.itemsize if dtype == "auto" else getattr(torch, dtype).itemsize
    free = free_memory()
    if place.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(place)[0])
    return fits(empty.num_parameters() * itemsize, free)


def _streamed(name: str, path: str, config: Any, dtype: str, place: torch.device, options: dict[str, Any]) -> Streamed:
    from transformers import GenerationConfig
    from transformers.utils import cached_file

    def fetch(file: str) -> Path | None:
        found = cached_file(path, file, **hub, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    hub = {key: value for key, value in options.items() if key != "trust_remote_code"}
    checkpoint = _downloaded(lambda: find_checkpoint(fetch))
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
    if place.type == "cuda":
        place = torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)
        torch.cuda.set_device(place)  # kernels are launched on the current device
    return place


def _downloaded(load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """What `load` gives; where a download breaks off, it is asked again, and goes on with the files that are missing."""
    for _ in range(DOWNLOADS - 1):
        try:
            return load()
        except OSError as error:
            if not _broke_off(error):
                raise
            logger.warning("A download broke off and is taken up again.")
    return load()


def _broke_off(error: BaseException) -> bool:
    from huggingface_hub.utils import httpx

    causes = (error, error.__cause__, error.__context__)
    return any(isinstance(cause, httpx.TransportError) or XET_FAILED in str(cause) for cause in causes)


def _why_not_loaded(
    name: str, error: OSError, revision: str | None, cache_dir: str | Path | None, local_files_only: bool
) -> str:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    causes: list[BaseException | None] = [error, error.__cause__, error.__context__]
    if any(isinstance(cause, GatedRepoError) for cause in causes) or "gated repo" in str(error):
        return f"{name} is gated. Accept its terms on the Hub, then run `hf auth login` or pass a token."
    if _broke_off(error):
        said = f"The download of {name} broke off {DOWNLOADS} times. Do the same again, which fetches only what is missing."
        return said + (WITHOUT_XET if any(XET_FAILED in str(cause) for cause in causes) else "")
    offline = huggingface_hub.is_offline_mode()
    cached = (offline or local_files_only) and _commit(name, revision, cache_dir) is not None
    pickled = (
        huggingface_hub.try_to_load_from_cache(name, "pytorch_model.bin", cache_dir, revision) if cached else None
    )
    if any(marker in str(error) for marker in NO_SAFETENSORS) and (not cached or isinstance(pickled, str)):
        return (
            f"{name} has no weights in safetensors. If it has pickles (.bin) and you trust who made them, allow them: "
            "allow_pickle=True, or --allow-pickle."
        )
    if cached:
        return (
            f"The local cache holds only a part of {name}, as after a download that was cut off. Load it once with a network, "
            f"which fetches the rest: unset HF_HUB_OFFLINE, or run `hf download {name}`."
        )
    near = difflib.get_close_matches(name, [pocket.NAME], n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if offline:
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


_fetched: dict[tuple[str, str | None], Path] = {}  # where the records of repos are, which may be in any cache


def fetch_record(
    name: str, revision: str | None, token: str | None, cache_dir: str | Path | None, local_files_only: bool
) -> None:
    """Puts the record of a run that was pushed to the repo `name`, if there is one, into the local cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError
    from huggingface_hub.utils import httpx

    if name == pocket.NAME or Path(name).exists():
        return
    options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    _fetched.pop((name, revision), None)
    # What goes wrong here goes wrong again when the model is loaded, and is told then.
    with contextlib.suppress(EntryNotFoundError, HFValidationError, OSError, httpx.HTTPError):
        _fetched[name, revision] = Path(hf_hub_download(name, RECORD_NAME, **options))


def made_by(name: str, revision: str | None = None) -> RunRecord | None:
    """The record of the run that made a model: of a saved folder, or of a repo after `fetch_record`.

    None for a model that no run made. A record that cannot be read is said, and counts as none.
    """
    path = _record_path(name, revision)
    if path is None:
        return None
    try:
        return RunRecord.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        logger.warning("The %s of %s cannot be read and is left aside: %s", RECORD_NAME, name, error)
        return None


def pruned_from(name: str, revision: str | None = None) -> str | None:
    """The name of the model from which the one in a folder or repo was pruned; None for a model that no run made."""
    path = _record_path(name, revision)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["base"]["name"] if path is not None else None
    except (ValueError, LookupError, TypeError, OSError):
        return None
    return found if isinstance(found, str) else None


def _record_path(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).is_dir():
        path = Path(name) / RECORD_NAME
        return path if path.is_file() else None
    if (name, revision) in _fetched:
        return _fetched[name, revision]
    try:
        found = try_to_load_from_cache(name, RECORD_NAME, revision=revision)
    except HFValidationError:  # a path that does not exist
        return None
    return Path(found) if isinstance(found, str) else None


def _card(
    name: str,
    local: bool,
    revision: str | None,
    token: str | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> tuple[str | None, tuple[str, ...]]:
    """Licence and languages that the base model's own card states."""
    import yaml
    from huggingface_hub import ModelCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if name == pocket.NAME:
        return pocket.LICENCE, ("en",)
    options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    try:
        path = Path(name) / "README.md" if local else hf_hub_download(name, "README.md", **options)
        data = ModelCard(Path(path).read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (EntryNotFoundError, OSError, ValueError, yaml.YAMLError):  # it need not have a card, nor a good one
        return None, ()
    stated = [data.language] if isinstance(data.language, str) else data.language
    languages = tuple(str(language) for language in stated) if isinstance(stated, list) else ()
    return (data.license if isinstance(data.license, str) else None), languages
