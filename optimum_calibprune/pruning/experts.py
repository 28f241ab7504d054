# SPDX-License-Identifier: Apache-2.0
"""The experts of one block, pruned one after the other, each for the tokens that the router sends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from ..records import LayerReport
from .balance import Arrived, Balance
from .ranks import ALONE, Ranks
from .stops import Experts


Solve = Callable[[dict[str, Tensor], Arrived], Iterator[LayerReport]]  # prunes named matrices of one input in place


@dataclass
class Routed:
    """What each micro-batch brings to the experts of a block: one more copy of the hidden states, from which every
    expert's inputs are taken when its turn comes. So two Hessians at a time are enough, however many experts there are.
    """

    experts: Experts
    balance: Balance
    length: int
    x: list[Tensor] = field(default_factory=list)  # [tokens, columns] of each micro-batch
    index: list[Tensor] = field(default_factory=list)  # [tokens, experts of each token]

    def add(self, micro_batch: int, brought: tuple[Tensor, Tensor]) -> None:
        assert micro_batch == len(self.x)
        assert len(brought[0]) % self.length == 0, "every token of every sample comes to the experts"
        self.x.append(brought[0])
        self.index.append(brought[1])

    def tokens(self) -> list[int]:
        """How many tokens the router has sent to each expert."""
        chosen = torch.stack([torch.bincount(index.flatten(), minlength=self.experts.count) for index in self.index])
        return chosen.sum(dim=0)[: self.experts.count].tolist()

    def rows(self, expert: int, starved: bool, between: bool, micro_batch: int) -> tuple[Tensor, Tensor]:
        """Inputs `[tokens, columns]` of one expert (of its `last` where `between`), in the order of the tokens, and the
        position in the micro-batch of the sample that each token is from; all tokens where it is `starved`."""
        x, index = self.x[micro_batch], self.index[micro_batch]
        mine = torch.arange(len(x), device=x.device)
        if not starved:
            mine = (index == expert).any(dim=1).nonzero().squeeze(1)
            x = x[mine]
        return self.experts.between(expert, x) if between else x, mine // self.length

    def arrive(self, expert: int, starved: bool, between: bool) -> Arrived:
        """The Hessians of an expert's first input, or of the one behind it."""
        rows = partial(self.rows, expert, starved, between)
        columns = _columns(self.experts.last(expert) if between else self.experts.first(expert))
        arrived = Arrived(self.balance, self.balance.empty(columns, self.x[0].device), rows)
        for micro_batch in range(len(self.x)):
            arrived.add_rows(micro_batch, *rows(micro_batch))
        return arrived

    def solve_in_turn(
        self,
        solve: Solve,
        *,
        dense: bool,
        ask: Callable[[str], None] = lambda name: None,
        ranks: Ranks = ALONE,
    ) -> Iterator[LayerReport]:
        """Prunes every expert: what reads its inputs first, then what reads the result, of the pruned weights or, as the
        two-pass scheme has it, of the `dense` ones. `ask` is told the name of each expert before its turn.

        Of several `ranks` each solves one expert of a round, for what all of them were sent.
        """
        counts = torch.tensor([*self.tokens(), sum(map(len, self.x))], device=self.x[0].device)
        ranks.add_up(counts)
        *sent, total = counts.tolist()
        for start in range(0, self.experts.count, ranks.size):
            turn = range(start, min(start + ranks.size, self.experts.count))
            for expert in turn:
                ask(f"{self.experts.name}.{expert}")
            wanted = [part for part in range(2) if any(self.experts.pruned(expert)[part] for expert in turn)]
            before = {part: self._own(turn, part, sent, total, ranks) for part in wanted} if dense else {}
            reports: list[LayerReport] = []
            for part in wanted:
                arrived = before.pop(part) if dense else self._own(turn, part, sent, total, ranks)
                if ranks.rank < len(turn) and arrived is not None:
                    own = turn[ranks.rank]
                    starved = self._starved(own, part, sent, total)
                    found = solve(self.experts.pruned(own)[part], arrived)
                    reports += [replace(report, routed=sent[own], starved=starved) for report in found]
                del arrived  # before the next one takes its room
                for owner, expert in enumerate(turn):
                    for W in self.experts.pruned(expert)[part].values():
                        ranks.send(W, source=owner)
            for of_rank in ranks.everywhere(reports):
                yield from of_rank

    def _own(self, turn: range, part: int, sent: list[int], total: int, ranks: Ranks) -> Arrived | None:
        """Of the experts in `turn` that of this rank: what all ranks bring to its first input, or to the one behind it."""
        own = None
        for owner, expert in enumerate(turn):
            if not self.experts.pruned(expert)[part]:
                continue
            arrived = self.arrive(expert, self._starved(expert, part, sent, total), between=part == 1)
            for hessian in arrived.hessians:
                hessian.add_up(ranks, to=owner)
            own = arrived if owner == ranks.rank else own
        return own

    def _starved(self, expert: int, part: int, sent: list[int], total: int) -> bool:
        matrices = self.experts.last(expert) if part else self.experts.first(expert)
        return sent[expert] < least_tokens(total, _columns(matrices))


def _columns(matrices: dict[str, Tensor]) -> int:
    return next(iter(matrices.values())).shape[1]


def least_tokens(total: int, columns: int) -> int:
    """With fewer of the layer's `total` tokens than this, an input of an expert is starved: with fewer than it has columns,
    since its Hessian then says nothing of some directions; but where all tokens together are hardly more, they help no
    better, and one's own are enough. `docs/log.md` has the numbers."""
    return columns if total >= 2 * columns else 1
