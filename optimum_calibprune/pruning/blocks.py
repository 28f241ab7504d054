# SPDX-License-Identifier: Apache-2.0
"""A model's decoder blocks: find them and what in them can be pruned; run one block at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..records import LEFT_DENSE, Sparsity, SparsityPattern, Untouched
from .stops import (
    Experts,
    InputGroup,
    Stop,
    fused,
    is_fused,
    is_linear,
    is_router,
    matrices_in,
    matrices_of,
    matrix,
    prunable,
    weight_of,
)


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


def check_model(model: PreTrainedModel, sparsity: Sparsity | SparsityPattern, streamed: bool = False) -> None:
    """Raises `ValueError`, naming the module, for everything that would stop a walk half-way or leave weights out. Where
    the blocks are `streamed`, each is read once, and its weights are checked when its turn comes."""
    check_structure(model, sparsity)
    if not streamed:
        _check_weights(model)
    _check_replay(model)


def _check_weights(model: PreTrainedModel) -> None:
    home = next(model.parameters()).device
    for name, parameter in model.named_parameters():
        if parameter.is_meta or parameter.device != home:
            raise ValueError(
                f"{name} is on {parameter.device}: offloaded, or apart from the rest. Edits of it would be lost; load the "
                "model on one device, without device_map or offloading."
            )
    for name, parameter in _pruned_parameters(model).items():
        if not bool(parameter.isfinite().all()):
            raise damaged(name)


def damaged(name: str) -> ValueError:
    return ValueError(f"{name} holds NaN or infinity; the checkpoint is damaged.")


def _pruned_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    blocks_name, blocks = find_blocks(model)
    found = {}
    for i, block in enumerate(blocks):
        found |= {f"{blocks_name}.{i}.{name}.weight": module.weight for name, module in prunable(block).items()}
        for name, module in fused(block).items():
            found |= {f"{blocks_name}.{i}.{name}.{key}": tensor for key, tensor in matrices_of(module).items()}
    return found


def check_structure(model: PreTrainedModel, sparsity: Sparsity | SparsityPattern) -> None:
    """The part of `check_model` that needs no weights, for a model on the meta device."""
    check_config(model.config)
    pruned = _pruned_parameters(model)
    if not pruned:
        raise ValueError(f"The blocks of {type(model).__name__} hold no linear layer that can be pruned.")
    _check_whole(model, pruned)
    sparsity, matrices = Sparsity.parse(sparsity), _matrices(model)
    sparsity.check(matrices)
    for name, W in matrices.items():
        columns, pattern = W.shape[1], sparsity.of(name)
        if pattern is not None and pattern.m is not None and columns % pattern.m:
            raise ValueError(f"{name} has {columns} columns, which m = {pattern.m} of {pattern} does not divide.")


def _matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    """All that can be pruned, `[outputs, inputs]`, by its full name."""
    blocks_name, blocks = find_blocks(model)
    found = (
        (f"{blocks_name}.{i}.{name}", W) for i, block in enumerate(blocks) for name, W in matrices_in(block).items()
    )
    return dict(found)


def _check_whole(model: PreTrainedModel, pruned: dict[str, nn.Parameter]) -> None:
    """Raises where matrices would stay dense that are no linear layers but do their work: fused experts of another
    layout, or any other weights in which a block has more than in its linear layers."""
    blocks_name, blocks = find_blocks(model)
    left: dict[str, nn.Parameter] = {}
    for path, module in blocks.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{blocks_name}.{path}.{key}"
            if name in pruned or parameter.ndim < 2 or isinstance(module, nn.Conv1d):
                continue
            if parameter.ndim >= 3:
                raise ValueError(
                    f"{name} holds several matrices in one tensor of shape {tuple(parameter.shape)}, in a layout that is "
                    "not known. They cannot be pruned, and pruning the rest alone would leave much of the model dense."
                )
            left[name] = parameter
    size = sum(parameter.numel() for parameter in left.values())
    if size > sum(parameter.numel() for parameter in pruned.values()):
        largest = max(left, key=lambda name: left[name].numel())
        raise ValueError(
            f"Most weights of {type(model).__name__} are not in linear layers: {largest}, for example, of shape "
            f"{tuple(left[largest].shape)}. They cannot be pruned, and pruning the rest alone would leave the model dense."
        )


@torch.no_grad()
def _check_replay(model: PreTrainedModel) -> None:
    """Raises where blocks that run one by one, with the `Call`s of another text, do not give what the model gives."""
    model.eval()
    blocks_name, blocks = find_blocks(model)
    ids = _short_text(model)
    _, calls = capture(model, ids, ids.device)
    alone: list[Tensor] = []  # what each block gives by itself
    arrived: list[Tensor] = []
    busy = False

    def leave(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal busy
        if busy:
            return
        busy, i = True, len(alone)
        arrived.append(args[0] if args else kwargs["hidden_states"])
        if i < len(blocks) and block is blocks[i]:
            alone.append(run(block, arrived[i], calls[i]))
        if block is blocks[-1]:
            arrived.append(_first(output))
        busy = False

    with _hooks([block.register_forward_hook(leave, with_kwargs=True, prepend=True) for block in blocks]):
        model(input_ids=ids.flip(1), use_cache=False)
    for i in range(len(blocks)):
        in_order = len(arrived) == len(blocks) + 1 and len(alone) == len(blocks)
        if not in_order or not torch.allclose(alone[i], arrived[i + 1], equal_nan=True):
            raise ValueError(
                f"{blocks_name}.{i} cannot run by itself: it needs more than the hidden states of the block before it "
                "(token embeddings, or keys and values of other blocks), or runs more than once. Such models cannot be "
                "pruned yet."
            )


def _short_text(model: PreTrainedModel) -> Tensor:
    embeddings = model.get_input_embeddings()
    return torch.arange(8, device=embeddings.weight.device)[None] % embeddings.num_embeddings


def untouched(
    model: PreTrainedModel, groups: list[list[Stop]], sparsity: Sparsity | None = None
) -> tuple[Untouched, ...]:
    """Every matrix outside `groups`, and why it stays dense; `sparsity` says which of them were left out on purpose."""
    left_dense = _left_dense(model, sparsity) if sparsity is not None else {}
    pruned: set[int] = set()
    for stop in (stop for block in groups for stop in block):
        modules = [stop.module] if isinstance(stop, Experts) else stop.modules
        pruned |= {id(parameter) for module in modules for parameter in module.parameters()}
    others = [
        Untouched(name, tuple(parameter.shape), _why_untouched(model, name, parameter, left_dense))
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in pruned
    ]
    return (*others, *_experts_left_dense(model, groups, left_dense))


def _experts_left_dense(
    model: PreTrainedModel, groups: list[list[Stop]], left_dense: dict[str, str]
) -> Iterator[Untouched]:
    """Where some matrices of fused experts are pruned: those that are not."""
    blocks_name, _ = find_blocks(model)
    for i, block in enumerate(groups):
        for stop in block:
            for name in sorted(stop.dense) if isinstance(stop, Experts) else ():
                full = f"{blocks_name}.{i}.{name}"
                yield Untouched(full, tuple(matrix(model, full).shape), f"{LEFT_DENSE}{left_dense[full]!r}")


def _why_untouched(model: PreTrainedModel, name: str, parameter: nn.Parameter, left_dense: dict[str, str]) -> str:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    blocks_name, blocks = find_blocks(model)
    if embeddings is not None and parameter is embeddings.weight:
        return "embeddings, which are never pruned"
    if head is not None and parameter is getattr(head, "weight", None):
        return "the output head, which is never pruned"
    if not name.startswith(f"{blocks_name}."):
        return "outside the decoder blocks"
    owner = name.rpartition(".")[0]
    globs = [glob for full, glob in left_dense.items() if full == owner]
    number, _, path = owner.removeprefix(f"{blocks_name}.").partition(".")
    block = blocks[int(number)]
    module = block.get_submodule(path)
    if is_fused(module):
        globs = sorted({glob for full, glob in left_dense.items() if full.startswith(f"{owner}.")})
    if globs:
        return f"{LEFT_DENSE}{', '.join(map(repr, globs))}"
    if parameter is getattr(module, "weight", None) and is_router(block, path):
        return "a router, which is never pruned"
    if not isinstance(module, nn.Linear | Conv1D):
        return "not a linear layer"
    if is_linear(module) and len(weight_of(module)) == 1:
        return "a gate of one output, which is never pruned"
    return "not reached by a forward pass, or shared with another module"


def _left_dense(model: PreTrainedModel, sparsity: Sparsity) -> dict[str, str]:
    """The full names of the matrices that are to stay dense, and the glob that says so."""
    return {name: sparsity.glob_of(name) for name in _matrices(model) if sparsity.of(name) is None}


@torch.no_grad()
def find_groups(model: PreTrainedModel, sparsity: Sparsity | None = None) -> list[list[Stop]]:
    """The stops of each block: fused experts, and linear layers grouped by the identity of the tensors that arrive, found
    by one short forward; what `sparsity` leaves dense belongs to none.

    The model is put into eval mode: dropout would split the groups.
    """
    model.eval()
    blocks_name, blocks = find_blocks(model)
    left_dense = _left_dense(model, sparsity) if sparsity is not None else {}
    seen: list[list[_Seen]] = [[] for _ in blocks]
    everywhere = model.named_modules(remove_duplicate=False)
    owners = Counter(id(parameter) for _, module in everywhere for parameter in module.parameters(recurse=False))
    handles = []
    for i, block in enumerate(blocks):
        for name, module in (prunable(block) | fused(block)).items():
            alone = all(owners[id(parameter)] == 1 for parameter in module.parameters(recurse=False))
            if alone and f"{blocks_name}.{i}.{name}" not in left_dense:
                handles.append(module.register_forward_pre_hook(_record(seen[i], name), with_kwargs=True))
    with _hooks(handles):
        model(input_ids=_short_text(model), use_cache=False)
    for i, block in enumerate(blocks):
        for name in fused(block).keys() - {entry[0] for entry in seen[i]}:
            raise ValueError(
                f"{blocks_name}.{i}.{name} is not reached by a forward pass, or is shared with another block. Such experts "
                "cannot be pruned yet."
            )
    inside = [{name.removeprefix(f"{blocks_name}.{i}.") for name in left_dense} for i in range(len(blocks))]
    groups = [_by_input(calls, dense) for calls, dense in zip(seen, inside, strict=True)]
    if not any(groups):
        raise ValueError(
            f"All linear layers of {type(model).__name__} are shared, or left dense; such models cannot be pruned yet."
        )
    return groups


_Seen = tuple[str, nn.Module, Any]  # a module's name, itself, and what it was called with


def _record(seen: list[_Seen], name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((name, module, (args, kwargs) if is_fused(module) else args[0]))

    return called


def _by_input(calls: list[_Seen], dense: Collection[str]) -> list[Stop]:
    """The stops in the order in which a forward first comes to them; of experts, what is in `dense` stays so."""
    names = [name for name, _, _ in calls]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} runs more than once in one forward of its block; such models cannot be pruned yet.")
    groups: list[tuple[Any, list[tuple[str, nn.Module]]]] = []
    for name, module, x in calls:
        members = next((members for y, members in groups if y is x), None)
        if members is None:
            groups.append((x, [(name, module)]))
        else:
            members.append((name, module))
    stops = [_stop(*zip(*members, strict=True), x, dense) for x, members in groups]
    return [stop for stop in stops if stop.names]


def _stop(names: tuple[str, ...], modules: tuple[nn.Module, ...], called: Any, dense: Collection[str]) -> Stop:
    if not is_fused(modules[0]):
        return InputGroup(names, modules)
    _, index = Experts(names[0], modules[0], per_token=1).read(*called)
    left = frozenset(name for name in dense if name.startswith(f"{names[0]}."))
    return Experts(names[0], modules[0], per_token=index.shape[-1], dense=left)


# --------------------------------------------------------------------------------- one block at a time


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

    Calls depend on the shape of the micro-batch, not on its content, so one capture serves all of a shape. Nor do they depend on
    what blocks compute: of each class of them only the first one runs, and the others pass on what they are given.
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

    def leave(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for other in blocks:
            if type(other) is type(block) and not bypassed(other):
                other.forward = partial(_pass_on, output)

    if count == 1:
        blocks[0].forward = partial(_pass_on, None)  # it will not run
    handles = [block.register_forward_pre_hook(arrive, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    try:
        with _hooks(handles):
            _run_until_stopped(model, input_ids)
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
    return first[0].to(device), calls


def bypassed(block: nn.Module) -> bool:
    """Whether a block passes on what it is given, and so needs no weights."""
    return "forward" in vars(block)


def _pass_on(output: Any, *args: Any, **kwargs: Any) -> Any:
    """The hidden states that a block is given, in the form of the `output` of a block of its class."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return type(output)((hidden, *output[1:])) if isinstance(output, tuple | list) else hidden


def embed(model: PreTrainedModel, input_ids: Tensor, device: torch.device) -> Tensor:
    """Hidden states that enter the first block, `[samples, length, width]`."""
    return capture(model, input_ids, device, count=1)[0]


def enter(
    model: PreTrainedModel, input_ids: Tensor, micro_batch: int, device: torch.device
) -> tuple[Iterator[Tensor], list[list[Call]]]:
    """For each micro-batch of `[samples, length]`: the hidden states that enter the first block (computed when they are
    asked for), and each block's `Call`."""
    batches = list(input_ids.split(micro_batch))
    shapes = {len(batch): batch for batch in (batches[-1], batches[0])}
    calls = {size: capture(model, batch, device)[1] for size, batch in shapes.items()}
    return (embed(model, batch, device) for batch in batches), [calls[len(batch)] for batch in batches]


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
