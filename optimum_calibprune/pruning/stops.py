# SPDX-License-Identifier: Apache-2.0
"""What of a block is pruned: linear layers, grouped by the tensor that they read, and fused experts; a walk stops there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Input:
    """One Hessian's worth of a stop: its columns, the rows of all matrices that read it, the share of the tokens."""

    columns: int
    rows: int
    share: float = 1.0


@dataclass(frozen=True)
class InputGroup:
    """Modules of one block that read the same tensor and so share one Hessian, in the order in which they run."""

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]

    @property
    def gate(self) -> nn.Module:
        """Forwards wait before it."""
        return self.modules[0]

    @property
    def matrices(self) -> dict[str, Tensor]:
        """What is pruned here, `[outputs, inputs]`, by its name: views."""
        return {name: weight_of(module) for name, module in zip(self.names, self.modules, strict=True)}

    @property
    def columns(self) -> int:
        return weight_of(self.modules[0]).shape[1]

    @property
    def inputs(self) -> tuple[Input, ...]:
        return (Input(self.columns, sum(map(len, self.matrices.values()))),)

    @property
    def width(self) -> int:
        """Numbers that one token brings and takes along."""
        return sum(given.columns + given.rows for given in self.inputs)

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What a forward brings to the gate: `[samples, length, columns]`, or the same without the first two apart."""
        return args[0]


@dataclass(frozen=True)
class Experts:
    """A module that holds all experts of a block in tensors `[experts, ., .]`, as transformers fuses them.

    Each expert is two inputs: `first` reads what the router sends it, `last` reads `between(x)`. What of them is in
    `dense` stays so.
    """

    name: str
    module: nn.Module
    per_token: int
    dense: frozenset[str] = frozenset()

    @property
    def gate(self) -> nn.Module:
        """Forwards wait before it."""
        return self.module

    @property
    def count(self) -> int:
        return len(self.module.down_proj)

    @property
    def columns(self) -> int:
        return next(iter(self.first(0).values())).shape[1]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.matrices)

    @property
    def matrices(self) -> dict[str, Tensor]:
        """What is pruned here, `[outputs, inputs]`, by its name: views."""
        parts = (part for expert in range(self.count) for part in self.pruned(expert))
        return {name: W for part in parts for name, W in part.items()}

    @property
    def inputs(self) -> tuple[Input, ...]:
        share = min(1.0, self.per_token / self.count)
        parts = (list(part.values()) for expert in range(self.count) for part in self.pruned(expert))
        return tuple(Input(part[0].shape[1], sum(map(len, part)), share) for part in parts if part)

    @property
    def width(self) -> int:
        """Numbers that one token brings and takes along."""
        return 2 * self.columns

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What a forward brings to the gate: `[tokens, columns]`, and the experts of each token `[tokens, per token]`."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        index = next(tensor for tensor in tensors if not tensor.is_floating_point())
        return tensors[0].flatten(0, -2), index.flatten(0, -2)

    def pruned(self, expert: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is pruned of one expert's `first` and `last`, by its name in the block."""

        def chosen(matrices: dict[str, Tensor]) -> dict[str, Tensor]:
            named = {f"{self.name}.{expert}.{kind}": W for kind, W in matrices.items()}
            return {name: W for name, W in named.items() if name not in self.dense}

        return chosen(self.first(expert)), chosen(self.last(expert))

    def first(self, expert: int) -> dict[str, Tensor]:
        """The matrices `[outputs, inputs]` of one expert that read what it is sent: views, by name."""
        module = self.module
        if not hasattr(module, "gate_up_proj"):
            return {"up_proj": self._matrix(module.up_proj, expert)}
        both = self._matrix(module.gate_up_proj, expert)
        half = len(both) // 2
        gate, up = (both[:half], both[half:]) if module.is_concatenated else (both[::2], both[1::2])
        return {"gate_proj": gate, "up_proj": up}

    def last(self, expert: int) -> dict[str, Tensor]:
        """The matrix `[outputs, inputs]` of one expert that reads `between`: a view, by name."""
        return {"down_proj": self._matrix(self.module.down_proj, expert)}

    def between(self, expert: int, x: Tensor) -> Tensor:
        """What `last` reads `[tokens, inputs]` where `first` reads `x` `[tokens, columns]`, with the weights as they are."""
        module = self.module
        kind = "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"
        weight, bias = getattr(module, kind).data[expert], getattr(module, f"{kind}_bias", None)
        y = x @ weight if module.is_transposed else F.linear(x, weight)
        y = y if bias is None else y + bias.data[expert]
        return module._apply_gate(y) if kind == "gate_up_proj" else module.act_fn(y)

    def _matrix(self, parameter: Tensor, expert: int) -> Tensor:
        matrix = parameter.data[expert]
        return matrix.t() if self.module.is_transposed else matrix


Stop = InputGroup | Experts


def is_fused(module: nn.Module) -> bool:
    """Whether it is what `Experts` describes; the layout stands in attributes that transformers (5.8 and later) sets."""
    layout = all(isinstance(getattr(module, name, None), bool) for name in ("is_transposed", "is_concatenated"))
    return layout and matrices_of(module).keys() in ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"})


def fused(block: nn.Module) -> dict[str, nn.Module]:
    """The fused experts of one block, by their name inside it."""
    return {name: module for name, module in block.named_modules() if is_fused(module)}


def matrices_of(experts: nn.Module) -> dict[str, nn.Parameter]:
    """The tensors `[experts, ., .]` of fused experts."""
    return {key: parameter for key, parameter in experts.named_parameters(recurse=False) if parameter.ndim == 3}


def prunable(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of one block, by their name inside it; `nn.Linear`, its subclasses, and GPT-2's `Conv1D`.

    What decides instead of computing is no such layer: routers, and gates of a single output.
    """
    return {
        name: module
        for name, module in block.named_modules()
        if is_linear(module) and len(weight_of(module)) > 1 and not is_router(block, name)
    }


def is_linear(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Linear | Conv1D)
        and isinstance(module.weight, nn.Parameter)  # not where a parametrisation computes it anew at each access
        and module.weight.ndim == 2
        and module.weight.is_floating_point()
    )


def is_router(block: nn.Module, name: str) -> bool:
    """Whether a module's weight has as many rows as the fused experts beside it are many."""
    weight = block.get_submodule(name).weight
    return any(name.startswith(beside) and len(weight) == count for beside, count in _fused_beside(block))


def _fused_beside(block: nn.Module) -> list[tuple[str, int]]:
    """Of each module that fuses experts, what the names of its neighbours begin with, and how many experts it has."""
    return [(name.removesuffix(name.rpartition(".")[2]), len(each.down_proj)) for name, each in fused(block).items()]


def matrices_in(block: nn.Module) -> dict[str, Tensor]:
    """All that can be pruned in one block, `[outputs, inputs]`, by its name: views."""
    found = {name: weight_of(module) for name, module in prunable(block).items()}
    for name, module in fused(block).items():
        found |= Experts(name, module, per_token=1).matrices
    return found


def weight_of(module: nn.Module) -> Tensor:
    """The weight as `[outputs, inputs]`; a view, whichever way the module stores it."""
    weight = module.weight.data
    return weight.t() if isinstance(module, Conv1D) else weight


def matrix(model: PreTrainedModel, name: str) -> Tensor:
    """The weight `[outputs, inputs]` of a module, or of an expert's part such as `model.layers.0.mlp.experts.3.up_proj`."""
    parent, _, kind = name.rpartition(".")
    path, _, expert = parent.rpartition(".")
    if expert.isdigit() and is_fused(model.get_submodule(path)):
        experts = Experts(path, model.get_submodule(path), per_token=1)
        return (experts.first(int(expert)) | experts.last(int(expert)))[kind]
    return weight_of(model.get_submodule(name))
