# SPDX-License-Identifier: Apache-2.0
"""Where a model's blocks are between their turns: all in memory, or on disk, from where each is read when its turn comes."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig, remove_tied_weights_from_state_dict
from transformers.utils import logging

from .blocks import bypassed, damaged, find_blocks
from .checkpoint import Checkpoint, as_bytes
from .forward import Forward, wait_before
from .memory import be_frugal, give_back


IN_STEP = 2**30  # bytes of hidden states between which a streamed block is read once
OUTSIDE = -1  # the part of a model that is no block: embeddings, last norm, head


class InMemory:
    """All of the model is in memory, on one device; a block is moved to where it is worked on, and back."""

    streamed = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        _, self.blocks = find_blocks(model)
        self.device = next(self.blocks.parameters()).device

    def brought(self, device: torch.device, start: int = 0) -> Iterator[nn.Module]:
        """The blocks from `start` on, each on `device`; elsewhere than on a CPU the next is on its way meanwhile."""
        if self.device == device:
            yield from self.blocks[start:]
            return
        yield from _one_ahead(self.blocks, start, device, self._move)

    def _move(self, i: int, device: torch.device) -> Callable[[], None]:
        tensors = [*self.blocks[i].parameters(), *self.blocks[i].buffers()]
        copies = [tensor.data.to(device) for tensor in tensors]

        def arrive() -> None:
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.data = copy

        return arrive

    def put_back(self, i: int) -> None:
        self.blocks[i].to(self.device)

    def logits(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Of batches of token ids `[samples, length]`, one after the other."""
        return (_logits(self.model, ids) for ids in batches)

    def fingerprint(self) -> str:
        """SHA-256 of all weights and their names."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(as_bytes(tensor))
        return digest.hexdigest()

    @contextmanager
    def only_blocks(self) -> Iterator[None]:
        """While nothing but single blocks is run."""
        yield

    def take(self, i: int, shard: Checkpoint) -> None:
        """Reads block `i` from what was written of it before."""
        load(self.model, shard, list(shard.files), self.device)


class Streamed:
    """The model is on the meta device, and its weights are in a checkpoint. What is no block is loaded on `device` unless
    nothing but blocks is run. In a forward of the whole model each block is read when it is called, and dropped after it.

    Raises `ValueError` where a tensor is missing, or belongs to several blocks.
    """

    streamed = True

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device) -> None:
        be_frugal()
        self.model, self.checkpoint, self.device = model, checkpoint, device
        self.name, self.blocks = find_blocks(model)
        self._shards: dict[int, Checkpoint] = {}
        self._keys = self._keys_by_part()
        self._visitors: set[int] = set()
        self._by_hand = False
        self._checked: set[int] = set()
        self._check_shared()
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        for i, block in enumerate(self.blocks):
            block.register_forward_pre_hook(lambda _, __, i=i: self._visit(i))
            block.register_forward_hook(lambda _, __, ___, i=i: self._leave(i))
        self._load(OUTSIDE, device)

    def brought(self, device: torch.device, start: int = 0) -> Iterator[nn.Module]:
        """The blocks from `start` on, each on `device`; elsewhere than on a CPU the next is on its way meanwhile."""
        if device.type == "cpu":  # one block in memory
            for i in range(start, len(self.blocks)):
                self._load(i, device)
                yield self.blocks[i]
            return
        try:
            yield from _one_ahead(self.blocks, start, device, self._read)
        finally:
            _drop(self.blocks.modules())  # where the walk has ended early, another block is on its way

    def _read(self, i: int, device: torch.device) -> Callable[[], None]:
        self._load(i, device)
        return lambda: None

    def logits(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Of batches of token ids `[samples, length]`: their forwards go in step, so that each block is read once for many."""
        waiting, size = [], 0
        for ids in batches:
            waiting.append(ids)
            size += (
                ids.numel() * self.model.config.get_text_config(decoder=True).hidden_size * self.model.dtype.itemsize
            )
            if size >= IN_STEP:
                yield from self._in_step(waiting)
                waiting, size = [], 0
        if waiting:
            yield from self._in_step(waiting)

    def _in_step(self, batches: list[Tensor]) -> Iterator[Tensor]:
        gates = [wait_before(block, lambda args, kwargs: True) for block in self.blocks]
        forwards = [Forward(partial(_logits, self.model, ids)) for ids in batches]
        self._drop_visitors()
        self._by_hand = True
        try:
            for forward in forwards:
                forward.switch()
            for i, _ in enumerate(self.brought(self.device)):
                for forward in forwards:
                    if i + 1 < len(self.blocks):
                        forward.switch()
                    else:
                        yield forward.switch()
                self.put_back(i)
        finally:
            self._by_hand = False
            for gate in gates:
                gate.remove()
            for forward in forwards:
                forward.drop()
            _drop(self.blocks.modules())

    def fingerprint(self) -> str:
        """SHA-256 of all files of the checkpoint, and of those from which finished blocks are read instead."""
        dense = self.checkpoint.fingerprint()
        if not self._shards:
            return dense
        taken = [f"{i} {shard.fingerprint()}" for i, shard in sorted(self._shards.items())]
        return hashlib.sha256("\n".join([dense, *taken]).encode()).hexdigest()

    def put_back(self, i: int) -> None:
        """Drops the block: what is to last of it has been written, and is told to `take`."""
        _drop(self.blocks[i].modules())

    @contextmanager
    def only_blocks(self) -> Iterator[None]:
        """While nothing but single blocks is run: what is no block is not in memory."""
        self._drop_visitors()
        _drop(_outside(self.model, self.blocks))
        try:
            yield
        finally:
            self._load(OUTSIDE, self.device)

    def take(self, i: int, shard: Checkpoint) -> None:
        """From now on block `i` is read from what was written of it."""
        self._shards[i] = shard

    def _visit(self, i: int) -> None:
        if self._by_hand or bypassed(self.blocks[i]) or not _dropped(self.blocks[i]):
            return
        self._drop_visitors()
        self._load(i, self.device)
        self._visitors.add(i)

    def _leave(self, i: int) -> None:
        if i in self._visitors:
            self._drop_visitors()

    def _drop_visitors(self) -> None:
        for i in self._visitors:
            _drop(self.blocks[i].modules())
        self._visitors.clear()

    def _load(self, part: int, device: torch.device) -> None:
        shard = self._shards.get(part)
        source, keys = (self.checkpoint, self._keys[part]) if shard is None else (shard, list(shard.files))
        load(self.model, source, keys, device)
        if part == OUTSIDE:
            self.model.tie_weights()
        modules = _outside(self.model, self.blocks) if part == OUTSIDE else self.blocks[part].modules()
        if part != OUTSIDE and part not in self._checked:
            self._check_finite(part)
        missing = [type(module).__name__ for module in modules if _dropped(module, recurse=False)]
        if missing:
            where = "outside the blocks" if part == OUTSIDE else f"of {self.name}.{part}"
            raise ValueError(f"The checkpoint lacks weights {where}: those of a {missing[0]}.")

    def _check_finite(self, part: int) -> None:
        for name, parameter in self.blocks[part].named_parameters():
            if not parameter.is_meta and not bool(parameter.isfinite().all()):
                raise damaged(f"{self.name}.{part}.{name}")
        self._checked.add(part)

    def _keys_by_part(self) -> dict[int, list[str]]:
        """The checkpoint's keys for each part; those of nothing in the model are left out, as transformers does."""
        mapping, known = get_model_conversion_mapping(self.model), self.model.state_dict()
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        keys: dict[int, list[str]] = {part: [] for part in range(OUTSIDE, len(self.blocks))}
        for key in self.checkpoint.files:
            name, _ = rename_source_key(key, renamings, converters, self.model.base_model_prefix, known)
            name = key if name not in known and key in known else name
            inside = name.startswith(f"{self.name}.")
            part = int(name.removeprefix(f"{self.name}.").partition(".")[0]) if inside else OUTSIDE
            if part in keys:
                keys[part].append(key)
        return keys

    def _check_shared(self) -> None:
        owners: dict[int, int] = {}
        parts = [(OUTSIDE, list(_outside(self.model, self.blocks)))]
        parts += [(i, list(block.modules())) for i, block in enumerate(self.blocks)]
        for part, modules in parts:
            for parameter in (p for module in modules for p in module.parameters(recurse=False)):
                if owners.setdefault(id(parameter), part) != part:
                    raise ValueError(
                        f"{type(self.model).__name__} shares weights between its blocks, or with what is outside them; such "
                        "a model cannot be streamed. Load it in memory: stream=False."
                    )


Home = InMemory | Streamed


@dataclass(frozen=True)
class Absent:
    """A model whose weights are nowhere, on a device that need not be here: enough to plan with."""

    model: PreTrainedModel
    device: torch.device
    streamed: bool

    @property
    def blocks(self) -> nn.ModuleList:
        return find_blocks(self.model)[1]


# ------------------------------------------------------------------------------------- parts of a model


def without_weights(config: PretrainedConfig, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """A causal language model whose parameters are on the meta device; its buffers are not."""
    from accelerate import init_empty_weights  # here, so that a GPU machine can do without

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options).eval()


_LOADING = threading.Lock()  # transformers notes in the model how its weights were renamed, and we collect it


def load(model: PreTrainedModel, checkpoint: Checkpoint, keys: list[str], device: torch.device) -> None:
    """Reads some tensors of a checkpoint into the model, renamed and fused as transformers does it."""
    dtype, mapping = model.dtype, get_model_conversion_mapping(model)
    options = LoadStateDictConfig(
        device_map={"": device}, dtype=dtype, dtype_plan=model._get_dtype_plan(dtype), weight_mapping=mapping
    )
    with _LOADING, checkpoint.read(keys) as slices, _no_bars():
        before = getattr(model, "_weight_conversions", None) or []
        convert_and_load_state_dict_in_model(model, slices, options)
        used = {repr(entry) for entry in (*before, *(model._weight_conversions or []))}
        model._weight_conversions = [entry for entry in mapping if repr(entry) in used]


def part_state(model: PreTrainedModel, part: int) -> dict[str, Tensor]:
    """The tensors of a block, or of what is `OUTSIDE`, under the names that they have in the model's checkpoints."""
    name, blocks = find_blocks(model)
    if part == OUTSIDE:
        state = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(f"{name}.")}
        state = remove_tied_weights_from_state_dict(state, model)
    else:
        state = {f"{name}.{part}.{key}": tensor for key, tensor in blocks[part].state_dict().items()}
    state = {key: tensor for key, tensor in state.items() if key not in (model._keys_to_ignore_on_save or ())}
    with _LOADING:
        return revert_weight_conversion(model, state)


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids.to(model.get_input_embeddings().weight.device), use_cache=False).logits


def _outside(model: PreTrainedModel, blocks: nn.ModuleList) -> Iterator[nn.Module]:
    inside = set(blocks.modules())
    return (module for module in model.modules() if module not in inside)


def _dropped(module: nn.Module, recurse: bool = True) -> bool:
    return any(parameter.is_meta for parameter in module.parameters(recurse))


def _drop(modules: Iterable[nn.Module]) -> None:
    """Leaves the parameters of the modules themselves on the meta device, and what they held to the system."""
    for module in modules:
        for key, parameter in module.named_parameters(recurse=False):
            setattr(module, key, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
    give_back()


@contextmanager
def _no_bars() -> Iterator[None]:
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _one_ahead(
    blocks: nn.ModuleList,
    start: int,
    device: torch.device,
    fetch: Callable[[int, torch.device], Callable[[], None]],
) -> Iterator[nn.Module]:
    """The blocks from `start` on, each of which a helper thread has fetched while the one before it was worked on;
    what `fetch` returns is called when its turn comes.

    All copies are made on the device's default stream: transformers' loader has threads of its own, which copy there, and
    fuses what they have copied.
    """
    with ThreadPoolExecutor(1) as helper:
        coming: Future[Callable[[], None]] = helper.submit(_fetched, fetch, start, device)
        for i in range(start, len(blocks)):
            arrive = coming.result()
            if i + 1 < len(blocks):
                coming = helper.submit(_fetched, fetch, i + 1, device)
            arrive()
            yield blocks[i]


def _fetched(fetch: Callable[[int, torch.device], Any], i: int, device: torch.device) -> Any:
    """On the helper's thread, whose current device is another one than the caller's."""
    if device.type != "cuda":
        return fetch(i, device)
    with torch.cuda.device(device):
        return fetch(i, device)
