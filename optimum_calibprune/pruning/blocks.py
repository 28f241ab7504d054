# SPDX-License-Identifier: Apache-2.0
"""A model's decoder blocks: find them and what in them can be pruned; load, run and store one block at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..records import LEFT_DENSE, Sparsity, SparsityPattern, Untouched


@dataclass(frozen=True)
class InputGroup:
    """Modules of one block that read the same tensor and so share one Hessian, in the order in which they run."""

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]

    @property
    def columns(self) -> int:
        return weight_of(self.modules[0]).shape[1]

    @property
    def rows(self) -> int:
        return sum(weight_of(module).shape[0] for module in self.modules)


@dataclass(frozen=True)
class Call:
    """What the model passes to a block beside the hidden states: it differs from block to block, and is replayed."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stop(Exception):
    """Ends a forward whose remaining blocks are not needed."""


# -------------------------------------------------------------------------------------- what is pruned


def check_config(config: PretrainedConfig) -> None:
    """Refuses, before any weight is read, a model that is quantised already."""
    for part in (config, config.get_text_config(decoder=True)):
        quantization = getattr(part, "quantization_config", None)
        if not quantization:
            continue
        name = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        raise ValueError(
            f"{config.name_or_path or 'The model'} is quantised already ({name}); pruning needs plain weights. Load it "
            "with a quantization config that has dequantize=True (FP8, MXFP4) or take the unquantised checkpoint, "
            "call save_pretrained, and prune the saved folder."
        )


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder blocks: of the text decoder's `nn.ModuleList`s with as many entries as its config has hidden layers,
    the shallowest."""
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", None)
    decoder = set(model.get_decoder().modules())
    found = [
        (name.count("."), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and module in decoder
    ]
    if not found or count == 0 or model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} has no decoder blocks that can be pruned: it is an encoder-decoder, or has no "
            f"nn.ModuleList of num_hidden_layers = {count} entries. Only decoder-only models of transformers can be pruned."
        )
    _, name, module = min(found, key=lambda entry: entry[:2])
    return name, module


def weight_of(module: nn.Module) -> Tensor:
    """The weight as `[outputs, inputs]`; a view, whichever way the module stores it."""
    weight = module.weight.data
    return weight.t() if isinstance(module, Conv1D) else weight


def prunable(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of one block, by their name inside it; `nn.Linear`, its subclasses, and GPT-2's `Conv1D`."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and isinstance(module.weight, nn.Parameter)  # not where a parametrisation computes it anew at each access
        and module.weight.ndim == 2
        and module.weight.is_floating_point()
    }


def check_model(model: PreTrainedModel, sparsity: Sparsity | SparsityPattern) -> None:
    """Raises `ValueError`, naming the module, for everything that would stop a walk half-way or leave weights out."""
    check_structure(model, sparsity)
    home = next(model.parameters()).device
    for name, parameter in model.named_parameters():
        if parameter.is_meta or parameter.device != home:
            raise ValueError(
                f"{name} is on {parameter.device}: offloaded, or apart from the rest. Edits of it would be lost; load the "
                "model on one device, without device_map or offloading."
            )
    for name, module in _pruned_modules(model).items():
        if not bool(module.weight.isfinite().all()):
            raise ValueError(f"{name}.weight holds NaN or infinity; the checkpoint is damaged.")
    _check_replay(model)


def _pruned_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    blocks_name, blocks = find_blocks(model)
    return {f"{blocks_name}.{i}.{n}": module for i, b in enumerate(blocks) for n, module in prunable(b).items()}


def check_structure(model: PreTrainedModel, sparsity: Sparsity | SparsityPattern) -> None:
    """The part of `check_model` that needs no weights, for a model on the meta device."""
    check_config(model.config)
    blocks_name, blocks = find_blocks(model)
    for name, module in blocks.named_modules():
        full = f"{blocks_name}.{name}"
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 3 and not isinstance(module, nn.Conv1d):
                raise ValueError(
                    f"{full}.{key} holds several matrices in one tensor of shape {tuple(parameter.shape)}, as fused experts "
                    "do. They cannot be pruned yet, and pruning the rest alone would leave much of the model dense."
                )
    pruned = _pruned_modules(model)
    if not pruned:
        raise ValueError(f"The blocks of {type(model).__name__} hold no linear layer that can be pruned.")
    sparsity = Sparsity.parse(sparsity)
    sparsity.check(pruned)
    for full, module in pruned.items():
        columns, pattern = weight_of(module).shape[1], sparsity.of(full)
        if pattern is not None and pattern.m is not None and columns % pattern.m:
            raise ValueError(f"{full} has {columns} columns, which m = {pattern.m} of {pattern} does not divide.")


@torch.no_grad()
def _check_replay(model: PreTrainedModel) -> None:
    """Raises where blocks that run one by one, with the `Call`s of another text, do not give what the model gives."""
    model.eval()
    blocks_name, blocks = find_blocks(model)
    ids = _short_text(model)
    _, calls = capture(model, ids, ids.device)
    arrived: list[Tensor] = []
    left: list[Any] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        arrived.append(args[0] if args else kwargs["hidden_states"])
        left.append(_first(output))

    with _hooks([block.register_forward_hook(record, with_kwargs=True) for block in blocks]):
        model(input_ids=ids.flip(1), use_cache=False)
    expected = [*arrived[1:], *left[-1:]]
    for i, block in enumerate(blocks):
        alone = run(block, arrived[i], calls[i]) if len(arrived) == len(blocks) else None
        if alone is None or not torch.allclose(alone, expected[i], equal_nan=True):
            raise ValueError(
                f"{blocks_name}.{i} cannot run by itself: it needs more than the hidden states of the block before it "
                "(token embeddings, or keys and values of other blocks), or runs more than once. Such models cannot be "
                "pruned yet."
            )


def _short_text(model: PreTrainedModel) -> Tensor:
    embeddings = model.get_input_embeddings()
    return torch.arange(8, device=embeddings.weight.device)[None] % embeddings.num_embeddings


def untouched(
    model: PreTrainedModel, groups: list[list[InputGroup]], sparsity: Sparsity | None = None
) -> tuple[Untouched, ...]:
    """Every matrix outside `groups`, and why it stays dense; `sparsity` says which of them were left out on purpose."""
    blocks_name, _ = find_blocks(model)
    left_dense = _left_dense(model, sparsity) if sparsity is not None else {}
    pruned = {id(m.weight) for block in groups for group in block for m in group.modules}
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    entries = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or id(parameter) in pruned:
            continue
        if embeddings is not None and parameter is embeddings.weight:
            reason = "embeddings, which are never pruned"
        elif head is not None and parameter is getattr(head, "weight", None):
            reason = "the output head, which is never pruned"
        elif not name.startswith(f"{blocks_name}."):
            reason = "outside the decoder blocks"
        elif id(parameter) in left_dense:
            reason = f"{LEFT_DENSE}{left_dense[id(parameter)]!r}"
        elif isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear | Conv1D):
            reason = "not reached by a forward pass, or shared with another module"
        else:
            reason = "not a linear layer"
        entries.append(Untouched(name, tuple(parameter.shape), reason))
    return tuple(entries)


def _left_dense(model: PreTrainedModel, sparsity: Sparsity) -> dict[int, str]:
    """Which weights are to stay dense, by their id, and the glob that says so."""
    modules = _pruned_modules(model).items()
    return {id(module.weight): sparsity.glob_of(name) for name, module in modules if sparsity.of(name) is None}


@torch.no_grad()
def find_groups(model: PreTrainedModel, sparsity: Sparsity | None = None) -> list[list[InputGroup]]:
    """The input groups of each block, found by one short forward and by the identity of the tensors that arrive; modules
    that `sparsity` leaves dense belong to none.

    The model is put into eval mode: dropout would split the groups.
    """
    model.eval()
    _, blocks = find_blocks(model)
    left_dense = _left_dense(model, sparsity) if sparsity is not None else {}
    seen: list[list[tuple[str, nn.Module, Tensor]]] = [[] for _ in blocks]
    everywhere = model.named_modules(remove_duplicate=False)
    owners = Counter(id(parameter) for _, module in everywhere for parameter in module.parameters(recurse=False))
    handles = []

    def record(i: int, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: seen[i].append((name, module, args[0]))

    for i, block in enumerate(blocks):
        for name, module in prunable(block).items():
            if owners[id(module.weight)] == 1 and id(module.weight) not in left_dense:
                handles.append(module.register_forward_pre_hook(record(i, name)))
    with _hooks(handles):
        model(input_ids=_short_text(model), use_cache=False)
    if not any(seen):
        raise ValueError(
            f"All linear layers of {type(model).__name__} are shared, or left dense; such models cannot be pruned yet."
        )
    return [_by_input(calls) for calls in seen]


def _by_input(calls: list[tuple[str, nn.Module, Tensor]]) -> list[InputGroup]:
    names = [name for name, _, _ in calls]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} runs more than once in one forward of its block; such models cannot be pruned yet.")
    groups: list[tuple[Tensor, list[tuple[str, nn.Module]]]] = []
    for name, module, x in calls:
        members = next((members for y, members in groups if y is x), None)
        if members is None:
            groups.append((x, [(name, module)]))
        else:
            members.append((name, module))
    return [InputGroup(tuple(n for n, _ in members), tuple(m for _, m in members)) for _, members in groups]


# --------------------------------------------------------------------------------- one block at a time


def brought(model_blocks: nn.ModuleList, device: torch.device) -> Iterator[nn.Module]:
    """The blocks one after the other, each moved to `device`; while one is worked on, the next is on its way."""
    if next(model_blocks.parameters()).device == device:
        yield from model_blocks
        return
    with ThreadPoolExecutor(1) as helper:
        coming = helper.submit(_copies, model_blocks[0], device)
        for i, block in enumerate(model_blocks):
            copies = coming.result()
            if i + 1 < len(model_blocks):
                coming = helper.submit(_copies, model_blocks[i + 1], device)
            for tensor, copy in copies:
                tensor.data = copy
                if device.type == "cuda":
                    copy.record_stream(torch.cuda.current_stream(device))  # it was made on another one
            yield block


def _copies(block: nn.Module, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    tensors = [*block.parameters(), *block.buffers()]
    if device.type != "cuda":
        return [(tensor, tensor.data.to(device)) for tensor in tensors]
    with torch.cuda.stream(torch.cuda.Stream(device)):
        copies = [(tensor, tensor.data.to(device)) for tensor in tensors]
        torch.cuda.current_stream(device).synchronize()  # only this thread waits
    return copies


def store(block: nn.Module, device: torch.device) -> None:
    """Moves a block back to where the model lives."""
    block.to(device)


def run(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """One forward of a block: hidden states `[samples, length, width]` in, the same out."""
    return _first(block(hidden, *call.args, **call.kwargs))


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def capture(
    model: PreTrainedModel, input_ids: Tensor, device: torch.device, count: int | None = None
) -> tuple[Tensor, list[Call]]:
    """Hidden states that enter the first block, and the `Call` of each block (or of the first `count`), for one
    micro-batch `[samples, length]`.

    Calls depend on the shape of the micro-batch, not on its content, so one capture serves all of a shape.
    """
    _, blocks = find_blocks(model)
    first: list[Tensor] = []
    calls: list[Call] = []

    def arrive(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not calls:
            first.append(args[0] if args else kwargs["hidden_states"])
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        calls.append(Call(_to(args[1:], device), _to(rest, device)))
        if len(calls) == (count or len(blocks)):
            raise _Stop

    with _hooks([block.register_forward_pre_hook(arrive, with_kwargs=True) for block in blocks]):
        _run_until_stopped(model, input_ids)
    return first[0].to(device), calls


def embed(model: PreTrainedModel, input_ids: Tensor, device: torch.device) -> Tensor:
    """Hidden states that enter the first block, `[samples, length, width]`."""
    return capture(model, input_ids, device, count=1)[0]


def enter(
    model: PreTrainedModel, input_ids: Tensor, micro_batch: int, device: torch.device
) -> tuple[list[Tensor], list[list[Call]]]:
    """For each micro-batch of `[samples, length]`: the hidden states that enter the first block, and each block's `Call`."""
    batches = list(input_ids.split(micro_batch))
    shapes = {len(batch): batch for batch in (batches[-1], batches[0])}
    calls = {size: capture(model, batch, device)[1] for size, batch in shapes.items()}
    return [embed(model, batch, device) for batch in batches], [calls[len(batch)] for batch in batches]


def _run_until_stopped(model: PreTrainedModel, input_ids: Tensor) -> None:
    try:
        model(input_ids=input_ids.to(model.get_input_embeddings().weight.device), use_cache=False)
    except _Stop:
        return
    raise AssertionError("the forward pass ended without reaching the decoder blocks")


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value
